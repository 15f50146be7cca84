"""Which report a path gets, by what lies there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sae_jax import artifact, storage
from sae_jax.errors import UsageError
from sae_jax.pages import page
from sae_jax.pages.reports.run import of_members, of_run
from sae_jax.pages.reports.sweep import of_sweep
from sae_jax.record import RunRecord
from sae_jax.scaling import table
from sae_jax.storage import AnyPath
from sae_jax.training import checkpoint


def write_report(
    folders: Sequence[AnyPath], members_of_sweeps: Mapping[AnyPath, Mapping[str, AnyPath]], out: AnyPath
) -> None:
    """Write the report of a run, of a run of several members, of a sweep, or of several dictionaries side by side.

    Args:
        folders: what it is of; several are compared, of which none may be a sweep.
        members_of_sweeps: {folder: {member: its run}} of those that are sweeps.
        out: the file.

    Raises:
        UsageError: a path that none of these lies at, or a file at `out` that is no report.
    """
    _refuse_to_overwrite(out)
    if len(folders) == 1 and is_sweep(folders[0]):
        made = of_sweep(folders[0], members_of_sweeps[folders[0]], out)
    elif len(folders) == 1 and not checkpoint.members(folders[0]):
        _check(folders[0])
        made = of_run(folders[0], out)
    else:
        named = _dictionaries(folders)
        title = folders[0].resolve().name if len(folders) == 1 else f"{len(named)} dictionaries"
        made = of_members(named, title, out)
    page.write(out, made)


def is_sweep(folder: AnyPath) -> bool:
    """Whether a folder is that of a sweep, or holds the table of one."""
    return (folder / "sweep.json").is_file() or (folder / table.FILE).is_file()


def _dictionaries(folders: Sequence[AnyPath]) -> dict[str, AnyPath]:
    """{name: folder} of dictionaries, and of the members of sets."""
    found = {}
    for folder in folders:
        if is_sweep(folder):
            raise UsageError(f"{folder} is a sweep, which has a report of its own; name it alone")
        if names := checkpoint.members(folder):
            prefix = f"{folder.resolve().name}/" if len(folders) > 1 else ""
            found |= {f"{prefix}{name}": folder / checkpoint.MEMBERS / name for name in names}
        else:
            _check(folder)
            found[str(folder)] = folder
    short = page.short_names(found)
    return {short[name]: folder for name, folder in found.items()}


def _check(folder: AnyPath) -> None:
    kind = (storage.read_json(folder / "config.json") or {}).get("kind")
    if (folder / artifact.RECORD).is_file() or kind == RunRecord.KIND:
        return
    if not folder.exists():
        raise UsageError(f"{folder} does not exist; name a run, a sweep or a saved dictionary")
    raise UsageError(
        f"{folder} is no run (config.json), sweep (sweep.json, {table.FILE}) or saved dictionary ({artifact.RECORD}); "
        f"name the --out of sae-jax train or sweep"
    )


def _refuse_to_overwrite(out: AnyPath) -> None:
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file, such as {out / 'report.html'}")
    if out.exists() and f'content="{page.GENERATOR}"' not in out.read_text(errors="replace"):
        raise UsageError(f"{out} exists and is not a report; choose another file or remove it")
