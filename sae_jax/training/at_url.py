"""Checkpoints at a URL (s3://, gs://), where nothing can be renamed and processes share no disk.

    checkpoints/<step>/<part>/<array>/<region>        the bytes of one piece of an array, such as 0-8192_0-512
    checkpoints/lists/<step>/digests-<p>-of-<n>.json  what process p wrote: arrays with shape and dtype, pieces with
                                                      size and digest; sealed
    checkpoints/lists/<step>/damaged                  it was found damaged, and no longer counts

Each process writes the pieces that its own devices hold, little-endian and in C order, each at most PIECE_BYTES, and
then its list. A checkpoint counts once the lists of all n processes are there: a save that is cut off leaves none that
counts, and a removal takes the lists away first. What does not count is removed by the next process that trains. Lists
have a prefix of their own, so that to find the newest checkpoint takes one request, however many pieces there are.

A mesh of any shape reads any other's: a process reads the pieces that overlap with what its devices are to hold, each
once, and compares them with the digests on the way. Nothing is used before all processes have found all theirs whole.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax.experimental import multihost_utils

from sae_jax import storage
from sae_jax.storage import Url, digests
from sae_jax.storage.digests import FileDigest, are_all_there, list_name
from sae_jax.training.on_disk import give_memory_back
from sae_jax.types import UserError

PIECE_BYTES = 64 << 20  # what a request that failed must send again
AT_ONCE = 16  # requests under way, whose pieces are in memory
LISTS, DAMAGED = "lists", "damaged"

Region = tuple[tuple[int, int], ...]  # start and stop along each axis


class _Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


class _List(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one process has written of a checkpoint; of several processes, put together."""

    arrays: dict[str, _Array]
    pieces: dict[str, FileDigest]


class _DamagedError(Exception):
    """What is there is not what was written."""


