"""Run text through a language model and store its activations: the set that dictionaries are trained on.

    text -> token sequences -> model up to the last hook -> rows of a shard -> disk
                                (batch i+1 runs while i is fetched; shard s is written while s+1 is computed)

Several models with one tokenizer, such as a model and what fine-tuning made of it, run on the same sequences: their
sources share rows and order.

The content of a shard depends on the settings and its number alone. So a harvest resumes when the command is rerun, and
workers on any machines share it by `--shard i/n`; they need not know of each other.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations import places, store, tokens
from sae_jax.activations import text as texts
from sae_jax.activations.ahead import Ahead
from sae_jax.activations.conversations import ALL, Conversations, roles_of
from sae_jax.activations.fields import COLUMN
from sae_jax.activations.forward import Forward, hooks_of, source_name
from sae_jax.activations.rows import row_bytes
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.shards import empty_rows, index_of, take_shard
from sae_jax.activations.sinks import MULTIPLE, Sinks
from sae_jax.activations.spec import SetSpec, SourceSpec, layout
from sae_jax.lm.chat import first_template
from sae_jax.progress import Progress, console, say_once
from sae_jax.storage import Files, Lease
from sae_jax.types import UsageError

N_FILES_NAMED = 5
N_CONVERSATIONS_TRIED = 100  # of a dataset of the hub, in which a role has to be
# Shards that are tokenised while one is computed, in a thread. Worker processes would bring nothing: the tokenizer
# works in threads of its own, one a core, without Python's lock. Of 8.3 s that two cores took for 3.8 million tokens of
# source code 1.0 s was in Python, which leaves room for millions of tokens a second.
SHARDS_AHEAD = 1


def harvest(
    config: HarvestConfig, out: str, shard: tuple[int, int] = (0, 1), stop: Callable[[], bool] = lambda: False
) -> SetSpec:
    """Make the shards i, i + n, i + 2n, ... of an activation set that are not there yet.

    Args:
        config: what to store.
        out: directory or URL of the set.
        shard: (i, n), this worker's number and the number of workers.
        stop: asked before each shard: whether to leave it and those that follow to another time.

    Raises:
        HeldError: another process is at one of these shards.
        UsageError: a model, hook or text that does not exist, or a set of other settings at `out`.
    """
    with Lease(Files(out).at(f"owner-{shard[0]}-of-{shard[1]}"), out):
        return _harvest(config, out, shard, stop)


def _harvest(config: HarvestConfig, out: str, shard: tuple[int, int], stop: Callable[[], bool]) -> SetSpec:
    spec, scanned, text, forward, n_sequences = prepare(config, out)
    writer = store.create(out, spec)
    if config.tokens == 0:
        places.note_count(out, n_sequences)
    done = writer.committed()
    mine = range(shard[0], spec.n_shards, shard[1])
    todo = [s for s in mine if s not in done]
    shard_tokens = (spec.sequences_per_shard or 0) * config.context
    start = (len(mine) - len(todo)) * shard_tokens
    known = places.Places(out, spec.sequences_per_shard or 1)
    # Shards come in order, so the text before the first of them is tokenised, too, from the last known place on.
    first = "running the first batch" if forward.is_compiled else "compiling"
    if todo and known.before(todo[0] * known.every)[0] < todo[0] * known.every:
        first = f"tokenising the text before shard {todo[0]}; {first}"
    unread = dict.fromkeys(scanned.files)
    with Progress("harvest", len(mine) * shard_tokens, "tokens", start, first=first) as progress:
        stream = () if stop() else shards_of_text(config, text, todo, spec, lambda file: unread.pop(file, None), known)
        with Ahead(stream, SHARDS_AHEAD, "tokenise") as ahead:
            _write_shards(forward, text.tokenizer, spec, writer, ahead, progress, start, stop)
    if len(missing := set(range(spec.n_shards)) - writer.committed()) == 0:
        writer.finish()
        places.remove(out)
    elif not stop():
        console.print(f"{out}: {len(missing)} of {spec.n_shards} shards are still to come from other workers")
    if unread and spec.n_shards - 1 in todo and not stop():
        n, order = len(scanned.files), "an order by seed" if config.shuffle else "order of name"
        console.print(
            f"{n - len(unread)} of {n} files were read, in {order}; harvest.tokens={config.tokens} ended before "
            f"{next(iter(unread))}{f' and {len(unread) - 1} more' * (len(unread) > 1)}. harvest.tokens=0 reads all"
        )
    return spec


class Prepared(NamedTuple):
    """What has to be known, and loaded, before the first shard."""

    spec: SetSpec
    scanned: texts.Scan
    text: tokens.TokenText
    forward: Forward
    n_sequences: int  # of the set, at most


def prepare(config: HarvestConfig, out: str | None = None, devices: list[jax.Device] | None = None) -> Prepared:
    """Read models, tokenizer and text.

    Args:
        config: what to store.
        out: a set that may have been begun; None: there is none.
        devices: those that the models run on; None: all local ones.

    Raises as `harvest`.
    """
    devices = devices or jax.local_devices()
    mesh = meshes.lm_mesh(config.split, devices[:1] if config.backend == "torch" else devices)
    references = {name: lm.resolve(reference) for name, reference in config.models().items()}
    template = None if config.chat is None else first_template([*references.values()])
    load = lm.load_torch if config.backend == "torch" else partial(lm.load, mesh=mesh)
    models = {name: load(reference, config.precision, recorded=True) for name, reference in references.items()}
    tokenizer = shared_tokenizer(models)
    n_vocab = min(model.spec.n_vocab for model in models.values())
    chat = None
    if template is not None and config.chat is not None:
        chat = Conversations(template, tokenizer, config.chat, n_vocab)
    spec, scanned, text, n_sequences = plan(config, models, tokenizer, chat, out)
    forward = Forward(models, config, mesh)
    if config.max_norm_multiple == "auto":
        spec = replace(spec, max_norm_multiple=_multiple(out, text, forward))
    return Prepared(spec, scanned, text, forward, n_sequences)


def _multiple(out: str | None, text: tokens.TokenText, forward: Forward) -> float | None:
    """What `auto` means for this set: what was decided when it was begun, or what the first sequences show."""
    if out is not None and Files(out).read("dataset.json") is not None:
        return store.read_spec(Files(out)).max_norm_multiple
    ids_ST, text_ST = text.stacked(0, forward.batch)
    sinks = Sinks()
    is_first = jax.process_index() == 0  # of several that train on live data
    with Progress("first sequences", len(ids_ST), "sequences", silent=not is_first) as progress:
        sinks.add(ids_ST, text_ST, forward.look(ids_ST))
        progress.update(len(ids_ST))
    if not sinks.n:
        return None
    if is_first:
        console.print(
            f"first {len(ids_ST)} sequences: {sinks.told(text.tokenizer)}. Rows above {MULTIPLE:g} medians are left "
            f"out of this set; harvest.max_norm_multiple=none keeps them"
        )
    return MULTIPLE


def _write_shards(
    forward: Forward,
    tokenizer: lm.Tokenizer,
    spec: SetSpec,
    writer: store.Writer,
    stream: Ahead[tuple[int, np.ndarray, np.ndarray]],
    progress: Progress,
    done: int,
    stop: Callable[[], bool],
) -> None:
    """Run shard after shard through the models, and write each while the next one is computed.

    A batch that one shard does not fill goes on with the next.
    """
    sinks = Sinks()
    rows_written, first, pending = 0, None, None  # first: (tokens done, time) once the models are compiled
    disk_seconds = 0.0

    def show() -> None:
        nonlocal first
        now = time.monotonic()
        first = first or (done, now, stream.wait_seconds)
        if done == first[0]:
            progress.update(done, f"{rows_written:,} rows written")
            return
        seconds = now - first[1]
        text, disk = (stream.wait_seconds - first[2]) / seconds, disk_seconds / seconds
        waits = f"waits for text {text:.0%}, disk {disk:.0%}"
        rate = f"{(done - first[0]) / seconds:,.0f} tokens/s"
        progress.update(done, f"{rows_written:,} rows written  {rate}  {waits}")

    def on_block(n_tokens: int) -> None:
        nonlocal done
        done += n_tokens
        show()

    with ThreadPoolExecutor(1) as disk:
        shards, for_models = itertools.tee(stream)
        blocks = forward(ids_ST for _, ids_ST, _ in for_models)
        for number, ids_ST, text_ST in shards:
            if stop():
                break
            acts = empty_rows(spec, ids_ST.size)
            keep_ST = take_shard(blocks, ids_ST, text_ST, spec.max_norm_multiple, acts, on_block, sinks)
            rows = {name: x_ND[keep_ST.ravel()] for name, x_ND in acts.items()}
            del acts
            if pending is not None:
                began = time.monotonic()
                pending.result()
                disk_seconds += time.monotonic() - began
            pending = disk.submit(writer.write_shard, number, rows, index_of(spec, number, ids_ST, keep_ST), ids_ST)
            rows_written += int(keep_ST.sum())
            show()
        if pending is not None:
            pending.result()
    if sinks.n:
        multiple = spec.max_norm_multiple
        what = "kept" if multiple is None else f"above {multiple:g} medians they are left out"
        console.print(f"{sinks.told(tokenizer)}; {what}")


def shared_tokenizer(models: Mapping[str, lm.LanguageModel | lm.TorchModel]) -> lm.Tokenizer:
    """The tokenizer of all models.

    Raises UsageError where one has another, to which the same ids would be other text, and UserError where the
    embedding of one has too few rows.
    """
    (name, first), *others = models.items()
    tokenizer = lm.tokenizer(first.reference, *(model.spec.n_vocab for model in models.values()), recorded=True)
    for other, model in others:
        its = lm.tokenizer(model.reference, recorded=True)
        if (its.vocabulary, its.separator_id) != (tokenizer.vocabulary, tokenizer.separator_id):
            raise UsageError(
                f"harvest.model: {other} ({model.reference}) has another tokenizer than {name} ({first.reference}); "
                f"models of one set read the same tokens"
            )
    return tokenizer


def plan(
    config: HarvestConfig,
    models: Mapping[str, lm.LanguageModel | lm.TorchModel],
    tokenizer: lm.Tokenizer,
    chat: Conversations | None = None,
    out: str | None = None,
) -> tuple[SetSpec, texts.Scan, tokens.TokenText, int]:
    """The set that these settings describe, the same on every machine, what its text is made of, its sequences.

    The last is how many sequences there are, at most; of a whole text they are counted if a set at `out` does not say.
    """
    sources = _sources(config, models)  # before the text, which takes longer: they may be refused
    read = _read_texts(config)
    text = tokens.TokenText(
        read.text,
        tokenizer,
        config.context,
        config.fields(),
        read.scanned.files,
        chat,
        tokenizer.first_id,
        config.seed if config.shuffle else None,
        config.sequence,
    )
    spec_of = partial(_spec, config, sources, tokenizer, chat, read)
    n_sequences = _n_sequences(config, text, read.scanned, lambda: places.count(out, spec_of))
    return spec_of(n_sequences), read.scanned, text, n_sequences


def _sources(config: HarvestConfig, models: Mapping[str, lm.LanguageModel | lm.TorchModel]) -> tuple[SourceSpec, ...]:
    """The activations of each model at each hook."""
    return tuple(
        SourceSpec(source_name(name, hook), width, config.dtype, model.reference, model.digest, str(hook))
        for name, model in models.items()
        for hook, width in hooks_of(config, model).items()
    )


class _Texts(NamedTuple):
    """What is harvested, and what evaluation uses."""

    text: str
    scanned: texts.Scan
    heldout: str | None
    heldout_digest: str | None


def _read_texts(config: HarvestConfig) -> _Texts:
    """Both texts, read once. UsageError where they share files or are the same, or lack the role that rows are of."""
    text = texts.resolve(config.text)
    heldout = None if config.heldout is None else texts.resolve(config.heldout)
    scanned = _scan(text, config)
    if config.chat not in (None, ALL, *scanned.roles):
        raise UsageError(
            f"harvest.chat={config.chat!r} is the role of no message; use one of {', '.join((*scanned.roles, ALL))}"
        )
    if heldout is None:
        return _Texts(text, scanned, None, None)
    apart = _scan(heldout, config)
    if apart.digest == scanned.digest:
        raise UsageError(f"harvest.heldout={config.heldout!r} is the text that is harvested; name another one")
    if both := {*map(os.path.realpath, scanned.files)} & {*map(os.path.realpath, apart.files)}:
        raise UsageError(f"harvest.heldout: {min(both)} is part of harvest.text, too; keep it out of one of them")
    return _Texts(text, scanned, heldout, apart.digest)


def _spec(
    config: HarvestConfig,
    sources: tuple[SourceSpec, ...],
    tokenizer: lm.Tokenizer,
    chat: Conversations | None,
    read: _Texts,
    n_sequences: int,
) -> SetSpec:
    """The set of so many sequences. What is as it is by default is left out, so that a set keeps its spec."""
    n_shards, shard_rows, chunk_rows = layout(
        n_sequences * config.context, [row_bytes(source.d, source.dtype) for source in sources], config.context
    )
    return SetSpec(
        sources=sources,
        n_shards=n_shards,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        seed=config.seed,
        tokenizer=sources[0].model,
        tokenizer_digest=tokenizer.digest,
        text=read.text,
        text_digest=read.scanned.digest,
        text_column=None if config.text_column == COLUMN else config.text_column,
        text_template=config.fields().template,
        chat=config.chat,
        shuffled=config.shuffle or None,
        chat_template_digest=None if chat is None else chat.template.digest,
        heldout=read.heldout,
        heldout_digest=read.heldout_digest,
        first_token=tokenizer.first_id,
        context=config.context,
        sequence="document" if config.sequence == "document" else None,
        sequences_per_shard=-(-n_sequences // n_shards),
        max_norm_multiple=None if config.max_norm_multiple == "auto" else config.max_norm_multiple,
        precision=None if config.precision == "float32" else config.precision,
        backend="torch" if config.backend == "torch" else None,
    )


def _n_sequences(
    config: HarvestConfig, text: tokens.TokenText, scanned: texts.Scan, noted: Callable[[], int | None]
) -> int:
    """How many sequences the set has, at most. `noted`: how many a set that was begun says that its whole text has."""
    asked = config.tokens // config.context
    if scanned.n_bytes and config.sequence == "document":
        return min(asked or scanned.n_documents, scanned.n_documents)
    if not asked:
        return noted() or _count(text, scanned.n_bytes)
    if not scanned.n_bytes:
        return asked
    # A token is at least a byte: a short text must not be cut as if it were as long as was asked for.
    return min(asked, -(-scanned.n_bytes // (config.context - (text.first is not None))))


def _scan(text: str, config: HarvestConfig) -> texts.Scan:
    """What a text is made of; says what is left out."""
    fields, n_bytes = config.fields(), texts.local_bytes(text)
    with Progress("reading text", n_bytes, "bytes", silent=not n_bytes, first="") as progress:
        scanned = texts.scan(text, fields, progress.update, config.skip_unreadable)
    if not scanned.n_bytes:  # of the hub: whether it can be read at all, before anything is written
        first = list(itertools.islice(texts.documents(text, fields), N_CONVERSATIONS_TRIED if fields.is_chat else 1))
        roles = set().union(*map(roles_of, first)) if fields.is_chat else ()
        scanned = replace(scanned, roles=tuple(sorted(roles)))
    n_files = len(scanned.files) + sum(map(len, scanned.left_out.values()))
    for reason, paths in scanned.left_out.items():
        named = ", ".join(map(str, paths[:N_FILES_NAMED]))
        more = f" and {len(paths) - N_FILES_NAMED} more" if len(paths) > N_FILES_NAMED else ""
        say_once(f"{len(paths)} of {n_files} files are left out, {reason}: {named}{more}")
    if scanned.n_empty:
        n = scanned.n_documents + scanned.n_empty
        say_once(f"{scanned.n_empty:,} of {n:,} documents of {text} are empty, and left out")
    return scanned


def _count(text: tokens.TokenText, n_bytes: int) -> int:
    """Sequences of a whole text."""
    n_read = 0
    with Progress("counting tokens", n_bytes, "bytes", silent=not n_bytes, first="") as progress:

        def on_read(file: str, n_bytes: int) -> None:
            nonlocal n_read
            n_read += n_bytes
            progress.update(n_read)

        return sum(1 for _ in text.sequences(on_read=on_read))


def shards_of_text(
    config: HarvestConfig,
    text: tokens.TokenText,
    todo: Sequence[int],
    spec: SetSpec,
    on_file: Callable[[str], Any],
    known: places.Places | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(shard, its sequences i32[n, T], bool[n, T]: which are text) for the shards `todo`, in one pass over the text.

    `on_file` is called with each file that a sequence has reached, and again as more of it is read; `known` says where
    shards begin, as far as that is known.
    """
    if not todo:
        return
    per_shard, remaining = spec.sequences_per_shard or 0, set(todo)
    start, stop = todo[0] * per_shard, (todo[-1] + 1) * per_shard

    def on_read(file: str, n_bytes: int) -> None:
        on_file(file)

    lengths: list[int] = []  # of documents that are sequences of their own, in tokens
    stream = text.sequences(start, stop, on_read, lengths.append, known)
    for shard, group in itertools.groupby(enumerate(stream, start), key=lambda item: item[0] // per_shard):
        if shard in remaining:
            remaining.remove(shard)
            ids, marks = zip(*(pair for _, pair in group), strict=True)
            yield shard, np.stack(ids), np.stack(marks)
    if over := [length - config.context for length in lengths if length > config.context]:
        say_once(
            f"{len(over):,} of {len(lengths):,} documents are longer than harvest.context={config.context} tokens, and "
            f"cut: {sum(over):,} of {sum(lengths):,} tokens are left out"
        )
    # The text may end before the number of tokens asked for; what is left of the set is empty, not missing.
    if remaining:
        say_once(f"{config.text} ends before harvest.tokens={config.tokens}; {len(remaining)} shards stay empty")
    for shard in sorted(remaining):
        yield shard, np.zeros((0, config.context), np.int32), np.zeros((0, config.context), bool)
