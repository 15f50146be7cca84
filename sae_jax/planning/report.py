"""The report on a plan: a nested mapping for JSON, and lines for a person."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from sae_jax.planning import analytic, hlo
from sae_jax.planning.analytic import Run, Step
from sae_jax.planning.compile import INSTALL, Compiled
from sae_jax.planning.storage import Demand
from sae_jax.planning.targets import Target
from sae_jax.units import duration, memory, size

N_BUFFERS = 3  # shown to a person


def report(
    target: Target,
    steps: Mapping[str, Step],
    largest: str,
    n_slices: int,
    run: Run,
    mfu: float,
    storage: Demand,
    compiled: Compiled | None,
) -> dict[str, Any]:
    """The report. Without `compiled` it is an estimate: the compiler is not installed.

    Args:
        target: the machines.
        steps: {member: its step on one device of its slice}.
        largest: the member whose step takes the most working memory; it is the one that was compiled.
        n_slices: members that are stepped at once.
        run: all of it.
        mfu: share of the matrix rate.
        storage: what the run asks of it.
        compiled: the step of `largest`, alone.
    """
    usable, step = target.usable_bytes, steps[largest]
    state = analytic.state_bytes([*steps.values()], n_slices)
    if compiled is None:
        peak: int | None = analytic.peak_bytes([*steps.values()], n_slices)
    else:  # of one member; the states of the others lie beside it
        peak = None if compiled.peak_bytes is None else compiled.peak_bytes + state - step.state_bytes
    refused = compiled is not None and compiled.text is None
    device: dict[str, Any] = {
        "state_bytes": state,
        "gradient_bytes": step.gradient_bytes,
        "pair_bytes": step.pair_bytes,
        "model_bytes": step.model_bytes,
        "model_activation_bytes": step.model_activation_bytes,
        "peak_bytes": peak,
        "limit_bytes": target.chip.memory_bytes,
        "usable_bytes": usable,
        "headroom_bytes": None if peak is None else usable - peak,
        "flop": step.flop,
        "aux_flop": step.aux_flop,
    }
    if compiled is not None and compiled.text is not None:
        device |= {"donated_bytes": compiled.alias_bytes, **of_program(compiled.text)}
    return {
        "target": target.name,
        "n_devices": target.n_devices,
        "n_members": len(steps),
        "n_slices": n_slices,
        "largest_member": largest,
        "source": "estimate" if compiled is None else "compiled",
        "fits": not refused and peak is not None and peak <= usable,
        "refusal": compiled.refusal if compiled else None,
        "device": device,
        "run": {**asdict(run), "mfu": mfu},
        "storage": asdict(storage),
        "compiler": of_compiler(compiled),
    }


def of_compiler(compiled: Compiled | None) -> dict[str, Any] | None:
    """What compiling took; None: the compiler is not installed."""
    names = ("lower_seconds", "compile_seconds", "cpu_seconds", "host_bytes")
    return None if compiled is None else {name: getattr(compiled, name) for name in names}


def of_program(text: str) -> dict[str, Any]:
    """Work and communication of a compiled program."""
    program, quiet = (hlo.analyse(text, quietest) for quietest in (False, True))
    return {
        "compiled_flop": program.matmul_flop,
        "other_flop": program.other_flop,
        "collectives": [asdict(c) for c in sorted(program.collectives.values(), key=lambda c: -c.bytes)],
        "quietest": {
            "compiled_flop": quiet.matmul_flop,
            "collectives": [asdict(c) for c in quiet.collectives.values()],
        },
        "sorts": program.sorts,
        "open_loops": program.open_loops,
        "largest_buffers": [asdict(buffer) for buffer in program.largest],
    }


def lines(content: dict[str, Any]) -> list[str]:
    """A report for a person to read."""
    device, run, several = content["device"], content["run"], content["n_members"] > 1
    of_step = f"a step of {content['largest_member']}" if several else "a step"
    rows = [
        ("state", memory(device["state_bytes"]) + f", of {content['n_members']} members" * several),
        *(
            (
                ("language model", memory(device["model_bytes"])),
                ("its activations", f"{memory(device['model_activation_bytes'])}, estimated"),
            )
            if device["model_bytes"]
            else ()
        ),
        *memory_rows(content, "a step"),
        ("work", f"{device['flop']:.3g} FLOP {of_step}" + _with_dead(device)),
    ]
    if "collectives" in device:
        least = device["quietest"]
        quiet = {c["kind"]: c for c in least["collectives"]}
        none = {"bytes": 0, "count": 0}
        rows += [
            ("work, compiled", f"{least['compiled_flop']:.3g} to {device['compiled_flop']:.3g} FLOP {of_step}"),
            *((c["kind"], f"{sent(quiet.get(c['kind'], none))} to {sent(c)}") for c in device["collectives"]),
            ("sorts", f"{device['sorts']} in the program"),
            *buffer_rows(device),
        ]
    time, floor = (run[name] * 3600 for name in ("hours", "floor_hours"))
    at_rate = f"at {run['mfu']:.0%} of the matrix rate, but never below the floor"
    whole = [
        ("tokens", f"{run['tokens']:,}"),
        ("set on disk", size(run["disk_bytes"])),
        ("work", f"{run['flop']:.3g} FLOP"),
        ("time", f"{duration(time)} {at_rate}"),
        ("floor", f"{duration(floor)} at the full matrix rate, then the state read and written once a step"),
    ]
    parts = {"each device": rows, "the run": whole, "storage": storage_rows(content["storage"])}
    return [*_verdict(content), *(line for title, rows in parts.items() for line in section(title, rows))]


def storage_rows(storage: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run asks of its storage."""
    rate, between = f"{storage['gb_per_second']:g} GB/s", f"{storage['hours_between_preemptions']:g} hours"
    every, best = storage["checkpoint_every"], storage["best_checkpoint_every"]
    most = storage["most_input_gb_per_second"]
    return [
        ("input", f"{storage['input_gb_per_second']:.3g} GB/s, and {most:.3g} at the floor"),
        ("a save", f"{size(storage['save_bytes'])}: {duration(storage['save_seconds'])} at {rate}, with its digests"),
        ("a restore", f"{duration(storage['restore_seconds'])} at that rate, with its digests"),
        ("goodput", f"{storage['goodput']:.1%} or more, if machines are taken away every {between}"),
        (
            "best",
            f"{storage['best_goodput']:.1%} or more with a save every {duration(storage['best_interval_seconds'])}: "
            f"train.checkpoint_every={best} for {every}",
        ),
    ]


