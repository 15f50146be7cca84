"""An activation set from arrays that a user has, in memory or as a stream of blocks of any size.

Shards and chunks derive from the size of the set, so that a small one still has many chunks to shuffle. A
stream that ends within BUFFER_BYTES is laid out by its size too; a longer one gets full-size shards, and
their number is known at the end. dataset.json is therefore written last: a set whose writing was cut off
cannot be opened.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from sae_jax import lm
from sae_jax.activations import text as texts
from sae_jax.activations.arrays import as_floats, as_numpy
from sae_jax.activations.rows import DTYPES, encode, row_bytes, width
from sae_jax.activations.spec import SetSpec, SourceSpec, array_specs, layout
from sae_jax.activations.store import ActivationSet, Writer, open_activations, open_array
from sae_jax.lm import redrawn
from sae_jax.progress import say_once
from sae_jax.storage import Files, Lease
from sae_jax.types import UsageError, UserError, check_indices

BUFFER_BYTES = 256 << 20
SLICE_BYTES = 64 << 20  # an array in memory is converted in slices of this size
ENDLESS_ROWS = 1 << 50  # more than any stream


def write_activations(
    path: str | os.PathLike[str],
    rows: Any,
    *,
    name: str = "acts",
    dtype: str = "bfloat16",
    seed: int = 0,
    tokens: Any = None,
    tokenizer: str | None = None,
    text: str | None = None,
    model: str | None = None,
    model_digest: str | None = None,
    hook: str | None = None,
) -> ActivationSet:
    """Write rows as a new activation set, and open it.

    Args:
        path: a folder or URL where there is no set yet.
        rows: an array [..., d] (numpy, JAX, or a torch tensor); or a dict of source name -> array, all with the same
            rows; or an iterator of such arrays or dicts, in blocks of any size.
        name: of the source, when rows are arrays and not dicts.
        dtype: on disk: bfloat16, float16, float32, or int8 with a scale for each row.
        seed: of the shuffle inside shards.
        tokens: int [n, context], for rows [n, context, d]: an array, or with an iterator of rows an iterator of blocks
            in step with it. A set with tokens can show the text around a row.
        tokenizer: reference of the tokenizer that made the tokens.
        text: reference of the text.
        model: reference of the model that made the rows; with `hook`, lets evaluation splice into it. One of a family
            that is not supported is recorded, unread.
        model_digest: of the model's weights; by default computed, if the model is a folder and supported.
        hook: where in the model the rows come from.

    Raises:
        UsageError: there is a set already, shapes do not fit, or a reference names nothing, or two things.
        HeldError: another process writes one there.
        UserError: a row is not finite; a token is beyond the tokenizer or the model; the disk is full.
    """
    files = Files(path)
    if not isinstance(seed, int | np.integer):
        raise UsageError(f"seed={seed!r} must be a whole number")
    n_rows, blocks = _blocks(rows, tokens, name, _known(dtype))
    origin = _Origin.of(tokenizer, model, model_digest, hook, text)
    lease = Lease(files.at("owner"), path)
    _refuse_occupied(files, lease.holder())  # a writer that is only stopped keeps what it has begun
    with lease:
        _refuse_occupied(files)
        shards = _Shards(files, partial(origin.lay_out, dtype, int(seed)), n_rows, lease)
        for block, tokens_BT in blocks:
            if tokens_BT is not None:
                origin.check(tokens_BT)
            shards.push(block, tokens_BT)
        spec = shards.finish()
        lease.check()
        if not files.create("dataset.json", spec.to_json().encode()):
            raise UserError(f"{files.path}: another process has made a set there meanwhile; delete it and write again")
    return open_activations(path)


def _refuse_occupied(files: Files, holder: str = "") -> None:
    """Raise an error where there is a set, or the beginning of one, which nobody but its writer can end."""
    if files.read("dataset.json") is not None:
        raise UsageError(f"{files.path} is an activation set already; write to another path or delete it")
    if files.keys("commits/"):
        whose = "whose writing was cut off; delete it first"
        if holder:
            whose = f"that {holder} is writing; wait for it, or delete it first if that process is dead"
        raise UserError(f"{files.path} has shards of a set {whose}")


class _Shards:
    """Rows as they come, written in shards of full size; the rest at the end."""

    def __init__(
        self,
        files: Files,
        lay_out: Callable[[int, dict[str, int], int | None], SetSpec],
        n_rows: int | None,
        lease: Lease,
    ) -> None:
        """n_rows: of the whole set, if it is known."""
        self._files, self._lay_out, self._n_rows, self._lease = files, lay_out, n_rows, lease
        self._buffer = _Buffer()
        self._writer: Writer | None = None
        self._n_written = 0

    def push(self, block: dict[str, np.ndarray], tokens_BT: np.ndarray | None) -> None:
        """Adds stored rows [n, width] of every source; writes the shards that they fill."""
        self._buffer.push(block, tokens_BT)
        if self._n_rows is not None or self._writer is not None or self._buffer.n_bytes > BUFFER_BYTES:
            writer = self._opened(ENDLESS_ROWS if self._n_rows is None else self._n_rows)
            while self._buffer.n_rows >= _full(writer.spec):
                self._write(writer, _full(writer.spec))

    def finish(self) -> SetSpec:
        """Writes what is left, creates the arrays and computes the statistics; the set as it came out."""
        if self._buffer.n_rows + self._n_written == 0:
            raise UsageError("there are no rows to write")
        writer = self._opened(self._buffer.n_rows)
        while self._buffer.n_rows:
            self._write(writer, min(self._buffer.n_rows, _full(writer.spec)))
        spec = replace(writer.spec, n_shards=self._n_written)
        for array in array_specs(spec).values():
            open_array(self._files, array, "create")
        Writer(self._files, spec).finish()
        return spec

    def _opened(self, n_rows: int) -> Writer:
        if self._writer is None:
            spec = self._lay_out(n_rows, self._buffer.widths, self._buffer.context)
            self._writer = Writer(self._files, spec, self._lease)
        return self._writer

    def _write(self, writer: Writer, n_rows: int) -> None:
        sources, tokens_MT = self._buffer.take(n_rows)
        index = None
        if tokens_MT is not None:
            seq, pos = np.divmod(np.arange(tokens_MT.size), tokens_MT.shape[1])
            first = self._n_written * (writer.spec.sequences_per_shard or 0)
            index = {"token": tokens_MT.reshape(-1), "seq": seq + first, "pos": pos}
        first_row = self._n_written * _full(writer.spec)
        writer.write_shard(self._n_written, sources, index, tokens_MT, first_row=first_row)
        self._n_written += 1


class _Origin(NamedTuple):
    """What rows come from, as far as it is on this machine: a hub model is not fetched to write rows."""

    text: str | None
    tokenizer: str | None
    tokenizer_digest: str | None
    model: str | None
    model_digest: str | None
    hook: str | None
    tokens_of: tuple[tuple[str, int], ...]  # who has rows or texts for so many ids
    model_spec: lm.Spec | None

    @classmethod
    def of(
        cls, tokenizer: str | None, model: str | None, digest: str | None, hook: str | None, text: str | None
    ) -> _Origin:
        """From what a user writes. UsageError for a reference that names nothing, or two things."""
        tokenizer, model = (None if reference is None else lm.resolve(reference) for reference in (tokenizer, model))
        text = None if text is None else texts.resolve(text)
        bounds, spec, tokenizer_digest = [], None, None
        if tokenizer is not None and _is_here(tokenizer):
            loaded = lm.tokenizer(tokenizer, recorded=True)
            tokenizer_digest = loaded.digest
            bounds.append((f"the tokenizer {tokenizer}", loaded.size))
        if model is not None and _is_here(model):
            try:
                spec = lm.read_spec(model, recorded=True)
            except lm.UnsupportedError:
                say_once(f"{model} is not supported: it is recorded, but rows and tokens are not compared with it")
            else:
                bounds.append((f"the model {model}", spec.n_vocab))
                digest = digest or lm.digest(model, recorded=True)
        return cls(text, tokenizer, tokenizer_digest, model, digest, hook, tuple(bounds), spec)

    def lay_out(self, dtype: str, seed: int, n_rows: int, widths: dict[str, int], context: int | None) -> SetSpec:
        """The set of so many rows, at most. UsageError for a hook that the model does not have, or not so wide."""
        self._check_hook(widths)
        unit_rows = 1 if context is None else context
        n_shards, shard_rows, chunk_rows = layout(n_rows, [row_bytes(d, dtype) for d in widths.values()], unit_rows)
        per_shard = None if context is None else shard_rows // unit_rows
        return SetSpec(
            sources=tuple(SourceSpec(n, d, dtype, self.model, self.model_digest, self.hook) for n, d in widths.items()),
            n_shards=min(n_shards, (2**31 - 1) // (per_shard or 1)),
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            seed=seed,
            tokenizer=self.tokenizer,
            tokenizer_digest=self.tokenizer_digest,
            text=self.text,
            context=context,
            sequences_per_shard=per_shard,
        )

    def check(self, tokens_BT: np.ndarray) -> None:
        """Raises UserError for a token or a position that tokenizer or model do not have."""
        for who, n in self.tokens_of:
            check_indices(tokens_BT, n, "token id", f"{who} has {n} ids; give the one that the tokens were made with")
        if self.model_spec is not None and tokens_BT.shape[1] > (n_positions := self.model_spec.n_context):
            raise UserError(
                f"tokens have {tokens_BT.shape[1]} positions, and the model {n_positions}; give shorter sequences"
            )

    def _check_hook(self, widths: dict[str, int]) -> None:
        if self.model_spec is None or self.hook is None:
            return
        width = lm.hook_width(self.model_spec, lm.parse_hook(self.hook, self.model_spec))
        for source, d in widths.items():
            if d != width:
                raise UsageError(
                    f"rows of {source} are {d} wide, and hook={self.hook} of the model {width}; name theirs"
                )


def _is_here(reference: str) -> bool:
    place, _ = redrawn.parted(reference)
    return place == "bundled" or os.path.isabs(place)


class _Buffer:
    """Blocks of rows that wait to be written."""

    def __init__(self):
        self.blocks: deque[dict[str, np.ndarray]] = deque()
        self.tokens: deque[np.ndarray] = deque()
        self.n_rows = self.n_bytes = self.n_pushed = 0
        self.widths: dict[str, int] = {}
        self.context: int | None = None

    def push(self, block: dict[str, np.ndarray], tokens_BT: np.ndarray | None) -> None:
        """Adds stored rows [n, width] of every source. UsageError where they do not fit those before."""
        widths = {name: width(rows) for name, rows in block.items()}
        context = None if tokens_BT is None else tokens_BT.shape[1]
        if self.n_pushed and (widths, context) != (self.widths, self.context):
            raise UsageError(
                f"block {self.n_pushed} has source widths {widths} and context {context}; those before have "
                f"{self.widths} and {self.context}"
            )
        self.widths, self.context = widths, context
        self.n_pushed += 1
        self.n_rows += len(next(iter(block.values())))
        self.n_bytes += sum(rows.nbytes for rows in block.values())
        self.blocks.append(block)
        if tokens_BT is not None:
            self.tokens.append(tokens_BT)

    def take(self, n_rows: int) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """Removes the first n_rows rows, and their tokens."""
        taken: list[dict[str, np.ndarray]] = []
        missing = n_rows
        while missing:
            block = self.blocks.popleft()
            n = len(next(iter(block.values())))
            if n > missing:
                self.blocks.appendleft({name: rows[missing:] for name, rows in block.items()})
                block = {name: rows[:missing] for name, rows in block.items()}
            taken.append(block)
            missing -= min(n, missing)
        self.n_rows -= n_rows
        sources = {name: np.concatenate([block[name] for block in taken]) for name in self.widths}
        self.n_bytes -= sum(rows.nbytes for rows in sources.values())
        if self.context is None:
            return sources, None
        all_tokens = np.concatenate(self.tokens)
        self.tokens = deque([all_tokens[n_rows // self.context :]])
        return sources, all_tokens[: n_rows // self.context]


def _full(spec: SetSpec) -> int:
    """Rows of a full shard: a sequence is never cut."""
    if spec.context is None or spec.sequences_per_shard is None:
        return spec.shard_rows
    return spec.sequences_per_shard * spec.context


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype!r}; use one of {', '.join(DTYPES)}")
    return dtype


def _blocks(
    rows: Any, tokens: Any, name: str, dtype: str
) -> tuple[int | None, Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]]:
    """Total rows (None for a stream) and blocks: stored rows [n, width] of each source, tokens [m, context]."""
    named = rows if isinstance(rows, Mapping) else {name: rows}
    if not named:
        raise UsageError("rows name no source; give at least one array")
    if all(hasattr(values, "shape") for values in named.values()):
        shapes = {source: tuple(values.shape) for source, values in named.items()}
        if any(len(shape) < 2 for shape in shapes.values()):
            raise UsageError(f"rows have shapes {shapes}; rows are [..., d]")
        lengths = {source: len(values) for source, values in named.items()}
        if len(set(lengths.values())) > 1:
            raise UsageError(f"all sources need the same rows, they have {lengths}")
        first = next(iter(named.values()))
        n_bytes = sum(math.prod(values.shape[1:]) * DTYPES[dtype].itemsize for values in named.values())
        step = max(1, SLICE_BYTES // max(n_bytes, 1))
        parts = [slice(low, low + step) for low in range(0, len(first), step)]
        stream = ({source: values[part] for source, values in named.items()} for part in parts)
        if tokens is not None:
            tokens = as_numpy(tokens, "tokens")
            if tokens.shape != tuple(first.shape[:-1]):
                raise UsageError(f"tokens are {tokens.shape}; rows [n, context, d] need {tuple(first.shape[:-1])}")
        token_stream = repeat(None) if tokens is None else (tokens[part] for part in parts)
        n_rows = math.prod(first.shape[:-1])
    else:
        if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
            kinds = {source: type(values).__name__ for source, values in named.items()}
            raise UsageError(f"rows are {kinds}; give arrays, a dict of arrays, or an iterator of either")
        stream = (block if isinstance(block, Mapping) else {name: block} for block in rows)
        token_stream = repeat(None) if tokens is None else iter(tokens)
        n_rows = None
    return n_rows, _paired(stream, token_stream, dtype)


def _paired(
    stream: Iterator[Mapping[str, Any]], token_stream: Iterator[Any], dtype: str
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray | None]]:
    for number, block in enumerate(stream):
        try:
            yield _block(number, block, next(token_stream), dtype)
        except StopIteration:
            raise UsageError(f"tokens end before block {number} of the rows; give one for each") from None
    if not isinstance(token_stream, repeat) and next(token_stream, None) is not None:
        raise UsageError("rows end before the tokens; give a block of rows for each of tokens")


def _block(
    number: int, block: Mapping[str, Any], tokens: Any, dtype: str
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    arrays = {source: as_floats(values, f"rows of {source} (block {number})") for source, values in block.items()}
    shapes = {source: values.shape for source, values in arrays.items()}
    if len({shape[:-1] for shape in shapes.values()}) != 1:
        raise UsageError(f"block {number} has shapes {shapes}; rows are [..., d], alike in all but d")
    tokens_BT = None
    if tokens is not None:
        tokens_BT = as_numpy(tokens, f"tokens (block {number})")
        lead = next(iter(shapes.values()))[:-1]
        if tokens_BT.ndim != 2 or tokens_BT.shape != lead:
            raise UsageError(f"block {number}: tokens are {tokens_BT.shape}; rows [n, context, d] need {lead}")
        if tokens_BT.dtype.kind not in "iu" or (tokens_BT.size and not 0 <= tokens_BT.min() <= tokens_BT.max() < 2**31):
            raise UsageError(f"block {number}: tokens are {tokens_BT.dtype}; they must be integers in [0, 2^31)")
    # A value too large for dtype, or none, is refused with its row when it is written.
    flat = {source: values.reshape(-1, values.shape[-1]) for source, values in arrays.items()}
    # A copy: a generator may fill the same array again.
    return {source: encode(values, dtype, copy=True) for source, values in flat.items()}, tokens_BT
