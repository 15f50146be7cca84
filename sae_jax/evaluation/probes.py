"""Logistic probes: of every direction by itself, all at once, and of a few features together.

    p(label) = sigmoid(w x + b),      loss = mean over examples of -log p, in nats

`best_direction` fits w and b for each of F directions by Newton's method and takes the one that fits best. `fit` is a
probe of many features with an L2 penalty. Both scale features to a mean of 0 and a standard deviation of 1 first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special

from sae_jax.evaluation import prompts

MAX_WEIGHT = 100.0  # |w| of a direction, a standard deviation: of classes that separate it would grow for ever
MAX_STEPS = 50  # of Newton's method
CONVERGED = 1e-6  # nats that a step would gain, to second order
ROUNDING = 1e-5  # relative: a standard deviation below it is none
BLOCK_VALUES = 2**23  # examples times directions that are fitted at a time: 32 MiB an array


class Newton(NamedTuple):
    """A probe of each direction, for x as it was given."""

    weight: jax.Array  # f32[F]
    bias: jax.Array  # f32[F]
    loss: jax.Array  # f32[F], mean over the examples, nats


class Best(NamedTuple):
    """The direction whose probe has the least loss on the examples that it was fitted to."""

    index: int
    loss: float  # of the training examples, nats
    test_loss: float


@dataclass(frozen=True)
class Probe:
    """A probe of several features, for x as it was given."""

    weight: np.ndarray  # f64[D]
    bias: float

    def logits(self, x_ND: np.ndarray) -> np.ndarray:
        """f64[N]; above 0 where the label is more likely than not."""
        return x_ND @ self.weight + self.bias

    def accuracy(self, x_ND: np.ndarray, y_N: np.ndarray) -> float:
        """Share of the examples whose label is the more likely one."""
        return accuracy(self.logits(x_ND), y_N)


@jax.jit
def newton(x_NF: jax.Array, y_N: jax.Array, counts_N: jax.Array) -> Newton:
    """The probe of least mean logistic loss of each feature by itself.

    Newton's method in w and b. A step that does not lower the loss is taken back and made again with ten times the
    damping (Levenberg and Marquardt), so that a Hessian which is nearly singular does no harm. Where the classes
    separate, w ends at MAX_WEIGHT a standard deviation or where a step gains less than CONVERGED. A feature that is
    constant has w = 0, and the entropy of the base rate for its loss.

    Args:
        x_NF: f32.
        y_N: f32, the labels 0 and 1, both present.
        counts_N: f32, 1 for the examples that count, 0 for those that fill up.
    """
    counts_N1, n = counts_N[:, None], counts_N.sum()
    mean_F = (counts_N1 * x_NF).sum(0) / n
    centred_NF = x_NF - mean_F[None]
    std_F = jnp.sqrt((counts_N1 * centred_NF**2).sum(0) / n)
    is_constant_F = std_F <= ROUNDING * jnp.abs(mean_F)
    std_F = jnp.where(is_constant_F, 1.0, std_F)
    z_NF = jnp.where(is_constant_F[None], 0.0, centred_NF / std_F[None])
    base = (counts_N * y_N).sum() / n

    def loss_of(w_F, b_F):
        logit_NF = z_NF * w_F[None] + b_F[None]
        margin_NF = jnp.where(y_N[:, None] > 0, logit_NF, -logit_NF)
        # Four times as fast on CPUs as softplus, and as exact as a mean in f32 can be.
        loss_NF = jnp.maximum(-margin_NF, 0.0) + jnp.log(1 + jnp.exp(-jnp.abs(margin_NF)))
        return (counts_N1 * loss_NF).sum(0) / n

    def step(state):
        w_F, b_F, loss_F, damping_F, _, i = state
        p_NF = jax.nn.sigmoid(z_NF * w_F[None] + b_F[None])
        error_NF, curve_NF = counts_N1 * (p_NF - y_N[:, None]) / n, counts_N1 * p_NF * (1 - p_NF) / n
        gw_F, gb_F = (error_NF * z_NF).sum(0), error_NF.sum(0)
        damp_F = 1 + damping_F
        ww_F, bb_F = damp_F * (curve_NF * z_NF**2).sum(0) + 1e-12, damp_F * curve_NF.sum(0) + 1e-12
        wb_F = (curve_NF * z_NF).sum(0)
        determinant_F = jnp.maximum(ww_F * bb_F - wb_F**2, 1e-6 * ww_F * bb_F)
        dw_F, db_F = (wb_F * gb_F - bb_F * gw_F) / determinant_F, (wb_F * gw_F - ww_F * gb_F) / determinant_F
        # At its bound w stays, and b has a step of its own.
        is_held_F = (jnp.abs(w_F) >= MAX_WEIGHT) & (dw_F * w_F > 0)
        dw_F, db_F = jnp.where(is_held_F, 0.0, dw_F), jnp.where(is_held_F, -gb_F / bb_F, db_F)
        new_w_F = jnp.clip(w_F + dw_F, -MAX_WEIGHT, MAX_WEIGHT)
        new_b_F = b_F + db_F
        new_loss_F = loss_of(new_w_F, new_b_F)
        is_better_F = new_loss_F <= loss_F
        gain_F = -(gw_F * dw_F + gb_F * db_F) / 2
        damping_F = jnp.where(is_better_F, damping_F / 10, jnp.maximum(10 * damping_F, 1e-2))
        pairs = ((new_w_F, w_F), (new_b_F, b_F), (new_loss_F, loss_F))
        w_F, b_F, loss_F = (jnp.where(is_better_F, new_F, old_F) for new_F, old_F in pairs)
        return w_F, b_F, loss_F, damping_F, (gain_F > CONVERGED).any(), i + 1

    zeros_F = jnp.zeros(x_NF.shape[1])
    b_F = zeros_F + jnp.log(base) - jnp.log1p(-base)
    start = (zeros_F, b_F, loss_of(zeros_F, b_F), zeros_F, jnp.bool_(True), jnp.int32(0))
    w_F, b_F, loss_F, *_ = jax.lax.while_loop(lambda state: state[4] & (state[5] < MAX_STEPS), step, start)
    return Newton(w_F / std_F, b_F - w_F * mean_F / std_F, loss_F)


def best_direction(
    train_NX: np.ndarray, y_N: np.ndarray, test_MX: np.ndarray, y_M: np.ndarray, directions_FX: jax.Array | np.ndarray
) -> Best:
    """Fit a probe to x . direction for each direction, in blocks of directions, and take the best one.

    A constant that is added to x . direction, or that it is multiplied by, changes nothing: a probe undoes it. So the
    pre-activations of latents, mean over tokens or not, are x times the rows of the encoder here, without biases.

    Args:
        train_NX: f32, examples that probes are fitted to and the direction is chosen by.
        y_N: bool, their labels; both occur.
        test_MX: f32, examples that the direction is judged by.
        y_M: bool.
        directions_FX: f32.
    """
    centre_X = train_NX.mean(0)
    n_filled = 1 << (len(y_N) - 1).bit_length()  # so that few programs are compiled
    train_NX = np.pad(train_NX - centre_X, ((0, n_filled - len(y_N)), (0, 0)))
    counts_N, labels_N = (np.pad(np.float32(part), (0, n_filled - len(y_N))) for part in (np.ones(len(y_N)), y_N))
    n_directions = len(directions_FX)
    block = min(max(BLOCK_VALUES // n_filled, 1), n_directions)
    best: tuple[float, int, float, float] | None = None
    for first in range(0, n_directions, block):
        start = min(first, n_directions - block)  # the last block reaches back, so that all have one shape
        probes = _of_directions(train_NX, labels_N, counts_N, jnp.asarray(directions_FX[start : start + block]))
        losses_f = np.asarray(probes.loss)
        i = int(np.nanargmin(losses_f))
        if best is None or losses_f[i] < best[0]:
            best = float(losses_f[i]), start + i, float(probes.weight[i]), float(probes.bias[i])
    assert best is not None
    loss, index, weight, bias = best
    direction_X = np.asarray(directions_FX[index], np.float64)
    return Best(index, loss, cross_entropy(weight * ((test_MX - centre_X) @ direction_X) + bias, y_M))


def fit(x_ND: np.ndarray, y_N: np.ndarray, l2: float = 1.0, balanced: bool = False) -> Probe:
    """The probe of least sum over examples of the loss + l2 / 2 |w|^2, with w of the scaled features.

    This is what scikit-learn's LogisticRegression(C=1 / l2) minimises for features of unit variance.

    Args:
        x_ND: any float type.
        y_N: bool, both occur.
        l2: weight of the penalty.
        balanced: both labels weigh alike, however many examples they have.
    """
    x_ND = np.asarray(x_ND, np.float64)
    mean_D, std_D = x_ND.mean(0), x_ND.std(0)
    std_D = np.where(std_D <= ROUNDING * np.abs(mean_D), np.inf, std_D)  # what is constant gets no weight
    z_ND, sign_N, n = (x_ND - mean_D) / std_D, np.where(y_N, 1.0, -1.0), len(y_N)
    share_N = np.where(y_N, 0.5 / max(y_N.sum(), 1), 0.5 / max((~y_N).sum(), 1)) if balanced else np.full(n, 1 / n)

    def loss(params):
        margin_N = sign_N * (z_ND @ params[:-1] + params[-1])
        error_N = -share_N * sign_N * scipy.special.expit(-margin_N)
        gradient = np.append(error_N @ z_ND + l2 / n * params[:-1], error_N.sum())
        return -share_N @ scipy.special.log_expit(margin_N) + l2 / n / 2 * params[:-1] @ params[:-1], gradient

    start = np.zeros(x_ND.shape[1] + 1)
    params = scipy.optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000, "ftol": 1e-9}
    ).x
    weight_D = params[:-1] / std_D
    return Probe(weight_D, float(params[-1] - weight_D @ mean_D))


def cross_entropy(logit_N: np.ndarray, y_N: np.ndarray) -> float:
    """Mean logistic loss, nats."""
    return float(-scipy.special.log_expit(np.where(y_N, logit_N, -logit_N)).mean())


def entropy(y_N: np.ndarray) -> float:
    """Loss of a probe that knows how many labels are true, and nothing else, nats."""
    p = y_N.mean()
    return float(scipy.special.entr(p) + scipy.special.entr(1 - p))


def accuracy(logit_N: np.ndarray, y_N: np.ndarray) -> float:
    """Share of the examples with the label that the sign of the logit says."""
    return float(((logit_N > 0) == y_N).mean())


def auc(score_N: np.ndarray, y_N: np.ndarray) -> float:
    """Share of pairs, one of each label, in which the true one has the greater score; ties count half."""
    return float(prompts.auc(score_N[y_N, None], score_N[~y_N, None])[0])


def f1(logit_N: np.ndarray, y_N: np.ndarray) -> float:
    """Harmonic mean of precision and recall; 0 if nothing true is found."""
    said_N = logit_N > 0
    return float(2 * (said_N & y_N).sum() / max(said_N.sum() + y_N.sum(), 1))


@jax.jit
def _of_directions(x_NX: jax.Array, y_N: jax.Array, counts_N: jax.Array, directions_fX: jax.Array) -> Newton:
    x_Nf = jnp.matmul(x_NX, directions_fX.T, precision=jax.lax.Precision.HIGHEST)
    return newton(x_Nf, y_N, counts_N)
