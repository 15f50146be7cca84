"""Tables on stdout: drawn on a terminal, plain aligned text in a pipe or a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table

from sae_jax.progress import plain_console


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table."""
    console = plain_console()
    if console.is_terminal:
        table = Table(*header)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in lines))


def print_lines(lines: Sequence[str]) -> None:
    """Lines, as they are."""
    sys.stdout.write("".join(f"{line}\n" for line in lines))
