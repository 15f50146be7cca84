"""Import: a dictionary that another program wrote becomes a folder that `sae_jax.load` reads. Export: the reverse.

Arrays go through memory a few MiB at a time, in both directions. An output folder appears whole or not at all.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sae_jax import artifact, config, storage
from sae_jax.artifact import ARRAYS, RECORD, Dictionary
from sae_jax.interchange import formats as package
from sae_jax.interchange import hub
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

OURS = "sae_jax"  # the format of `sae_jax.save`
Place = tuple[str, str | None, str | None]  # a path or where on a hub; revision, licence


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
) -> Record:
    """Write the dictionary that lies at a path, in another program's format, as a folder that `sae_jax.load` reads.

    Args:
        path: a folder, or a file in one; or hf:owner/repo[/folder][@revision] or saelens:RELEASE/ID, see hub.py. One
            that is a dictionary of ours already is copied.
        out: where there is nothing yet. Of a set of several dictionaries, each lands in a folder below it.
        format: a name of `known_formats`; auto: the one whose files are there.
        k: active latents a row, for formats whose files do not say.
        calibrate: a set's path, or rows [N, X], from which a threshold is taken: for a selection over a batch that has
            none for rows by themselves.

    Returns:
        The record of the dictionary; of a set, that of the first with the sources of all.

    Raises:
        UsageError: an unknown format, or something at `out`.
        UserError: no format, or several, fit the files; or they are damaged, disagree, or are of nothing computed here.
    """
    place: Place = (os.fspath(path), None, None)
    is_published = hub.is_remote(path)
    if is_published:
        fetched = hub.fetch(os.fspath(path))
        place = (str(fetched.place._replace(revision=None)), fetched.place.revision, fetched.licence)
        path = fetched.path
    if storage.is_url(path):
        raise UsageError(f"{path}: files of another program are read from a disk or the hub; copy the folder")
    files = Files.at(Path(path), place[0] if is_published else None)
    if RECORD in files.names and format in ("auto", OURS):
        return _copied(files.folder, out, place)
    module = _format(format) if format != "auto" else _recognised(files)
    # Values that are not finite are refused when they are written.
    with new_folder(out) as folder, np.errstate(all="ignore"):
        try:
            members = module.read_set(files, k) if hasattr(module, "read_set") else {}
            members = members or {"": module.read(files, k)}
        except UsageError as error:  # of a variant, which does not know that a file says so
            raise UserError(f"{path}: {error}") from None
        records = []
        for name, foreign in members.items():
            (folder / name).mkdir(exist_ok=True)
            records.append(_written(module.NAME, foreign, folder / name, place, calibrate))
    return _record_of_set(records)


def _written(format_name: str, foreign: Foreign, folder: Path, place: Place, calibrate: Any) -> Record:
    # So that values are those of the original, on every machine.
    foreign = with_threshold(replace(foreign, config=replace(foreign.config, dtype="float32")), calibrate)
    _check_shapes(foreign)
    unit_rows = _has_unit_rows(foreign)
    write_safetensors(folder / ARRAYS, foreign.arrays)
    changes = foreign.changes + _casts(foreign)
    record = _record(foreign, Origin(format_name, *place, changes, unit_rows))
    artifact.write_record(folder, record)
    return record


Exported = Dictionary | AbstractSae | str | os.PathLike[str]


def export(
    dictionary: Exported | Sequence[Exported],
    format: str,
    out: str | os.PathLike[str],
    calibrate: Any = None,
) -> Record:
    """Write a dictionary for another program; returns its record.

    Args:
        dictionary: a folder that `sae_jax.save` or an import wrote, a run, or one in the hand; several, of as many
            layers, for a format that takes a set.
        format: a name of `known_formats` that can be written; sae_jax: ours, as `sae_jax.save`.
        out: where there is nothing yet.
        calibrate: a set's path, or rows [N, X], from which thresholds are taken that leave k latents active on
            average: for formats that know no selection of k latents.

    Raises:
        UsageError: an unknown format, something at `out`, or a dictionary that the format cannot hold.
        UserError: nothing there, or a damaged file.
    """
    several = [*dictionary] if isinstance(dictionary, list | tuple) else [dictionary]
    if len(several) != 1 and not hasattr(_format(format) if format != OURS else None, "write_set"):
        raise UsageError(f"{format} takes one dictionary, not {len(several)}; export each of them by itself")
    if format == OURS:
        if calibrate is not None:
            raise UsageError(f"{OURS} keeps a selection of k latents as it is; leave --calibrate out")
        (given,) = several
        d: Any = artifact.load(given) if isinstance(given, str | os.PathLike) else given
        d = Dictionary(d, artifact.record_of(d)) if isinstance(d, AbstractSae) else d
        d.save(out)
        return d.record
    module = _format(format)
    if not hasattr(module, "write"):
        writable = ", ".join(name for name, each in known_formats().items() if hasattr(each, "write"))
        raise UsageError(f"{format} is read and not written; written are {writable}")
    with new_folder(out) as folder, np.errstate(all="ignore"):
        members, read = [], []
        for each in several:
            ours, arrays = _ours(each)
            if calibrate is not None:
                ours = _calibrated(each, ours, calibrate)
            elif module.NEEDS_THRESHOLD and selects_k(ours.config):
                raise UsageError(
                    f"{format} knows thresholds and no selection of k latents; give --calibrate SET, from whose rows "
                    f"thresholds are taken"
                )
            members.append(ours)
            read += [] if arrays is None else [arrays]
        module.write(members[0], folder) if len(members) == 1 else module.write_set(members, folder)
        for path, digest in read:
            digests.check_file(path, digest)
    return _record_of_set([ours.record for ours in members])


def _record_of_set(records: Sequence[Record]) -> Record:
    """What a card says of several dictionaries that belong together: the sources of all."""
    if len(records) == 1:
        return records[0]
    encodes = tuple(source for record in records for source in record.encodes)
    reconstructs = tuple(source for record in records for source in record.reconstructs)
    return replace(records[0], encodes=encodes, reconstructs=reconstructs, metrics={})


def _copied(folder: Path, out: str | os.PathLike[str], place: Place) -> Record:
    """A dictionary of ours, which keeps what its record says of an earlier origin."""
    d = artifact.load(folder)
    record = d.record if d.record.origin else replace(d.record, origin=Origin(OURS, *place, (), unit_rows=True))
    artifact.save(d.sae, out, record)
    return record


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
        folder = storage.path(dictionary)
        described = artifact.read_record(folder)
        if described is not None and isinstance(folder, Path):
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
