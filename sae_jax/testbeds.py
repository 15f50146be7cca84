"""Rows whose directions are known, to hold against what a dictionary found.

A bed is a frozen config. Its true unit directions follow from its `seed` alone; `draw` makes rows from them,

    rows = codes @ directions + noise,      codes [N, G] >= 0 and mostly zero,

and `write` an activation set of such rows, for `sae-jax train --data`. Rows that were not trained on are another draw.

    SparseFeatures   more features than dimensions, at rates that fall geometrically (Sharkey et al. 2022)
    Superposition    the hidden layer of a toy model that had to squeeze features in (Elhage et al. 2022)
    Tree             children fire only where their parent fires
    Pairs            two features each that fire together, or avoid each other
    PlantedChange    two models that share features; each has some of its own

Axis key, beside that of types.py: G true features, N rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.special import ndtri

from sae_jax.activations.ingest import write_activations
from sae_jax.activations.store import ActivationSet
from sae_jax.types import UsageError

R = TypeVar("R", covariant=True)

BLOCK_ROWS = 16_384  # of a set that are made at a time
TRAINING = (5000, 1024, 1e-3)  # steps, batch and rate of a superposition model


class Draw(NamedTuple, Generic[R]):
    """Rows, and what they are made of."""

    rows: R  # f32[N, D]; of two models {name: f32[N, D]}
    codes: np.ndarray  # f32[N, G]: how strongly each feature is there


class Bed(Protocol):
    """What the configs below have in common."""

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[Any]:
        """Fresh rows."""
        ...


def write(bed: Bed, path: str | os.PathLike[str], n_rows: int, seed: int = 0) -> ActivationSet:
    """A float32 activation set of `n_rows` rows, one source named `acts`; of two models, one source each.

    Raises UsageError and UserError as `write_activations` does.
    """
    rng = np.random.default_rng(seed)

    def blocks() -> Iterator[Any]:
        for first in range(0, n_rows, BLOCK_ROWS):
            yield bed.draw(min(BLOCK_ROWS, n_rows - first), rng).rows

    return write_activations(path, blocks(), dtype="float32", seed=seed)


@dataclass(frozen=True)
class SparseFeatures:
    """Unit features in random directions; feature j fires at a rate proportional to decay^j, with strength U[0, 1].

    Where they fire together more or less than chance, a normal vector of random covariance is compared with one
    threshold a feature. A row on which nothing would fire gets one feature, drawn by the rates; only this adds to them.

    Source: Sharkey, Braun and Millidge 2022, "Taking features out of superposition with sparse autoencoders".
    """

    d_model: int = 256
    n_features: int = 512
    mean_active: float = 5.0
    """features that fire on a row, on average"""
    decay: float = 0.99
    """rate of a feature over that of the one before"""
    correlation_rank: int = 0
    """rank of the random covariance of firing, smaller is stronger; 0 = features fire independently"""
    noise: float = 0.0
    """standard deviation of what is added to every number of a row (0.1 in the source)"""
    seed: int = 0
    """of directions and covariance"""

    def __post_init__(self) -> None:
        _check_counts(self, "d_model", "n_features")
        _check_range(self, 0, 1, "decay")
        _check_range(self, 0, math.inf, "mean_active", "noise", "correlation_rank")
        if self.rates.max() > 1:
            raise UsageError(
                f"mean_active={self.mean_active} asks the first feature to fire on {self.rates.max():.3g} of rows; "
                f"lower it or raise decay={self.decay}"
            )

    @property
    def rates(self) -> np.ndarray:
        """f64[G]: share of rows on which each feature fires."""
        falling_G = self.decay ** np.arange(self.n_features)
        return self.mean_active * falling_G / falling_G.sum()

    @cached_property
    def directions(self) -> np.ndarray:
        """f32[G, D], unit rows."""
        return _unit(_truth(self.seed).standard_normal((self.n_features, self.d_model)))

    @cached_property
    def _mixing(self) -> np.ndarray:
        """f32[rank, G]: what makes normal variables of the random covariance, each of variance 1."""
        factors_GR = _truth(self.seed, 1).standard_normal((self.n_features, self.correlation_rank))
        return _unit(factors_GR).T

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[np.ndarray]:
        """Fresh rows."""
        if self.correlation_rank:
            normal_NR = rng.standard_normal((n_rows, self.correlation_rank), np.float32)
            fires_NG = normal_NR @ self._mixing < ndtri(self.rates).astype(np.float32)
        else:
            fires_NG = rng.random((n_rows, self.n_features), np.float32) < self.rates
        (empty,) = np.nonzero(~fires_NG.any(1))
        fires_NG[empty, rng.choice(self.n_features, len(empty), p=self.rates / self.rates.sum())] = True
        codes_NG = rng.random((n_rows, self.n_features), np.float32) * fires_NG
        return _rows(codes_NG, self.directions, self.noise, rng)


@dataclass(frozen=True)
class Superposition:
    """The hidden layer of a toy model with more features than dimensions, trained to give its input back.

        x_i = U[0, 1] with probability `density`, else 0      h = W x      x_hat = ReLU(W^T h + b)
        loss = sum_i importance^i (x_i - x_hat_i)^2

    Rows are h, codes are x. Rare features come to share dimensions; frequent and unimportant ones are given up.

    Source: Elhage et al. 2022, "Toy models of superposition".
    """

    d_model: int = 20
    n_features: int = 80
    density: float = 0.05
    """share of rows on which a feature is not zero: 1 - S"""
    importance: float = 0.9
    """weight of a feature's error over that of the one before"""
    seed: int = 0
    """of the model's training"""

    def __post_init__(self) -> None:
        _check_counts(self, "d_model", "n_features")
        _check_range(self, 0, 1, "density", "importance")

    @cached_property
    def weights(self) -> np.ndarray:
        """f32[G, D]: the columns of W, trained when first asked for."""
        return np.asarray(_trained_superposition(self))

    @property
    def directions(self) -> np.ndarray:
        """f32[G, D], unit rows: those of `weights`."""
        return _unit(self.weights)

    @property
    def dimensionality(self) -> np.ndarray:
        """f64[G]: the share of a dimension that each feature has, ||W_i||^2 / sum_j (W_j . W_i / ||W_i||)^2."""
        w_GD = self.weights.astype(np.float64)
        return (w_GD**2).sum(1) / np.maximum(((_unit(w_GD) @ w_GD.T) ** 2).sum(1), 1e-30)

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[np.ndarray]:
        """Fresh rows."""
        shape = (n_rows, self.n_features)
        codes_NG = rng.random(shape, np.float32) * (rng.random(shape, np.float32) < self.density)
        return Draw(codes_NG @ self.weights, codes_NG)


