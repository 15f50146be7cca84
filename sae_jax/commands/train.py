"""`sae-jax train RECIPE --data SET --out RUN`: one autoencoder, or a set of members from one pass over the data.

With `--data live` the recipe's language model runs in the same process, and nothing of what it makes need be stored.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

import jax

from sae_jax import recipe, runs
from sae_jax.activations.live import LiveConfig
from sae_jax.activations.settings import HarvestConfig
from sae_jax.commands import gpu, runtime
from sae_jax.progress import console
from sae_jax.training.run import S, TrainJob
from sae_jax.types import UsageError


@dataclass(frozen=True)
class Train(TrainJob[S], Generic[S]):
    """Train a sparse autoencoder on an activation set, or on live data. Repeat the command to resume."""

    data: str
    """activation set to train on; or `live`: rows that the language model of `harvest` makes in this process"""
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    live: LiveConfig = field(default_factory=LiveConfig)


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, train."""
    command = recipe.parse(Train, argv, "sae-jax train")
    job = TrainJob(**{f.name: getattr(command, f.name) for f in dataclasses.fields(TrainJob)})
    is_live = job.data == runs.LIVE
    if is_live and os.path.exists(runs.LIVE):
        raise UsageError(
            "--data=live is a word and the name of what is here, too; write ./live for the path, or run elsewhere for "
            "the word"
        )
    if is_live and not recipe.says("harvest", argv):
        raise UsageError(
            "--data=live: nothing says what language model to run on what text; give a recipe with a harvest: section"
        )
    jobs = runs.expand_members(job)
    runtime.start_distributed()
    gpu.warn_of_idle_gpu()
    step = runs.run_train(job, runs.live(settings=command.harvest, live_config=command.live) if is_live else None)
    if jax.process_index() == 0:
        n_steps = max(member.train.steps for member in jobs.values())
        console.print(f"{job.out}: step {step} of {n_steps}")
