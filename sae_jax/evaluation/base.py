"""What an evaluator is, and what it is given.

Every file of metrics/ is an evaluator: a class `Evaluator` with two methods and a table that describes its metrics.

    measure(batch) -> {name: array}      what one batch contributes: sums over its rows or sequences
    metrics(sums)  -> Metric, ...        the metrics of all batches, from the sums of all contributions

Sums over batches, over the shards of several workers and over processes are added up alike (`add`, in float64 on the
host), so an evaluator needs to know nothing of them. A new evaluator is one new file.
"""

from __future__ import annotations

import abc
import importlib
import math
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from sae_jax import lm
from sae_jax.saes.base import AbstractSae
from sae_jax.types import Code

Sums = dict[str, np.ndarray]  # f64 each

CONFIDENCE, NORMAL_QUANTILE = 0.9, 1.6449  # of intervals
OF_WEIGHTS = "of the weights alone, which are what they are"


class Description(NamedTuple):
    """What a person is told of a metric."""

    label: str
    text: str
    in_table: bool = True  # False for what is no number, such as a histogram
    no_interval: str = ""  # why it has none, where it has none by its nature


class Metric(NamedTuple):
    """One result."""

    name: str
    value: Any  # a number; {source: number}; or what JSON can hold
    interval: Any = None  # of CONFIDENCE: (low, high); of {source: number} one for each that has one


@dataclass(frozen=True)
class Subject:
    """A dictionary that is measured, and the rows that it reconstructs."""

    sae: AbstractSae
    sources: Mapping[str, int]  # widths of the sources side by side in what is reconstructed
    mean: np.ndarray  # f64[Y], of the rows of the set: the centre that squares are summed around
    recorded: Mapping[str, float] = field(default_factory=dict)  # metrics of its training

    @property
    def n_latents(self) -> int:
        """Width of the dictionary."""
        return self.sae.b_enc.shape[0]


