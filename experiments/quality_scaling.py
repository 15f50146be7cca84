"""Do wider and sparser dictionaries get better by more than their reconstruction?

Question: TopK on residual activations of the bundled language model, three widths by three k, equal tokens: how do the
metrics by which Gao et al. 2024 (arXiv 2406.04093, section 4) judge go with width and k: downstream loss, probe loss,
N2G, sparsity of effects, uniformity of importance; and with them k-sparse probing, absorption, SCR and TPP?
Guess, before any run, after the paper and Karvonen et al. 2025 (arXiv 2503.09532): downstream KL falls with n and with
k. Probe loss falls with n, and hardly moves with k. N2G's recall and precision rise with n and fall with k.
Ablation sparsity (the share of logits that move) rises with k, so effects are less sparse, and hardly moves with n.
Absorption rises with n and falls with k. Of SCR and TPP no guess.
Command: python experiments/quality_scaling.py --out OUT
Answer: not run yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tyro
from bundled import harvested, laptop_recipe
from scaling_steps import of_widths

import sae_jax
from sae_jax.commands.show import print_table
from sae_jax.evaluation.evaluate import descriptions
from sae_jax.scaling import quality
from sae_jax.sweeps.run import member_folders

WIDTHS, K = (256, 1024, 4096), (8, 16, 32)
TOKENS = 3_000_000  # of training
MEASURED = 40_000  # of held-out text


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are."""

    out: Path = Path("build/quality_scaling")
    """Folder for the set, the sweep, quality.json and quality.png."""
    data: Path | None = None
    """The set of configs/scaling_laptop.yaml; made in `out` if not given."""
    smoke: bool = False
    """Narrow dictionaries, the core alone: does it run?"""


def main(config: Config) -> None:
    """Sweep, measure every member, and fit every number that all of them have."""
    recipe = laptop_recipe(config.smoke)
    data, sweep = harvested(recipe, config.data, config.out), config.out / "sweep"
    sae_jax.sweep(
        data,
        out=sweep,
        grid={"k": [2, 4] if config.smoke else list(K)},
        members=of_widths((32, 64) if config.smoke else WIDTHS),
        sae_config=recipe.sae,
        train_config=recipe.train,
        site=recipe.site,
        tokens=[2560 if config.smoke else TOKENS],
        held_out=1024 if config.smoke else 2**15,
    )
    sae_jax.evaluate(
        sweep, suite=["core"] if config.smoke else ["openai", "probing"], tokens=2048 if config.smoke else MEASURED
    )
    measured, missing = quality.read(sweep, member_folders(sweep))
    assert not missing
    common = set.intersection(*(set(one.metrics) for one in measured))
    common = {name for name in common if np.ptp([one.metrics[name] for one in measured]) > 1e-6}  # and they vary
    shown = [name for name, description in descriptions().items() if description.in_table and name in common]
    found, _ = sae_jax.quality(sweep, shown)
    print_table(quality.HEADER, quality.rows(found))


if __name__ == "__main__":
    main(tyro.cli(Config))
