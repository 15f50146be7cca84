"""`sae-jax sweep RECIPE --data SET --out DIR`: a grid of autoencoders, measured at marks, as one table."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from sae_jax import config, recipe, runs
from sae_jax.commands import gpu, runtime
from sae_jax.progress import console, plain_console
from sae_jax.sweeps.plan import SweepJob, in_passes, plan
from sae_jax.sweeps.preview import preview
from sae_jax.sweeps.run import failure, sweep


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, sweep; or say what would be trained."""
    job = recipe.parse(SweepJob, argv, "sae-jax sweep")
    shard = config.share(job.shard)
    if not job.dry_run:
        runtime.start_distributed()
    gpu.warn_of_idle_gpu()
    source = runs.as_source(job.data, job.allow_partial, job.cache_gib)
    planned, refused = plan(job, source)
    passes = in_passes(job, planned, shard)
    if job.dry_run:
        table, lines = preview(job, planned, passes)
        output = plain_console()
        output.print(table)
        for line in lines:
            output.print(line)
    if jax.process_index() == 0:
        for line in refused:
            console.print(f"left out: {line}")
    problems = [] if job.dry_run else sweep(job, planned, source)
    if refused or problems:
        raise failure(job.out, [f"{len(refused)} left out"] * bool(refused) + problems)
