"""What a plan says: one nested mapping, for JSON, and the same as a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table

from sae_jax.plan import hlo
from sae_jax.plan.analytic import Run, Step
from sae_jax.plan.compile import INSTALL, Compiled
from sae_jax.plan.targets import GIB, Target


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
        program = hlo.analyse(compiled.text)
        device |= {
            "donated_bytes": compiled.alias_bytes,
            "compiled_flop": program.matmul_flop,
            "collectives": [asdict(c) for c in sorted(program.collectives.values(), key=lambda c: -c.bytes)],
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
        else {name: getattr(compiled, name) for name in ("lower_seconds", "compile_seconds", "host_bytes")},
    }


def table(content: dict[str, Any]) -> Group:
    """A report for a person to read."""
    device, run = content["device"], content["run"]
    rows = Table("on each device", "", show_header=True)
    rows.add_row("state", _gib(device["state_bytes"]))
    rows.add_row("peak" if content["compiler"] else "peak, estimated", _gib(device["peak_bytes"]))
    share = device["usable_bytes"] / device["limit_bytes"]
    rows.add_row("limit", f"{_gib(device['limit_bytes'])}, of which a step may take {share:.0%}")
    rows.add_row("headroom", _gib(device["headroom_bytes"]))
    rows.add_row("products of a step", f"{device['flop']:.3g} FLOP")
    if "collectives" in device:
        rows.add_row("compiled, AuxK included", f"{device['compiled_flop']:.3g} FLOP")
        for collective in device["collectives"]:
            each = f"{collective['count']} a step, {collective['bytes'] / 1e6:,.1f} MB"
            rows.add_row(collective["kind"], each)
        rows.add_row("sorts", str(device["sorts"]))
        for buffer in device["largest_buffers"][:3]:
            rows.add_row("large buffer", f"{buffer['shape']}, {_gib(buffer['bytes'])}, {buffer['origin'][-60:]}")
    whole = Table("the run", "", show_header=True)
    whole.add_row("tokens", f"{run['tokens']:,}")
    whole.add_row("set on disk", f"{run['disk_bytes'] / 1e12:,.2f} TB")
    whole.add_row("work", f"{run['flop']:.3g} FLOP")
    whole.add_row("time", f"{run['hours']:,.1f} h at {run['mfu']:.0%} of the matrix rate")
    whole.add_row("floor", f"{run['floor_hours']:,.1f} h at all of it, state read and written once a step")
    return Group(_verdict(content), rows, whole)


def _verdict(content: dict[str, Any]) -> str:
    verdict = "fits" if content["fits"] else "does NOT fit"
    line = f"{content['target']}, {content['n_devices']} devices: {verdict}"
    if content["refusal"]:
        return f"{line}; the compiler refused it: {content['refusal']}"
    if content["compiler"] is None:
        return f"{line}, by an ESTIMATE; for the compiled step: {INSTALL}"
    compiler = content["compiler"]
    return f"{line} (compiled in {compiler['compile_seconds']:.0f} s, {compiler['host_bytes'] / GIB:.1f} GiB of host)"


def _gib(n_bytes: int | None) -> str:
    return "not told" if n_bytes is None else f"{n_bytes / GIB:,.2f} GiB"
