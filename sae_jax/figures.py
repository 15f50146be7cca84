"""Figures without `pyplot`: that would choose a back end for the whole process, a notebook's included."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from sae_jax import storage

if TYPE_CHECKING:  # importing it takes half a second
    from matplotlib.figure import Figure


# What matplotlib draws in, and what it is called in a page; then these names in light and in dark.
_CYCLE = ("1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "7f7f7f", "bcbd22", "17becf")
_DARK = ("6aa6dd", "ffa657", "5fc95f", "ff7b72", "c297eb", "c49184", "f29bd6", "a5a5a5", "d3d455", "4dd8e6")
_COLOURS = {
    "#000000": "ink",
    "#ffffff": "paper",
    **dict.fromkeys(("#b0b0b0", "#cccccc"), "faint"),
    **dict.fromkeys(("#4c4c4c", "#666666"), "soft"),
    **{f"#{colour}": f"c{i}" for i, colour in enumerate(_CYCLE)},
}
_FONTS = "system-ui, 'Liberation Sans', 'DejaVu Sans', sans-serif"


def _scheme(ink: str, paper: str, faint: str, soft: str, cycle: tuple[str, ...]) -> str:
    named = {"ink": ink, "paper": paper, "faint": faint, "soft": soft, **{f"c{i}": c for i, c in enumerate(cycle)}}
    return f":root{{{';'.join(f'--{name}:#{colour}' for name, colour in named.items())}}}"


_SCHEME = (
    _scheme("1d1c1a", "ffffff", "b9b3aa", "66615a", _CYCLE)
    + f"@media(prefers-color-scheme:dark){{{_scheme('e7e4df', '1a1d22', '5c626c', 'a19b92', _DARK)}}}"
    + "text{fill:var(--ink)}"
)


def new(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: storage.StrPath) -> None:
    """Write a figure as a PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    storage.write_bytes(path, data.getvalue())


def svg(figure: Figure) -> str:
    """A figure as an SVG for a page: no background, and colours that follow the reader's choice of light or dark."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sae_jax"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]  # without the declaration of a document
    for colour, name in _COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    drawn = drawn.replace("'DejaVu Sans'", _FONTS).replace('width="', 'data-width="', 1)
    first, rest = drawn.split(">", 1)
    return f"{first}><style>{_SCHEME}</style>{rest}"


def plain(text: str, most: int = 60) -> str:
    """A name as a label: cut in the middle where it is long, and a dollar is one, no sign of a formula."""
    if len(text) > most:
        text = f"{text[: most // 2]}\u2026{text[-(most // 2) :]}"
    return text.replace("$", r"\$")


def label_logarithmic(axis: Any) -> None:
    """Plain numbers on a logarithmic axis (`axes.xaxis` or `yaxis`), enough of them to read values off.

    By default only powers of ten have labels: where an axis shows less than two, that is one number or none.
    """
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades > 2.5:
        axis.set_minor_formatter(ticker.NullFormatter())
        return
    if decades < 0.5:
        axis.set_major_locator(ticker.MaxNLocator(6))
    else:
        axis.set_major_locator(
            ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades > 1 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
        )
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(ticker.NullLocator())
