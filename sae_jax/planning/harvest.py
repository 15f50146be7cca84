"""A harvest on machines that are not there: does it fit, how fast is it, how large is the set.

A worker has the devices of one host, and makes its share of the shards; workers do not know of each other. What is
compiled is the pass of one batch on one host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations.forward import batch_sequences, hooks_of
from sae_jax.activations.rows import row_bytes
from sae_jax.activations.settings import HarvestConfig
from sae_jax.activations.spec import INDEX_NAMES, layout
from sae_jax.planning import compile, harvest_report
from sae_jax.planning.forward import ForwardPass
from sae_jax.planning.job import check_settings
from sae_jax.planning.targets import Target, parse
from sae_jax.progress import console
from sae_jax.types import UsageError

ORIGIN_BYTES = 4 * (len(INDEX_NAMES) + 1)  # where a row is from, and its token among the sequences


@dataclass(frozen=True)
class HarvestJob:
    """What is to be harvested, and on what."""

    target: str  # machines, as planning/targets.py names them
    harvest: HarvestConfig = field(default_factory=HarvestConfig)
    mfu: float = 0.3  # share of the matrix rate that the pass is taken to reach
    timeout: float = 600.0  # seconds until a compiler that does not come back is killed

    def __post_init__(self) -> None:
        check_settings(self.mfu, self.timeout)
        if self.harvest.backend == "torch":
            raise UsageError("harvest.backend=torch is not compiled; plan with harvest.backend=jax")


@dataclass(frozen=True)
class Speed:
    """Tokens a second of all devices, by arithmetic. Traffic between the devices of a copy is not in it."""

    at_rate: float  # at the stated share of the matrix rate, and no more than `floor`
    floor: float  # products at the full rate, then parameters read and rows written once a batch at full bandwidth


def plan_harvest(job: HarvestJob) -> dict[str, Any]:
    """The report on a harvest (planning/harvest_report.py): compiled where the compiler is installed, else an estimate.

    Of the models only config.json is read.

    Raises UsageError for a target, model, hook or split that cannot be, UserError where the compiler fails.
    """
    config, target = job.harvest, parse(job.target)
    host = target.host
    passes = passes_of(config, host.n_devices)
    largest = max(passes, key=lambda name: passes[name].working_bytes)
    others = [each for name, each in passes.items() if name != largest]
    compiled = None
    if compile.is_installed(target):
        console.print(f"compiling for {host.name} ...")
        compiled = compile.compile_forward(host, passes[largest], job.timeout)
    estimate = peak_bytes(passes)
    if compiled is None:
        peak: int | None = estimate
    elif compiled.peak_bytes is None:
        peak = None
    else:
        beside = passes[largest].unread_bytes + passes[largest].result_bytes
        peak = compiled.peak_bytes + beside + sum(each.model_bytes + 2 * each.result_bytes for each in others)
    fits = peak is not None and peak <= host.usable_bytes and (compiled is None or compiled.text is not None)
    factor = 1.0 if peak is None else max(1.0, peak / estimate)
    n_workers = target.n_devices // host.n_devices
    return harvest_report.report(
        target=target,
        host=host,
        passes=passes,
        largest=largest,
        peak=peak,
        fits=fits,
        cure=None if fits else cure(config, host, factor),
        compiled=compiled,
        run={"mfu": job.mfu, **_run(config, passes, host, n_workers, job.mfu)},
    )


def passes_of(config: HarvestConfig, n_devices: int) -> dict[str, ForwardPass]:
    """{model: its pass} on the devices of one worker. Raises UsageError as a harvest does."""
    meshes.abstract_lm_mesh(config.split, n_devices)
    passes = {}
    for name, reference in config.models().items():
        spec = lm.read_spec(reference)
        passes[name] = ForwardPass(
            spec=spec,
            hooks=tuple(hooks_of(config, lm.LanguageModel({}, spec))),
            context=config.context,
            n_sequences=batch_sequences(config, n_devices),
            n_devices=n_devices,
            split=config.split,
            dtype=config.dtype,
            precision=config.precision,
        )
    return passes


def peak_bytes(passes: dict[str, ForwardPass]) -> int:
    """An estimate: all models, the pass of one at a time, and the results of two batches, one of which is fetched."""
    return max(each.working_bytes for each in passes.values()) + sum(
        each.model_bytes + 2 * each.result_bytes for each in passes.values()
    )


def speed(passes: dict[str, ForwardPass], host: Target, n_workers: int, mfu: float) -> Speed:
    """Of all workers, who run the models one after the other."""
    n_tokens = next(iter(passes.values())).n_tokens
    compute = sum(each.flop / host.rate(each.precision) for each in passes.values())
    moved = sum(each.read_bytes + each.result_bytes for each in passes.values()) / host.chip.bandwidth
    seconds, floor = max(compute / mfu, compute + moved), compute + moved
    return Speed(n_workers * n_tokens / seconds, n_workers * n_tokens / floor)


def cure(config: HarvestConfig, host: Target, factor: float) -> list[str] | None:
    """The least change of settings that makes a harvest fit, as flags; None: there is none.

    Args:
        config: settings that do not fit.
        host: the machine of a worker.
        factor: by which the estimates of peaks are raised.
    """
    # One setting rather than two, and bfloat16, which changes the rows a little, last.
    for changes in sorted(_changes(config, host.n_devices), key=lambda new: ("precision" in new, len(new))):
        if factor * peak_bytes(passes_of(replace(config, **changes), host.n_devices)) <= host.usable_bytes:
            return [f"--harvest.{name}={value}" for name, value in changes.items()]
    return None


def _changes(config: HarvestConfig, n_devices: int) -> Iterator[dict[str, Any]]:
    """Settings to try: smaller batches, and these with more devices a copy, and both in bfloat16."""
    for precision in dict.fromkeys((config.precision, "bfloat16")):
        for split in (n for n in range(config.split, n_devices + 1) if n_devices % n == 0):
            least = config.context * (n_devices // split)
            batch_tokens = config.batch_tokens
            while True:
                new = {"batch_tokens": batch_tokens, "split": split, "precision": precision}
                if changes := {name: value for name, value in new.items() if value != getattr(config, name)}:
                    yield changes
                if batch_tokens <= least:
                    break
                batch_tokens = max(batch_tokens // 2, least)


def _run(
    config: HarvestConfig, passes: dict[str, ForwardPass], host: Target, n_workers: int, mfu: float
) -> dict[str, Any]:
    """The whole harvest; without harvest.tokens its length is not known."""
    rate = speed(passes, host, n_workers, mfu)
    result: dict[str, Any] = {
        "token_flop": sum(each.token_flop for each in passes.values()),
        "row_bytes": sum(each.row_bytes for each in passes.values()),
        "tokens_per_second": rate.at_rate,
        "floor_tokens_per_second": rate.floor,
        "n_workers": n_workers,
    }
    n_sequences = config.tokens // config.context
    if not n_sequences:
        return result
    tokens = n_sequences * config.context
    widths = [width for each in passes.values() for width in each.widths]
    n_shards, _, _ = layout(tokens, [row_bytes(width, config.dtype) for width in widths], config.context)
    # Where shards do not divide, some workers make one more than others.
    of_busiest = math.ceil(n_shards / n_workers) * math.ceil(n_sequences / n_shards) * config.context
    share = min(of_busiest / tokens, 1) * n_workers
    return result | {
        "tokens": tokens,
        "flop": tokens * result["token_flop"],
        "hours": share * tokens / rate.at_rate / 3600,
        "floor_hours": share * tokens / rate.floor / 3600,
        "disk_bytes": tokens * (result["row_bytes"] + ORIGIN_BYTES),
        "n_shards": n_shards,
    }
