"""A study as text for a person."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from sae_jax.progress import plain_console
from sae_jax.scaling import fit
from sae_jax.scaling.active import Curve
from sae_jax.scaling.forms import LARGEST
from sae_jax.scaling.laws import Fitted, Study

FORMULAS = {
    "compute": "FVU of FLOP C: constant + coefficient * C^-exponent",
    "best_latents": "best width n of FLOP C: coefficient * C^exponent",
    "latents": "FVU of width n: constant + coefficient * n^-exponent",
    "tokens": "tokens to convergence of width n: coefficient * n^exponent",
    "lr": "best learning rate of width n: coefficient * n^exponent",
    "joint": "FVU of n and k: exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)",
}
WIDTH = 120
NOISIER = 3.0  # is worth saying


def render(study: Study) -> str:
    """The laws with their intervals and how well they predict, the best width of each budget, and all warnings."""
    text = io.StringIO()
    console = plain_console(file=text, width=WIDTH)
    k = "" if study.k is None else f" at k={study.k}"
    site = f" of {study.site}" if study.site else ""
    console.print(f"{study.variant}{site}{k}: {len(study.at_k)} points, of {len(study.points)} at any k\n")
    for name, formula in FORMULAS.items():
        if name in study.laws:
            _law(console, formula, study.laws[name])
    if study.budgets:
        console.print("iso-FLOP curves")
        table = Table("FLOP", "widths", "best width", "FVU there")
        for budget in study.budgets:
            best = f"{budget.best.x:.0f}" + (", at the edge of the grid" if budget.best.at_edge else "")
            table.add_row(f"{budget.flops:.3g}", str(len(budget.n)), best, f"{budget.best.loss:.4g}")
        console.print(table)
    if "lr" in study.laws:
        law = study.laws["lr"].law
        n = 4 * study.widest
        ends = fit.ends(law.draw(n))
        within = f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else ""
        console.print(f"learning rate at n_latents={n}: {law.predict(n):.3g}{within}\n")
    if study.active:
        console.print(
            "how alike decoder rows are over k: guidance on the number of active latents, see docs/scaling.md"
        )
        table = Table("latents", "k: mean |cos| of decoder rows", "least at k", "tokens")
        for curve in study.active:
            values = ", ".join(f"{k}: {value:.4f}" for k, value in zip(curve.k, curve.cosine, strict=True))
            table.add_row(str(curve.n_latents), values, _least(curve), f"{curve.tokens:,}")
        console.print(table)
    for warning in study.warnings:
        console.print(f"warning: {warning}", soft_wrap=True)
    return text.getvalue()


def _least(curve: Curve) -> str:
    low, high = curve.within
    if low is not None and high is not None:
        return f"{curve.best}, or anywhere from {low} to {high}"
    ends = [f"above {low}"] * (low is not None) + [f"below {high}"] * (high is not None)
    return f"not between the k tried: {ends[0] if ends else 'the same at all'}"


def written(value: float) -> str:
    """A coefficient."""
    return "-inf" if value <= -LARGEST else f"{value:.5g}"


def coefficients(law: fit.Law) -> list[tuple[str, str, str]]:
    """(name, value, interval) of each."""
    return [
        (name, written(value), f"{written(ends[0])} to {written(ends[1])}" if ends else "none")
        for name, value in law.coefficients.items()
        for ends in (law.interval.get(name),)
    ]


def remarks(fitted: Fitted) -> list[str]:
    """Which points a law was fitted to, and how well it describes them, a sentence each."""
    law, lines = fitted.law, [fitted.note]
    if law.chance is not None:
        lines.append(f"that the error does not fall to nought has a probability of {law.chance:.2f}")
    quality = f"R2 of ln {law.r2:.5f}, residuals {law.rmse_log:.2%}"
    if law.noise_growth > NOISIER:
        quality += f", {law.noise_growth:.1f} times as noisy at the largest as at the smallest"
    if law.largest_out is not None:
        quality += f"; the largest, predicted without it, is off by {law.largest_out:.2%}"
        if law.carried is not None:
            quality += f", the next smaller one by {law.carried:.2%}"
    return [*lines, quality]


def _law(console: Console, formula: str, fitted: Fitted) -> None:
    console.print(formula)
    table = Table("", "value", "90 % interval")
    for row in coefficients(fitted.law):
        table.add_row(*row)
    console.print(table)
    *lines, last = remarks(fitted)
    for line in lines:
        console.print(line)
    console.print(last + "\n")
