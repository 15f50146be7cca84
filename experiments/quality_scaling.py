"""Do wider and sparser dictionaries get better by more than their reconstruction?

Question: TopK on residual activations of the bundled language model, three widths by three k, equal tokens: how do the
metrics by which Gao et al. 2024 (arXiv 2406.04093, section 4) judge go with width and k: downstream loss, probe loss,
N2G, sparsity of effects, uniformity of importance; and with them k-sparse probing, absorption, SCR and TPP?
Guess, before any run, after the paper and Karvonen et al. 2025 (arXiv 2503.09532): downstream KL falls with n and with
k. Probe loss falls with n, and hardly moves with k. N2G's recall and precision rise with n and fall with k.
Ablation sparsity (the share of logits that move) rises with k, so effects are less sparse, and hardly moves with n.
Absorption rises with n and falls with k. Of SCR and TPP no guess.
Command: python experiments/quality_scaling.py --out OUT
Cost: 23 minutes for the sweep and 17 for the measurements, on two cores that had much else to do.
Answer: losses go as published, single latents do not. TopK, resid_post.2, three million tokens each, one seed; 40,000
held-out tokens (figures/quality_scaling.png; JAX 0.10.2, CPU). Change for each doubling, with intervals of 90 %:

                                      of latents                    of k
    FVU                               -0.019 [-0.025, -0.013]       -0.046 [-0.059, -0.033]
    KL                                -0.048 [-0.073, -0.024]       -0.125 [-0.174, -0.077]
    probe loss                        +0.000 [-0.003, +0.003]       -0.009 [-0.015, -0.002]
    N2G precision                     -0.020 [-0.035, -0.006]       -0.024 [-0.053, +0.005]
    N2G recall                        +0.021 [+0.011, +0.031]       -0.002 [-0.022, +0.018]
    ablation sparsity                 +0.0002 [-0.0004, +0.0009]    +0.0009 [-0.0004, +0.0023]
    uniformity of importance          -0.004 [-0.010, +0.002]       -0.048 [-0.061, -0.036]
    accuracy of one latent, of five   -0.004, -0.010                +0.026, +0.013
    SCR                               +0.015 [-0.000, +0.029]       +0.052 [+0.023, +0.081]
    TPP                               -0.028 [-0.035, -0.022]       -0.003 [-0.016, +0.010]

The KL falls with both, as guessed. Probe loss was guessed to fall with n and to care little for k: it is the other
way round, 0.49 to 0.52 everywhere (a principal component 0.543, a channel 0.569). N2G's recall rises with n as
guessed, its precision falls, and what k does to either these nine cannot say. Ablation sparsity tells nothing apart:
0.091 to 0.097, as random directions have. Absorption cannot be measured: the model knows no first letters (F1 0.15).
Not guessed: probes of few latents and TPP get worse as dictionaries get wider, uniformity falls with k, and probes
and SCR get better with k. At equal tokens the widest have learnt least of each latent: of 4,096 latents 27, 12 and 7
% fire on none of these tokens, so width and training are not told apart here.
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
DRAWN = (
    *("kl", "probe_loss", "n2g_precision", "n2g_recall", "ablation_sparsity", "importance_uniformity"),
    *("sparse_probing_accuracy_1", "scr", "tpp"),
)


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
    quality.draw(measured, [one for one in found if one.metric in DRAWN], config.out / "quality_scaling.png")
    print_table(quality.HEADER, quality.rows(found))


if __name__ == "__main__":
    main(tyro.cli(Config))
