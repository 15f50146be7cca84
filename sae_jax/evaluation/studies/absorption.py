"""Whether latents for the first letter of a word fall silent on some words because a latent for the word says it.

For each letter: a logistic probe p for it, of the activation at the word's own token; its main latents, the one whose
mean value is greatest on words of the letter against others, and the next ones while each raises the F1 of a probe of
them by more than `min_gain` (a letter split over several); and for each word that the probe gets right, with unit p,

    P = p . (activation - what the dictionary reconstructs without any latent)
    M = sum over main latents of z p . d            d: decoder row
    A = the same over at most `max_absorbing` others, those that add most, each with cosine(d, p) >= `min_cosine`

    absorbed = min(A, P - M) / (min(A, P - M) + M)     0 if M >= P or A < min_share * P;  1 if M <= 0

letter_absorption        its mean over a letter's words, mean over letters
letter_absorption_full   share of words whose main latents are silent, while the one other latent that adds most has a
                         cosine >= `min_full_cosine` and adds >= `min_full_share` of P
letter_absorption_all    `letter_absorption` without thresholds: A is of all others that add anything

Words are tokens of letters that begin a word and end it, where they stand in held-out text; at most `per_word` of each.
Main latents and probes are fitted to two thirds of the words, both labels weighing alike, and all else is of the other
third: no word is in both. Letters that the probe tells with an F1 below `min_probe_f1` are left out.

Source: Chanin et al. 2024, arXiv 2409.14507, and Karvonen et al. 2025 ("SAEBench", arXiv 2503.09532). Differences: no
prompt with examples of spelling, so that the probe reads the word's own token; P is without the dictionary's bias; main
latents are chosen by mean value, where these use a probe with an L1 penalty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sae_jax.analysis.bootstrap import mean_and_interval
from sae_jax.evaluation import examples, probes, study
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress, say_once
from sae_jax.saes.normalise import normalise

MIN_TRAIN, MIN_TEST = 6, 3  # different words of a letter


class Absorbed(NamedTuple):
    """Of each of N words."""

    share: np.ndarray  # f64[N]
    full: np.ndarray  # bool[N]
    without_thresholds: np.ndarray  # f64[N]


@dataclass(frozen=True)
class Study(study.Study):
    """First letters of words."""

    n_sequences: int = 800
    """of held-out text"""
    per_word: int = 4
    """places of one word that are looked at, at most"""
    max_main: int = 10
    """latents of a letter, at most"""
    min_gain: float = 0.03
    """of F1, for another latent of a letter"""
    max_absorbing: int = 3
    min_cosine: float = 0.1
    min_share: float = 0.4
    min_full_cosine: float = 0.025
    min_full_share: float = 0.4
    min_probe_f1: float = 0.5
    """letters that the activations themselves tell worse are left out"""

    SUITE = "probing"
    ORDER = 230
    METRICS = {  # noqa: RUF012
        "letter_absorption": Description(
            "absorption", "share of a word's first letter that other latents than the letter's say; mean over letters"
        ),
        "letter_absorption_full": Description("full absorption", "words on which the letter's latents are silent"),
        "letter_absorption_all": Description("absorption, no thresholds", "the same counting all other latents"),
        "letter_splits": Description("latents of a letter", "that together say it best, mean over letters"),
        "letter_f1": Description("first letters, F1 of latents", "of a probe of a letter's latents, on other words"),
        "letter_probe_f1": Description(
            "first letters, F1 of activations", "of a probe of the activations, all letters"
        ),
        "letter_absorption_by_letter": Description("absorption by letter", "the same of each letter", in_table=False),
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See study.Study."""
        examples.check(case.subject)
        word_N, made = self._words(case)
        letter_N = np.array([word[0] for word in word_N])
        is_test_N = np.isin(word_N, _test_words(word_N))
        members = {letter: letter_N == letter for letter in np.unique(letter_N)}
        letters = [letter for letter, y_N in members.items() if _has_words(word_N[y_N], is_test_N[y_N])]
        if len(letters) < 2:
            n_words = len({*word_N})
            say_once(f"absorption: {n_words} words of the held-out text are one token, too few for first letters")
            return
        own_NY = made.y - _without_latents(case, made)
        by_letter: dict[str, dict[str, Any]] = {}
        with Progress("absorption", len(letters), "letters") as progress:
            for done, letter in enumerate(letters, 1):
                by_letter[str(letter)] = self._letter(case, made, own_NY, members[letter], is_test_N)
                progress.update(done)
        told = {letter: each for letter, each in by_letter.items() if "letter_absorption" in each}
        if not told:
            say_once(
                f"absorption: nothing is measured, as a probe of the activations tells none of {len(letters)} first "
                f"letters with an F1 of {self.min_probe_f1}"
            )
        for name in [*self.METRICS][:-1]:
            values = np.array([each[name] for each in (by_letter if name == "letter_probe_f1" else told).values()])
            if len(values):
                yield Metric(name, *mean_and_interval(values))
        yield Metric("letter_absorption_by_letter", by_letter)

    def _letter(
        self, case: Case, made: examples.Examples, own_NY: np.ndarray, y_N: np.ndarray, is_test_N: np.ndarray
    ) -> dict[str, Any]:
        """What is measured of a letter; of one that the activations do not tell its F1 alone."""
        probe = probes.fit(made.y[~is_test_N], y_N[~is_test_N], balanced=True)
        logit_N = probe.logits(made.y)
        probe_f1 = probes.f1(logit_N[is_test_N], y_N[is_test_N])
        right = np.flatnonzero(is_test_N & y_N & (logit_N > 0))
        if probe_f1 < self.min_probe_f1 or len(right) == 0:
            return {"letter_probe_f1": probe_f1}
        main, f1 = self.main_latents(made.code, y_N, is_test_N)
        w_dec_FY = np.asarray(case.subject.sae.w_dec)
        absorbed = self.absorbed(made.code[right], own_NY[right], w_dec_FY, probe.weight, main)
        return {
            "letter_absorption": float(absorbed.share.mean()),
            "letter_absorption_full": float(absorbed.full.mean()),
            "letter_absorption_all": float(absorbed.without_thresholds.mean()),
            "letter_splits": len(main),
            "letter_f1": f1,
            "letter_probe_f1": probe_f1,
            "latents": main.tolist(),
            "n_words_right": len(right),
            "n_words": int((is_test_N & y_N).sum()),
        }

    def main_latents(
        self, code_NF: examples.SparseCode, y_N: np.ndarray, is_test_N: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """The latents of a letter, and the F1 of a probe of them on words that they were not chosen by."""
        train_NF, y_train = code_NF[~is_test_N], y_N[~is_test_N]
        order = np.argsort(-examples.mean_difference(train_NF, y_train), kind="stable")[: self.max_main]
        n, best = 1, -np.inf
        for k in range(1, len(order) + 1):
            x = train_NF[:, order[:k]].toarray()
            f1 = probes.f1(probes.fit(x, y_train, balanced=True).logits(x), y_train)
            if k > 1 and f1 <= best + self.min_gain:
                break
            n, best = k, f1
        main = order[:n]
        probe = probes.fit(train_NF[:, main].toarray(), y_train, balanced=True)
        return main, probes.f1(probe.logits(code_NF[is_test_N][:, main].toarray()), y_N[is_test_N])

    def absorbed(
        self,
        code_NF: examples.SparseCode,
        own_NY: np.ndarray,
        w_dec_FY: np.ndarray,
        direction_Y: np.ndarray,
        main: np.ndarray,
    ) -> Absorbed:
        """How much of each word's letter other latents than the main ones say.

        Args:
            code_NF: of the words.
            own_NY: activations less what is reconstructed without any latent.
            w_dec_FY: decoder rows.
            direction_Y: of the letter's probe, of any norm.
            main: latents of the letter.
        """
        unit_Y = direction_Y / np.linalg.norm(direction_Y)
        along_F = w_dec_FY @ unit_Y.astype(w_dec_FY.dtype)
        cosine_F = along_F / np.maximum(np.linalg.norm(w_dec_FY, axis=1), 1e-30)
        whole_N = np.asarray(own_NY, np.float64) @ unit_Y
        share_N, full_N, all_N = np.zeros(len(whole_N)), np.zeros(len(whole_N), bool), np.zeros(len(whole_N))
        for i, whole in enumerate(whole_N):
            row = code_NF[i]
            latents, added = row.indices, row.data * along_F[row.indices]
            is_main = np.isin(latents, main)
            by_main = added[is_main].sum()
            is_other = ~is_main & (added > 0)
            near = np.sort(added[is_other & (cosine_F[latents] >= self.min_cosine)])[-self.max_absorbing :].sum()
            if whole <= 0:  # nothing of the letter is there to be shared
                continue
            if near >= self.min_share * whole:
                share_N[i] = _share(near, by_main, whole)
            all_N[i] = _share(added[is_other].sum(), by_main, whole)
            if is_other.any() and not (row.data[is_main] > 0).any():
                most = np.flatnonzero(is_other)[added[is_other].argmax()]
                is_near = cosine_F[latents[most]] >= self.min_full_cosine
                full_N[i] = is_near and added[most] >= self.min_full_share * whole
        return Absorbed(share_N, full_N, all_N)

    def _words(self, case: Case) -> tuple[np.ndarray, examples.Examples]:
        """Words in lower case, str[N], and what is at their tokens."""
        ids_ST, text_ST = (each[: self.n_sequences] for each in (case.text.sequences, case.text.text))
        numbers, inverse = np.unique(ids_ST, return_inverse=True)
        strings = np.array([*case.subject.tokenizer.tokens(numbers), "\n"], object)
        string_ST = strings[np.where(text_ST, inverse.reshape(ids_ST.shape), len(strings) - 1)]
        after_ST, before_ST = np.full_like(string_ST, "a"), np.full_like(string_ST, "\n")  # the last one may go on
        after_ST[:, :-1], before_ST[:, 1:] = string_ST[:, 1:], string_ST[:, :-1]
        seen: dict[str, int] = {}
        words, places = [], []
        for s, t in np.random.default_rng(case.seed).permutation(np.argwhere(text_ST)):
            string, word = string_ST[s, t], string_ST[s, t].strip().lower()
            begins = string[:1].isspace() or not before_ST[s, t][-1:].isalnum()
            if not (begins and word.isascii() and word.isalpha() and len(word) > 1) or after_ST[s, t][:1].isalnum():
                continue
            seen[word] = seen.get(word, 0) + 1
            if seen[word] <= self.per_word:
                words.append(word)
                places.append((s, t))
        part_ST = np.full(ids_ST.shape, -1)
        part_ST[tuple(np.array(places, int).reshape(-1, 2).T)] = np.arange(len(places))
        (made,) = examples.of_sequences(case, ids_ST, text_ST, [part_ST], "absorption: held-out text")
        return np.array(words, str), made


def _share(others: float, main: float, whole: float) -> float:
    """min(A, P - M) / (min(A, P - M) + M), 1 if M <= 0 and there is an A; 0 if M >= P."""
    taken = max(min(others, whole - main), 0.0)
    return taken / (taken + max(main, 0.0)) if taken > 0 else 0.0


def _test_words(word_N: np.ndarray) -> list[str]:
    """A third of the words of each letter, spread over their alphabet."""
    words = np.unique(word_N)
    return [word for letter in {w[0] for w in words} for word in [w for w in words if w[0] == letter][1::3]]


def _without_latents(case: Case, made: examples.Examples) -> np.ndarray:
    """What is reconstructed of a code of zeros, f64, to be subtracted from [N, Y]."""
    sae = case.subject.sae
    _, mean, scale = normalise(jnp.asarray(made.x), sae.config.input_norm)  # of a word there is one row
    return np.asarray(sae.b_dec, np.float64) * np.asarray(scale) + np.asarray(mean)


def _has_words(word_N: np.ndarray, is_test_N: np.ndarray) -> bool:
    """Whether a letter has enough different words to train on, and to test on."""
    return len({*word_N[~is_test_N]}) >= MIN_TRAIN and len({*word_N[is_test_N]}) >= MIN_TEST
