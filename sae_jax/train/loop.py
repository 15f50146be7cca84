"""The run, top to bottom: state, data, steps, checkpoints, record.

loader (step t) --> rows over all devices --> step --> metrics of t, fetched while t+1 runs
                                               |
                                               +--> checkpoint: on an interval, on SIGTERM, at the end
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sae_jax import config as configs
from sae_jax import mesh as meshes
from sae_jax.progress import Progress, console
from sae_jax.saes.base import Batch, SaeConfig, Sample
from sae_jax.train import logs
from sae_jax.train.checkpoint import Checkpoints, check_resumable
from sae_jax.train.state import TrainConfig, abstract, initial
from sae_jax.train.step import make_step
from sae_jax.types import UsageError, UserError


class Batches(Protocol):
    """Where rows come from. The rows of step t depend on t alone, so the step is all the state there is."""

    wait_seconds: float  # so far, for input

    def batches(self, start_step: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(step, {source: [B / processes, D]}) from `start_step` on, without end."""
        ...

    def row_ids(self, step: int) -> np.ndarray:
        """i64[B / processes]: which rows of the set this process's part of a batch holds."""
        ...


def train(
    run: Path,
    facts: dict[str, Any],
    sae_config: SaeConfig,
    config: TrainConfig,
    mesh: Mesh,
    loader: Batches,
    site: str,
    sample: Callable[[], Sample],
) -> int:
    """Train until `config.steps`, or until the machine is to be taken away (SIGTERM).

    The same call resumes: it goes on from the last checkpoint in `run`.

    Args:
        run: directory of the run, shared by all processes.
        facts: what config.json shall say; must hold `d_model`.
        sae_config: the variant's config.
        config: length, optimiser, bookkeeping.
        mesh: devices; batches are split over all of them.
        loader: rows of any step.
        site: the source that is encoded and reconstructed.
        sample: called once, for a run without checkpoint, to learn what initialisation needs to know of the data.

    Returns:
        The step the run stands at.

    Raises:
        UsageError: `run` was started with other settings.
        UserError: the loss is not finite; RUN/failure-<process>.json names the step and its rows.
    """
    first = jax.process_index() == 0
    meshes.check_divides(mesh, sae_config.n_latents, config.batch_size)
    # Both may refuse, so before anything is written.
    if resuming := (run / "config.json").exists():
        check_resumable(run, facts)
    begin = None if resuming else sample()

    with jax.set_mesh(mesh), Checkpoints(run) as checkpoints:
        if checkpoints.latest is None:
            state = jax.jit(lambda begin: initial(sae_config, config, begin))(begin or sample())
        else:
            state = checkpoints.restore(abstract(sae_config, config, facts["d_model"], mesh))
        start = int(state.step)
        if start > config.steps:
            raise UsageError(f"{run} stands at step {start}; train.steps={config.steps} must be at least that")
        if first:
            configs.write_json(run / "config.json", facts)
        attempt = logs.Attempts(run, start, not first, mesh=meshes.sizes(mesh), n_processes=jax.process_count())
        step_fn = make_step(sae_config, config)
        record = _Recorder(config, loader, start)
        done = start
        with (
            logs.Metrics(run, start, record.wanted, config.tensorboard, not first) as metrics_file,
            Progress("train", config.steps, "steps", start, silent=not first) as progress,
        ):
            pending = None
            for step, rows in loader.batches(start):
                if step >= config.steps:
                    break
                state, metrics = step_fn(state, _place(rows[site], mesh))
                if jax.process_count() > 1 and jax.default_backend() == "cpu":
                    # The CPU client deadlocks with more than some thirty collective programs in flight.
                    jax.block_until_ready(metrics)
                if pending is not None:
                    _finish(run, pending, loader, record, metrics_file, progress, attempt, checkpoints)
                done, pending = step + 1, (step + 1, metrics)
                # JAX counts from 0: a SIGTERM from before the first question is agreed upon for step 1 of the attempt.
                stopping = multihost_utils.reached_preemption_sync_point(done - start)
                if _is_due(done, config) or stopping:
                    # The save before this one ends before this step is on record. With two saves an interval, a run
                    # is thus never further than one interval from its last complete checkpoint.
                    checkpoints.wait()
                    _finish(run, pending, loader, record, metrics_file, progress, attempt, checkpoints)
                    pending = None
                    checkpoints.save(done, state)
                    attempt.record(done, "running")
                if stopping:
                    break
        if first and done < config.steps:
            console.print(f"stopped by SIGTERM at step {done}; the same command goes on from there")
    attempt.record(done, "finished" if done >= config.steps else "preempted")
    return done


