"""The dashboard of a dictionary: what its latents fire on, collected and written as a static site."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from sae_jax import lm, storage
from sae_jax.activations.forward import hook_of
from sae_jax.activations.spec import SourceSpec
from sae_jax.activations.store import ActivationSet
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.examples import Activations
from sae_jax.artifact import Dictionary, digest_of
from sae_jax.autointerp.explain import in_words, read_labels
from sae_jax.evaluation import base, prompts
from sae_jax.evaluation.text import load_model, open_set, say_or_refuse
from sae_jax.pages import export
from sae_jax.pages.about import about, without_folders
from sae_jax.pages.dashboard import Site, refuse_to_overwrite, write_dashboard, write_page
from sae_jax.pages.labels import read_labels_file
from sae_jax.pages.latents import Pattern, SourceRows, Subject, chosen
from sae_jax.pages.patterns import patterns_of, strongest
from sae_jax.progress import Progress, say_once
from sae_jax.types import UsageError, check_indices

# On these pages latents are silent in the sample, too.
_LABELS = {"dead_fraction": "dead, in training", "silent_fraction": "silent, held-out"}


def write_site(
    d: Dictionary,
    title: str,
    out: str | os.PathLike[str],
    data: str | None = None,
    model: str | None = None,
    n_tokens: int = 400_000,
    split: int = 1,
    store: str | os.PathLike[str] | None = None,
    beside: tuple[Dictionary, str] | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
    latents: Sequence[int] | None = None,
    n_patterns: int = 64,
    single_file: bool = False,
    format: str = export.SITE,
) -> None:
    """Write the site, or files of what it shows for another program.

    Args:
        d: the dictionary.
        title: what the pages are headed with.
        out: directory of the site; open index.html in it. Of a single file, its name.
        data: the activation set; default: the one the dictionary was trained on.
        model: another reference for the language model, if it moved.
        n_tokens: tokens of the set's text to show examples from.
        split: devices that the language model is split over.
        store: where the activations of the sample are kept; what is there is not made again. None: nowhere. Labels of
            latents that `explain` left there are shown.
        beside: another dictionary to compare with, and its title; it is shown on the same set if that has its sources,
            else on its own.
        labels: a file of labels (labels.py); it wins over those of the store.
        latents: those that get a page; None: all.
        n_patterns: latents, of those that write most, whose N2G patterns are made.
        single_file: all in one page; for some latents alone.
        format: a name of `export.formats()`.

    Raises:
        UsageError: a set without text, another store at `store`, something at `out` that is not a dashboard, a format
            that does not exist or has no place for the dictionary, or one that shows none beside it.
        HeldError: another process writes a dashboard there.
    """
    is_site = format == export.SITE
    shown = _Shown(model, n_tokens, split, labels, latents, n_patterns if is_site else 0)
    if not is_site:
        export.check(format, d.record, storage.path(out))
        if beside is not None or single_file:
            raise UsageError(
                f"format {format} has a folder of its own for one dictionary; leave out beside and single_file"
            )
    if single_file and (latents is None or beside is not None):
        raise UsageError("a single file is of some latents of one dictionary; name them (latents), without beside")
    if is_site:
        refuse_to_overwrite(storage.path(out), single_file)
    with storage.lease_of_folder(out) as lease, contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        activations = open_set(d.record, data)
        site = _site(d, title, activations, shown, store or f"{scratch}/store")
        other = None
        if beside is not None:
            other_d, other_title = beside
            has_all = all(name in activations.sources for name in other_d.record.sites.x)
            on = activations if has_all else open_set(other_d.record, None)
            all_of_other = replace(shown, labels=None, latents=None)
            other = _site(other_d, other_title, on, all_of_other, f"{scratch}/beside")
        total = len(site.numbers) + (len(other.numbers) if other else 0)
        with Progress("dashboard", total, "latents", first="") as progress:
            if not is_site:
                export.write(format, storage.path(out), export.Exported(site, d.record), progress.update, lease)
            elif single_file:
                write_page(storage.path(out), site, progress.update)
            else:
                write_dashboard(storage.path(out), site, other, progress=progress.update, lease=lease)


def _site(d: Dictionary, title: str, activations: ActivationSet, shown: _Shown, store: str | os.PathLike[str]) -> Site:
    """What is shown of a dictionary, in a sample of a set whose activations are kept at `store`."""
    record, model = d.record, shown.model
    targets = [activations.source(name) for name in record.sites.y]
    if (tokenizer := model or activations.spec.tokenizer) is None:
        activations.check_text()
        raise UsageError(f"{activations.path} names no tokenizer; give model=, one that has the tokenizer of the set")
    vocabulary = lm.tokenizer(tokenizer, recorded=True)
    if activations.spec.tokenizer_digest not in (None, vocabulary.digest):
        say_or_refuse(f"the tokenizer of {tokenizer} is not that of {activations.path}", model, "model")
    n_latents = len(d.w_dec)
    labels = read_labels_file(shown.labels, n_latents) if shown.labels is not None else {}
    numbers = chosen(n_latents, shown.latents)
    models = _Models(activations, shown)
    effects = [_effects(target, activations, models) for target in targets]
    table = collect_set(d.sae, activations, record.sites.x, shown.n_tokens, store)
    if table is None:
        raise UsageError(f"{store} lacks parts that other workers are to make; run sae-jax collect there to its end")
    cure = f"{tokenizer} is not the tokenizer of {activations.path}; name the one that is with --model"
    check_indices(table.sequences, vocabulary.size, "token id", cure)
    is_padded = activations.spec.sequence == "document"
    w_dec = np.split(np.asarray(d.w_dec), np.cumsum([target.d for target in targets])[:-1], axis=1)
    scales = record.normalisation.y or (1.0,) * len(targets)
    several = [
        SourceRows(target.name, rows, scale if record.normalisation.is_folded else 1.0, effect)
        for target, rows, scale, effect in zip(targets, w_dec, scales, effects, strict=True)
    ]
    subject = Subject(
        table=table,
        w_dec=w_dec[-1],  # what latents write to, nearest to the logits
        n_tokens=vocabulary.size,
        logit_effects=effects[-1],
        labels={latent: in_words(label) for latent, label in read_labels(store).items()} | labels,
        lengths=_lengths(table.sequences, vocabulary.separator_id) if is_padded else None,
        sources=several if len(several) > 1 else (),
        patterns=_patterns(d, models, vocabulary, table, w_dec[-1], numbers, shown.n_patterns),
    )
    metrics = [
        (_LABELS.get(name, description.label), record.metrics[name], description.text)
        for name, description in base.descriptions().items()
        if description.in_table and name in record.metrics
    ]
    tokens = vocabulary.tokens(range(vocabulary.size))
    config, latents = without_folders(record.to_json()), None if shown.latents is None else numbers
    return Site(subject, tokens, title, about(record), metrics, config, latents, digest_of(d.sae))


def _patterns(
    d: Dictionary,
    models: _Models,
    tokenizer: lm.Tokenizer,
    table: Activations,
    w_dec: np.ndarray,
    latents: np.ndarray,
    n: int,
) -> dict[int, list[Pattern]]:
    """N2G patterns of n latents; none where no language model was needed so far, or rows come from several."""
    encodes = d.record.encodes
    if not n or len(models.loaded) != 1 or any(source.hook is None for source in encodes):
        return {}
    ((reference, model),) = models.loaded.items()
    if any(source.model is None or lm.moved(models.shown.model, source.model) != reference for source in encodes):
        return {}
    shown = strongest(table, w_dec, latents, n)
    if len(shown) < np.count_nonzero(table.counts[latents]):
        say_once(f"patterns (N2G) are made of the {len(shown):,} latents that write most; --patterns N makes more")
    hooks = [tuple(hook_of(source.hook or "", model) for source in side) for side in (encodes, d.record.reconstructs)]
    first = models.activations.spec.first_token
    begins_with = tokenizer.separator_id if first is None else first
    return patterns_of(prompts.Subject(d.sae, model, tokenizer, hooks[0], hooks[1], begins_with), table, shown)


@dataclass(frozen=True)
class _Shown:
    """What is shown of a dictionary, beside all that its record and its set say."""

    model: str | None = None  # another reference for the language model, if it moved
    n_tokens: int = 400_000  # of the set's text, to show examples from
    split: int = 1  # devices that the language model is split over
    labels: str | os.PathLike[str] | None = None  # a file of labels (labels.py); it wins over those of the store
    latents: Sequence[int] | None = None  # those that get a page; None: all
    n_patterns: int = 64  # latents, of those that write most, whose N2G patterns are made

    def __post_init__(self) -> None:
        if self.n_patterns < 0:
            raise UsageError(f"patterns={self.n_patterns} must be at least 0")


@dataclass(frozen=True)
class _Models:
    """The language models of a set, each loaded once, when it is needed."""

    activations: ActivationSet
    shown: _Shown
    loaded: dict[str, lm.LanguageModel] = field(default_factory=dict)

    def load(self, reference: str) -> lm.LanguageModel:
        if reference not in self.loaded:
            model = load_model(self.activations, reference, self.shown.split)
            assert isinstance(model, lm.LanguageModel)
            self.loaded[reference] = model
        return self.loaded[reference]


def _effects(target: SourceSpec, activations: ActivationSet, models: _Models) -> Any:
    """What rows that latents write to a source do to the logits; None, and it is said why, where that is not known."""
    if target.hook is None:
        return None
    if target.hook.rpartition(".")[0] in lm.READ_BY_BLOCK:
        say_once(f"{target.hook} does not join the residual stream: its latents have no direct effect on the logits")
        return None
    if activations.spec.backend == "torch":
        say_once(f"{activations.path} was made with harvest.backend=torch: pages are without effects on the logits")
        return None
    given = models.shown.model
    if not (reference := target.model and lm.moved(given, target.model)):
        return None
    try:
        model = models.load(reference)
    except lm.UnsupportedError:
        say_once(f"{reference} is not supported: pages are without effects on the logits")
        return None
    if target.model_digest not in (None, model.digest):
        say_or_refuse(f"the weights of {reference} are not those that {activations.path} was made with", given, "model")
    effect = jax.jit(lm.logit_effect, static_argnums=1)
    site = lm.parse_hook(str(target.hook), model.spec)
    return lambda rows_ND: np.asarray(effect(model, site, rows_ND))


def _lengths(sequences: np.ndarray, padding: int) -> np.ndarray:
    """i64[n]: tokens of each sequence i32[n, T] without the padding at its end."""
    return sequences.shape[1] - (sequences[:, ::-1] != padding).argmax(axis=1)
