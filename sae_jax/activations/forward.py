"""Running token sequences through language models, for the activations at their hooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.rows import encode_on_device
from sae_jax.activations.settings import HarvestConfig
from sae_jax.types import UsageError

Block: TypeAlias = tuple[dict[str, np.ndarray], np.ndarray]  # ({source: [b, T, width]}, norms f32[b, T, hooks])
Hooks: TypeAlias = tuple[Any, ...]  # lm.Hook each; of a torch model str


def read_hooks(
    model: lm.LanguageModel | lm.TorchModel, ids_BT: jax.Array | np.ndarray, hooks: Hooks, dtype: str
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Activations {name: [B, T, width]} with heads joined, as stored in `dtype` (rows.py); their norms f32[B, T, S]."""
    if not isinstance(model, lm.TorchModel):
        return activations_at(model, ids_BT, hooks, dtype)
    acts, norm_BTS = model.read(ids_BT, hooks, "float32" if dtype == "int8" else dtype)
    return {name: encode_on_device(x, dtype) for name, x in acts.items()}, norm_BTS


@partial(jax.jit, static_argnames=("hooks", "dtype"))
def activations_at(model: lm.LanguageModel, ids_BT: jax.Array, hooks: tuple[lm.Hook, ...], dtype: str):
    """What `read_hooks` gives of a model that JAX runs."""
    acts = lm.run(model, ids_BT, capture=hooks, logits=False).acts
    flat = {str(hook): meshes.reshape(acts[hook], *ids_BT.shape, -1) for hook in hooks}
    norm_BTS = jnp.stack([jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in flat.values()], -1)
    return {name: encode_on_device(x, dtype) for name, x in flat.items()}, norm_BTS


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


def batch_sequences(config: HarvestConfig, n_devices: int) -> int:
    """Sequences of one forward pass, equally many for each copy of the model."""
    n_copies = n_devices // config.split
    return max(config.batch_tokens // config.context // n_copies, 1) * n_copies


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
        self.batch = batch_sequences(config, mesh.size)
        self.is_compiled = config.backend == "torch"  # which has nothing to compile
        self._looked_at: tuple[np.ndarray, Any] | None = None

    def look(self, ids_BT: np.ndarray) -> np.ndarray:
        """Norms [b, T, hooks] of at most a batch of sequences. If they are what comes next, they are not run again."""
        result = self._start(ids_BT)
        self._looked_at = ids_BT, result
        return self._fetch(result)[1][: len(ids_BT)]

    def __call__(self, arrays: Iterable[np.ndarray]) -> Iterator[Block]:
        """Blocks of arrays i32[S, T] of sequences, on the host, in their order; a batch goes on with the next array."""
        queued: tuple[list[int], Any] | None = None
        for parts in _batches(arrays, self.batch):
            ids_BT, (looked_at, result) = np.concatenate(parts), self._looked_at or (None, None)
            self._looked_at = None
            if looked_at is None or not np.array_equal(looked_at, ids_BT):
                result = self._start(ids_BT)
            if queued is not None:
                yield from self._blocks(*queued)
            queued = [len(part) for part in parts], result
        if queued is not None:
            yield from self._blocks(*queued)

    def _start(self, ids_BT: np.ndarray) -> Any:
        self.is_compiled = True
        # A short batch is filled up: another shape would compile the model again.
        ids_BT = np.concatenate([ids_BT, np.zeros((self.batch - len(ids_BT), ids_BT.shape[1]), np.int32)])
        with jax.set_mesh(self._mesh):
            placed = jax.device_put(ids_BT, meshes.sharding(self._mesh, meshes.lm_rows(self._mesh)))
            return [read_hooks(model, placed, self._hooks[name], self._dtype) for name, model in self._models.items()]

    def _blocks(self, lengths: list[int], result: Any) -> Iterator[Block]:
        acts, norm_BTS = self._fetch(result)
        for n in lengths:
            yield {name: x_BTD[:n] for name, x_BTD in acts.items()}, norm_BTS[:n]
            acts, norm_BTS = {name: x_BTD[n:] for name, x_BTD in acts.items()}, norm_BTS[n:]

    def _fetch(self, result: Any) -> Block:
        acts, norms = zip(*jax.device_get(result), strict=True)
        by_source = {
            source_name(name, hook): x_BTD
            for name, of_model in zip(self._models, acts, strict=True)
            for hook, x_BTD in of_model.items()
        }
        return by_source, np.concatenate(norms, axis=-1)


def _batches(arrays: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Batches of `size` sequences, the last of them smaller, each as the parts of arrays that it is made of."""
    parts, room = [], size
    for ids_ST in arrays:
        while len(ids_ST):
            parts.append(ids_ST[:room])
            ids_ST, room = ids_ST[room:], room - len(parts[-1])
            if not room:
                yield parts
                parts, room = [], size
    if parts:
        yield parts