@dataclass(frozen=True)
class Tree:
    """Features in levels: a child fires only where its parent fires. Orthonormal while there are dimensions for it.

    Strengths are independent of each other, also of the parent's. Features stand level by level, siblings together.

    Source: Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders", arXiv
    2503.17547, and Chanin et al. 2024, "A is for absorption", arXiv 2409.14507, have toy sets of this kind.
    """

    d_model: int = 128
    branching: tuple[int, ...] = (20, 4)
    """number of roots, and of children of each feature of the level above"""
    rates: tuple[float, ...] = (0.1, 0.15)
    """of a root on any row; of a child where its parent fires"""
    exclusive: bool = True
    """at most one child of a parent fires"""
    strength: tuple[float, float] = (0.5, 1.5)
    """least and greatest"""
    noise: float = 0.0
    """standard deviation of what is added to every number of a row"""
    seed: int = 0
    """of the directions"""

    def __post_init__(self) -> None:
        _check_counts(self, "d_model")
        if not self.branching or min(self.branching) < 1 or len(self.branching) != len(self.rates):
            raise UsageError(
                f"branching={self.branching} and rates={self.rates} must have one number a level, branching at least 1"
            )
        for level, (n, rate) in enumerate(zip(self.branching, self.rates, strict=True)):
            most = 1 / n if self.exclusive and level else 1
            if not 0 < rate <= most:
                raise UsageError(f"rates={self.rates}: that of level {level} must be above 0 and at most {most:.3g}")
        if not 0 <= self.strength[0] <= self.strength[1] < math.inf:
            raise UsageError(f"strength={self.strength} must be (least, greatest), both >= 0")
        _check_range(self, 0, math.inf, "noise")

    @property
    def parents(self) -> np.ndarray:
        """i64[G]: which feature is the parent of each; -1 for roots."""
        sizes = np.cumprod(self.branching)
        firsts = np.cumsum([0, *sizes])
        above = zip(firsts[:-2], sizes[:-1], self.branching[1:], strict=True)
        return np.concatenate([np.full(sizes[0], -1), *(np.repeat(a + np.arange(size), n) for a, size, n in above)])

    @cached_property
    def directions(self) -> np.ndarray:
        """f32[G, D], unit rows."""
        return _spread(len(self.parents), self.d_model, self.seed)

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[np.ndarray]:
        """Fresh rows."""
        levels = [rng.random((n_rows, self.branching[0])) < self.rates[0]]
        for n, rate in zip(self.branching[1:], self.rates[1:], strict=True):
            parents_NP = levels[-1]
            if self.exclusive:
                own_NPC = (rng.random(parents_NP.shape) // rate)[:, :, None] == np.arange(n)
            else:
                own_NPC = rng.random((*parents_NP.shape, n)) < rate
            levels.append((parents_NP[:, :, None] & own_NPC).reshape(n_rows, -1))
        fires_NG = np.concatenate(levels, axis=1)
        return _rows(_strengths(fires_NG, self.strength, rng), self.directions, self.noise, rng)


@dataclass(frozen=True)
class Pairs:
    """Features 2i and 2i + 1 fire at the same rate, with a given correlation. Orthonormal while there is room.

    Correlated features tempt a dictionary that is too small to blend them: hedging (Chanin et al. 2025, arXiv
    2505.11756).
    """

    d_model: int = 64
    n_pairs: int = 20
    rate: float = 0.1
    """share of rows on which a feature fires"""
    correlation: float = 0.5
    """of the two indicators of a pair; below 0 they avoid each other"""
    strength: tuple[float, float] = (0.5, 1.5)
    """least and greatest"""
    noise: float = 0.0
    """standard deviation of what is added to every number of a row"""
    seed: int = 0
    """of the directions"""

    def __post_init__(self) -> None:
        _check_counts(self, "d_model", "n_pairs")
        _check_range(self, 0, 0.5, "rate")
        _check_range(self, 0, math.inf, "noise")
        least = -self.rate / (1 - self.rate)
        if not least <= self.correlation <= 1:
            raise UsageError(
                f"correlation={self.correlation} must be in [{least:.3g}, 1]: two features of rate={self.rate} cannot "
                f"avoid each other more"
            )

    @cached_property
    def directions(self) -> np.ndarray:
        """f32[G, D], unit rows."""
        return _spread(2 * self.n_pairs, self.d_model, self.seed)

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[np.ndarray]:
        """Fresh rows."""
        both = self.rate**2 + self.correlation * self.rate * (1 - self.rate)
        # On a line of length 1 the first takes [0, rate), the second as much from `rate - both` on.
        place_NP = rng.random((n_rows, self.n_pairs))
        first_NP, second_NP = place_NP < self.rate, (place_NP >= self.rate - both) & (place_NP < 2 * self.rate - both)
        fires_NG = np.stack([first_NP, second_NP], axis=-1).reshape(n_rows, -1)
        return _rows(_strengths(fires_NG, self.strength, rng), self.directions, self.noise, rng)


@dataclass(frozen=True)
class PlantedChange:
    """Two models, `a` and `b`: shared features have one direction and strength in both, the others are in one alone.

    Features stand in the order shared, of a, of b, as `side` says.
    """

    d_model: int = 64
    n_shared: int = 64
    n_exclusive: int = 16
    """features that a alone has, and b alone"""
    rate: float = 0.05
    """share of rows on which a feature fires"""
    strength: tuple[float, float] = (0.5, 1.5)
    """least and greatest"""
    noise: float = 0.0
    """standard deviation of what is added to every number of a row, in each model anew"""
    seed: int = 0
    """of the directions"""

    def __post_init__(self) -> None:
        _check_counts(self, "d_model", "n_shared", "n_exclusive")
        _check_range(self, 0, 1, "rate")
        _check_range(self, 0, math.inf, "noise")

    @property
    def side(self) -> np.ndarray:
        """str[G]: `both`, `a` or `b`."""
        return np.repeat(["both", "a", "b"], [self.n_shared, self.n_exclusive, self.n_exclusive])

    @cached_property
    def directions(self) -> np.ndarray:
        """f32[G, D], unit rows."""
        return _spread(len(self.side), self.d_model, self.seed)

    def draw(self, n_rows: int, rng: np.random.Generator) -> Draw[dict[str, np.ndarray]]:
        """Fresh rows of both models."""
        codes_NG = _strengths(rng.random((n_rows, len(self.side))) < self.rate, self.strength, rng)

        def rows_of(model: str) -> np.ndarray:
            return _rows(codes_NG * np.isin(self.side, ["both", model]), self.directions, self.noise, rng).rows

        return Draw({model: rows_of(model) for model in ("a", "b")}, codes_NG)


def _truth(seed: int, part: int = 0) -> np.random.Generator:
    """Of what a bed's seed decides. Another stream than that of any seed for rows."""
    return np.random.default_rng([0x7E57BED5, part, seed])


def _unit(rows_GD: np.ndarray) -> np.ndarray:
    return (rows_GD / np.maximum(np.linalg.norm(rows_GD, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _spread(n: int, d_model: int, seed: int) -> np.ndarray:
    """f32[n, D]: unit rows, orthogonal to each other in groups of d_model."""
    rng = _truth(seed)
    groups = [np.linalg.qr(rng.standard_normal((d_model, d_model)))[0] for _ in range(-(-n // d_model))]
    return np.concatenate(groups)[:n].astype(np.float32)


def _strengths(fires_NG: np.ndarray, bounds: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """f32[N, G]: U[bounds] where features fire."""
    low, high = bounds
    return (low + (high - low) * rng.random(fires_NG.shape, np.float32)) * fires_NG


def _rows(codes_NG: np.ndarray, directions_GD: np.ndarray, noise: float, rng: np.random.Generator) -> Draw[np.ndarray]:
    rows_ND = codes_NG @ directions_GD
    if noise:
        rows_ND += np.float32(noise) * rng.standard_normal(rows_ND.shape, np.float32)
    return Draw(rows_ND, codes_NG)


def _trained_superposition(bed: Superposition) -> jax.Array:
    """W as f32[G, D], after training from a random start with Adam."""
    steps, batch, rate = TRAINING
    optimiser = optax.adam(rate)
    importance_G = jnp.asarray(bed.importance ** np.arange(bed.n_features), jnp.float32)

    def loss(weights: tuple[jax.Array, jax.Array], x_BG: jax.Array) -> jax.Array:
        w_GD, b_G = weights
        x_hat_BG = jax.nn.relu(x_BG @ w_GD @ w_GD.T + b_G[None])
        return (importance_G[None] * (x_BG - x_hat_BG) ** 2).sum(-1).mean()

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        weights, moments = carry
        fires_key, strength_key = jax.random.split(key)
        shape = (batch, bed.n_features)
        fires_BG = jax.random.bernoulli(fires_key, bed.density, shape)
        gradient = jax.grad(loss)(weights, jax.random.uniform(strength_key, shape) * fires_BG)
        updates, moments = optimiser.update(gradient, moments)
        return (optax.apply_updates(weights, updates), moments), None

    @jax.jit
    def run(key: jax.Array) -> jax.Array:
        start_key, steps_key = jax.random.split(key)
        start = jax.random.normal(start_key, (bed.n_features, bed.d_model)) * bed.n_features**-0.5
        weights = (start, jnp.zeros(bed.n_features))
        carry, _ = jax.lax.scan(step, (weights, optimiser.init(weights)), jax.random.split(steps_key, steps))
        return carry[0][0]

    return run(jax.random.key(bed.seed))


def _check_counts(bed: Any, *names: str) -> None:
    for name in names:
        if getattr(bed, name) < 1:
            raise UsageError(f"{name}={getattr(bed, name)} must be at least 1")


def _check_range(bed: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(bed, name) <= high:
            raise UsageError(f"{name}={getattr(bed, name)} must be in [{low}, {high}]")
