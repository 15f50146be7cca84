"""What the experiments on scaling laws share: the commands they run, on the set they all learn from."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sae_jax.scaling import table

RECIPE = Path(__file__).parents[1] / "configs" / "scaling_laptop.yaml"
SMOKE = ("--train.batch-size=256", "--train.log-every=10")

WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
BUDGETS = (1e11, 2e11, 4e11, 8e11, 1.6e12, 3.2e12, 6.4e12, 1.28e13, 2.56e13, 5.12e13, 1.02e14)  # FLOP
TOLERANCE, WINDOW, MOST = 0.02, 2e6, 18e6  # a run that gains less FVU in so many tokens ends; and every run ends

# The learning rate of a width n: RATE * n**EXPONENT, two thirds of the best of 1,024 and 4,096 latents at k = 32 over
# three million tokens (0.0048, 0.0031; learning_rate.py). At 0.004 13 % of 4,096 latents die there.
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


def until_converged(data: Path | None, out: Path, smoke: bool, k: Sequence[int]) -> Path:
    """The sweep over WIDTHS by k, each run until it has converged and measured at BUDGETS on the way, and its laws."""
    widths, budgets, window, most = WIDTHS, BUDGETS, WINDOW, MOST
    if smoke:
        widths, budgets, window, most = (64, 128, 256), (2e8, 4e8), 2560.0, 5120.0
    flags = [f"--sweep.tolerance={TOLERANCE}", f"--sweep.window={window:g}", f"--sweep.max-tokens={most:g}"]
    flags += [f"--sweep.min-tokens={window / 20:g}", "--sweep.compute", *(f"{budget:g}" for budget in budgets)]
    return swept(harvested(data, out, smoke), out, smoke, {"sae.k": list(k)}, *flags, *of_widths(widths))


def laws_of(sweep: Path, out: Path, *flags: str) -> list[table.Point]:
    """The points of a sweep, and what `sae-jax fit` makes of them in OUT: the laws in their own folder stay."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep / table.FILE, out / table.FILE)
    sae_jax("fit", out, *flags)
    return table.read(out)
