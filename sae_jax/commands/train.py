"""`sae-jax train RECIPE --data SET --out RUN`: one autoencoder, or a set of members from one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from sae_jax import recipe, runs
from sae_jax.commands import gpu, runtime
from sae_jax.progress import console
from sae_jax.storage import is_url
from sae_jax.training.run import TrainJob
from sae_jax.types import UsageError


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, train."""
    job = recipe.parse(TrainJob, argv, "sae-jax train")
    if is_url(job.out):
        raise UsageError(f"--out={job.out}: a run needs a directory that all processes share; URLs are for sets")
    jobs = runs.expand_members(job)
    runtime.start_distributed()
    gpu.warn_of_idle_gpu()
    step = runs.run_train(job)
    if jax.process_index() == 0:
        n_steps = max(member.train.steps for member in jobs.values())
        console.print(f"{job.out}: step {step} of {n_steps}")
