"""Does a larger language model need more latents for the same error?

Question: language models of three widths, trained alike on the same text, layer 2 of 4 of each, TopK at k = 16 from 128
to 4,096 latents at equal tokens: how do L(n) = constant + coefficient * n^-exponent of the three compare (Gao et al.
2024, section 3.2.2)?
Guess: the wider the model, the larger the error at every n, and the smaller the exponent.
Command: python experiments/scaling_subject_model.py --out OUT
Answer: not known yet; only its smoke has run.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scaling_steps import harvested, swept

from sae_jax.scaling import fit, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTHS = (32, 64, 128)  # of the language models
LATENTS = (128, 256, 512, 1024, 2048, 4096)
K = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/scaling_subject_model")
    """Folder for the models, sets and sweeps, results.json and the figure."""
    lm_steps: int = 1500
    """Of each language model, as the bundled one had."""
    tokens: float = 2e6
    """That every autoencoder learns from."""
    lr: float = 4e-3
    """Of every autoencoder."""
    smoke: bool = False
    """One untrained model, two widths, five steps: does it run?"""


def main(config: Config) -> None:
    """Train the models, harvest, sweep and fit each; write OUT/results.json and OUT/scaling_subject_model.png."""
    results = {}
    for d_model in WIDTHS[:1] if config.smoke else WIDTHS:
        model, folder = config.out / f"lm{d_model}", config.out / f"d{d_model}"
        trained(model, d_model, config)
        data = harvested(None, folder, config.smoke, f"--harvest.model={model}")
        n, tokens = ((64, 128), 1280) if config.smoke else (LATENTS, config.tokens)
        grid = {"sae.n_latents": list(n), "sae.k": [8 if config.smoke else K]}
        flags = (f"--sweep.tokens={tokens:g}", f"--train.lr={config.lr}")
        points = table.read(swept(data, folder, config.smoke, grid, *flags))
        results[d_model] = {str(point.n_latents): point.fvu for point in points}
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not config.smoke:
        show(results)
        plot(results, config.out / "scaling_subject_model.png")


def trained(model: Path, d_model: int, config: Config) -> None:
    """A language model by the recipe of the bundled one, unless it is there."""
    if not (model / "heldout.jsonl").exists():
        script = Path(__file__).with_name("train_bundled_lm.py")
        words = ["--smoke"] if config.smoke else [f"--steps={config.lm_steps}", f"--d-model={d_model}"]
        subprocess.run([sys.executable, str(script), f"--out={model}", *words], check=True)


def law_of(errors: dict[str, float]) -> fit.Law:
    """L(n) of one model."""
    return fit.decay_constant(np.array([float(n) for n in errors]), np.array([*errors.values()]))


def show(results: dict[int, dict[str, float]]) -> None:
    """Errors and laws, a row a model."""
    shown = Table("d_model", *map(str, LATENTS), "constant", "exponent", title="FVU on held-out rows, by latents")
    for d_model, errors in results.items():
        law = law_of(errors)
        ends = {name: f"{low:.3g} to {high:.3g}" for name, (low, high) in law.interval.items()}
        laws = (f"{law.coefficients[name]:.3f} ({ends.get(name, '')})" for name in ("constant", "exponent"))
        shown.add_row(str(d_model), *(f"{fvu:.4f}" for fvu in errors.values()), *laws)
    Console(width=140).print(shown)


def plot(results: dict[int, dict[str, float]], path: Path) -> None:
    """FVU against latents, points and law of each model."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    x = np.geomspace(min(LATENTS), max(LATENTS), 50)
    for i, (d_model, errors) in enumerate(results.items()):
        axis.plot([float(n) for n in errors], [*errors.values()], "o", color=f"C{i}", label=f"d_model = {d_model}")
        axis.plot(x, law_of(errors).predict(x), color=f"C{i}")
    axis.set(xscale="log", yscale="log", xlabel="n_latents", ylabel="FVU of held-out rows")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Config))
