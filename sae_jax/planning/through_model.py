"""What the language model takes in a run whose dictionary is trained through it (saes/end_to_end.py).

A step runs the model once as it is, which gives the rows to learn from, and once more from the hook on, with the
reconstruction in their place and gradients back to it. Parameters are constants, whole on every device, in float32.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from sae_jax import lm, storage
from sae_jax import mesh as meshes
from sae_jax.activations.sequences import model_rows
from sae_jax.lm import params
from sae_jax.ops import tuning
from sae_jax.planning.forward import block_flop
from sae_jax.types import UsageError

FLOAT32 = 4  # bytes
# Numbers that a token keeps until its gradient is there: so many times D, M and the scores of attention in each block
# after the hook, D before it, and V. Fitted to the peaks of steps of GPT-2 small and relatives of it, compiled for an
# H200 and a v5p; they are within 20 %.
BLOCK_D, BLOCK_M, BLOCK_SCORES, BEFORE_D, LOGITS = 4, 6, 3, 16, 2


@dataclass(frozen=True)
class ThroughModel:
    """A language model, the hook whose activations are replaced, and how it is used."""

    spec: lm.Spec
    hook: lm.Hook
    context: int  # tokens of a sequence
    later: bool = False  # whether later layers are compared, too

    def __post_init__(self) -> None:
        if self.context > self.spec.n_context:
            raise UsageError(f"harvest.context={self.context} exceeds the model's {self.spec.n_context} positions")

    @property
    def parameter_bytes(self) -> int:
        """On every device."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params.abstract(self.spec)))

    @property
    def n_blocks_after(self) -> int:
        """Blocks that run a second time."""
        return self.spec.n_layers - self.hook.layer - (self.hook.point == "resid_post")

    @property
    def token_bytes(self) -> int:
        """An estimate of the activations that a token keeps until its gradient is there."""
        spec = self.spec
        block = BLOCK_D * spec.d_model + BLOCK_M * spec.d_mlp + BLOCK_SCORES * spec.n_heads * self.context
        later = self.later * self.n_blocks_after * spec.d_model
        return FLOAT32 * (BEFORE_D * spec.d_model + self.n_blocks_after * block + later + LOGITS * spec.n_vocab)

    @property
    def token_flop(self) -> int:
        """Of the products of both passes and of the gradient with respect to activations."""
        unembed = 2 * self.spec.d_model * self.spec.n_vocab
        n_blocks = self.spec.n_layers + 2 * self.n_blocks_after
        return n_blocks * block_flop(self.spec, self.context) + 3 * unembed

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {"spec": asdict(self.spec), "hook": list(self.hook), "context": self.context, "later": self.later}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ThroughModel:
        """The inverse of `to_json`."""
        return cls(
            storage.as_type(values["spec"], lm.Spec, "the language model's sizes"),
            lm.Hook(*values["hook"]),
            values["context"],
            values["later"],
        )

    def lower(
        self, step: Any, state: Any, hparams: Any, batch_size: int, mesh: Mesh | AbstractMesh
    ) -> jax.stages.Lowered:
        """A training step with the pass of the model before it, traced as one program."""

        def both(state: Any, hparams: Any, model: lm.LanguageModel, ids_ST: jax.Array, keep_ST: jax.Array) -> Any:
            return step(state, hparams, model_rows(model, ids_ST, keep_ST, hook=self.hook, later=self.later))

        rows, shape = meshes.sharding(mesh, meshes.ROWS), (batch_size // self.context, self.context)
        ids_ST, keep_ST = (jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_))
        parameters = jax.tree.map(
            lambda p, place: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place),
            *(params.abstract(self.spec), params.shardings(self.spec, mesh)),
        )
        model = lm.LanguageModel(parameters, self.spec)
        return tuning.jit(both, donate_argnums=0).trace(state, hparams, model, ids_ST, keep_ST).lower()


def check_batch(model: ThroughModel, batch_size: int, n_devices: int) -> None:
    """Refuse a batch that is no whole number of sequences a device, as training does."""
    unit = model.context * n_devices
    if batch_size % unit:
        raise UsageError(
            f"train.batch_size={batch_size} must be whole sequences of {model.context} tokens, equally many on each of "
            f"{n_devices} devices; use {max(round(batch_size / unit), 1) * unit}"
        )
