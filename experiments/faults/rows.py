"""Do rows that no model would give ever lead to a good-looking number?

Question: rows that are constant, huge, tiny or not numbers, alone or among ordinary ones, are stored and learnt from by
every variant that learns from rows. Is that refused, or is each number finite and true, or explicitly none?
Guess: yes.
Command: python experiments/faults/rows.py --out OUT      (the same command resumes; 8 minutes)
Answer: yes. Of 144 trials, 18 kinds of rows by 8 variants, 75 were refused, 53 ended with the FVU that float64 finds,
and 16 with one that is explicitly none: of rows whose squares a float32 does not hold.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import sae_jax
from sae_jax import storage
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import Progress
from sae_jax.saes import base
from sae_jax.types import UserError

OTHERS = ("crosscoder", "transcoder", "end_to_end")  # variants that need two sources, or a model
WELL = ("refused", "true", "not a number")
TOLERANCE = 0.02  # of an FVU: rows pass through bfloat16
ROWS = np.random.default_rng(0).standard_normal((512, 16)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where to."""

    out: Path = Path("build/rows")
    """Folder for the sets, trials.jsonl and table.json."""
    smoke: bool = False
    """One variant and two kinds of rows: does it run?"""


def kinds() -> dict[str, np.ndarray]:
    """{what: f32[512, 16]}."""

    def with_one(value: float) -> np.ndarray:
        rows = ROWS.copy()
        rows[300, 5] = value
        return rows

    scales = {f"all times {scale:.0e}": ROWS * np.float32(scale) for scale in (1e30, 1e18, 1e8, 1e-8, 1e-18, 1e-40)}
    ones = {f"one number {value}": with_one(value) for value in (np.nan, np.inf, -np.inf, 3e38, 1e18, 1e-40)}
    constant = {f"all {value}": np.full_like(ROWS, value) for value in (0.0, 7.3, 1e19, 1e-30)}
    column = np.where(np.arange(16) == 3, np.float32(1e6), ROWS)
    return {"ordinary": ROWS, "one column 1e6": column, **scales, **ones, **constant}


def main(config: Config) -> None:
    """Try each kind with each variant, but for those in OUT/trials.jsonl; write OUT/table.json; show it."""
    names = [name for name in base.variants() if name not in OTHERS]
    trials = [(what, variant) for what in kinds() for variant in names]
    trials = trials[3 * len(names) :: len(names)][:2] if config.smoke else trials
    done = {(row["rows"], row["variant"]) for row in storage.read_lines(config.out / "trials.jsonl")}
    todo = [trial for trial in trials if trial not in done]
    with storage.Lines(config.out / "trials.jsonl") as lines, Progress("try", len(todo), "trials", first="") as bar:
        for i, (what, variant) in enumerate(todo, 1):
            outcome, said = attempt(config.out / what.replace(" ", "-"), kinds()[what], variant)
            lines.write({"rows": what, "variant": variant, "outcome": outcome, "said": said})
            bar.update(i)
    counts: dict[str, Counter[str]] = {}
    problems = []
    for row in storage.read_lines(config.out / "trials.jsonl"):
        counts.setdefault(row["rows"], Counter())[row["outcome"]] += 1
        if row["outcome"] not in WELL:
            problems.append(f"{row['rows']}, {row['variant']}: {row['outcome']} {row['said']}")
    storage.write_text(config.out / "table.json", json.dumps(counts, indent=2) + "\n")
    outcomes = sorted({outcome for count in counts.values() for outcome in count})
    table = Table("rows", *outcomes)
    for what, count in counts.items():
        table.add_row(what, *(str(count[outcome] or "") for outcome in outcomes))
    Console(width=120).print(table)
    for problem in problems:
        Console(width=200).print(problem, markup=False)
    if problems:
        raise SystemExit("not every number is true, see above")


def attempt(path: Path, rows: np.ndarray, variant: str) -> tuple[str, str]:
    """(outcome, what was said) of storing rows, learning from them and measuring on them."""
    small = {"n_latents": 32, "steps": 4, "batch_size": 64, "dtype": "float32", "log_every": 1}
    try:
        if not path.exists():
            sae_jax.write_activations(path, rows, dtype="float32")
        activations = sae_jax.open_activations(path)
        stored = [row for i in range(activations.n_chunks) for row in activations.read_chunk("acts", i)]
        if Counter(map(bytes, stored)) != Counter(map(bytes, rows)):  # they are shuffled
            return "OTHER ROWS", ""
        d = sae_jax.train(path, variant=variant, **small)
        return judged(on_rows(d.sae, rows), rows, np.asarray(d(rows)))
    except UserError as error:
        return "refused", str(error)
    except Exception:
        return "TRACEBACK", traceback.format_exc()[-500:]


def judged(metrics: dict[str, Any], rows: np.ndarray, reconstruction: np.ndarray) -> tuple[str, str]:
    """(outcome, which number is wrong), by the same figure in float64."""
    x, x_hat = rows.astype(np.float64), reconstruction.astype(np.float64)
    with np.errstate(all="ignore"):
        fvu = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    found = metrics["fvu"]
    if not np.isfinite(found):
        return "not a number", ""
    is_true = np.isclose(found, fvu, rtol=TOLERANCE)
    return ("true" if is_true else "UNTRUE"), f"fvu {found}, in float64 {fvu}"


if __name__ == "__main__":
    main(tyro.cli(Config))
