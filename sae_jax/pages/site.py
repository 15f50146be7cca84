"""The dashboard of a dictionary: what its latents fire on, collected and written as a static site."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sae_jax import lm, storage
from sae_jax.activations.spec import SourceSpec
from sae_jax.activations.store import ActivationSet
from sae_jax.analysis.collect import collect_set
from sae_jax.artifact import Dictionary
from sae_jax.autointerp.explain import in_words, read_labels
from sae_jax.evaluation import base
from sae_jax.evaluation.text import load_model, open_set, say_or_refuse
from sae_jax.pages import export
from sae_jax.pages.about import about, without_folders
from sae_jax.pages.dashboard import Site, refuse_to_overwrite, write_dashboard
from sae_jax.pages.latents import Subject
from sae_jax.progress import Progress, say_once
from sae_jax.types import UsageError, check_indices


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
    format: str = export.SITE,
) -> None:
    """Write the site, or files of what it shows for another program.

    Args:
        d: the dictionary.
        title: what the pages are headed with.
        out: directory of the site; open index.html in it.
        data: the activation set; default: the one the dictionary was trained on.
        model: another reference for the language model, if it moved.
        n_tokens: tokens of the set's text to show examples from.
        split: devices that the language model is split over.
        store: where the activations of the sample are kept; what is there is not made again. None: nowhere. Labels of
            latents that `explain` left there are shown.
        beside: another dictionary to compare with, and its title; it is shown on the same set if that has its sources,
            else on its own.
        format: a name of `export.formats()`.

    Raises:
        UsageError: a set without text, another store at `store`, something at `out` that is not a dashboard, a format
            that does not exist or has no place for the dictionary, or one that shows none beside it.
        HeldError: another process writes a dashboard there.
    """
    if format == export.SITE:
        refuse_to_overwrite(Path(out))
    else:
        export.check(format, d.record, Path(out))
        if beside is not None:
            raise UsageError(f"format {format} has no place for a dictionary beside; export each by itself")
    with storage.lease_of_folder(out) as lease, contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        activations = open_set(d.record, data)
        site = _site(d, title, activations, model, n_tokens, split, store or f"{scratch}/store")
        other = None
        if beside is not None:
            other_d, other_title = beside
            has_all = all(name in activations.sources for name in other_d.record.sites.x)
            on = activations if has_all else open_set(other_d.record, None)
            other = _site(other_d, other_title, on, model, n_tokens, split, f"{scratch}/beside")
        total = site.subject.table.n_latents + (other.subject.table.n_latents if other else 0)
        with Progress("dashboard", total, "latents", first="") as progress:
            if format != export.SITE:
                export.write(format, Path(out), export.Exported(site, d.record), progress.update, lease)
                return
            write_dashboard(Path(out), site, other, progress=progress.update, lease=lease)


def _site(
    d: Dictionary,
    title: str,
    activations: ActivationSet,
    model: str | None,
    n_tokens: int,
    split: int,
    store: str | os.PathLike[str],
) -> Site:
    """What is shown of a dictionary, in a sample of a set whose activations are kept at `store`."""
    record = d.record
    target = activations.source(record.sites.y[-1])  # what latents write to, nearest to the logits
    if (tokenizer := model or activations.spec.tokenizer) is None:
        activations.check_text()
        raise UsageError(f"{activations.path} names no tokenizer; give model=, one that has the tokenizer of the set")
    vocabulary = lm.tokenizer(tokenizer, recorded=True)
    if activations.spec.tokenizer_digest not in (None, vocabulary.digest):
        say_or_refuse(f"the tokenizer of {tokenizer} is not that of {activations.path}", model, "model")
    effects = _effects(target, activations, model, split)
    table = collect_set(d.sae, activations, record.sites.x, n_tokens, store)
    if table is None:
        raise UsageError(f"{store} lacks parts that other workers are to make; run sae-jax collect there to its end")
    cure = f"{tokenizer} is not the tokenizer of {activations.path}; name the one that is with --model"
    check_indices(table.sequences, vocabulary.size, "token id", cure)
    is_padded = activations.spec.sequence == "document"
    subject = Subject(
        table=table,
        w_dec=np.asarray(d.w_dec[:, -target.d :]),
        n_tokens=vocabulary.size,
        logit_effects=effects,
        labels={latent: in_words(label) for latent, label in read_labels(store).items()},
        lengths=_lengths(table.sequences, vocabulary.separator_id) if is_padded else None,
    )
    metrics = [
        (description.label, record.metrics[name], description.text)
        for name, description in base.descriptions().items()
        if description.in_table and name in record.metrics
    ]
    tokens = vocabulary.tokens(range(vocabulary.size))
    return Site(subject, tokens, title, about(record), metrics, config=without_folders(record.to_json()))


def _effects(target: SourceSpec, activations: ActivationSet, model: str | None, split: int) -> Any:
    """What rows that latents write to a source do to the logits; None, and it is said why, where that is not known."""
    if target.hook is None:
        return None
    if target.hook.rpartition(".")[0] in lm.READ_BY_BLOCK:
        say_once(f"{target.hook} does not join the residual stream: its latents have no direct effect on the logits")
        return None
    if activations.spec.backend == "torch":
        say_once(f"{activations.path} was made with harvest.backend=torch: pages are without effects on the logits")
        return None
    if not (reference := target.model and lm.moved(model, target.model)):
        return None
    try:
        return _logit_effects(reference, target, activations, model, split)
    except lm.UnsupportedError:
        say_once(f"{reference} is not supported: pages are without effects on the logits")
        return None


def _lengths(sequences: np.ndarray, padding: int) -> np.ndarray:
    """i64[n]: tokens of each sequence i32[n, T] without the padding at its end."""
    return sequences.shape[1] - (sequences[:, ::-1] != padding).argmax(axis=1)


def _logit_effects(
    reference: str, target: SourceSpec, activations: ActivationSet, given: str | None, split: int
) -> Any:
    model = load_model(activations, reference, split)
    assert isinstance(model, lm.LanguageModel)
    if target.model_digest not in (None, model.digest):
        say_or_refuse(f"the weights of {reference} are not those that {activations.path} was made with", given, "model")
    effect = jax.jit(lm.logit_effect, static_argnums=1)
    site = lm.parse_hook(str(target.hook), model.spec)
    return lambda rows_ND: np.asarray(effect(model, site, rows_ND))
