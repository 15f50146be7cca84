"""Which autoencoders a sweep trains, where on the way they are measured, and who trains which in how many passes.

grid     every combination of values is a member: an autoencoder of its own
marks    the steps after which it is measured. The rate is constant, so what stands there is the run that would have
         ended there: one run gives a point for every budget.
passes   members that fit into memory together learn from one pass over the data
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_jax import storage
from sae_jax.types import UsageError

SHORT = {"n_latents": "n"}  # in names of members
MAX_CELLS, MAX_MARKS = 100_000, 1_000_000  # no sweep that ends has more
NOT_IN_A_NAME = str.maketrans({" ": "_", "/": "_", ":": "_", "+": None})


@dataclass(frozen=True)
class SweepConfig:
    """What to try, and when to measure it."""

    grid: tuple[str, ...] = ()
    """'sae.k=16 32 64': a setting and its values. Every combination is trained, of each of `members` if there are any.
    In a recipe and from Python: {sae.k: [16, 32, 64], ...}"""
    compute: tuple[float, ...] = ()
    """budgets in FLOP (both matrices, forward and twice backward): each member is measured where it has used them up"""
    tokens: tuple[float, ...] = ()
    """numbers of tokens after which each member is measured; none and no budgets: train.steps"""
    min_tokens: float = 0
    """a budget that buys a member fewer has no point for it"""
    max_tokens: float | None = None
    """a budget that buys a member more has no point for it; runs until convergence end here"""
    tolerance: float | None = None
    """train until the held-out FVU changes by less than this share over a window; needs max_tokens"""
    window: float = 1_000_000
    """tokens; with a tolerance, each member is measured after every window"""
    lr_from: str | None = None
    """a fit.json whose rule gives the learning rate of each width"""
    held_out: int = 32768
    """rows that no member learns from, to measure on"""
    split: int = 1
    """devices that the language model is split over while it makes these rows, as harvest.split"""
    memory_gib: float | None = None
    """of each device, for the members of a pass; None = what the device has"""
    per_pass: int | None = None
    """members of a pass, at most; fewer give more passes for workers with --claim to share"""

    def __post_init__(self) -> None:
        for name in ("compute", "tokens"):
            for value in getattr(self, name):
                if not 0 < value < math.inf:
                    raise UsageError(f"sweep.{name}={value} must be above 0 and finite")
        if not 0 <= self.min_tokens < math.inf or max(self.min_tokens, 1) > self.limit:
            raise UsageError(
                f"sweep.min_tokens={self.min_tokens:g} and sweep.max_tokens={self.limit:g} leave nothing between them; "
                f"lower the one or raise the other"
            )
        if self.tolerance is not None:
            if not 0 < self.tolerance < 1:
                raise UsageError(f"sweep.tolerance={self.tolerance} must be above 0 and below 1")
            if self.max_tokens is None:
                raise UsageError("sweep.tolerance needs sweep.max_tokens: the end of a run that does not converge")
        for name in ("window", "held_out", "split", "per_pass"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < math.inf:
                raise UsageError(f"sweep.{name}={value:g} must be at least 1 and finite")
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise UsageError(f"sweep.memory_gib={self.memory_gib} must be above 0 and finite")

    @property
    def limit(self) -> float:
        """Tokens that no member goes beyond."""
        return math.inf if self.max_tokens is None else self.max_tokens


class Cell(NamedTuple):
    """One combination of the grid."""

    name: str  # part of a member's name
    settings: dict[str, Any]


def cells(config: SweepConfig) -> list[Cell]:
    """All combinations, the last setting changing fastest; one without settings if there is no grid."""
    values = config.grid if isinstance(config.grid, Mapping) else _from_words(config.grid)
    for key, tried in values.items():
        if not isinstance(tried, list | tuple) or not tried or len(set(map(str, tried))) < len(tried):
            raise UsageError(f"sweep.grid {key}={tried!r}: give a setting a list of different values")
    if (n := math.prod(map(len, values.values()))) > MAX_CELLS:
        raise UsageError(f"sweep.grid has {n:,} combinations, more than {MAX_CELLS:,}; give settings fewer values")
    return [
        Cell("-".join(_named(key, value) for key, value in cell.items()), cell)
        for cell in (dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values()))
    ]


def _from_words(grid: Sequence[str]) -> dict[str, list[Any]]:
    """{setting: values} of a grid as it is typed: 'sae.k=16 32 64'."""
    values: dict[str, list[Any]] = {}
    for words in grid:
        key, equals, rest = words.partition("=")
        try:
            values_of_key = [storage.parse_yaml(word, words) for word in shlex.split(rest)]
        except (ValueError, UsageError):
            values_of_key = []
        if not equals or not values_of_key:
            raise UsageError(f"sweep.grid {words!r}: give a setting and different values for it, as in 'sae.k=16 32'")
        if key in values:
            raise UsageError(f"sweep.grid: {key} stands twice; give all its values at once")
        values[key] = values_of_key
    return values


def due(config: SweepConfig, steps: int, batch_size: int, flop_per_token: int) -> dict[int, float | None]:
    """{step: the budget that is used up there, if that is why} for all marks of a member, in order.

    `steps` is how long it would be trained if the sweep did not say.
    """
    fewest, most = max(config.min_tokens, batch_size), config.limit
    marks: dict[int, float | None] = {}
    if config.tolerance is not None:
        window = max(round(config.window / batch_size), 1)
        if most / batch_size / window > MAX_MARKS:
            raise UsageError(
                f"sweep.max_tokens={most:g} holds over {MAX_MARKS:,} times sweep.window={config.window:g}; raise it"
            )
        marks |= dict.fromkeys(range(window, int(most // batch_size) + 1, window))
    marks |= dict.fromkeys(max(round(n / batch_size), 1) for n in config.tokens if n <= most)
    marks |= {
        round(budget / flop_per_token / batch_size): budget
        for budget in config.compute
        if fewest <= budget / flop_per_token <= most
    }
    if not config.tokens and not config.compute and config.tolerance is None:
        marks[steps] = None
    return dict(sorted(marks.items()))


def share(costs: Sequence[float], i: int, n: int) -> list[int]:
    """Which of these pieces of work are worker i's of n: the dearest first, each to whoever has least so far."""
    loads, owner = [0.0] * n, {}
    for piece in sorted(range(len(costs)), key=lambda piece: (-costs[piece], piece)):
        owner[piece] = loads.index(min(loads))
        loads[owner[piece]] += costs[piece]
    return [piece for piece in range(len(costs)) if owner[piece] == i]


def pack(
    n_bytes: Sequence[int], workspaces: Sequence[int], room: float, max_pieces: int | None = None
) -> list[list[int]]:
    """Pieces into passes so that the bytes of all, and the largest workspace beside them, stay within `room`.

    The largest first, each into the first pass that holds it and has fewer than `max_pieces`; a piece that is too large
    gets a pass of its own.
    """
    passes: list[list[int]] = []
    for piece in sorted(range(len(n_bytes)), key=lambda piece: (-n_bytes[piece] - workspaces[piece], piece)):
        for pieces in passes:
            together = [*pieces, piece]
            needs = sum(n_bytes[p] for p in together) + max(workspaces[p] for p in together)
            if len(pieces) != max_pieces and needs <= room:
                pieces.append(piece)
                break
        else:
            passes.append([piece])
    return [sorted(pieces) for pieces in passes]


def _named(key: str, value: Any) -> str:
    last = key.rpartition(".")[2]
    value = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    text = (f"{value:g}" if isinstance(value, float) else str(value)).translate(NOT_IN_A_NAME)
    return f"{SHORT.get(last, last)}{text}" if text[:1].isdigit() else text
