"""A report page: a head and sections of a few kinds of parts, in one file that needs no other.

Whoever makes a page gives data; templates/report.html, which escapes all of it, makes HTML of them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from sae_jax import figures, storage
from sae_jax.storage import StrPath

GENERATOR = "sae_jax report"
_TEMPLATES = files("sae_jax.pages") / "templates"
_STYLES, _SCRIPT = ("style.css", "report.css"), "report.js"
_PIXELS = 96  # an inch


@dataclass(frozen=True)
class Facts:
    """Numbers with names; what they mean is shown on hover and in a list that opens."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str, str]]  # name, value, meaning or ""


@dataclass(frozen=True)
class Cell:
    """Of a table. It sorts by `key` if there is one; else by its text."""

    text: str
    key: float | None = None
    href: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows as wide as the names of columns. Readers may sort it if it says so."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell | str]]
    is_sortable: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure, its question or name above it and what it says beneath."""

    caption: str
    alt: str  # what a reader who does not see it is told
    source: str  # data:
    width: int
    height: int
    note: str = ""

    @classmethod
    def of(cls, figure: Any, caption: str, alt: str, note: str = "") -> Chart:
        """Of a matplotlib figure."""
        width, height = (round(_PIXELS * inches) for inches in figure.get_size_inches())
        data = base64.b64encode(figures.svg(figure).encode()).decode()
        return cls(caption, alt, f"data:image/svg+xml;base64,{data}", width, height, note)


@dataclass(frozen=True)
class Charts:
    """Side by side where there is room."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True)
class Lines:
    """Sentences, one a line, under a small heading if there is one."""

    kind: ClassVar[str] = "lines"
    lines: Sequence[str]
    heading: str = ""


@dataclass(frozen=True)
class Reasons:
    """Names, and why something is as it is with each."""

    kind: ClassVar[str] = "reasons"
    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Settings:
    """Nested settings, folded away."""

    kind: ClassVar[str] = "settings"
    items: Sequence[tuple[str, str]]


Part = Facts | Table | Charts | Lines | Reasons | Settings


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Page:
    """All that a report says."""

    title: str
    about: str = ""  # a line beneath
    warnings: Sequence[str] = ()  # what is unfinished, damaged or missing
    links: Sequence[tuple[str, str]] = ()  # text and address, relative to the page
    sections: Sequence[Section] = field(default_factory=tuple)


def filled(table: Table) -> Table:
    """A table without the columns in which nothing stands."""
    kept = [i for i in range(len(table.columns)) if any(row[i] != "" for row in table.rows)]
    rows = [[row[i] for i in kept] for row in table.rows]
    return replace(table, columns=[table.columns[i] for i in kept], rows=rows)


def short_names(names: Iterable[str]) -> dict[str, str]:
    """{path: its last part}, or as much of it as tells it from the others."""
    parts = {name: Path(name).parts or (name,) for name in names}
    for n in range(1, max(map(len, parts.values()), default=1) + 1):
        short = {name: "/".join(of[-n:]) for name, of in parts.items()}
        if len(set(short.values())) == len(short):
            return short
    return {name: name for name in parts}


def write(path: StrPath, page: Page) -> None:
    """Write a page to a file, which is replaced."""
    storage.write_text(path, render(page))


def render(page: Page) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((_TEMPLATES / "report.html").read_text("utf-8"))
    style = "".join((_TEMPLATES / name).read_text("utf-8") for name in _STYLES)
    html = template.render(
        page=page, generator=GENERATOR, style=style, script=(_TEMPLATES / _SCRIPT).read_text("utf-8")
    )
    return html.encode("utf-8", "backslashreplace").decode("utf-8")  # lone bytes of file names