def memory_rows(content: dict[str, Any], what: str) -> list[tuple[str, str]]:
    """What fits on a device; `what` takes the memory."""
    device = content["device"]
    share = device["usable_bytes"] / device["limit_bytes"]
    return [
        ("peak" if content["compiler"] else "peak, estimated", _or_unknown(device["peak_bytes"])),
        ("limit", f"{memory(device['limit_bytes'])}, of which {what} may take {share:.0%}"),
        ("headroom", _or_unknown(device["headroom_bytes"])),
    ]


def buffer_rows(device: dict[str, Any]) -> list[tuple[str, str]]:
    """The largest arrays of a program."""
    large = device["largest_buffers"][:N_BUFFERS]
    return [("large array", f"{memory(b['bytes'])} {b['shape']} {b['origin']}".rstrip()) for b in large]


def section(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """A title, and below it names and what they are."""
    return [title, *(f"  {name:20}{value}" for name, value in rows)]


def _verdict(content: dict[str, Any]) -> list[str]:
    first = f"{content['target']}, {content['n_devices']} devices: {'fits' if content['fits'] else 'does NOT fit'}"
    compiler, n_slices = content["compiler"], content["n_slices"]
    if compiler is None:
        parts = "state, 3/2 of the gradient and 1 GiB of workspace"
        if content["device"]["pair_bytes"]:
            parts = "state, 3 GiB of gradients of a tile, their pairs and 1 GiB of workspace"
        if content["device"]["model_bytes"]:
            parts = f"language model, its activations, {parts}"
        return [
            f"{first}, by an ESTIMATE: the compiler is not installed",
            f"  the peak is the sum of {parts}",
            f"  for the compiled step: {INSTALL}",
        ]
    if content["refusal"]:
        return [first, f"  the compiler refused it: {content['refusal']}"]
    what = "the step" if content["n_members"] == 1 else f"the step of {content['largest_member']}, the largest member,"
    where = f" for one of {n_slices} slices" * (n_slices > 1)
    took = f"{duration(compiler['compile_seconds'])} with {memory(compiler['host_bytes'])} of host memory"
    return [first, f"  {what} compiled{where} in {took}"]


def sent(collective: dict[str, Any]) -> str:
    """Bytes of all collectives of a kind, and how many there are."""
    return f"{size(collective['bytes'])} in {collective['count']:,}"


def _with_dead(device: dict[str, Any]) -> str:
    """What AuxK may add; nothing where there is none."""
    return f", up to {device['flop'] + device['aux_flop']:.3g} with dead latents" if device["aux_flop"] else ""


def _or_unknown(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else memory(n_bytes)
