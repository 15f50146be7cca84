"""A dictionary on disk, and in the hand: `sae_jax.load`, `sae_jax.save`.

    DIR/dictionary.safetensors    the arrays, float32, under their names: w_enc, b_enc, w_dec, b_dec, ...
    DIR/dictionary.json           the record: what it is, what it was trained on, how it measures; digest of the arrays

A dictionary can be loaded from such a folder, from a run that `sae-jax train` made, or from a member of one. What users
load takes rows as they are: the constants of a dataset's scaling are folded into the weights, and decoder rows have
norm 1 where the variant says so, in whatever form training keeps them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from sae_jax import config as configs
from sae_jax import mesh, storage
from sae_jax.record import Normalisation, Origin, Record, RunRecord, SourceRecord, program
from sae_jax.saes import base, init
from sae_jax.saes.base import AbstractSae, Constants, Counters, SaeConfig
from sae_jax.saes.normalise import PER_VECTOR, Scale
from sae_jax.storage import AnyPath, digests
from sae_jax.storage.digests import FileDigest
from sae_jax.training import checkpoint
from sae_jax.training.quantise import WEIGHT, dequantise, zeros_like_moments
from sae_jax.training.state import TrainState, initial_weights, placed
from sae_jax.types import Code, UsageError, UserError, Widths, check_indices

ARRAYS, RECORD = "dictionary.safetensors", "dictionary.json"
UNIT_TOLERANCE = 1e-4  # of the norm of a decoder row


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sparse dictionary with its record. Arrays and methods of the SAE are had under their names, as `d.w_dec`."""

    sae: AbstractSae  # plain arrays on the default device, no mesh
    record: Record

    def encode(self, x: Any) -> Code:
        """See AbstractSae.encode."""
        return self.sae.encode(x)

    def decode(self, code: Code) -> jax.Array:
        """See AbstractSae.decode. UserError for a latent that the dictionary does not have; NaN in a traced call."""
        n_latents = self.sae.w_dec.shape[0]
        check_indices(code.indices, n_latents, "latent", "give a code of this dictionary")
        if isinstance(code.indices, jax.core.Tracer):  # JAX would read the last latent instead
            is_there = (code.indices >= 0) & (code.indices < n_latents)
            code = Code(code.indices, jnp.where(is_there, code.values, jnp.nan))
        return self.sae.decode(code)

    def __call__(self, x: Any) -> jax.Array:
        """Reconstruction of rows, see AbstractSae."""
        return self.sae(x)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that `sae_jax.load` reads. Raises UsageError if there is something at `path`."""
        save(self.sae, path, record=self.record)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for these before there is an sae
            raise AttributeError(name)
        return getattr(self.sae, name)

    def __repr__(self) -> str:
        record, (n_latents, _) = self.record, self.sae.w_enc.shape
        k = self.sae.config.n_active
        lines = [f"Dictionary: {record.variant}, {n_latents:,} latents" + (f", k={k}" if k else "")]
        for what, sources in (("encodes", record.encodes), ("reconstructs", record.reconstructs)):
            if what == "encodes" or sources != record.encodes:
                lines.append(f"  {what:13}" + ", ".join(_told(source) for source in sources))
        if record.steps:
            where = f" of {record.data.path}" if record.data and record.data.path else ""
            lines.append(f"  {'trained':13}{record.steps:,} steps, {record.tokens:,} tokens{where}")
        if origin := record.origin:
            norms = "" if origin.unit_rows else "; decoder rows keep their norms"
            what = "from" if origin.format == "sae_jax" else "imported"
            lines.append(f"  {what:13}{origin.place} ({origin.format}){norms}")
        if record.metrics:
            lines.append(f"  {'measured':13}" + ", ".join(f"{n} {value:.4g}" for n, value in record.metrics.items()))
        return "\n".join(lines)


def load(path: str | os.PathLike[str], ema: bool = False) -> Dictionary:
    """A dictionary from a folder that `save` wrote, a run, or a member of a run.

    Args:
        path: the folder; of a run, the newest checkpoint is taken.
        ema: the averaged weights of a run instead of the live ones.

    Raises:
        UserError: nothing there, no checkpoint yet, a damaged file, or a record of another version.
        UsageError: averages asked of what has none.
    """
    folder = storage.path(path)
    described = read_record(folder)
    if described is None:
        return _from_run(folder, ema)
    record, expected = described
    if ema and record.weights != "average":
        raise UsageError(f"{folder}: holds the live weights, no average; load it without ema")
    sae_config = config_of(record, folder / RECORD)
    with storage.on_disk(folder / ARRAYS, expected.size) as path:
        with storage.open_safetensors(path) as file:
            sae = _read_arrays(file, folder / ARRAYS, _abstract(sae_config, record.widths))
        digests.check_file(path, expected)
    return Dictionary(sae, record)


def read_record(folder: AnyPath) -> tuple[Record, FileDigest] | None:
    """The record of a saved dictionary and the digest of its arrays; None if there is none in the folder."""
    content = storage.read_json(folder / RECORD)
    if content is None:
        return None
    expected = storage.as_type(content.pop("arrays", None), FileDigest, f"{folder / RECORD}: arrays")
    return Record.from_json(content, folder / RECORD), expected


def write_record(folder: Path, record: Record) -> None:
    """Write the record of the arrays that lie in a folder. They are part of it from here on: see `load`."""
    arrays = msgspec.to_builtins(digests.of_file(folder / ARRAYS))
    storage.write_json(folder / RECORD, {**record.to_json(), "arrays": arrays})


def shapes(config: SaeConfig, widths: Widths) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a dictionary, by name."""
    return {name: array.shape for name, array in arrays_of(_abstract(config, widths)).items()}


