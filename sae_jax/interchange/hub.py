"""Files of the Hugging Face hub: a folder is fetched, or one is published.

    hf:owner/repo[/folder][@revision]    the files of one folder of a repository, or one file; main if no revision
    saelens:RELEASE/ID                   the same, where the registry of an installed SAELens says that SAE lies

Files go through the hub's cache, as of every program that uses `huggingface_hub`; HF_TOKEN or a login (`hf auth login`)
opens private repositories. Which commit was read is part of what `fetch` returns, so that it can be recorded. With
HF_HUB_OFFLINE, or where the hub cannot be reached, the cache has to hold the files.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import yaml

from sae_jax import config
from sae_jax.interchange import card
from sae_jax.progress import say_once
from sae_jax.record import Record
from sae_jax.storage.guarded import one_line
from sae_jax.types import UsageError, UserError

HUB, SAELENS = "hf:", "saelens:"
REGISTRY = "pretrained_saes.yaml"  # in SAELens' package
LOGIN = "log in with `hf auth login`, or set HF_TOKEN"

_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>[^@]+?))?/?(@(?P<revision>[\w./-]+))?")
_DESTINATION = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(/(?P<folder>[^@]+?))?/?")
_INSIDE = ("checkpoints",)  # sub-folders in which a format keeps weights beside its settings
_SETTINGS = ("cfg.json", "config.", "hyperparams.json", "wandb-config.", "wanb-config.")  # beside a file of weights
_BESIDE = (".md", ".png", ".gitattributes", ".gitignore")  # what lies in a folder without being part of a dictionary


class Place(NamedTuple):
    """Where on the hub something lies."""

    repo: str
    folder: str = ""  # or a file; "" is the whole repository
    revision: str | None = None

    def __str__(self) -> str:
        """As users write it."""
        folder, revision = self.folder and f"/{self.folder}", f"@{self.revision}" if self.revision else ""
        return f"{HUB}{self.repo}{folder}{revision}"


class Fetched(NamedTuple):
    """A folder or a file of the hub, in its cache."""

    path: Path
    place: Place  # its revision is the commit
    licence: str | None  # as the repository states it


def is_remote(where: object) -> bool:
    """Whether this names something on the hub."""
    return isinstance(where, str) and where.startswith((HUB, SAELENS))


def fetch(reference: str) -> Fetched:
    """The files that a reference names, from the hub or from its cache.

    Raises:
        UsageError: what is no reference, or names more than one dictionary.
        UserError: there is no such repository, revision or folder, or the hub cannot be reached.
    """
    place = resolve(reference)
    with reported(place):
        from huggingface_hub import HfApi

        api = HfApi()
        listing = _listing(api, place)
        if listing is None:
            return _cached(api, place)
        names, licence = listing
        patterns = [glob.escape(name) for name in _files_of(names, place)]
        folder = Path(api.snapshot_download(place.repo, revision=place.revision, allow_patterns=patterns))
    return Fetched(folder / place.folder, place._replace(revision=folder.name), licence)


def upload(
    folder: Path,
    repo: str,
    record: Record,
    layout: str,
    private: bool = False,
    revision: str | None = None,
    licence: str | None = None,
) -> str:
    """Publish a folder of one dictionary, in one commit and with a card; returns the reference that fetches it.

    In a job of several processes the first one uploads. The login is that of `hf auth login`, or HF_TOKEN.

    Args:
        folder: files of a dictionary.
        repo: owner/name[/folder]; a repository that is not there is made.
        record: of the dictionary.
        layout: the format that the files are in.
        private: a repository that is made is seen by its owner alone.
        revision: branch to push to, made if it is not there; None: main.
        licence: as the hub names it, such as apache-2.0; None: that of the record's origin, if it names one.

    Raises:
        UsageError: `repo` is none, or the folder there holds other files.
        UserError: the hub refuses, or cannot be reached.
    """
    place = destination(repo, revision)
    if jax.process_index() > 0:
        return str(place)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    licence = licence or (record.origin.licence if record.origin else None)
    text = card.write(record, place.repo, place.folder, layout, licence).encode()
    start = f"{place.folder}/" if place.folder else ""
    with reported(place):
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        api.create_repo(place.repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(place.repo, branch=revision, exist_ok=True)
        there = api.model_info(place.repo, revision=revision)
        if private and not there.private:
            raise UsageError(
                f"{place}: {place.repo} is there and public; make it private on its page, or leave that out"
            )
        names = {sibling.rfilename for sibling in there.siblings or ()}
        _refuse_others(place, [name.removeprefix(start) for name in names if name.startswith(start)], files)
        contents: dict[str, Path | bytes] = {f"{start}{name}": path for name, path in files.items()}
        contents[f"{start}README.md"] = text
        if "README.md" not in names:
            contents["README.md"] = text  # the page of a repository is the card at its root
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(
            place.repo, operations, commit_message=f"{place.folder or record.variant}, by sae_jax", revision=revision
        )
    return str(place._replace(revision=commit.oid))


def destination(repo: str, revision: str | None = None) -> Place:
    """Where to push. Raises UsageError for what is no owner/name[/folder]."""
    match = _DESTINATION.fullmatch(repo.removeprefix(HUB))
    if match is None or ".." in PurePosixPath(match["folder"] or "").parts:
        raise UsageError(f"{repo!r} is no place on the hub to push to; write owner/name[/folder]")
    return Place(match["repo"], match["folder"] or "", revision)


def _refuse_others(place: Place, there: Sequence[str], files: Mapping[str, Path]) -> None:
    """A folder that mixes two dictionaries would load as neither."""
    own = [name for name in there if "/" not in name and not name.endswith(_BESIDE)]
    if others := sorted(set(own) - files.keys()):
        raise UsageError(f"{place}: holds {_some(others)} already, which this push would leave; choose another folder")


def resolve(reference: str) -> Place:
    """Where a reference points. Raises UsageError for what is none, and for a name that SAELens does not have."""
    if reference.startswith(SAELENS):
        return _of_saelens(reference.removeprefix(SAELENS))
    match = _REFERENCE.fullmatch(reference.removeprefix(HUB))
    folder = (match["folder"] or "") if match else ".."
    if match is None or ".." in PurePosixPath(folder).parts or folder.startswith("/"):
        raise UsageError(f"{reference!r} is no place on the hub; write hf:owner/repo[/folder][@revision]")
    return Place(match["repo"], folder, match["revision"])


def _listing(api: Any, place: Place) -> tuple[list[str], str | None] | None:
    """(names of all files, licence) of a repository; None where the hub cannot be asked."""
    from huggingface_hub import errors

    try:
        repository = api.model_info(place.repo, revision=place.revision)
    except (errors.HfHubHTTPError, ValueError):
        raise
    except (errors.HTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        if not isinstance(error, errors.OfflineModeIsEnabled):
            say_once(f"{place}: the hub cannot be reached ({one_line(error)}); looking in its cache")
        return None
    licence = getattr(repository.card_data, "license", None) if repository.card_data else None
    names = [sibling.rfilename for sibling in repository.siblings or ()]
    return names, licence if isinstance(licence, str) else None


def _files_of(names: Sequence[str], place: Place) -> list[str]:
    """Files of one dictionary. Raises UsageError where a folder holds none itself."""
    if place.folder in names:
        parent = PurePosixPath(place.folder).parent
        beside = [PurePosixPath(name) for name in names if PurePosixPath(name).parent == parent]
        return [place.folder, *(str(path) for path in beside if path.name.startswith(_SETTINGS))]
    start = f"{place.folder}/" if place.folder else ""
    inside = [name for name in names if name.startswith(start) and ".." not in PurePosixPath(name).parts]
    if not inside:
        raise UsageError(f"{place}: there is no such folder or file; {place.repo} has {_some(_folders(names, ''))}")
    parts = {name: name.removeprefix(start).split("/") for name in inside}
    own = [name for name in inside if len(parts[name]) == 1 or parts[name][0] in _INSIDE]
    if all(name.endswith(_BESIDE) for name in own):
        choices = _folders(inside, start)
        raise UsageError(f"{place}: holds no dictionary itself; name one of its folders: {_some(choices)}")
    return own


def _folders(names: Sequence[str], start: str) -> list[str]:
    """Folders that hold files other than texts, by their paths below `start`."""
    folders = {str(PurePosixPath(name.removeprefix(start)).parent) for name in names if not name.endswith(_BESIDE)}
    return sorted(folders)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "none") + rest


def _cached(api: Any, place: Place) -> Fetched:
    """What the cache holds of a place. UserError where there is nothing."""
    from huggingface_hub import errors

    inside = glob.escape(place.folder)
    patterns = [inside, f"{inside}/*"] if place.folder else ["*"]
    try:
        snapshot = api.snapshot_download(
            place.repo, revision=place.revision, allow_patterns=patterns, local_files_only=True
        )
    except errors.LocalEntryNotFoundError as error:
        snapshot = getattr(error, "snapshot_path", None)  # other folders of the repository were never fetched
    path = Path(snapshot or os.devnull) / place.folder
    if snapshot is None or not (path.is_file() or (path.is_dir() and any(file.is_file() for file in path.iterdir()))):
        cure = "unset HF_HUB_OFFLINE" if _is_offline() else "see to the network"
        raise UserError(f"{place}: is not in the hub's cache, and the hub is out of reach; {cure}")
    return Fetched(path, place._replace(revision=Path(snapshot).name), None)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


@contextlib.contextmanager
def reported(place: Place) -> Iterator[None]:
    """Whatever goes wrong between the hub and here, in one line. The client never puts a token into its messages."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{place}: {place.repo} is gated; accept its terms on its page, and {LOGIN}") from None
    except errors.RevisionNotFoundError:
        what = place.revision or "main"
        raise UserError(f"{place}: {place.repo} has no revision {what}; name a branch, a tag or a commit") from None
    except errors.RepositoryNotFoundError:
        cure = f"check the name, or {LOGIN} if it is private"
        raise UserError(f"{place}: there is no repository {place.repo}, or none that you may see; {cure}") from None
    except errors.LocalTokenNotFoundError:
        raise UserError(f"{place}: the hub asks who you are; {LOGIN}") from None
    except errors.OfflineModeIsEnabled:
        raise UserError(f"{place}: HF_HUB_OFFLINE is set, so the hub cannot be asked; unset it") from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # of a part of an upload
            error = error.__cause__
        status = getattr(getattr(error, "response", None), "status_code", None)
        cure = LOGIN if status in (401, 403) else "try again later, or check the name and the network"
        raise UserError(f"{place}: the hub cannot serve this ({one_line(error)}); {cure}") from error


