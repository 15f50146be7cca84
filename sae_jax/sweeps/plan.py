"""What a sweep trains: its members, what each needs and costs, and which pass over the data each belongs to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic

import jax

from sae_jax import config, storage
from sae_jax import mesh as meshes
from sae_jax.activations.source import RowSource, choose_sites
from sae_jax.planning import analytic
from sae_jax.planning.targets import GIB
from sae_jax.record import program as program_version
from sae_jax.scaling import flops
from sae_jax.sweeps.grid import SweepConfig, cells, due, pack, share
from sae_jax.sweeps.points import Requested
from sae_jax.training.expand import NAME, change, expand_members, with_shared
from sae_jax.training.run import S, TrainJob
from sae_jax.training.settings import program, settled
from sae_jax.types import Sites, UsageError

USABLE = 0.8  # share of the memory that may be filled


@dataclass(frozen=True)
class SweepJob(TrainJob[S], Generic[S]):
    """Train and measure a grid of autoencoders, many from each pass over the data. Repeat the command to resume."""

    sweep: SweepConfig = field(default_factory=SweepConfig)
    shard: str = "0/1"
    """i/n: the i-th of n shares of the members; run n such commands anywhere, in any order"""
    claim: bool = False
    """take the passes that no other worker is at; start as many such commands as you like, at any time"""
    dry_run: bool = False
    """show what would be trained, and what it costs"""
    target: str | None = None
    """machine to tell the time for, such as h200:8; default: this one"""


@dataclass(frozen=True)
class Planned:
    """A member of a sweep."""

    job: SweepJob[Any]
    requested: Requested
    sites: Sites
    state_bytes: int  # on each device
    workspace_bytes: int  # that a step needs beside the state
    flop_per_token: int  # executed

    @property
    def cost(self) -> float:
        """FLOP until the last mark."""
        return float(max(self.requested.marks) * self.job.train.batch_size * self.flop_per_token)


def plan(job: SweepJob, source: RowSource) -> tuple[dict[str, Planned], list[str]]:
    """{name: member} of all that can be trained, and a line for each member or budget that cannot.

    Raises UsageError if nothing can.
    """
    lr = rates(job.sweep)
    planned: dict[str, Planned] = {}
    refused: list[str] = []
    for name, member in _jobs(job, refused):
        try:
            member_plan = _planned(name, member, source, lr)
        except UsageError as error:
            refused.append(str(error) if name in str(error) else f"member {name}: {error}")
            continue
        if member_plan.requested.marks:
            planned[name] = member_plan
        else:
            refused.append(f"member {name}: no mark between sweep.min_tokens and sweep.max_tokens; widen them")
    spent = {budget for member in planned.values() for budget in member.requested.marks.values()}
    per_token = [member.requested.flop_per_token for member in planned.values()]
    for budget in sorted(set(job.sweep.compute) - spent) if planned else ():
        fewest, most = budget / max(per_token), budget / min(per_token)
        refused.append(
            f"sweep.compute={budget:g}: buys {fewest:.3g} to {most:.3g} tokens, for every member less than a step or "
            f"sweep.min_tokens, or more than sweep.max_tokens"
        )
    if not planned:
        raise UsageError(refused[0] if len(refused) == 1 else f"nothing to train; {refused[0]}")
    return planned, refused


def _jobs(job: SweepJob, refused: list[str]) -> Iterator[tuple[str, SweepJob]]:
    """(name, job) of every listed member in every cell of the grid; what cannot be goes to `refused`."""
    # The order of the batches is one for all, whatever seed a member of the list or the grid has.
    job = dataclasses.replace(job, train=dataclasses.replace(job.train, order_seed=job.train.order))
    listed = expand_members(job)
    for cell in cells(job.sweep):
        # Settings of the whole pass, such as the source, change for all members of the cell.
        of_pass = {key: value for key, value in cell.settings.items() if not key.startswith(("sae.", "train."))}
        of_member = {key: value for key, value in cell.settings.items() if key not in of_pass}
        for listed_name, member in listed.items():
            name = "-".join(filter(None, (listed_name, cell.name))) or "sae"
            try:
                together = change(f"member {name}", job, of_pass)
                changed = change(f"member {name}", change(f"member {name}", member, of_pass), of_member)
                if not NAME.fullmatch(name):
                    raise UsageError(f"member {name}: values of the grid cannot name it; list it under members")
                yield name, with_shared(name, changed, together)
            except UsageError as error:
                refused.append(str(error) if name in str(error) else f"member {name}: {error}")


def _planned(name: str, member: SweepJob, source: RowSource, lr: Callable[[int], float] | None) -> Planned:
    """A member as it will be trained. Raises UsageError if it cannot be."""
    sites, widths = choose_sites(source, member.site, member.reconstruct, member.d_model)
    member.sae.check(widths, sites.x == sites.y)
    member = dataclasses.replace(member, sae=member.sae.on(jax.default_backend()))
    steps, batch_size = member.train.steps, member.train.batch_size
    if member.train.decay:
        raise UsageError(
            f"train.decay={member.train.decay}: what is measured on the way must have been trained at a constant rate; "
            f"leave it out"
        )
    rate = lr(member.sae.n_latents) if lr else member.train.lr
    train = dataclasses.replace(member.train, lr=rate, decay=0.0)
    member = dataclasses.replace(member, train=settled(train, member.sae))
    mesh = meshes.abstract_mesh(dataclasses.replace(member.mesh, member=1), jax.device_count() // member.mesh.member)
    meshes.check_divides(mesh, member.sae.n_latents, batch_size)
    marks = due(member.sweep, steps, batch_size, flops.dense(member.sae, widths))
    step = analytic.step(member.sae, member.train, widths, mesh)
    settings = {"sae": config.to_dict(member.sae), "train": config.to_dict(member.train), "sites": sites.to_json()}
    fields = {
        "name": name,
        "variant": member.sae.variant,
        "n_latents": member.sae.n_latents,
        "k": member.sae.n_active,
        "lr": member.train.lr,
        "seed": member.train.seed,
        "d_model": widths.x[0],
        "commit": program_version(),
        "data": source.data.content,  # not where it lies: errors compare on the same rows
        "config": settings,
    }
    return Planned(
        member,
        Requested(marks, flops.dense(member.sae, widths), fields),
        sites,
        state_bytes=step.state_bytes,
        workspace_bytes=step.peak_bytes - step.state_bytes,
        flop_per_token=flops.executed(member.sae, widths),
    )


def in_passes(job: SweepJob, planned: dict[str, Planned], worker: tuple[int, int]) -> dict[str, list[str]]:
    """{folder of a pass: its members} of this worker: a function of the plan, the worker and the memory alone."""
    groups = _groups(planned, job.mesh.member)
    mine = [groups[i] for i in share([sum(planned[name].cost for name in group) for group in groups], *worker)]
    by_data: dict[Any, list[list[str]]] = {}
    for group in mine:
        first = planned[group[0]]
        by_data.setdefault((first.sites, first.job.sae.learns), []).append(group)
    room = job.sweep.memory_gib * GIB if job.sweep.memory_gib else _memory()
    passes: list[list[str]] = []
    for together in by_data.values():
        state_bytes = [planned[group[0]].state_bytes for group in together]
        workspaces = [planned[group[0]].workspace_bytes for group in together]
        max_groups = job.sweep.per_pass and max(job.sweep.per_pass // job.mesh.member, 1)
        packed = pack(state_bytes, workspaces, room, max_groups)
        passes += [[name for i in indices for name in together[i]] for indices in packed]
    return {f"{worker[0]}of{worker[1]}-{i}": names for i, names in enumerate(passes)}


def _groups(planned: dict[str, Planned], n_slices: int) -> list[list[str]]:
    """Members that are stepped at once: those of one program, as many as the mesh has slices for."""
    by_program: dict[Any, list[str]] = {}
    for name, member in planned.items():
        key = (member.sites, member.job.sae.program, program(member.job.train))
        by_program.setdefault(key, []).append(name)
    for names in by_program.values():
        if len(names) % n_slices:
            raise UsageError(
                f"mesh.member={n_slices}: members that share a program must fill {n_slices} slices, these do not: "
                f"{', '.join(names)}; use mesh.member=1, or one that divides {len(names)}"
            )
    return [names[i : i + n_slices] for names in by_program.values() for i in range(0, len(names), n_slices)]


def _memory() -> float:
    """Bytes that the members of a pass may fill on each device."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return USABLE * stats["bytes_limit"]
    return USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()


def rates(settings: SweepConfig) -> Callable[[int], float] | None:
    """The learning rate of a width, by the rule of a fit."""
    if settings.lr_from is None:
        return None
    if any(words.startswith("train.lr=") for words in settings.grid):
        raise UsageError("sweep.lr_from does not go with train.lr in sweep.grid; leave one out")
    content = storage.read_json(settings.lr_from)
    rule = storage.unsealed(content, settings.lr_from).get("lr") if content else None
    if not isinstance(rule, dict) or not {"coefficient", "exponent"} <= rule.keys():
        raise UsageError(
            f"sweep.lr_from={settings.lr_from}: no learning-rate rule in it; give the fit.json of a sweep over train.lr"
        )
    return lambda n_latents: rule["coefficient"] * n_latents ** rule["exponent"]
