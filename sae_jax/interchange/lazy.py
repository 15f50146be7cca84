"""An array that is read a part at a time: on a disk, in memory, or what exact operations make of such.

    Lazy.of_file(path, place)    a tensor of a file, whatever its strides; nothing is read yet
    Lazy.of(array)               what is in memory
    a.transposed(), a.picked(axis, i), a.part(axis, start, stop), a.scaled(factors, axis), side_by_side([a, b], axis)

`slabs` goes through an array along its longest axis, which is that of the latents: a few MiB at a time, whatever the
width. Values are float32, whatever they are stored as.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sae_jax.storage.guarded import open_file
from sae_jax.storage.tensor_files import FLOATS, Place, read_part
from sae_jax.types import UserError

SLAB_BYTES = 16 << 20  # of float32

Read = Callable[[tuple[slice, ...]], np.ndarray]  # one slice an axis, with a start and a stop -> that part, float32


@dataclass(frozen=True, eq=False)
class Lazy:
    """See the head of this file."""

    shape: tuple[int, ...]
    read: Read
    name: str = ""  # for messages: the file, and what it calls this
    kind: str = "F32"  # how it is stored, as safetensors says

    @classmethod
    def of_file(cls, path: Path, name: str, place: Place) -> Lazy:
        """A tensor of a file. Reading it raises UserError if it is not one of floats."""
        where = f"{path}: {name}"

        def read(part: tuple[slice, ...]) -> np.ndarray:
            if place.kind not in FLOATS:
                raise UserError(f"{where} is {place.kind}; weights must be {', '.join(FLOATS)}")
            with open_file(path) as file:
                return read_part(file.fileno(), place, part).astype(np.float32, order="C", copy=False)

        return cls(place.shape, read, where, place.kind)

    @classmethod
    def of(cls, array: np.ndarray, name: str = "") -> Lazy:
        """An array in memory."""
        return cls(array.shape, lambda part: np.asarray(array[part], np.float32), name)

    @classmethod
    def zeros(cls, shape: tuple[int, ...]) -> Lazy:
        """Of zeros, which take no memory."""
        return cls(shape, lambda part: np.zeros([p.stop - p.start for p in part], np.float32))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """f32[stop - start, ...]."""
        return self.read((slice(start, stop), *(slice(0, size) for size in self.shape[1:])))

    def array(self) -> np.ndarray:
        """All of it, in memory: for vectors and matrices without an axis of latents."""
        return self.read(tuple(slice(0, size) for size in self.shape))

    def slabs(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """(where, f32 values) of parts that cover the array. UserError for a value that is not finite."""
        if 0 in self.shape:
            return
        if not self.shape:
            yield (), self.read(())
            return
        axis = int(np.argmax(self.shape))
        step = max(1, SLAB_BYTES // (4 * (int(np.prod(self.shape, dtype=np.int64)) // self.shape[axis])))
        whole = tuple(slice(0, size) for size in self.shape)
        for start in range(0, self.shape[axis], step):
            part = (*whole[:axis], slice(start, min(start + step, self.shape[axis])), *whole[axis + 1 :])
            values = self.read(part)
            if not np.isfinite(values).all():
                raise UserError(f"{self.name or 'an array'} has values that are not finite in float32; get it again")
            yield part, values

    def transposed(self) -> Lazy:
        """Its axes in reverse order."""
        return self._made(self.shape[::-1], lambda part: self.read(part[::-1]).T)

    def picked(self, axis: int, index: int) -> Lazy:
        """Without an axis, at this index of it."""

        def read(part: tuple[slice, ...]) -> np.ndarray:
            return self.read((*part[:axis], slice(index, index + 1), *part[axis:])).squeeze(axis)

        return self._made((*self.shape[:axis], *self.shape[axis + 1 :]), read)

    def part(self, axis: int, start: int, stop: int) -> Lazy:
        """From `start` to `stop` of an axis."""

        def read(part: tuple[slice, ...]) -> np.ndarray:
            moved = slice(part[axis].start + start, part[axis].stop + start)
            return self.read((*part[:axis], moved, *part[axis + 1 :]))

        return self._made((*self.shape[:axis], stop - start, *self.shape[axis + 1 :]), read)

    def scaled(self, factors: np.ndarray | float, axis: int = 0) -> Lazy:
        """Times one factor, or times one for each index of an axis."""
        factors = np.asarray(factors, np.float32)

        def read(part: tuple[slice, ...]) -> np.ndarray:
            if not factors.ndim:
                return self.read(part) * factors
            along = factors[part[axis]]
            return self.read(part) * along.reshape(-1, *(1,) * (len(self.shape) - axis - 1))

        return self._made(self.shape, read)

    def cut(self, n_parts: int) -> Lazy:
        """[n, p * w] as [n, p, w]."""
        shape = (self.shape[0], n_parts, self.shape[1] // n_parts)

        def read(part: tuple[slice, ...]) -> np.ndarray:
            rows = self.read((part[0], slice(0, self.shape[1])))
            return rows.reshape(len(rows), *shape[1:])[:, part[1], part[2]]

        return self._made(shape, read)

    def _made(self, shape: tuple[int, ...], read: Read) -> Lazy:
        return Lazy(shape, read, self.name, self.kind)


def side_by_side(arrays: Sequence[Lazy], axis: int) -> Lazy:
    """Arrays one after the other along an axis."""
    ends = np.cumsum([array.shape[axis] for array in arrays])
    shape = (*arrays[0].shape[:axis], int(ends[-1]), *arrays[0].shape[axis + 1 :])

    def read(part: tuple[slice, ...]) -> np.ndarray:
        pieces = []
        for array, end in zip(arrays, ends, strict=True):
            first = int(end) - array.shape[axis]
            start, stop = max(part[axis].start, first), min(part[axis].stop, int(end))
            if start < stop:
                pieces.append(array.read((*part[:axis], slice(start - first, stop - first), *part[axis + 1 :])))
        return np.concatenate(pieces, axis)

    return arrays[0]._made(shape, read)