def digest_of(sae: AbstractSae) -> str:
    """Of a dictionary's arrays and settings: another one has another."""
    digest = xxhash.xxh3_64(repr(sae.config).encode())
    for path, leaf in jax.tree.leaves_with_path(sae):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def save(sae: AbstractSae, path: str | os.PathLike[str], record: Record | None = None) -> None:
    """Write a dictionary as a folder, whole and durable.

    Args:
        sae: for rows as they are; its arrays are stored as float32, to the bit.
        path: where there is nothing yet.
        record: where it comes from; by default what the arrays and the config say.

    Raises:
        UsageError: something is at `path`, or it is at S3 and the arrays are more than 5 GiB; the record is of another
            dictionary, or decoder rows do not have norm 1 though the variant says so.
    """
    arrays = arrays_of(sae)
    storage.refuse_large(path, 4 * sum(array.size for array in arrays.values()))
    record = record_of(sae) if record is None else record
    if record.variant != sae.config.variant or config_of(record, storage.path(path) / RECORD) != sae.config:
        raise UsageError(f"the record is of a {record.variant} with other settings than this dictionary; leave it out")
    if sae.config.UNIT_DECODER and (record.origin is None or record.origin.unit_rows):
        norms_F = np.linalg.norm(np.asarray(sae.w_dec, np.float64), axis=1)
        off = float(np.abs(norms_F[norms_F > 0] - 1).max(initial=0.0))
        if off > UNIT_TOLERANCE:
            raise UsageError(
                f"decoder rows have norms up to {off:.2g} away from 1, which those of a {record.variant} have; divide "
                f"w_dec by them and multiply w_enc and b_enc"
            )
    floats = {name: np.asarray(array, np.float32, order="C") for name, array in arrays.items()}
    with storage.new_folder(path) as folder:
        storage.write_safetensors(folder / ARRAYS, floats)
        write_record(folder, record)


def record_of(sae: AbstractSae) -> Record:
    """What a dictionary that was made by hand says of itself."""
    widths = getattr(sae, "widths", None) or Widths((sae.w_enc.shape[1],), (sae.w_dec.shape[1],))
    names = [
        [f"{side}{i}" if len(part) > 1 else side for i in range(len(part))]
        for side, part in zip("xy", widths, strict=True)
    ]
    encodes, reconstructs = (tuple(map(SourceRecord, side, part)) for side, part in zip(names, widths, strict=True))
    return Record(
        variant=sae.config.variant,
        sae=configs.to_dict(sae.config),
        encodes=encodes,
        reconstructs=encodes if widths.x == widths.y else reconstructs,
        normalisation=Normalisation(sae.config.input_norm, is_folded=sae.config.input_norm not in PER_VECTOR),
        data=None,
        steps=0,
        tokens=0,
        weights="live",
        metrics={},
        program=program(),
    )


def from_state(state: TrainState, record: RunRecord, ema: bool = False) -> Dictionary:
    """The dictionary that a state in training stands for, on the default device of every process of the job."""
    parts = (dequantise(state.average) if ema else state.sae, state.constants.scale, state.counters.silent)
    if jax.process_count() > 1:
        parts = multihost_utils.process_allgather(parts, tiled=True)
    weights, scale, silent = jax.device_get(parts)
    weights, scale = jax.tree.map(jnp.asarray, (weights, scale))
    dead = float((silent > record.train["dead_after_tokens"]).mean())
    return _folded(weights, scale, record, int(state.step), dead, ema)


def _from_run(run: AnyPath, ema: bool) -> Dictionary:
    record = checkpoint.read_record(run)
    if ema and not record.train["ema"]:
        raise UsageError(f"{run}: train.ema was 0, so the run kept no averaged weights; load it without ema")
    where, name = checkpoint.newest(run)
    with checkpoint.Checkpoints(where, writes=False) as checkpoints:
        if checkpoints.latest is None:
            raise UserError(f"{run}: no complete checkpoint yet; let training reach train.checkpoint_every steps")
        target = _abstract_parts(config_of(record.dictionary, run / "config.json"), record)
        names = ("average" if ema else "sae", "counters", "run")
        parts = {checkpoint.part_name(name, part): target[part] for part in names}
        step, tree = checkpoints.read(parts)
    weights, counters, at = (tree[checkpoint.part_name(name, part)] for part in names)
    dead = float((np.asarray(counters.silent) > record.train["dead_after_tokens"]).mean())
    return _folded(dequantise(weights), at["constants"].scale, record, step, dead, ema, _evaluation(run, step, ema))