@dataclass(frozen=True)
class TextBatch:
    """The S sequences that the rows of a batch belong to, and the language model, which can run on from other rows.

    Dictionaries of one site share it, so what does not depend on a dictionary is computed once.
    """

    model: lm.ReplacedSite | lm.TorchSite  # with the logits of the model as it is
    is_text: jax.Array  # bool[S * T]: no special token, of the role that counts, and not filled up
    is_sink: jax.Array  # bool[S * T]: a norm far above the median (activations/sinks.py)
    counted: jax.Array  # f32[S, T - 1]: 1 where the next token and the one it is predicted from are text
    mean: np.ndarray  # f64[Y], of the rows of the set

    def losses(self, rows_NY: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cross-entropy, KL from the model as it is) with rows f32[S * T, Y] put in: sums over T, f32[S] each."""
        site = self.model
        if isinstance(site, lm.TorchSite):
            logits_STV = site.with_rows(rows_NY)
        else:
            logits_STV = _logits_with(site, jax.device_put(rows_NY, site.ids.sharding))  # it may be split, and they not
        return _losses(site.logits, logits_STV, site.ids, self.counted)

    @cached_property
    def ce_clean(self) -> jax.Array:
        """Cross-entropy of the model as it is: sums over T, f32[S]."""
        return _clean_loss(self.model.logits, self.model.ids, self.counted)

    @cached_property
    def ce_zero(self) -> jax.Array:
        """With zeros in the place of the activations."""
        return self.losses(jnp.zeros((self.model.ids.size, len(self.mean))))[0]

    @cached_property
    def ce_mean(self) -> jax.Array:
        """With their mean in the place of the activations."""
        mean_Y = jnp.asarray(self.mean, jnp.float32)
        return self.losses(jnp.broadcast_to(mean_Y, (self.model.ids.size, len(self.mean))))[0]


@dataclass(frozen=True)
class EvalBatch:
    """N rows as one dictionary sees them. Its code and its reconstruction are computed once, when first asked for."""

    sae: AbstractSae
    x: jax.Array  # f32[N, X]: what is encoded
    y: jax.Array  # f32[N, Y]: what is reconstructed
    keep: jax.Array  # bool[N]: the rows that count
    text: TextBatch | None  # None for rows that come from no text

    @property
    def context(self) -> int | None:
        """Rows of a sequence; None where rows come from no text."""
        return None if self.text is None else self.text.model.ids.shape[1]

    @cached_property
    def code(self) -> Code:
        """Latents of the rows, [N, K]."""
        return self.sae.encode(self.x)

    @cached_property
    def y_hat(self) -> jax.Array:
        """The reconstruction, f32[N, Y]."""
        return self.sae(self.x)


class Evaluator(abc.ABC):
    """Measures one dictionary. Keeps nothing between batches."""

    ORDER: ClassVar[int]  # lower ones are shown first
    NEEDS_TEXT: ClassVar[bool] = False
    METRICS: ClassVar[Mapping[str, Description]]  # of every metric, in the order in which they are shown

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    @abc.abstractmethod
    def measure(self, batch: EvalBatch) -> Mapping[str, jax.Array | np.ndarray]:
        """The sums of one batch: arrays of the same names and number of axes each time."""

    @abc.abstractmethod
    def metrics(self, sums: Sums) -> Iterable[Metric]:
        """The metrics of all that was added up."""


def evaluators() -> dict[str, type[Evaluator]]:
    """The evaluator in each file of metrics/, in the order in which they are shown."""
    package = importlib.import_module("sae_jax.evaluation.metrics")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    kinds = {name: importlib.import_module(f"{package.__name__}.{name}").Evaluator for name in names}
    return dict(sorted(kinds.items(), key=lambda item: (item[1].ORDER, item[0])))


def descriptions() -> dict[str, Description]:
    """Of every metric there is, in the order in which they are shown."""
    return {name: text for evaluator in evaluators().values() for name, text in evaluator.METRICS.items()}


def gathered(name: str, parts: Iterable[Metric]) -> Metric:
    """One metric of several places, from a metric of each, with the intervals of those that have one."""
    parts = list(parts)
    found = {part.name: part.interval for part in parts if part.interval is not None}
    return Metric(name, {part.name: part.value for part in parts}, found or None)


def add(a: Sums, b: Mapping[str, Any]) -> Sums:
    """Sums over two parts of the rows. A histogram that is longer in one is filled up with zeros in the other."""
    b = {name: np.asarray(value, np.float64) for name, value in b.items()}
    return {name: _add(a[name], b[name]) for name in b} if a and b else a or b


def ratio(
    sums_Q: np.ndarray, products_QQ: np.ndarray, n: float, numerator_Q: np.ndarray, denominator_Q: np.ndarray
) -> tuple[float, tuple[float, float] | None]:
    """A ratio of two linear functions of sums over n sequences, and its interval.

    The interval is the normal one: sequences vary independently, and the ratio is linearised in their sums.

    Args:
        sums_Q: f64, sum over sequences of quantities q_i.
        products_QQ: f64, sum over sequences of q_i q_i^T.
        n: number of sequences.
        numerator_Q: its coefficients.
        denominator_Q: its coefficients.
    """
    below = float(denominator_Q @ sums_Q)
    if below == 0:
        return math.nan, None
    value = float(numerator_Q @ sums_Q) / below
    if n < 2:
        return value, None
    residual_Q = numerator_Q - value * denominator_Q
    variance = n / (n - 1) * max(float(residual_Q @ products_QQ @ residual_Q), 0.0) / below**2
    half = NORMAL_QUANTILE * math.sqrt(variance)
    return value, (value - half, value + half)


def by_unit(values_NQ: jax.Array, keep_N: jax.Array, context: int | None) -> Sums:
    """What `interval` needs of a batch: sums over what varies independently, and products of these sums.

    That is a sequence, or a row of a set, which are shuffled.

    Args:
        values_NQ: f32[N, Q], quantities of rows.
        keep_N: bool[N], the rows that count.
        context: rows of a sequence, in order; None: each row is by itself.
    """
    # In float64: intervals are small differences of large products.
    counted_NQ = np.asarray(jnp.where(keep_N[:, None], values_NQ, 0.0), np.float64)
    return of_units(counted_NQ.reshape(-1, context or 1, values_NQ.shape[1]).sum(1))


def of_units(sums_UQ: np.ndarray) -> Sums:
    """What `interval` needs of the sums of each unit, f64[U, Q]; one whose sums are all 0 is none."""
    return {"n_units": (sums_UQ != 0).any(1).sum(), "sums_Q": sums_UQ.sum(0), "products_QQ": sums_UQ.T @ sums_UQ}


def interval(sums: Sums, value: float, numerator_Q: ArrayLike, denominator_Q: ArrayLike) -> tuple[float, float] | None:
    """The interval of a value that is, but for a constant near 1, the ratio of two sums of quantities (`by_unit`)."""
    numerator, denominator = (np.asarray(each, np.float64) for each in (numerator_Q, denominator_Q))
    of_sums, found = ratio(sums["sums_Q"], sums["products_QQ"], float(sums["n_units"]), numerator, denominator)
    if found is None or not math.isfinite(value) or not of_sums:
        return None
    half = (found[1] - found[0]) / 2 * abs(value / of_sums)
    return (value - half, value + half) if math.isfinite(half) else None


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.shape == b.shape:
        return a + b
    short, long = sorted((a, b), key=len)
    return long + np.pad(short, (0, len(long) - len(short)))


@jax.jit
def _clean_loss(logits_STV: jax.Array, ids_ST: jax.Array, counted_ST: jax.Array) -> jax.Array:
    return (lm.cross_entropy(logits_STV, ids_ST) * counted_ST).sum(-1)


@jax.jit
def _logits_with(model: lm.ReplacedSite, rows_NY: jax.Array) -> jax.Array:
    return model.with_rows(rows_NY)[0]


@jax.jit
def _losses(
    clean_STV: jax.Array, logits_STV: jax.Array, ids_ST: jax.Array, counted_ST: jax.Array
) -> tuple[jax.Array, jax.Array]:
    kl_ST = lm.kl_divergence(clean_STV[:, :-1], logits_STV[:, :-1])
    cross_entropy_ST = lm.cross_entropy(logits_STV, ids_ST)
    return (cross_entropy_ST * counted_ST).sum(-1), (kl_ST * counted_ST).sum(-1)
