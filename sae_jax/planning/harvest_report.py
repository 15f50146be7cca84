"""The report on a planned harvest: a nested mapping for JSON, and lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_jax.planning.compile import INSTALL, Compiled
from sae_jax.planning.forward import ForwardPass
from sae_jax.planning.report import buffer_rows, memory_rows, of_compiler, of_program, section, sent
from sae_jax.planning.targets import Target
from sae_jax.units import duration, memory, number, size


def report(
    target: Target,
    host: Target,
    passes: Mapping[str, ForwardPass],
    largest: str,
    peak: int | None,
    fits: bool,
    cure: list[str] | None,
    compiled: Compiled | None,
    run: dict[str, Any],
) -> dict[str, Any]:
    """The report. Without `compiled` it is an estimate: the compiler is not installed.

    Args:
        target: the machines.
        host: those of one worker.
        passes: {model: its pass on one host}.
        largest: the model whose pass takes the most memory; it is the one that was compiled.
        peak: bytes of a device, the other models and the results of the batch before included; None: unknown.
        fits: whether that is what a device has.
        cure: flags that make it fit, by an estimate; None: there are none, or it fits.
        compiled: the pass of `largest`, alone.
        run: all of it.
    """
    all_passes = [*passes.values()]
    device: dict[str, Any] = {
        "model_bytes": sum(each.model_bytes for each in all_passes),
        "result_bytes": sum(each.result_bytes for each in all_passes),
        "read_bytes": sum(each.read_bytes for each in all_passes),
        "peak_bytes": peak,
        "limit_bytes": host.chip.memory_bytes,
        "usable_bytes": host.usable_bytes,
        "headroom_bytes": None if peak is None else host.usable_bytes - peak,
        "flop": sum(each.flop for each in all_passes),
    }
    if compiled is not None and compiled.text is not None:
        device |= of_program(compiled.text)
    return {
        "target": target.name,
        "n_devices": target.n_devices,
        "host": host.name,
        "n_models": len(passes),
        "largest_model": largest,
        "precision": all_passes[0].precision,
        "split": all_passes[0].split,
        "batch_tokens": all_passes[0].n_tokens,
        "source": "estimate" if compiled is None else "compiled",
        "fits": fits,
        "refusal": compiled.refusal if compiled else None,
        "cure": cure,
        "device": device,
        "run": run,
        "compiler": of_compiler(compiled),
    }


def lines(content: dict[str, Any]) -> list[str]:
    """A report for a person to read."""
    device, run = content["device"], content["run"]
    split = f", each copy over {content['split']} devices" * (content["split"] > 1)
    models = f", of {content['n_models']} models" * (content["n_models"] > 1)
    rows = [
        ("parameters", f"{memory(device['model_bytes'])} in {content['precision']}{split}{models}"),
        ("rows of a batch", f"{memory(device['result_bytes'])}, and those of the batch before"),
        *memory_rows(content, "a harvest"),
        (
            "work",
            f"{device['flop']:.3g} FLOP a batch, which is {content['batch_tokens']:,} tokens on {content['host']}",
        ),
        (
            "memory traffic",
            f"{size(device['read_bytes'] + device['result_bytes'])} a batch: parameters read, rows written",
        ),
    ]
    if "compiled_flop" in device:
        share = device["compiled_flop"] / (device["compiled_flop"] + device["other_flop"])
        of_model = f" of {content['largest_model']}" * (content["n_models"] > 1)
        rows += [
            ("work, compiled", f"{device['compiled_flop']:.3g} FLOP{of_model}, {share:.1%} of all operations"),
            *((c["kind"], f"{sent(c)} a batch; no part of the times") for c in device["collectives"]),
            *buffer_rows(device),
        ]
    rate, floor = run["tokens_per_second"], run["floor_tokens_per_second"]
    n, each = run["n_workers"], f" on each of {run['n_workers']} hosts" * (run["n_workers"] > 1)
    whole = [
        ("work", f"{run['token_flop']:.3g} FLOP a token"),
        ("speed", f"{number(rate)} tokens/s at {run['mfu']:.0%} of the matrix rate, but never above the limit"),
        ("speed limit", f"{number(floor)} tokens/s at the full matrix rate, then the memory traffic"),
        ("to disk", f"{size(rate * run['row_bytes'] / n)} a second{each}"),
    ]
    if "tokens" in run:
        whole += [
            ("tokens", f"{run['tokens']:,}"),
            ("time", f"{duration(run['hours'] * 3600)}; at the speed limit {duration(run['floor_hours'] * 3600)}"),
            ("set on disk", f"{size(run['disk_bytes'])} in {run['n_shards']:,} shards, if no row is left out"),
        ]
    else:
        whole.append(("tokens", "all of the text; --harvest.tokens says how many, for time and size"))
    return [*_verdict(content), *section("each device", rows), *section("the harvest", whole)]


def _verdict(content: dict[str, Any]) -> list[str]:
    n, compiler = content["run"]["n_workers"], content["compiler"]
    says = [f"{content['target']}, {content['n_devices']} devices: {'fits' if content['fits'] else 'does NOT fit'}"]
    if compiler is None:
        says[0] += ", by an ESTIMATE: the compiler is not installed"
        says.append("  the peak is the sum of parameters, activations of a batch and rows of two batches")
        says.append(f"  for the compiled pass: {INSTALL}")
    elif content["refusal"]:
        says.append(f"  the compiler refused it: {content['refusal']}")
    else:
        what = f"the pass of {content['largest_model']}, the largest model," if content["n_models"] > 1 else "the pass"
        took = f"{duration(compiler['compile_seconds'])} with {memory(compiler['host_bytes'])} of host memory"
        says.append(f"  {what} compiled in {took}")
    if n > 1:
        says.append(f"  on each of {n} hosts ({content['host']}) a worker: --shard i/{n}")
    if content["cure"]:
        says.append(f"  by an estimate it fits with {' '.join(content['cure'])}")
    elif not content["fits"]:
        says.append("  no harvest.split, batch_tokens or precision makes it fit; use devices with more memory")
    return says
