"""Explanations of latents by a judge, and how well they predict where the latents fire.

    simulation   the judge predicts, by the explanation, the latent's strength on each token of ten texts that it was
                 not made from: five of the next strongest, and five at random of the others in which the latent fires.
                 The score is the correlation of predicted and true strengths over all these tokens; of the five random
                 texts alone it is told beside it (Bills et al. 2023; Cunningham et al. 2023, arXiv 2309.08600). A
                 prediction that is the same on all tokens scores 0.
    detection    the judge says in which of fourteen shuffled texts the latent fires: two of the next strongest, two
                 drawn by their values, ten at random of all texts. The score is the share of texts that it is right
                 about (Karvonen et al. 2025, arXiv 2503.09532); a judge that always says no gets about ten of
                 fourteen, so the mean of the shares among texts in which it fires and does not is told beside it.

Labels are kept in STORE/labels.jsonl, the judge's answers in STORE/answers.jsonl.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sae_jax import storage
from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.analysis.store import Store
from sae_jax.autointerp import questions
from sae_jax.autointerp.fragments import N_SHOWN, Shuffled, Simulated, Texts
from sae_jax.autointerp.judge import Judge, JudgeConfig, JudgeError, RequestError, Usage
from sae_jax.errors import printable
from sae_jax.progress import Progress, console
from sae_jax.types import UsageError, UserError

Score = Literal["simulation", "detection"]
SCORES = {
    "simulation": ("simulation", "simulation_random"),
    "detection": ("detection", "detection_balanced"),
}
N_TEXTS = {None: N_SHOWN, "simulation": Simulated.N_TEXTS, "detection": Shuffled.N_TEXTS}  # in which a latent must fire

Label = dict[str, Any]  # latent, explanation, model, prompts (version of the words), seed; and scores


@dataclass(frozen=True)
class Explained:
    """What came of a run."""

    labels: list[Label]
    failures: dict[int, str]  # by latent, why there is no label
    usage: Usage

    def mean(self, name: str) -> tuple[float, tuple[float, float] | None]:
        """The mean of a score over latents, and its interval of 90 % by a bootstrap over them."""
        return mean_and_interval(np.array([label[name] for label in self.labels]))


def explain(
    path: storage.StrPath,
    config: JudgeConfig,
    latents: Sequence[int] = (),
    n: int | None = None,
    score: Score | None = None,
    batch: int = 5,
    seed: int = 0,
    tokenizer: str | None = None,
) -> Explained:
    """Explain latents of a store, with what can be had: whatever fails is told by latent.

    Args:
        path: of a finished store.
        config: the judge.
        latents: which; or
        n: so many at random, of those that fire in texts enough.
        score: how explanations are scored.
        batch: texts in one request of a score.
        seed: of what is drawn.
        tokenizer: another reference for the tokenizer of the text, if it moved.

    Raises:
        UsageError: a latent that does not exist, or neither or both of `latents` and `n`.
        UserError: a store in which no latent fires in texts enough.
        JudgeError: no request can come to anything, and none has.
    """
    if batch < 1:
        raise UsageError(f"batch={batch} must be at least 1")
    store = Store(path)
    texts = Texts.of(store, tokenizer)
    chosen = choose(texts, str(path), latents, n, N_TEXTS[score], seed)
    failures = {
        latent: f"it fires in {n_texts:,} texts, and {score or 'an explanation'} takes {N_TEXTS[score]}"
        for latent in chosen
        if (n_texts := texts.n_texts(latent)) < N_TEXTS[score]
    }
    labels = []
    with (
        storage.Lease(store.path / "explain.owner", f"the labels of {path}"),
        Judge(config, store.path / "answers.jsonl") as judge,
        storage.Lines(store.path / "labels.jsonl") as lines,
    ):
        before = {(label["latent"], label["model"]): label for label in _read(store.path)}
        asked = [latent for latent in chosen if latent not in failures]
        for latent, label in _ask_all(texts, judge, asked, score, batch, seed):
            if isinstance(label, str):
                failures[latent] = label
                continue
            label = _with_earlier_scores(label, before.get((latent, config.model)))
            labels.append(label)
            lines.write(label)
        lines.close()
        _compact(store.path)
    return Explained(sorted(labels, key=lambda label: label["latent"]), dict(sorted(failures.items())), judge.usage)


def read_labels(path: storage.StrPath) -> dict[int, Label]:
    """The latest label of each latent of a store."""
    return {label["latent"]: label for label in _read(storage.path(path))}


def in_words(label: Label) -> tuple[str, str]:
    """(explanation, who gave it and how well it predicts) of a label."""
    scores = [f"{name} {label[name]:.2f}" for names in SCORES.values() for name in names if name in label]
    return printable(label["explanation"]), "; ".join([f"explained by {printable(label['model'])}", *scores])


def choose(texts: Texts, where: str, latents: Sequence[int], n: int | None, n_texts: int, seed: int) -> list[int]:
    """These latents, or `n` at random of those that fire in `n_texts` texts or more. Errors as `explain`."""
    if bool(latents) == (n is not None):
        raise UsageError("name latents, or say how many are drawn (n), one of the two")
    n_latents = texts.table.n_latents
    if strange := [latent for latent in latents if not 0 <= latent < n_latents]:
        raise UsageError(f"latent {strange[0]} does not exist; choose 0 to {n_latents - 1}")
    if n is None:
        return list(dict.fromkeys(latents))
    if n < 1:
        raise UsageError(f"n={n} must be at least 1")
    drawn, counts = [], texts.table.counts
    for latent in np.random.default_rng(seed).permutation(n_latents).tolist():
        if counts[latent] >= n_texts and texts.n_texts(latent) >= n_texts:
            drawn.append(latent)
        if len(drawn) == n:
            break
    if not drawn:
        raise UserError(f"{where}: no latent fires in {n_texts} texts or more; collect more --tokens")
    if len(drawn) < n:
        console.print(f"{where}: only {len(drawn)} latents fire in {n_texts} texts or more; these are taken")
    return drawn


def _ask_all(
    texts: Texts, judge: Judge, latents: Sequence[int], score: Score | None, batch: int, seed: int
) -> Iterable[tuple[int, Label | str]]:
    """(latent, its label, or why there is none), as they come."""
    pool, n_labels, stopped = ThreadPoolExecutor(judge.config.concurrency), 0, None
    try:
        with Progress("explain", len(latents), "latents", first="asking") as progress:
            asked: dict[Future[Label], int] = {
                pool.submit(_label, texts, judge, latent, score, batch, seed): latent for latent in latents
            }
            for number, future in enumerate(as_completed(asked), 1):
                try:
                    label = future.result()
                    n_labels += 1
                    yield asked[future], label
                except JudgeError as error:  # after which all others fail without being asked
                    stopped = error if stopped is None else stopped
                    yield asked[future], f"{error}"
                except RequestError as error:
                    yield asked[future], f"{error}"
                progress.update(number)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    if stopped is not None and not n_labels:
        raise stopped


def _label(texts: Texts, judge: Judge, latent: int, score: Score | None, batch: int, seed: int) -> Label:
    """Explain a latent, and score that."""
    rng = np.random.default_rng([seed, latent])
    largest = texts.largest(latent)
    said = judge.ask(questions.explanation(texts.strongest(latent), largest), questions.read_explanation)
    label = {"latent": latent, "explanation": said, "model": judge.config.model}
    label |= {"prompts": questions.VERSION, "seed": seed}
    if score == "simulation":
        values = simulate(judge, said, texts.simulated(latent, rng), largest, batch, rng)
    elif score == "detection":
        values = detect(judge, said, texts.shuffled(latent, rng), batch)
    else:
        return label
    return label | dict(zip(SCORES[score], values, strict=True))


def simulate(
    judge: Judge, said: str, texts: Simulated, largest: float, batch: int, rng: np.random.Generator
) -> tuple[float, float]:
    """The score of an explanation by simulation, and that on random texts alone."""
    fragments = [*texts.top, *texts.random]
    order = rng.permutation(len(fragments))  # or the judge would learn which are the strongest
    predicted: list[np.ndarray] = [np.zeros(0)] * len(fragments)
    for at in _in_batches(order, batch):
        part = [fragments[i] for i in at]
        answers = judge.ask(
            questions.simulation(said, part), lambda answer, part=part: questions.read_simulation(answer, part)
        )
        for i, values_T in zip(at, answers, strict=True):
            predicted[i] = values_T
    true = [fragment.levels(largest) for fragment in fragments]
    n_top = len(texts.top)
    on_random = correlation(np.concatenate(predicted[n_top:]), np.concatenate(true[n_top:]))
    return correlation(np.concatenate(predicted), np.concatenate(true)), on_random


def detect(judge: Judge, said: str, texts: Shuffled, batch: int) -> tuple[float, float]:
    """The score of an explanation by detection, and the mean of the shares that are right of either kind."""
    said_E = np.concatenate(
        [
            judge.ask(questions.detection(said, part), lambda answer, part=part: questions.read_detection(answer, part))
            for part in _in_batches(texts.fragments, batch)
        ]
    )
    fires_E = np.array([fragment.values.max() > 0 for fragment in texts.fragments])
    right_E = said_E == fires_E
    shares = [float(right_E[of_kind].mean()) for of_kind in (fires_E, ~fires_E) if of_kind.any()]
    return float(right_E.mean()), sum(shares) / len(shares)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of Pearson; 0 if one of them is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _in_batches(items: Any, size: int) -> list[Any]:
    return [items[first : first + size] for first in range(0, len(items), size)]


def _read(path: storage.AnyPath) -> list[Label]:
    """The labels in the file of a store, later ones last."""
    rows = storage.read_lines(path / "labels.jsonl")
    return [row for row in rows if {"latent", "explanation", "model"} <= row.keys()]


def _compact(path: storage.AnyPath) -> None:
    """Keep the latest label of each latent by each model."""
    latest: dict[tuple[int, str], Label] = {}
    for label in _read(path):
        name = (label["latent"], label["model"])
        latest.pop(name, None)
        latest[name] = label
    storage.write_lines(path / "labels.jsonl", sorted(latest.values(), key=lambda label: label["latent"]))


def _with_earlier_scores(label: Label, earlier: Mapping[str, Any] | None) -> Label:
    """With the scores that the same explanation got before."""
    same = ("explanation", "prompts", "seed")
    if earlier is None or any(earlier.get(name) != label[name] for name in same):
        return label
    return {**earlier, **label}
