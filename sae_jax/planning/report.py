"""What a plan says: one nested mapping, for JSON, and the same for a person."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sae_jax.planning import hlo
from sae_jax.planning.analytic import Run, Step
from sae_jax.planning.compile import INSTALL, Compiled
from sae_jax.planning.targets import GIB, Target

N_BUFFERS = 3  # shown to a person


def report(target: Target, on: Step, run: Run, mfu: float, compiled: Compiled | None) -> dict[str, Any]:
    """All that is known. `compiled` None: an estimate, as the compiler is not installed."""
    usable = target.usable_bytes
    peak = on.peak_bytes if compiled is None else compiled.peak_bytes
    refused = compiled is not None and compiled.text is None
    device: dict[str, Any] = {
        "state_bytes": on.state_bytes,
        "gradient_bytes": on.gradient_bytes,
        "peak_bytes": peak,
        "limit_bytes": target.chip.memory_bytes,
        "usable_bytes": usable,
        "headroom_bytes": None if peak is None else usable - peak,
        "flop": on.flop,
    }
    if compiled is not None and compiled.text is not None:
        program, quiet = (hlo.analyse(compiled.text, quietest) for quietest in (False, True))
        device |= {
            "donated_bytes": compiled.alias_bytes,
            "compiled_flop": program.matmul_flop,
            "collectives": [asdict(c) for c in sorted(program.collectives.values(), key=lambda c: -c.bytes)],
            "quietest": {
                "compiled_flop": quiet.matmul_flop,
                "collectives": [asdict(c) for c in quiet.collectives.values()],
            },
            "sorts": program.sorts,
            "open_loops": program.open_loops,
            "largest_buffers": [asdict(buffer) for buffer in program.largest],
        }
    return {
        "target": target.name,
        "n_devices": target.n_devices,
        "source": "estimate" if compiled is None else "compiled",
        "fits": not refused and peak is not None and peak <= usable,
        "refusal": compiled.refusal if compiled else None,
        "device": device,
        "run": {**asdict(run), "mfu": mfu},
        "compiler": None
        if compiled is None
        else {
            name: getattr(compiled, name) for name in ("lower_seconds", "compile_seconds", "cpu_seconds", "host_bytes")
        },
    }


def lines(content: dict[str, Any]) -> list[str]:
    """A report for a person to read."""
    device, run = content["device"], content["run"]
    share = device["usable_bytes"] / device["limit_bytes"]
    rows = [
        ("state", _gib(device["state_bytes"])),
        ("peak" if content["compiler"] else "peak, estimated", _gib(device["peak_bytes"])),
        ("limit", f"{_gib(device['limit_bytes'])}, of which a step may take {share:.0%}"),
        ("headroom", _gib(device["headroom_bytes"])),
        ("work", f"{device['flop']:.3g} FLOP a step"),
    ]
    if "collectives" in device:
        least, large = device["quietest"], device["largest_buffers"][:N_BUFFERS]
        quiet = {c["kind"]: c for c in least["collectives"]}
        none = {"bytes": 0, "count": 0}
        rows += [
            ("work, compiled", f"{least['compiled_flop']:.3g} to {device['compiled_flop']:.3g} FLOP a step"),
            *((c["kind"], f"{_sent(quiet.get(c['kind'], none))} to {_sent(c)}") for c in device["collectives"]),
            ("sorts", f"{device['sorts']} in the program"),
            *(("large array", f"{_gib(b['bytes'])} {b['shape']} {b['origin']}".rstrip()) for b in large),
        ]
    whole = [
        ("tokens", f"{run['tokens']:,}"),
        ("set on disk", f"{run['disk_bytes'] / 1e12:,.3g} TB"),
        ("work", f"{run['flop']:.3g} FLOP"),
        ("time", f"{run['hours']:,.3g} hours at {run['mfu']:.0%} of the matrix rate"),
        ("floor", f"{run['floor_hours']:,.3g} hours at all of it, state read and written once a step"),
    ]
    return [
        *_verdict(content),
        "each device",
        *(f"  {name:20}{value}" for name, value in rows),
        "the run",
        *(f"  {name:20}{value}" for name, value in whole),
    ]


def _verdict(content: dict[str, Any]) -> list[str]:
    first = f"{content['target']}, {content['n_devices']} devices: {'fits' if content['fits'] else 'does NOT fit'}"
    compiler = content["compiler"]
    if compiler is None:
        return [f"{first}, by an ESTIMATE: the compiler is not installed", f"  for the compiled step: {INSTALL}"]
    took = f"compiled in {compiler['compile_seconds']:.0f} s with {compiler['host_bytes'] / GIB:.1f} GiB of host memory"
    if content["refusal"]:
        return [first, f"  the compiler refused it: {content['refusal']}"]
    return [first, f"  {took}"]


def _sent(collective: dict[str, Any]) -> str:
    return f"{collective['bytes'] / 1e6:,.1f} MB in {collective['count']:,}"


def _gib(n_bytes: int | None) -> str:
    return "not told" if n_bytes is None else f"{n_bytes / GIB:,.2f} GiB"
