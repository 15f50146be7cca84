"""What the experiments on scaling laws share: the commands they run, on the set they all learn from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "configs" / "scaling_laptop.yaml"
SMOKE = ("--train.batch-size=256", "--train.log-every=10")

# The learning rate of a width n: RATE * n**EXPONENT, two thirds of the best of 1,024 and 4,096 latents at k = 32 over
# three million tokens (0.0048, 0.0031; learning_rate.py). At the best a tenth of 4,096 latents die.
RATE, EXPONENT = 0.025, -0.3


def sae_jax(*words: object) -> None:
    """One command, in a process of its own."""
    subprocess.run([sys.executable, "-m", "sae_jax.commands.main", *map(str, words)], check=True)


def harvested(data: Path | None, out: Path, smoke: bool, *flags: str) -> Path:
    """The activation set: `data`, or one made in `out`."""
    if data:
        return data
    sae_jax("harvest", RECIPE, "--out", out / "set", *flags, *(["--harvest.tokens=20480"] if smoke else []))
    return out / "set"


def of_widths(widths: Sequence[int]) -> list[str]:
    """Flags of a sweep over widths: members at their own learning rates."""
    own = (f"n{n} --sae.n-latents={n} --train.lr={RATE * n**EXPONENT:.2g}" for n in widths)
    return ["--members", *own]


def swept(data: Path, out: Path, smoke: bool, grid: dict[str, list], *flags: str) -> Path:
    """The sweep over a grid, in OUT/sweep, and its laws."""
    words = [f"{key}={' '.join(map(str, values))}" for key, values in grid.items()]
    smoke_flags = (*SMOKE, "--sweep.held-out=1024") if smoke else ()
    sae_jax("sweep", RECIPE, "--data", data, "--out", out / "sweep", "--sweep.grid", *words, *flags, *smoke_flags)
    sae_jax("fit", out / "sweep")
    return out / "sweep"