class AtUrl:
    """The checkpoints under a URL. See `checkpoint.Store`."""

    def __init__(self, folder: Url) -> None:
        self.folder, self._files = folder, storage.Files(folder)
        self._lease, self._n_kept = storage.Lease(None, ""), 0
        self._under_way: int | None = None
        self._damaged: set[int] = set()

    def begin(self, lease: storage.Lease, n_kept: int) -> None:
        """See Store."""
        self._lease, self._n_kept = lease, n_kept
        if jax.process_index() == 0:
            lists = self._lists()
            steps = {int(step) for key in self._files.keys("") if (step := key.partition("/")[0]).isdecimal()}
            for step in steps | lists.keys():
                if not (are_all_there(lists.get(step, ())) or DAMAGED in lists.get(step, ())):
                    self._delete(step)
            self._remove_old()
        multihost_utils.sync_global_devices("only whole checkpoints are left")
        self._damaged = {step for step, names in self._lists().items() if DAMAGED in names}

    def steps(self) -> list[int]:
        """See Store."""
        whole = {step for step, names in self._lists().items() if are_all_there(names) and DAMAGED not in names}
        return sorted(whole | ({self._under_way} if self._under_way is not None else set()), reverse=True)

    def holds(self, step: int, part: str) -> bool:
        """See Store."""
        return bool(self._files.keys(f"{step}/{part}/"))

    def save(self, step: int, tree: dict[str, Any]) -> Callable[[], None]:
        """See Store."""
        self._make_room(step)
        arrays, shards = {}, []
        for name, leaf in _named(tree).items():
            arrays[name] = _array(leaf)
            shards += [(name, leaf.shape, each) for each in leaf.addressable_shards if each.replica_id == 0]
        for _, _, shard in shards:
            shard.data.copy_to_host_async()
        pieces = {}
        for name, shape, shard in shards:
            # On a CPU numpy would look at the very bytes that the next step writes into.
            values = np.array(shard.data, copy=True if shard.device.platform == "cpu" else None)
            for region, piece in _cut(values, _region(shard.index, shape)):
                pieces[f"{name}/{_text(region)}"] = piece
        self._under_way = step
        return functools.partial(self._write, step, arrays, pieces)

    def problem(self, step: int, parts: Iterable[str] | None = None) -> str:
        """See Store."""
        try:
            listed, parts = self._read_lists(step), None if parts is None else set(parts)
            keys = sorted(key for key in listed.pieces if parts is None or key.partition("/")[0] in parts)
            for _ in self._read(step, keys[jax.process_index() :: jax.process_count()], listed):
                pass
        except _DamagedError as error:
            return str(error)
        return ""

    def load(self, step: int, target: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """See Store."""
        tree, problem, failure = {}, "", None
        try:
            tree = self._load(step, target)
        except _DamagedError as error:
            problem = str(error)
        except UserError as error:  # the bucket does not answer, of which older checkpoints are no cure
            failure = error
        if multihost_utils.process_allgather(np.array(failure is not None)).any():
            raise failure or UserError(f"{self.folder}: cannot be read; another process says why")
        return tree, problem

    def set_aside(self, steps: Sequence[int]) -> None:
        """Mark them. They stay until the run saves these steps again."""
        if jax.process_index() == 0:
            for step in steps:
                self._files.write(f"{LISTS}/{step}/{DAMAGED}", b"")
        multihost_utils.sync_global_devices("checkpoints set aside")
        self._damaged |= {*steps}
        self._under_way = None

    def tidy(self) -> None:
        """See Store."""
        self._under_way = None
        if jax.process_index() == 0:
            self._remove_old()

    def close(self) -> None:
        """See Store."""

    def is_there(self) -> bool:
        """See Store."""
        return bool(self._files.keys(""))

    def remove(self) -> None:
        """See Store."""
        keys = self._files.keys("")
        for of_lists in (True, False):
            self._files.delete_many(key for key in keys if key.startswith(f"{LISTS}/") is of_lists)

    def _lists(self) -> dict[int, list[str]]:
        """{step: names of the lists of a checkpoint, and of its mark}."""
        found: dict[int, list[str]] = {}
        for key in self._files.keys(f"{LISTS}/"):
            _, _, rest = key.partition("/")
            step, _, name = rest.partition("/")
            if step.isdecimal():
                found.setdefault(int(step), []).append(name)
        return found

    def _make_room(self, step: int) -> None:
        """Remove a damaged checkpoint of this step: of two saves the pieces may be cut differently."""
        if step in self._damaged:
            if jax.process_index() == 0:
                self._lease.check()
                self._delete(step)
            multihost_utils.sync_global_devices("nothing is in the way of a save")
            self._damaged.remove(step)

    def _write(self, step: int, arrays: dict[str, _Array], pieces: dict[str, np.ndarray]) -> None:
        """The rest of a save, in the thread of this process."""
        self._lease.check()
        listed = _List(arrays, {})

        def contents() -> Iterator[tuple[str, bytes]]:
            while pieces:
                key, values = pieces.popitem()
                data = values.tobytes()
                listed.pieces[key] = FileDigest(len(data), digests.of_bytes(data))
                yield f"{step}/{key}", data

        self._files.write_many(contents(), AT_ONCE)
        give_memory_back()
        self._lease.check()
        key = f"{LISTS}/{step}/{list_name(jax.process_index(), jax.process_count())}"
        text = storage.json_text(storage.sealed(msgspec.to_builtins(listed)), self._files.name(key), indent=None)
        # The same list may be there, of a removal that was cut off before it.
        if not self._files.create(key, text.encode()) and self._files.read(key) != text.encode():
            raise UserError(f"{self._files.name(key)} is there already: another job writes this run")
        if jax.process_index() == 0:
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove whole checkpoints beyond those that are kept."""
        lists = self._lists()
        whole = sorted(step for step, names in lists.items() if are_all_there(names) and DAMAGED not in names)
        for step in whole[: -self._n_kept]:
            self._lease.check()
            self._delete(step)

    def _delete(self, step: int) -> None:
        """Remove a checkpoint, or the rest of one: what says that it is whole first, that it is damaged last."""
        lists = self._files.keys(f"{LISTS}/{step}/")
        self._files.delete_many(key for key in lists if not key.endswith(DAMAGED))
        self._files.delete_many(self._files.keys(f"{step}/"))
        self._files.delete_many(key for key in lists if key.endswith(DAMAGED))

    def _read_lists(self, step: int) -> _List:
        keys = [key for key in self._files.keys(f"{LISTS}/{step}/") if not key.endswith(DAMAGED)]
        if not are_all_there(key.rpartition("/")[2] for key in keys):
            raise _DamagedError("its lists of digests (digests-*.json) are not complete")
        together = _List({}, {})
        for key, data in zip(keys, self._files.read_many(keys), strict=True):
            name = key.rpartition("/")[2]
            if data is None:
                raise _DamagedError(f"{name} is missing")
            try:
                content = storage.unsealed(storage.parse_json(data, name, dict[str, Any]), name)
                listed = storage.as_type(content, _List, name)
            except UserError as error:
                raise _DamagedError(str(error)) from error
            together.arrays.update(listed.arrays)
            together.pieces.update(listed.pieces)
        return together

    def _read(self, step: int, keys: Sequence[str], listed: _List) -> Iterator[bytes]:
        """Pieces in order, once they have been found to be what was written."""
        contents = self._files.read_many((f"{step}/{key}" for key in keys), AT_ONCE)
        for key, data in zip(keys, contents, strict=True):
            if data is None:
                raise _DamagedError(f"{key} is missing")
            if FileDigest(len(data), digests.of_bytes(data)) != listed.pieces[key]:
                raise _DamagedError(f"{key} is not what was written, its digest differs")
            yield data

    def _load(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        listed, wanted = self._read_lists(step), _named(target)
        there = {name: array for name, array in listed.arrays.items() if name.partition("/")[0] in target}
        if difference := sorted(there.keys() ^ wanted.keys()):
            raise _DamagedError(f"it {'has' if difference[0] in there else 'lacks'} an array {difference[0]}")
        for name, leaf in wanted.items():
            if there[name] != _array(leaf):
                raise _DamagedError(f"{name} is {there[name]}, not {_array(leaf)}")
        of_array: dict[str, list[tuple[str, Region]]] = {}
        for key in sorted(listed.pieces):
            name, _, text = key.rpartition("/")
            of_array.setdefault(name, []).append((key, _parse(text)))
        here = {name: _regions_here(leaf) for name, leaf in wanted.items()}
        needed = {name: _meeting(of_array.get(name, []), here[name]) for name in wanted}
        contents = self._read(step, [key for name in wanted for key, _ in needed[name]], listed)
        leaves = []
        for name, leaf in wanted.items():
            parts = {region: np.empty([stop - start for start, stop in region], leaf.dtype) for region in here[name]}
            missing = dict.fromkeys(parts, 0) | {region: part.size for region, part in parts.items()}
            for (_, piece), data in zip(needed[name], itertools.islice(contents, len(needed[name])), strict=True):
                values = np.frombuffer(data, leaf.dtype).reshape([stop - start for start, stop in piece])
                for region, part in parts.items():
                    if (common := _overlap(piece, region)) is not None:
                        part[_within(common, region)] = values[_within(common, piece)]
                        missing[region] -= math.prod(stop - start for start, stop in common)
            if any(missing.values()):
                raise _DamagedError(f"{name} has pieces that do not add up to it")
            leaves.append(_put(leaf, parts))
        return jax.tree.unflatten(jax.tree.structure(target), leaves)


def _meeting(pieces: Iterable[tuple[str, Region]], regions: list[Region]) -> list[tuple[str, Region]]:
    """The pieces {key, region} that overlap with some of these regions."""
    return [(key, piece) for key, piece in pieces if any(_overlap(piece, region) is not None for region in regions)]


def _named(tree: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a tree as part/array, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = (f"{path[0].key}/{jax.tree_util.keystr(path[1:], simple=True, separator='.')}" for path, _ in leaves)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _array(leaf: Any) -> _Array:
    return _Array(str(leaf.dtype), tuple(leaf.shape))


def _put(leaf: Any, parts: dict[Region, np.ndarray]) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: parts[_region(index, leaf.shape)])


def _regions_here(leaf: Any) -> list[Region]:
    """What the devices of this process are to hold of an array, each region once."""
    indices = leaf.sharding.addressable_devices_indices_map(tuple(leaf.shape)).values()
    return list(dict.fromkeys(_region(index, leaf.shape) for index in indices))


def _region(index: tuple[slice, ...] | None, shape: Sequence[int]) -> Region:
    return tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def _cut(values: np.ndarray, region: Region) -> Iterator[tuple[Region, np.ndarray]]:
    """A shard in pieces along its first axis."""
    if values.nbytes <= PIECE_BYTES:
        yield region, values
        return
    rows = max(PIECE_BYTES // (values.nbytes // len(values)), 1)
    (first, _), *others = region
    for start in range(0, len(values), rows):
        piece = values[start : start + rows]
        yield ((first + start, first + start + len(piece)), *others), piece


def _overlap(one: Region, other: Region) -> Region | None:
    """What two regions have in common; None where that is nothing, but of a single number it is all."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def _within(region: Region, outer: Region) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(region, outer, strict=True))


def _text(region: Region) -> str:
    return "_".join(f"{start}-{stop}" for start, stop in region) or "all"


def _parse(text: str) -> Region:
    """Raises _DamagedError for what `_text` does not write."""
    if text == "all":
        return ()
    try:
        return tuple((int(start), int(stop)) for start, stop in (part.split("-") for part in text.split("_")))
    except ValueError:
        raise _DamagedError(f"{text} is no region of an array") from None
