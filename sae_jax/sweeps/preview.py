"""What a sweep would train and cost, for a person to read before it begins."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from rich.table import Table

from sae_jax.ops import tuning
from sae_jax.planning import targets
from sae_jax.sweeps.plan import Planned, SweepJob
from sae_jax.units import duration, memory

MFU = 0.3  # share of the matrix rate that training is taken to reach


def preview(job: SweepJob, planned: dict[str, Planned], passes: dict[str, list[str]]) -> tuple[Table, list[str]]:
    """A table of the members, and a line for each pass."""
    target = targets.parse(job.target) if job.target else None
    rate = MFU * (target.chip.flops * target.n_devices if target else _measured_rate())
    table = Table("member", "n", "k", "lr", "tokens", "points", "FLOP", "time", title=job.out)
    for name, member in planned.items():
        fields, tokens = member.requested.fields, max(member.requested.marks) * member.job.train.batch_size
        table.add_row(
            *(name, str(fields["n_latents"]), str(fields["k"] or ""), f"{fields['lr']:.2g}", f"{tokens:.3g}"),
            *(str(len(member.requested.marks)), f"{tokens * member.requested.flop_per_token:.2e}"),
            duration(member.cost / rate),
        )
    lines = []
    for folder, names in passes.items():
        members = [planned[name] for name in names]
        state = sum(member.state_bytes for member in members) / job.mesh.member
        needed = state + max(member.workspace_bytes for member in members)
        takes = duration(sum(member.cost for member in members) / rate)
        lines.append(f"pass {folder}: {len(names)} members, {memory(needed)} a device, {takes}")
    where = job.target or "this machine, by the rate of one product on it"
    lines.append(f"time: executed FLOP at {MFU:.0%} of the matrix rate of {where}; small members take longer")
    return table, lines


def _measured_rate() -> float:
    """FLOP/s of a product on all devices here."""
    n, repeats = 2048, 5
    product = jax.jit(lambda a: jnp.einsum("ij,kj->ik", a, a, preferred_element_type=jnp.float32))
    a = jnp.ones((n, n), tuning.product_dtype(jax.default_backend()))
    product(a).block_until_ready()
    began = time.monotonic()
    for _ in range(repeats):
        product(a).block_until_ready()
    # Devices that are shares of one CPU are not faster together.
    several = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return several * repeats * 2 * n**3 / (time.monotonic() - began)
