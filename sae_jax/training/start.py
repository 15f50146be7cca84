"""A run that begins with the weights of a dictionary: fine-tuning, of ours or of one that was imported.

Users load a dictionary for rows as they are. A run scales its rows by constants of its own set, and keeps decoder rows
at norm 1, so the weights are taken to these units: what `AbstractSae.folded` does, backwards. Moments and counters are
new, and so is the order of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sae_jax.progress import say_once
from sae_jax.record import Record
from sae_jax.saes.base import AbstractSae, SaeConfig
from sae_jax.saes.normalise import PER_VECTOR, Scale
from sae_jax.training.state import TrainState
from sae_jax.types import UsageError

UNIFORM = 1e-4  # share by which lengths of rows may differ and still be one length
# Settings of variants that say what is computed, not how it is learnt. Another k is a choice.
COMPUTED = ("activation", "skip", "pre_bias", "mask", "window", "decoder_norm")


class Start(NamedTuple):
    """The dictionary that a run begins with."""

    name: str  # as the user wrote it
    read: Callable[[], tuple[AbstractSae, Record]]  # called once, when a run has no checkpoint yet


def started(state: TrainState, start: Start, scale: Scale, run: Record) -> TrainState:
    """The state before the first step, with the weights of a dictionary in the place of random ones.

    Args:
        state: at rest, on the mesh in use.
        start: the dictionary.
        scale: the constants of the run.
        run: the record of what is trained.

    Raises:
        UsageError: the dictionary is of another variant, width or number of latents, or computes something else.
    """
    with jax.set_mesh(_one_device(jax.sharding.get_mesh())):
        sae, record = start.read()
        check(start.name, sae, record, state.sae.config, run)
        sae = _in_units_of(jax.tree.map(np.asarray, sae), scale, start.name)
        weights = replace(jax.tree.map(np.asarray, sae), config=state.sae.config)  # pyrefly: ignore[bad-specialization]

    def put(leaf: jax.Array, value: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda part: value[part].astype(leaf.dtype))

    return replace(state, sae=jax.tree.map(put, state.sae, weights))


def check(name: str, sae: AbstractSae, record: Record, config: SaeConfig, run: Record) -> None:
    """Refuse a dictionary that this run cannot begin with."""
    theirs: dict[str, Any] = {"sae.variant": record.variant, "widths": _told(record)}
    ours: dict[str, Any] = {"sae.variant": run.variant, "widths": _told(run)}
    if record.variant == run.variant:
        settings = ("n_latents", *(each for each in COMPUTED if hasattr(config, each)))
        theirs |= {f"sae.{each}": getattr(sae.config, each) for each in settings}
        ours |= {f"sae.{each}": getattr(config, each) for each in settings}
        norms = sae.config.input_norm, config.input_norm
        if norms[0] != norms[1] and not set(norms).isdisjoint(PER_VECTOR):
            theirs["sae.input_norm"], ours["sae.input_norm"] = norms
    for key, value in theirs.items():
        if value != ours[key]:
            raise UsageError(
                f"--init-from={name}: it has {key}={value}, and this run {ours[key]}; they must be the same"
            )
    hooks = [[source.hook for source in each.encodes + each.reconstructs if source.hook] for each in (record, run)]
    if all(hooks) and hooks[0] != hooks[1]:
        say_once(f"--init-from={name}: it is for {', '.join(hooks[0])}, and this run for {', '.join(hooks[1])}")


def _in_units_of(sae: AbstractSae, scale: Scale, name: str) -> AbstractSae:
    """The same dictionary for rows that are multiplied by `scale`, with rows of the length that training keeps."""
    sae = sae.unfolded(jax.tree.map(np.asarray, scale))
    if (lengths_F := sae.row_lengths) is None:
        return sae
    lengths_F = np.asarray(lengths_F, np.float64)
    lengths_F = np.where(lengths_F > 0, lengths_F, 1.0)
    usual = float(np.median(lengths_F))
    if np.abs(lengths_F / usual - 1).max() <= UNIFORM:
        lengths_F = np.full_like(lengths_F, usual)
    elif sae.config.n_active is not None:
        say_once(
            f"--init-from={name}: its decoder rows have norms from {lengths_F.min():.3g} to {lengths_F.max():.3g}, and "
            f"training keeps them at one; latents become as much larger, so others may be the k strongest"
        )
    return _with_unit_rows(sae, lengths_F.astype(np.float32))


def _with_unit_rows(sae: AbstractSae, lengths_F: np.ndarray) -> AbstractSae:
    """Decoder rows divided by their lengths, and all that decides how large their latents are multiplied by them."""
    arrays: dict[str, Any] = {"w_enc": sae.w_enc * lengths_F[:, None], "w_dec": sae.w_dec / lengths_F[:, None]}
    for each in ("b_enc", "b_gate"):
        if hasattr(sae, each):
            arrays[each] = getattr(sae, each) * lengths_F
    fields = sae.__dataclass_fields__  # type: ignore[attr-defined]
    if "threshold" in fields:
        arrays["threshold"] = sae.threshold * np.median(lengths_F)  # type: ignore[attr-defined]
    if getattr(sae, "log_threshold", None) is not None:
        arrays["log_threshold"] = sae.log_threshold + jnp.log(lengths_F)  # type: ignore[attr-defined]
    return replace(sae, **arrays)  # type: ignore[type-var]


def _one_device(mesh: Mesh) -> Mesh:
    """A mesh of the same axes: a dictionary that is read lies on the host, if the CPU is a device of JAX."""
    try:
        (device, *_) = jax.local_devices(backend="cpu")
    except RuntimeError:
        (device, *_) = mesh.local_devices
    return Mesh(np.array(device).reshape((1,) * len(mesh.axis_names)), mesh.axis_names, axis_types=mesh.axis_types)


def _told(record: Record) -> str:
    x, y = ("+".join(map(str, side)) for side in record.widths)
    return x if x == y else f"{x} to {y}"
