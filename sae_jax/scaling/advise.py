"""What to train for a budget of compute, by the laws of a fit: width, tokens, learning rate, error to expect.

A law is only known to hold where it was fitted: how far the advice lies beyond the points is part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from sae_jax import storage
from sae_jax.errors import UsageError, UserError
from sae_jax.saes import base
from sae_jax.saes.base import SaeConfig
from sae_jax.scaling import fit

FAR = 10  # times what was fitted: beyond, advice is a guess
Interval = tuple[float, float] | None  # 90 %; None where the fit has none


@dataclass(frozen=True)
class Advice:
    """What to train, and what to expect of it."""

    compute: float  # FLOP to spend
    sae: SaeConfig
    latents: int  # a power of two
    law_latents: float  # what the law says
    law_latents_interval: Interval
    k: int | None
    tokens: float
    lr: float
    lr_interval: Interval
    lr_from_law: bool  # else the rate that the points had
    fvu: float
    fvu_interval: Interval
    d_model: int | None  # of the points
    notes: tuple[str, ...]  # what to keep in mind


@dataclass(frozen=True)
class _Alike:
    """What a fit.json says of scaling/active.py."""

    n_latents: int
    best: int
    within: tuple[int | None, int | None]


@dataclass(frozen=True)
class _Facts:
    """What a fit.json says beside its laws."""

    variant: str
    k: int | None
    d_model: int | None
    widest: float
    flops_per_token: dict[str, float]
    lr_of_points: dict[str, float]
    warnings: list[str]
    active: list[_Alike] = field(default_factory=list)  # by width; a fit of points without the number has none

    def __post_init__(self) -> None:
        for name in ("k", "d_model", "widest"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def advise(compute: float, path: str, k: int | None = None) -> Advice:
    """Advice for `compute` FLOP by the fit.json at `path`.

    Args:
        compute: FLOP to spend, in the unit of the table: 12 * n_latents * d_model a token.
        path: of the file that `sae-jax fit` wrote.
        k: active latents; another k than the fit's goes by the joint law.

    Raises:
        UsageError: there is no such file, or no law for this k.
        UserError: the file is damaged, lacks a law, or the budget is too small.
    """
    if not 0 < compute < math.inf:
        raise UsageError(f"compute={compute} must be above 0 and finite")
    if k is not None and k < 1:
        raise UsageError(f"k={k} must be at least 1")
    content = storage.read_json(path)
    if content is None:
        raise UsageError(f"{path}: there is no such file; write one with `sae-jax fit DIR`")
    content = storage.unsealed(content, path)
    try:
        facts = msgspec.convert(content, _Facts)
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            advice = _advise(compute, path, content, facts, k)
        if not (0 < advice.lr < math.inf and 0 < advice.tokens < math.inf and 0 < advice.fvu < math.inf):
            raise ValueError(f"tokens={advice.tokens:g}, lr={advice.lr:g}, fvu={advice.fvu:g}")
        return advice
    except (msgspec.ValidationError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{path}: not what `sae-jax fit` writes ({error!r}); write it again") from None


def _advise(compute: float, path: str, content: dict[str, Any], facts: _Facts, k: int | None) -> Advice:
    laws = _laws(path, content, facts)
    k = k or facts.k
    law_latents = float(laws["best_latents"].predict(compute))
    n = 2 ** max(0, round(math.log2(law_latents)))
    if k is not None and n < k:
        raise UserError(f"compute={compute:g} buys {n} latents, fewer than k={k}; spend more")
    cost, used = facts.flops_per_token, facts.lr_of_points
    fvu, draws_M, notes = _error(compute, path, laws, n, k, facts.k)
    lr = float(laws["lr"].predict(n)) if "lr" in laws else used["coefficient"] * n ** used["exponent"]
    beyond = {"FLOP": compute / laws["compute"].range["x"][1], "latents": n / facts.widest}
    for what, ratio in beyond.items():
        if ratio > FAR:
            notes.append(
                f"{what}: {ratio:,.3g} times the largest that was fitted, so this is a guess: nothing shows that the "
                f"law holds so far, and intervals suppose it; spend at most {FAR} times what was fitted, and fit again"
            )
        elif ratio > 1:
            notes.append(f"{what}: {ratio:,.3g} times the largest that was fitted")
    if k is not None and facts.active:
        notes += _on_k(min(facts.active, key=lambda each: abs(math.log(each.n_latents / n))), k)
    settings = {"variant": facts.variant, "n_latents": n, **({} if k is None else {"k": k})}
    return Advice(
        compute=compute,
        sae=base.config_from(facts.variant, settings, path),
        latents=n,
        law_latents=law_latents,
        law_latents_interval=fit.ends(laws["best_latents"].draw(compute)),
        k=k,
        tokens=compute / (cost["per_latent"] * n + cost["per_active"] * (k or 0)),
        lr=lr,
        lr_interval=fit.ends(laws["lr"].draw(n)) if "lr" in laws else None,
        lr_from_law="lr" in laws,
        fvu=fvu,
        fvu_interval=fit.ends(draws_M),
        d_model=facts.d_model,
        notes=tuple(notes),
    )


def _on_k(alike: _Alike, k: int) -> list[str]:
    """Where decoder rows are least alike, beside this k; nothing where that is not between those tried."""
    low, high = alike.within
    if low is None or high is None:
        return []
    return [
        f"k: at {alike.n_latents} latents decoder rows are least alike at k={alike.best}, {alike.best / k:.2g} times "
        f"this k, or anywhere from {low} to {high}: guidance that planted features support, no law"
    ]


def _error(
    compute: float, path: str, laws: dict[str, fit.Law], n: int, k: int | None, k_fitted: int | None
) -> tuple[float, np.ndarray, list[str]]:
    """(error to expect, its draws, what to say about it)."""
    error, draws_M = float(laws["compute"].predict(compute)), laws["compute"].draw(compute)
    if k is None or k_fitted is None or k == k_fitted:
        return error, draws_M, []
    if "joint" not in laws:
        raise UsageError(f"k={k}: {path} is at k={k_fitted} and has no joint law; fit with --k={k}")
    joint = laws["joint"]
    error = float(error * joint.predict(n, k) / joint.predict(n, k_fitted))
    draws_M = draws_M * joint.draw(n, k) / joint.draw(n, k_fitted) if len(joint.draws) else draws_M[:0]
    return error, draws_M, [f"the error at k={k_fitted} carried to k={k} by the joint law"]


def _laws(path: str, content: dict[str, Any], facts: _Facts) -> dict[str, fit.Law]:
    """The laws to predict by. Raises UserError, with the fit's reason, if one that advice needs was left out."""
    compute = content["compute"]
    laws = {"compute": compute, "best_latents": compute and compute["best_latents"]}
    for name, law in laws.items():
        if law is None:
            reason = next((each for each in facts.warnings if each.startswith(f"{name}: left out")), name)
            raise UserError(f"{path} has too little to advise by: {reason}")
    laws |= {name: content[name] for name in ("joint", "lr") if content[name]}
    return {name: fit.Law.from_json(law, content["draws"][name]) for name, law in laws.items()}
