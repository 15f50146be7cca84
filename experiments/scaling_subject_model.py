"""Does a larger language model need more latents for the same error?

Question: language models of three widths, trained alike on the same text, layer 2 of 4 of each, TopK at k = 8 from 64
to 1,024 latents at equal tokens: how do L(n) = constant + coefficient * n^-exponent of the three compare (Gao et al.
2024, section 3.2.2)?
Guess: the wider the model, the larger the error at every n, and the smaller the exponent.
Command: python experiments/scaling_subject_model.py --out OUT
Cost: 31 minutes for two language models on two cores, at the lowest priority beside other work; 18 for the rest.
Answer: the first half yes; of the exponents nothing can be said. 2,000,896 tokens, batch 2048, one seed; FVU of 32,768
held-out tokens (JAX 0.10.2, CPU; figures/scaling_subject_model.png), with 90 % intervals of the laws:

    d_model  bits a byte  64      128     256     512     1024 latents  constant               exponent
    32       1.70         0.1122  0.1001  0.0866  0.0797  0.0741        0.059 (0.030 to 0.069) 0.47 (0.22 to 0.73)
    64       1.46         0.2433  0.1963  0.1565  0.1350  0.1187        0.085 (0.056 to 0.096) 0.57 (0.39 to 0.67)
    128      1.28         0.3707  0.2962  0.2404  0.2014  0.1716        0.092 (0.080 to 0.103) 0.45 (0.42 to 0.49)

Twice the width costs 1.4 to 2.2 times the error, and four times the latents make up for it in one of six cases. k = 8
is a quarter of 32 dimensions and a sixteenth of 128, which is part of the reason.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib
import numpy as np
import train_bundled_lm
import tyro
from bundled import harvested, laptop_recipe
from rich.table import Table
from scaling_steps import of_widths, swept

from sae_jax import lm
from sae_jax.progress import plain_console
from sae_jax.scaling import fit, table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTHS = (32, 64, 128)  # of the language models
LATENTS = (64, 128, 256, 512, 1024)
K = 8


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how long to train."""

    out: Path = Path("build/scaling_subject_model")
    """Folder for the models, sets and sweeps, results.json and the figure."""
    lm_steps: int = 1500
    """Of each language model, as the bundled one had."""
    tokens: float = 2e6
    """That every autoencoder learns from."""
    smoke: bool = False
    """The bundled model alone, two widths, five steps: does it run?"""


def main(config: Config) -> None:
    """Train the models, harvest, sweep and fit each; write OUT/results.json and OUT/scaling_subject_model.png."""
    results = {}
    for d_model in WIDTHS[-1:] if config.smoke else WIDTHS:
        folder = config.out / f"d{d_model}"
        recipe = laptop_recipe(config.smoke)
        recipe = dataclasses.replace(
            recipe, harvest=dataclasses.replace(recipe.harvest, model=(str(trained(d_model, config)),))
        )
        data = harvested(recipe, None, folder)
        n, tokens = ((64, 128), 1280) if config.smoke else (LATENTS, config.tokens)
        marks = {"members": of_widths(n), "tokens": (tokens,)}
        points = table.read(swept(recipe, data, folder, config.smoke, {"k": [K]}, **marks))
        results[d_model] = {str(p.n_latents): p.fvu for p in sorted(points, key=lambda point: point.n_latents)}
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not config.smoke:
        show(results)
        plot(results, config.out / "scaling_subject_model.png")


def trained(d_model: int, config: Config) -> Path | str:
    """A language model by the recipe of the bundled one, which is one of them; nothing to do if it is there."""
    if d_model == lm.load("bundled").spec.d_model and config.lm_steps == Config.lm_steps:
        return "bundled"
    model = config.out / f"lm{d_model}"
    if not (model / "heldout.jsonl").exists():
        train_bundled_lm.main(train_bundled_lm.Config(out=model, steps=config.lm_steps, d_model=d_model))
    return model


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
    plain_console(width=140).print(shown)


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
