"""Figures of a study, as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sae_jax import figures
from sae_jax.scaling import fit
from sae_jax.scaling.laws import Fitted, Study
from sae_jax.storage import AnyPath

FVU = "FVU of held-out rows, share of variance"
LABEL_INCHES = 0.19  # that a line of a legend takes
N_WIDTHS = 6  # curves of the joint law that are told apart by colour


def draw(study: Study, folder: AnyPath) -> list[AnyPath]:
    """FOLDER/<what>.png of everything that the study has; those that it no longer has are removed."""
    figures_of = {name: figure for name, _, figure in drawn(study)}
    for name in PAINTERS.keys() - figures_of.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in figures_of.items():
        figures.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures_of]


def drawn(
    study: Study, size: tuple[float, float] = (6.4, 4.4), for_page: bool = False
) -> Iterator[tuple[str, str, Any]]:
    """(name, the question it answers, figure) of everything that the study has.

    Args:
        study: the fitted table.
        size: of a figure, in inches; legends that stand beneath come on top of it.
        for_page: without the question, which the page asks, and with the legend beneath, where it covers nothing.
    """
    for name, paint in PAINTERS.items():
        if not HAS[name](study):
            continue
        figure = figures.new(*size)
        axis = figure.subplots()
        axis.loglog()
        paint(axis, study)
        for each in (axis.xaxis, axis.yaxis):
            if each.get_scale() == "log":
                figures.label_logarithmic(each)
        axis.grid(alpha=0.3)
        question = axis.get_title().partition("\n")[0]
        if for_page:
            axis.set_title("")
            axis.set_ylabel(axis.get_ylabel(), fontsize=9)
        n_labels = len(axis.get_legend_handles_labels()[1])
        if n_labels and for_page:
            columns = 1 if n_labels < 5 else 2
            figure.set_size_inches(size[0], size[1] + LABEL_INCHES * -(-n_labels // columns))
            figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
        elif n_labels:
            axis.legend(fontsize=8)
        yield name, question, figure


def _compute(axis: Any, study: Study) -> None:
    axis.plot([p.flops for p in study.at_k], [p.fvu for p in study.at_k], ".", color="0.8", label="all points")
    _law(axis, study.laws["compute"])
    axis.set(xlabel="FLOP of training", ylabel=FVU)
    _title(axis, study, "What does compute buy?")


def _latents(axis: Any, study: Study) -> None:
    _law(axis, study.laws["latents"])
    axis.set_xscale("log", base=2)
    axis.set(xlabel="latents", ylabel=FVU)
    _title(axis, study, "What does width buy?")


def _law(axis: Any, fitted: Fitted) -> None:
    """Points, the law a little beyond them, and its interval."""
    (x_N,) = fitted.x
    x, law = np.geomspace(x_N.min() / 1.5, x_N.max() * 4, 100), fitted.law
    out = list(law.outliers)
    axis.plot(np.delete(x_N, out), np.delete(fitted.y, out), "o", color="C0", markersize=4, label="fitted points")
    if out:
        axis.plot(x_N[out], fitted.y[out], "x", color="C3", label="outliers, which do not count")
    axis.plot(x, law.predict(x), color="C1", label=_formula(law))
    if len(law.draws):
        low, high = np.quantile(law.draw(x), (0.5 - fit.LEVEL / 2, 0.5 + fit.LEVEL / 2), axis=0)
        axis.fill_between(x, low, high, color="C1", alpha=0.2, linewidth=0, label=f"{fit.LEVEL:.0%} interval")


def _formula(law: fit.Law) -> str:
    constant = law.coefficients.get("constant", 0.0)
    return (
        f"{constant:.3g} + " * (constant > 0)
        + f"{law.coefficients['coefficient']:.3g} $x^{{-{law.coefficients['exponent']:.3g}}}$"
    )


def _isoflop(axis: Any, study: Study) -> None:
    for i, budget in enumerate(study.budgets):
        colour = f"C{i % 10}"
        axis.plot(budget.n, budget.loss, ".-", color=colour, linewidth=1, label=f"{budget.flops:.2g} FLOP")
        if budget.best.at_edge:
            axis.plot(budget.best.x, budget.best.loss, "o", color=colour, markerfacecolor="none", markersize=8)
        else:
            axis.plot(budget.best.x, budget.best.loss, "*", color=colour, markersize=10)
    _explain_stars(axis, "widths")
    axis.plot(
        [],
        [],
        "o",
        color="0.3",
        markerfacecolor="none",
        markersize=8,
        linestyle="none",
        label="the best, at the edge: may lie beyond",
    )
    axis.set_xscale("log", base=2)
    axis.set(xlabel="latents", ylabel=FVU)
    _title(axis, study, "Which width is best for a budget?")


def _joint(axis: Any, study: Study) -> None:
    fitted = study.laws["joint"]
    n_N, k_N = fitted.x
    widths = np.unique(n_N)
    shown = widths[np.unique(np.linspace(0, len(widths) - 1, N_WIDTHS).round().astype(int))]
    k = np.geomspace(k_N.min(), k_N.max(), 50)
    for i, n in enumerate(shown):
        at = n_N == n
        axis.plot(k_N[at], fitted.y[at], "o", color=f"C{i}", markersize=4, label=f"n = {int(n)}")
        axis.plot(k, fitted.law.predict(n, k), color=f"C{i}", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.plot([], [], color="0.4", linewidth=1, label="the law")
    axis.set(xlabel="k, active latents a row", ylabel=FVU)
    _title(axis, study, "What do width and active latents buy together?", at_k=False)


def _rates(axis: Any, study: Study) -> None:
    for i, (n, (lr_N, fvu_N, best)) in enumerate(study.rates.items()):
        axis.plot(lr_N, fvu_N, ".-", color=f"C{i % 10}", linewidth=1, label=f"n = {n}")
        if not best.at_edge:
            axis.plot(best.x, best.loss, "*", color=f"C{i % 10}", markersize=10)
    _explain_stars(axis, "rates")
    axis.set(xlabel="learning rate", ylabel=FVU)
    _title(axis, study, "Which learning rate is best for a width?")


def _active(axis: Any, study: Study) -> None:
    for i, curve in enumerate(study.active):
        axis.plot(curve.k, curve.cosine, ".-", color=f"C{i % 10}", linewidth=1, label=f"n = {curve.n_latents}")
        if None not in curve.within:
            axis.plot(curve.best, curve.cosine.min(), "*", color=f"C{i % 10}", markersize=10)
    _explain_stars(axis, "k")
    axis.set(xlabel="k, active latents a row", ylabel="mean |cos| of pairs of decoder rows")
    _title(axis, study, "At how many active latents are decoder rows least alike?", at_k=False)


def _residuals(axis: Any, study: Study) -> None:
    for name in ("compute", "latents", "joint"):
        if (fitted := study.laws.get(name)) is None:
            continue
        order = np.argsort(fitted.x[0], kind="stable")
        above_N = 100 * (fitted.y / fitted.law.predict(*fitted.x) - 1)
        axis.plot(np.linspace(0, 1, len(order)), above_N[order], ".-", linewidth=0.5, label=name)
    axis.axhline(0, color="0.4", linewidth=1)
    axis.set(xscale="linear", yscale="linear")
    _title(axis, study, "Do the points follow their laws?", at_k=False)
    axis.set(xlabel="points, from the smallest budget or width to the largest", ylabel="point above its law, %")


def _explain_stars(axis: Any, tried: str) -> None:
    label = f"the best, where it lies between the {tried} tried"
    axis.plot([], [], "*", color="0.3", markersize=10, linestyle="none", label=label)


def _title(axis: Any, study: Study, question: str, at_k: bool = True) -> None:
    site = f" of {study.site}" if study.site else ""
    k = f", k = {study.k}" if at_k and study.k is not None else ""
    axis.set_title(figures.plain(f"{question}\n{study.variant}{site}{k}", 200), fontsize=10)


PAINTERS: dict[str, Callable[[Any, Study], None]] = {
    "compute": _compute,
    "latents": _latents,
    "isoflop": _isoflop,
    "joint": _joint,
    "rates": _rates,
    "active": _active,
    "residuals": _residuals,
}
HAS: dict[str, Callable[[Study], bool]] = {
    **{name: lambda study, name=name: name in study.laws for name in ("compute", "latents", "joint")},
    "isoflop": lambda study: bool(study.budgets),
    "rates": lambda study: bool(study.rates),
    "active": lambda study: bool(study.active),
    "residuals": lambda study: bool({"compute", "latents", "joint"} & study.laws.keys()),
}
