"""Import: a dictionary that another program wrote becomes a folder that `sae_jax.load` reads. Export: the reverse.

Arrays go through memory a few MiB at a time, in both directions. An output folder appears whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from sae_jax import artifact, config
from sae_jax.artifact import ARRAYS, RECORD, Dictionary
from sae_jax.interchange import formats as package
from sae_jax.interchange.calibrate import rows_for, with_threshold
from sae_jax.interchange.foreign import Files, Foreign, Ours, row_norms, selects_k
from sae_jax.interchange.lazy import Lazy
from sae_jax.interchange.tensors import write_safetensors
from sae_jax.record import Normalisation, Origin, Record, program
from sae_jax.saes import jumprelu, transcoder
from sae_jax.saes.base import AbstractSae, SaeConfig
from sae_jax.saes.normalise import PER_VECTOR
from sae_jax.storage import digests, tensor_files
from sae_jax.storage.folder import new_folder
from sae_jax.types import UsageError, UserError, Widths


class Published(NamedTuple):
    """Where on a hub a dictionary lies."""

    place: str
    revision: str | None = None
    licence: str | None = None


def known_formats() -> dict[str, ModuleType]:
    """The formats by name: the files of sae_jax/interchange/formats."""
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return {module.NAME: module for module in modules}


def import_dictionary(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str = "auto",
    k: int | None = None,
    calibrate: Any = None,
    published: Published | None = None,
) -> Record:
    """Write the dictionary that lies at a path, in another program's format, as a folder that `sae_jax.load` reads.

    Args:
        path: a folder, or a file in one.
        out: where there is nothing yet.
        format: a name of `known_formats`; auto: the one whose files are there.
        k: active latents a row, for formats whose files do not say.
        calibrate: a set's path, or rows [N, X], from which a threshold is taken: for a selection over a batch that has
            none for rows by themselves.
        published: where the path is a copy of something on a hub, for the record.

    Returns:
        The record of the dictionary.

    Raises:
        UsageError: an unknown format, or something at `out`.
        UserError: no format, or several, fit the files; or they are damaged, disagree, or are of nothing computed here.
    """
    files = Files.at(Path(path), published.place if published else None)
    module = _format(format) if format != "auto" else _recognised(files)
    # Values that are not finite are refused when they are written.
    with new_folder(out) as folder, np.errstate(all="ignore"):
        try:
            foreign = module.read(files, k)
        except UsageError as error:  # of a variant, which does not know that a file says so
            raise UserError(f"{path}: {error}") from None
        # So that values are those of the original, on every machine.
        foreign = with_threshold(replace(foreign, config=replace(foreign.config, dtype="float32")), calibrate)
        _check_shapes(foreign)
        unit_rows = _has_unit_rows(foreign)
        write_safetensors(folder / ARRAYS, foreign.arrays)
        changes = foreign.changes + _casts(foreign)
        origin = Origin(module.NAME, *(published or Published(str(path))), changes, unit_rows)
        record = _record(foreign, origin)
        artifact.write_record(folder, record)
    return record


def export(
    dictionary: Dictionary | AbstractSae | str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str],
    calibrate: Any = None,
) -> None:
    """Write a dictionary for another program.

    Args:
        dictionary: a folder that `sae_jax.save` or an import wrote, a run, or one in the hand.
        format: a name of `known_formats` that can be written.
        out: where there is nothing yet.
        calibrate: a set's path, or rows [N, X], from which thresholds are taken that leave k latents active on
            average: for formats that know no selection of k latents.

    Raises:
        UsageError: an unknown format, something at `out`, or a dictionary that the format cannot hold.
        UserError: nothing there, or a damaged file.
    """
    module = _format(format)
    if not hasattr(module, "write"):
        writable = ", ".join(name for name, each in known_formats().items() if hasattr(each, "write"))
        raise UsageError(f"{format} is read and not written; written are {writable}")
    with new_folder(out) as folder, np.errstate(all="ignore"):
        ours, arrays = _ours(dictionary)
        if calibrate is not None:
            ours = _calibrated(dictionary, ours, calibrate)
        elif module.NEEDS_THRESHOLD and selects_k(ours.config):
            raise UsageError(
                f"{format} knows thresholds and no selection of k latents; give --calibrate SET, from whose rows "
                f"thresholds are taken"
            )
        module.write(ours, folder)
        if arrays is not None:
            digests.check_file(*arrays)


def _format(name: str) -> ModuleType:
    known = known_formats()
    if name not in known:
        raise UsageError(f"there is no format {name!r}; there are {', '.join(known)}")
    return known[name]


def _recognised(files: Files) -> ModuleType:
    """The format whose files these are."""
    here = [module for module in known_formats().values() if module.is_here(files)]
    if len(here) == 1:
        return here[0]
    where = files.folder / (files.given or "")
    if here:
        names = ", ".join(module.NAME for module in here)
        raise UserError(f"{where}: fits the formats {names}; say which with --format")
    if below := sorted({str(Path(name).parent) for name in files.weights} - {"."}):
        raise UserError(f"{where}: no dictionary itself; give the folder, or the file, of one, such as {below[0]}")
    raise UserError(f"{where}: of no known format ({', '.join(known_formats())}); it has {_listed(files)}")


def _listed(files: Files) -> str:
    shown = ", ".join(files.names[:6])
    return (shown + (f" and {len(files.names) - 6} more" if len(files.names) > 6 else "")) or "no files"


def _widths(foreign: Foreign) -> Widths:
    return Widths(tuple(s.width for s in foreign.encodes), tuple(s.width for s in foreign.reconstructs))


def _check_shapes(foreign: Foreign) -> None:
    """Before anything is read of that size."""
    expected = artifact.shapes(foreign.config, _widths(foreign))
    for name, shape in expected.items():
        array = foreign.arrays[name]
        if array.shape != shape:
            raise UserError(
                f"{array.name or name} makes {name} {list(array.shape)}, and its settings make it {list(shape)}; "
                f"get both again"
            )


def _has_unit_rows(foreign: Foreign) -> bool:
    w_dec = foreign.arrays.get("w_dec")
    if w_dec is None or not foreign.config.UNIT_DECODER:
        return w_dec is None
    norms = row_norms(w_dec)
    return bool((np.abs(norms[norms > 0] - 1) <= artifact.UNIT_TOLERANCE).all())


def _casts(foreign: Foreign) -> tuple[str, ...]:
    rounded = sorted({name for name, array in foreign.arrays.items() if array.kind == "F64"})
    return (f"{', '.join(rounded)} were float64 and are rounded to float32",) if rounded else ()


def _record(foreign: Foreign, origin: Origin) -> Record:
    norm = foreign.config.input_norm
    return Record(
        variant=foreign.config.variant,
        sae=config.to_dict(foreign.config),
        encodes=foreign.encodes,
        reconstructs=foreign.reconstructs,
        normalisation=Normalisation(norm, is_folded=norm not in PER_VECTOR),
        data=None,
        steps=0,
        tokens=0,
        weights="live",
        metrics={},
        program=program(),
        origin=origin,
    )


def _ours(dictionary: Any) -> tuple[Ours, tuple[Path, digests.FileDigest] | None]:
    """A dictionary to write; and of one that is read from its file while it is written, that file and its digest."""
    if isinstance(dictionary, str | os.PathLike):
        folder = Path(dictionary)
        described = artifact.read_record(folder)
        if described is not None:
            record, digest = described
            sae_config, path = artifact.config_of(record, folder / RECORD), folder / ARRAYS
            places = tensor_files.safetensors_places(path)
            shapes = artifact.shapes(sae_config, record.widths)
            if shapes != {name: place.shape for name, place in places.items()}:
                raise UserError(f"{path}: its arrays are not those of the record beside it; restore both")
            arrays = {name: Lazy.of_file(path, name, place) for name, place in places.items()}
            return Ours(sae_config, record, arrays), (path, digest)
        dictionary = artifact.load(folder)
    if isinstance(dictionary, AbstractSae):
        dictionary = Dictionary(dictionary, artifact.record_of(dictionary))
    arrays = {name: Lazy.of(np.asarray(array)) for name, array in artifact.arrays_of(dictionary.sae).items()}
    return Ours(dictionary.sae.config, dictionary.record, arrays), None


def _calibrated(dictionary: Any, ours: Ours, calibrate: Any) -> Ours:
    """With thresholds in the place of a selection of k latents."""
    if not selects_k(ours.config):
        raise UsageError(f"a {ours.config.variant} has no selection that needs thresholds; leave --calibrate out")
    rows = rows_for(ours.record.encodes, calibrate)
    loaded = artifact.load(dictionary) if isinstance(dictionary, str | os.PathLike) else dictionary
    sae: Any = loaded.sae if isinstance(loaded, Dictionary) else loaded
    is_transcoder = isinstance(ours.config, transcoder.Config)
    made = jumprelu.calibrated(sae, rows, pre_bias=not is_transcoder)
    log_threshold = Lazy.of(np.asarray(made.log_threshold))
    if isinstance(ours.config, transcoder.Config):  # which may have a skip
        made_config: SaeConfig = replace(ours.config, activation="jumprelu")
    else:
        made_config = made.config
    record = replace(ours.record, variant=made_config.variant, sae=config.to_dict(made_config))
    return Ours(made_config, record, {**ours.arrays, "log_threshold": log_threshold})