def _folded(
    sae: AbstractSae,
    scale: Scale,
    record: RunRecord,
    step: int,
    dead_fraction: float,
    ema: bool,
    metrics: dict[str, float] | None = None,
) -> Dictionary:
    """Weights as they are in training, for rows as they are."""
    of_run = record.dictionary
    is_exact = not ema and record.train["weights"] == "float32"
    sae = jax.tree.map(lambda a: a.astype(jnp.float32), sae)
    # The average of rows of norm 1 is a little shorter, and rows in bf16 have it to about 1e-3.
    sae = sae.folded(scale) if is_exact else sae.constrained().folded(scale)
    factors = [_by_source(side, widths) for side, widths in zip((scale.x, scale.y), of_run.widths, strict=True)]
    kind = of_run.normalisation.kind
    origin = None
    if record.init_from is not None:
        origin = Origin("sae_jax", record.init_from, None, None, ("trained further",), unit_rows=True)
    return Dictionary(
        sae,
        replace(
            of_run,
            normalisation=Normalisation(kind, kind not in PER_VECTOR, *factors),
            steps=step,
            tokens=step * record.train["batch_size"],
            weights="average" if ema else "live",
            metrics={"dead_fraction": dead_fraction, **(metrics or {})},
            origin=origin,
        ),
    )


def _evaluation(run: AnyPath, step: int, ema: bool) -> dict[str, float]:
    """What `sae-jax evaluate` found of these weights, if it has been there."""
    path = run / "evaluation.json"
    content = storage.read_json(path)
    content = storage.unsealed(content, path) if content else {}
    if (content.get("step"), content.get("weights")) != (step, "average" if ema else "live"):
        return {}
    return {n: float(v) for n, v in content.items() if isinstance(v, int | float) and n != "step" and math.isfinite(v)}


def config_of(record: Record, path: object) -> SaeConfig:
    """The settings in a record. `path`: for messages."""
    return base.config_from(record.variant, record.sae, f"{path}: sae")


def _abstract(config: SaeConfig, widths: Widths) -> AbstractSae:
    """Shapes of the arrays of a dictionary."""
    return jax.eval_shape(lambda s: config.init(jax.random.key(0), s), init.abstract_sample(widths))


def _abstract_parts(config: SaeConfig, record: RunRecord) -> dict[str, Any]:
    """Shapes of the parts of a checkpoint that a dictionary is made of, all on the default device."""

    def parts(sample: init.Sample) -> dict[str, Any]:
        sae = initial_weights(config, record.train["weights"], jax.random.key(0), sample)
        silent = init.zeros((config.n_latents,), mesh.DICT, jnp.int32)
        return {
            "sae": sae,
            "average": zeros_like_moments(sae, record.train["ema_dtype"], WEIGHT),
            "counters": Counters(silent, config.initial_counters(sample)),
            "run": {"step": jnp.int32(0), "constants": Constants(jnp.float32(0), sample.scale)},
        }

    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return placed(jax.eval_shape(parts, init.abstract_sample(record.dictionary.widths)), here)


def arrays_of(sae: AbstractSae) -> dict[str, jax.Array]:
    """The arrays of a dictionary by name; those that it does not have, such as a skip, are left out."""
    names = [field.name for field in fields(sae) if field.metadata.get("pytree_node", True)]  # type: ignore[arg-type]
    return {name: array for name in names if (array := getattr(sae, name)) is not None}


def _read_arrays(file: Any, path: object, target: AbstractSae) -> AbstractSae:
    """A dictionary of the shapes of `target`. Raises UserError, naming the file, for anything else."""
    expected, names = arrays_of(target), set(file.keys())
    if difference := names ^ expected.keys():
        what = "has" if (name := min(difference)) in names else "lacks"
        raise UserError(f"{path}: {what} an array {name}, unlike the record beside it; restore both")
    for name in names:  # before anything of that size is allocated
        part, shape = file.get_slice(name), list(expected[name].shape)
        if part.get_shape() != shape or part.get_dtype() != "F32":
            raise UserError(
                f"{path}: {name} is {part.get_dtype()}{part.get_shape()}, the record beside it says F32{shape}; "
                f"restore both"
            )
    arrays = {name: jnp.asarray(file.get_tensor(name)) for name in names}
    return dataclasses.replace(target, **arrays)  # type: ignore[type-var]


def _by_source(scale_X: jax.Array, widths: tuple[int, ...]) -> tuple[float, ...]:
    starts = np.cumsum((0, *widths[:-1]))
    return tuple(float(scale_X[start]) for start in starts)


def _told(source: SourceRecord) -> str:
    model = f" of {source.model}" if source.model else ""
    return f"{source.name}{model} (d={source.width})"