def _of_saelens(name: str) -> Place:
    """Where SAELens' registry says that RELEASE/ID lies. The package's file is read; nothing of it is imported."""
    release, _, sae_id = name.partition("/")
    if not (release and sae_id):
        raise UsageError(
            f"{SAELENS}{name}: write {SAELENS}RELEASE/ID, such as {SAELENS}gpt2-small-res-jb/blocks.8.hook_resid_pre"
        )
    content = _release(release)
    saes = {str(sae["id"]): str(sae.get("path") or sae["id"]) for sae in content["saes"]}
    if sae_id not in saes:
        raise UsageError(f"{SAELENS}{name}: release {release} has no {sae_id}; there are {_some([*saes])}")
    return Place(content["repo_id"], saes[sae_id])


def _release(release: str) -> dict[str, Any]:
    """An entry of the registry: repo_id, and {id, path} of each SAE."""
    path = _registry()
    lines = path.read_text(encoding="utf-8").splitlines()
    # The file has megabytes, of which only this entry is parsed.
    starts = [number for number, line in enumerate(lines) if line[:1].strip() and not line.startswith("#")]
    names = [lines[number].partition(":")[0].strip("\"' ") for number in starts]
    if release not in names:
        near = config.nearest(release, names)
        raise UsageError(f"{SAELENS}{release}: the SAELens that is installed knows no such release; {near}")
    first = names.index(release)
    end = [*starts, len(lines)][first + 1]
    text = "\n".join(lines[starts[first] : end])
    try:
        (content,) = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)).values()
        return {"repo_id": str(content["repo_id"]), "saes": [{**sae, "id": sae["id"]} for sae in content["saes"]]}
    except (yaml.YAMLError, AttributeError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: entry {release} cannot be read ({one_line(error)}); install SAELens again") from None


def _registry() -> Path:
    """The file of an installed SAELens."""
    try:
        files = importlib.metadata.files("sae-lens") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == REGISTRY and Path(str(file.locate())).is_file():
            return Path(str(file.locate()))
    raise UserError(f"{SAELENS} needs the registry of SAELens, which is not installed here; pip install sae-lens")
