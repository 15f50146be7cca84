"""Running token sequences through language models, for the activations at their hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.settings import HarvestConfig
from sae_jax.types import UsageError

Hooks = tuple[Any, ...]  # lm.Hook each; of a torch model str


def read_hooks(
    model: lm.LanguageModel | lm.TorchModel, ids_BT: jax.Array | np.ndarray, hooks: Hooks, dtype: str
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Activations {name: dtype[B, T, D]} with heads joined, and their norms f32[B, T, S]."""
    if isinstance(model, lm.TorchModel):
        return model.read(ids_BT, hooks, dtype)
    return _read_hooks(model, ids_BT, hooks, dtype)


@partial(jax.jit, static_argnames=("hooks", "dtype"))
def _read_hooks(model: lm.LanguageModel, ids_BT: jax.Array, hooks: tuple[lm.Hook, ...], dtype: str):
    acts = lm.run(model, ids_BT, capture=hooks, logits=False).acts
    flat = {str(hook): meshes.reshape(acts[hook], *ids_BT.shape, -1) for hook in hooks}
    norm_BTS = jnp.stack([jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in flat.values()], -1)
    return {name: x.astype(dtype) for name, x in flat.items()}, norm_BTS


def hook_of(text: str, model: lm.LanguageModel | lm.TorchModel) -> Any:
    """The hook of a model that `text` names. UsageError if there is none."""
    return model.check_hook(text) if isinstance(model, lm.TorchModel) else lm.parse_hook(text, model.spec)


def hooks_of(config: HarvestConfig, model: lm.LanguageModel | lm.TorchModel) -> dict[Any, int]:
    """{hook: width} of these settings.

    Raises UsageError for a hook that the model lacks, or a context that it has no room for.
    """
    hooks = tuple(hook_of(text, model) for text in config.hooks)
    if len(set(hooks)) < len(hooks):
        raise UsageError(f"harvest.hooks names a hook twice: {', '.join(config.hooks)}")
    n_context = model.spec.n_context
    if n_context is not None and config.context > n_context:
        raise UsageError(f"harvest.context={config.context} exceeds the model's {n_context} positions")
    if isinstance(model, lm.TorchModel):
        return model.widths(hooks, config.context)
    return {hook: lm.hook_width(model.spec, hook) for hook in hooks}


def source_name(model: str, hook: lm.Hook | str) -> str:
    """Name of a source: of a set of one model that of the hook."""
    return f"{model}.{hook}" if model else str(hook)


class Forward:
    """Runs sequences through the models on the devices of a mesh, one batch ahead of the one being fetched."""

    def __init__(
        self, models: Mapping[str, lm.LanguageModel | lm.TorchModel], config: HarvestConfig, mesh: jax.sharding.Mesh
    ) -> None:
        self._mesh, self._models = mesh, models
        self._hooks = {name: tuple(hook_of(text, model) for text in config.hooks) for name, model in models.items()}
        self._dtype = config.dtype
        n_copies = mesh.size // config.split
        self.batch = max(config.batch_tokens // config.context // n_copies, 1) * n_copies  # sequences

    def __call__(self, ids_ST: np.ndarray) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """({name: [b, T, D]}, norms [b, T, hooks]) block by block, on the host."""
        queued: tuple[int, Any] | None = None
        for first in range(0, len(ids_ST), self.batch):
            ids_BT = ids_ST[first : first + self.batch]
            n = len(ids_BT)
            # A short last batch is filled up: another shape would compile the model again.
            ids_BT = np.concatenate([ids_BT, np.zeros((self.batch - n, ids_BT.shape[1]), np.int32)])
            with jax.set_mesh(self._mesh):
                placed = jax.device_put(ids_BT, meshes.sharding(self._mesh, meshes.lm_rows(self._mesh)))
                result = [
                    read_hooks(model, placed, self._hooks[name], self._dtype) for name, model in self._models.items()
                ]
            if queued is not None:
                yield self._fetch(*queued)
            queued = (n, result)
        if queued is not None:
            yield self._fetch(*queued)

    def _fetch(self, n: int, result: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        acts, norms = zip(*jax.device_get(result), strict=True)
        blocks = {
            source_name(name, hook): x_BTD[:n]
            for name, of_model in zip(self._models, acts, strict=True)
            for hook, x_BTD in of_model.items()
        }
        return blocks, np.concatenate(norms, axis=-1)[:n]
