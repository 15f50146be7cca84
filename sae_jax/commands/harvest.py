"""`sae-jax harvest RECIPE --out SET [--shard i/n]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sae_jax import config, recipe
from sae_jax.activations.harvest import harvest
from sae_jax.activations.settings import HarvestConfig
from sae_jax.commands import gpu, signals
from sae_jax.progress import console


@dataclass(frozen=True)
class Harvest:
    """Run text through a language model and store the activations of some sites. Repeat the command to resume."""

    out: str
    """directory or URL of the activation set"""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    shard: str = "0/1"
    """i/n: make every n-th shard, starting at i; run n such commands anywhere, in any order"""


def run(argv: Sequence[str]) -> None:
    """Parse and harvest."""
    command = recipe.parse(Harvest, argv, "sae-jax harvest")
    worker = config.share(command.shard)
    gpu.warn_of_idle_gpu()
    spec = harvest(command.harvest, command.out, worker, signals.defer_sigterm)
    if signals.defer_sigterm():
        raise signals.Terminated
    sites = ", ".join(source.name for source in spec.sources)
    console.print(f"{command.out}: {spec.n_shards} shards of {sites}")
