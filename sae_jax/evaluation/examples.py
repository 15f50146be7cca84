"""What a language model and a dictionary make of texts, as examples for probes: the mean over the tokens of each.

An example is some positions of one sequence: a token, a passage or a whole text. Positions that the dictionary's set
would hold no row of (special tokens, sinks) count nowhere. Of activations and of the code the mean over the others is
kept, of the code in the units of the rows: what a latent adds to the reconstruction is its value here times its decoder
row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
import scipy.sparse

from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation.prompts import Subject
from sae_jax.evaluation.study import Case
from sae_jax.progress import Progress
from sae_jax.saes.normalise import PER_VECTOR, normalise
from sae_jax.types import UsageError

SparseCode: TypeAlias = Any  # scipy.sparse.csr_matrix

BLOCK_TOKENS = 2048  # that the model and the dictionary see at a time
MAX_TOKENS = 128  # of a text that somebody gives: the rest is not read
WIDTH_STEP = 32  # texts are filled up to a multiple of it, so that few programs are compiled


@dataclass(frozen=True)
class Examples:
    """N examples."""

    x: np.ndarray  # f32[N, X]: what is encoded
    normed: np.ndarray  # f32[N, X]: the same as the encoder sees it; x itself if vectors are not normalised
    y: np.ndarray  # f32[N, Y]: what is reconstructed; x itself if it is what is encoded
    code: SparseCode  # f32[N, F]
    n_rows: np.ndarray  # i64[N]: positions that the means are over; 0: there is none, and all is 0


def mean_difference(code_NF: SparseCode, y_N: np.ndarray) -> np.ndarray:
    """Mean code of the examples with the label less that of the others, f64[F]."""
    signs_N = np.where(y_N, 1 / y_N.sum(), -1 / (~y_N).sum())
    return code_NF.T @ signs_N


def check(subject: Subject) -> None:
    """UsageError for a dictionary of several hooks on either side."""
    n = max(len(subject.encoded), len(subject.reconstructed))
    if n > 1:
        raise UsageError(
            f"the dictionary reads or writes {n} hooks, and probes are of one; measure an autoencoder or a transcoder "
            f"of one hook instead"
        )


def of_sequences(
    case: Case, ids_ST: np.ndarray, text_ST: np.ndarray, parts: Sequence[np.ndarray], title: str
) -> list[Examples]:
    """Examples of several kinds from one pass over sequences.

    Args:
        case: the dictionary in its model.
        ids_ST: i32, the sequences.
        text_ST: bool, where they hold text.
        parts: of each kind i64[S, T], the number of the example that a position belongs to, from 0 up; -1: none. An
            example lies in one sequence.
        title: of the progress; "": none is shown.
    """
    sae, subject = case.subject.sae, case.subject
    n_sequences, width = ids_ST.shape
    size = max(BLOCK_TOKENS // width, 1)  # also of few sequences, so that a width is one program
    pooled = [_Pooled(int(part_ST.max(initial=-1)) + 1, sae.b_enc.shape[0]) for part_ST in parts]
    hooks = tuple(dict.fromkeys(subject.encoded + subject.reconstructed))
    with Progress(title, n_sequences, "sequences", silent=not title) as progress:
        for first in range(0, n_sequences, size):
            block = slice(first, first + size)
            filling = ((0, size - len(ids_ST[block])), (0, 0))
            ids_sT, text_sT = (np.pad(each[block], filling) for each in (ids_ST, text_ST))
            acts, norm_sTH = read_hooks(subject.model, ids_sT, hooks, "float32")
            keep_n = case.text.keep(text_sT, np.asarray(norm_sTH)).reshape(-1)
            x_nX, y_nY = (
                np.asarray(acts[str(side[0])]).reshape(size * width, -1)
                for side in (subject.encoded, subject.reconstructed)
            )
            normed_nX, _, scale_n1 = normalise(jnp.asarray(x_nX), sae.config.input_norm)
            code = sae.encode(x_nX)
            values_nK = np.where(keep_n[:, None], np.asarray(code.values * scale_n1), 0)
            # As a matrix of all latents, so that means over positions are products.
            offsets_n = np.arange(len(values_nK) + 1) * values_nK.shape[1]
            code_nF = scipy.sparse.csr_matrix(
                (values_nK.reshape(-1), np.asarray(code.indices).reshape(-1), offsets_n),
                shape=(len(values_nK), sae.b_enc.shape[0]),
            )
            rows = {"x": x_nX}
            if sae.config.input_norm in PER_VECTOR:
                rows["normed"] = np.asarray(normed_nX)
            if subject.reconstructed != subject.encoded:
                rows["y"] = y_nY
            for each, part_ST in zip(pooled, parts, strict=True):
                part_n = np.pad(part_ST[block], filling, constant_values=-1).reshape(-1)
                each.add(np.where(keep_n, part_n, -1), rows, code_nF)
            progress.update(min(first + size, n_sequences))
    return [each.examples() for each in pooled]


def of_texts(case: Case, texts: Sequence[str], name: str) -> Examples:
    """An example of each text: the mean over its first MAX_TOKENS tokens, counting the one that begins it.

    Raises UsageError, with this name, for a text without tokens.
    """
    tokenizer, limit = case.subject.tokenizer, min(MAX_TOKENS, case.subject.model.spec.n_context or MAX_TOKENS)
    ids = [np.array([case.subject.first, *tokens[: limit - 1]], np.int32) for tokens in tokenizer.encode(texts)]
    for i, ids_T in enumerate(ids):
        if len(ids_T) < 2:
            raise UsageError(f"{name}: text {i} is empty; leave it out")
    widths = np.array([min(-(-len(ids_T) // WIDTH_STEP) * WIDTH_STEP, limit) for ids_T in ids])
    made, numbers = [], []
    for width in np.unique(widths):
        (here,) = np.nonzero(widths == width)
        ids_ST = np.stack([np.pad(ids[i], (0, width - len(ids[i]))) for i in here])
        place_T = np.arange(width)[None]
        text_ST = (place_T > 0) & (place_T < np.array([[len(ids[i])] for i in here]))
        text_ST &= ~np.isin(ids_ST, tokenizer.special_ids)
        part_ST = np.repeat(np.arange(len(here))[:, None], width, axis=1)
        made += of_sequences(case, ids_ST, text_ST, [part_ST], "")
        numbers.append(here)
    back = np.argsort(np.concatenate(numbers))
    x, normed, y, n_rows = (
        np.concatenate([getattr(each, name) for each in made])[back] for name in ("x", "normed", "y", "n_rows")
    )
    return Examples(x, normed, y, scipy.sparse.vstack([each.code for each in made]).tocsr()[back], n_rows)


class _Pooled:
    """Means over the positions of each example, as blocks of positions come by."""

    def __init__(self, n_examples: int, n_latents: int) -> None:
        self._n_rows = np.zeros(n_examples, np.int64)
        self._rows: dict[str, np.ndarray] = {}
        self._codes = [scipy.sparse.csr_matrix((1, n_latents), dtype=np.float32)]  # of examples without a position
        self._place = np.zeros(n_examples, np.int64)  # of each example in `_codes`
        self._n_codes = 1

    def add(self, example_n: np.ndarray, rows: dict[str, np.ndarray], code_nF: SparseCode) -> None:
        """Positions with their rows and codes; `example_n` is -1 where they count nowhere."""
        (counted,) = np.nonzero(example_n >= 0)
        numbers_e, local, n_rows_e = np.unique(example_n[counted], return_inverse=True, return_counts=True)
        mean_en = scipy.sparse.csr_matrix(
            (np.float32(1 / n_rows_e[local]), (local, counted)), shape=(len(numbers_e), len(example_n))
        )
        for name, x_nX in rows.items():
            if name not in self._rows:
                self._rows[name] = np.zeros((len(self._n_rows), x_nX.shape[1]), np.float32)
            self._rows[name][numbers_e] = mean_en @ x_nX
        code_eF = (mean_en @ code_nF).tocsr()
        code_eF.eliminate_zeros()
        self._codes.append(code_eF)
        self._place[numbers_e] = self._n_codes + np.arange(len(numbers_e))
        self._n_codes += len(numbers_e)
        self._n_rows[numbers_e] = n_rows_e

    def examples(self) -> Examples:
        """All of them."""
        x = self._rows["x"]
        code = scipy.sparse.vstack(self._codes).tocsr()[self._place]
        return Examples(x, self._rows.get("normed", x), self._rows.get("y", x), code, self._n_rows)