def _is_due(step: int, config: TrainConfig) -> bool:
    """Whether a checkpoint is begun at this step: on the interval, half-way between, and at the end."""
    return step % config.checkpoint_every in (0, config.checkpoint_every // 2) or step == config.steps


class _Recorder:
    """Turns device metrics into a row of the log, with rates over the steps since the last row."""

    def __init__(self, config: TrainConfig, loader: Batches, start: int) -> None:
        self._config, self._loader = config, loader
        self._began = self._last_time = time.monotonic()
        self._last_step, self._last_waited = start, loader.wait_seconds

    def row(self, step: int, metrics: dict[str, float]) -> dict[str, Any]:
        now = time.monotonic()
        elapsed = max(now - self._last_time, 1e-9)
        waited = self._loader.wait_seconds - self._last_waited
        rate = (step - self._last_step) * self._config.batch_size / elapsed
        self._last_time, self._last_step, self._last_waited = now, step, self._loader.wait_seconds
        return {
            "step": step,
            "tokens": step * self._config.batch_size,
            **metrics,
            "tokens_per_second": round(rate, 1),
            "input_wait": round(min(waited / elapsed, 1.0), 4),
            "seconds": round(now - self._began, 3),
        }

    def wanted(self, step: int) -> bool:
        return step % self._config.log_every == 0 or step in (1, self._config.steps)


def _finish(
    run: Path,
    pending: tuple[int, dict[str, jax.Array]],
    loader: Batches,
    record: _Recorder,
    metrics_file: logs.Metrics,
    progress: Progress,
    attempt: logs.Attempts,
    checkpoints: Checkpoints,
) -> None:
    """Fetch a step's metrics; stop on a loss that is not finite, log the step if it is due."""
    step, device_metrics = pending
    metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
    # A gradient that is not finite spoils the weights that a checkpoint of this very step would hold.
    if not np.isfinite(metrics["loss"] + metrics["grad_norm"]):
        _fail(run, step, metrics, loader, attempt, checkpoints)
    if record.wanted(step):
        row = record.row(step, metrics)
        metrics_file.write(row)
        progress.update(
            step,
            f"{row['tokens_per_second']:,.0f} tokens/s  fvu {row['fvu']:.4f}  l0 {row['l0']:.1f}  "
            f"dead {row['dead_fraction']:.1%}  input wait {row['input_wait']:.0%}",
        )


def _fail(run: Path, step: int, metrics, loader: Batches, attempt: logs.Attempts, checkpoints: Checkpoints) -> None:
    """Leave what is needed to replay the step: its number, its rows, and the checkpoint before it."""
    checkpoints.wait()
    attempt.record(step - 1, "failed")
    path = run / f"failure-{jax.process_index()}.json"
    rows = loader.row_ids(step - 1).tolist()
    facts = {"step": step, "metrics": {k: str(v) for k, v in metrics.items()}, "row_ids": rows}
    configs.write_json(path, {**facts, "last_checkpoint": checkpoints.latest})
    raise UserError(
        f"loss is {metrics['loss']}, gradient norm {metrics['grad_norm']} at step {step}; {path} names its rows and "
        f"the checkpoint before it; lower train.lr or look at these rows of the set"
    )


def _place(rows: np.ndarray, mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch, split over all devices."""
    x = jax.make_array_from_process_local_data(meshes.sharding(mesh, meshes.ROWS), rows)
    return Batch(x, x)
