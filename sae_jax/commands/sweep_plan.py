"""What a sweep trains: its members, what each needs and costs, and which pass over the data each belongs to."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from sae_jax import config, recipe, storage
from sae_jax import mesh as meshes
from sae_jax.activations.store import ActivationSet
from sae_jax.commands.train import S, Train, choose_sites
from sae_jax.planning import analytic, targets
from sae_jax.planning.targets import GIB
from sae_jax.scaling import flops
from sae_jax.sweeps.grid import SweepConfig, cells, due, pack, share
from sae_jax.sweeps.points import Wanted
from sae_jax.training.settings import learning_rate, program
from sae_jax.types import Sites, UsageError

MFU = 0.3  # share of the matrix rate that training is taken to reach, where hours are told
USABLE = 0.8  # share of the memory that may be filled


@dataclass(frozen=True)
class Sweep(Train[S], Generic[S]):
    """Train and measure a grid of autoencoders, many from each pass over the data. Repeat the command to go on."""

    sweep: SweepConfig = field(default_factory=SweepConfig)
    shard: str = "0/1"
    """i/n: the i-th of n shares of the members; run n such commands anywhere, in any order"""
    claim: bool = False
    """take the passes that no other worker is at; start as many such commands as you like, at any time"""
    dry_run: bool = False
    """show what would be trained, and what it costs"""
    target: str | None = None
    """machine to tell the hours for, such as h200:8; default: this one"""


@dataclass(frozen=True)
class Planned:
    """A member of a sweep."""

    command: Sweep[Any]
    wanted: Wanted
    sites: Sites
    n_bytes: int  # on each device
    beside: int  # that a step needs more
    executed: int  # FLOP a token

    @property
    def cost(self) -> float:
        """FLOP until the last mark."""
        return float(max(self.wanted.marks) * self.command.train.batch_size * self.executed)


def plan(command: Sweep, argv: Sequence[str], activations: ActivationSet) -> tuple[dict[str, Planned], list[str]]:
    """{name: member} of all that can be trained, and a line for each member or budget that cannot.

    Raises UsageError if nothing can.
    """
    listed = recipe.member_flags(command.members) or {"": []}
    parse_together = functools.cache(lambda words: recipe.parse(Sweep, [*argv, *words], "sae-jax sweep"))
    lr = rates(command.sweep)
    planned: dict[str, Planned] = {}
    refused: list[str] = []
    for cell in cells(command.sweep):
        of_pass = {key: value for key, value in cell.settings.items() if not key.startswith(("sae.", "train."))}
        own = {key: value for key, value in cell.settings.items() if key not in of_pass}
        for listed_name, flags in listed.items():
            name = "-".join(filter(None, (listed_name, cell.name))) or "sae"
            try:
                words = tuple(config.to_tokens(of_pass))
                together = parse_together(words)
                member = recipe.parse_member(
                    *(Sweep, [*argv, *words], "sae-jax sweep", name),
                    *([*flags, *config.to_tokens(own)], together),
                )
                if not recipe.NAME.fullmatch(name):
                    raise UsageError(f"member {name}: values of the grid cannot name it; list it under members")
                found = _planned(name, member, activations, lr)
            except UsageError as error:
                refused.append(str(error) if name in str(error) else f"member {name}: {error}")
                continue
            if found.wanted.marks:
                planned[name] = found
            else:
                refused.append(f"member {name}: no mark between sweep.min_tokens and sweep.max_tokens; widen them")
    spent = {budget for member in planned.values() for budget in member.wanted.marks.values()}
    per_token = [member.wanted.flop_per_token for member in planned.values()]
    for budget in sorted(set(command.sweep.compute) - spent) if planned else ():
        fewest, most = budget / max(per_token), budget / min(per_token)
        refused.append(
            f"sweep.compute={budget:g}: buys {fewest:.3g} to {most:.3g} tokens, for every member less than a step or "
            f"sweep.min_tokens, or more than sweep.max_tokens"
        )
    if not planned:
        raise UsageError(refused[0] if len(refused) == 1 else f"nothing to train; {refused[0]}")
    return planned, refused


def _planned(name: str, member: Sweep, activations: ActivationSet, lr: Callable[[int], float] | None) -> Planned:
    """A member as it will be trained. Raises UsageError if it cannot be."""
    sites, widths = choose_sites(activations, member)
    member.sae.check(widths, sites.x == sites.y)
    steps, batch_size = member.train.steps, member.train.batch_size
    if member.train.decay_steps:
        raise UsageError(
            f"train.decay_steps={member.train.decay_steps}: what is measured on the way must have been trained at a "
            f"constant rate; leave it at 0"
        )
    if lr:
        member = dataclasses.replace(member, train=dataclasses.replace(member.train, lr=lr(member.sae.n_latents)))
    mesh = meshes.abstract_mesh(dataclasses.replace(member.mesh, member=1), jax.device_count() // member.mesh.member)
    meshes.check_divides(mesh, member.sae.n_latents, batch_size)
    at = due(member.sweep, steps, batch_size, flops.dense(member.sae, widths))
    on = analytic.step(member.sae, member.train, widths, mesh)
    facts = {
        "name": name,
        "variant": member.sae.variant,
        "n_latents": member.sae.n_latents,
        "k": member.sae.n_active,
        "lr": learning_rate(member.train, member.sae),
        "seed": member.train.seed,
        "d_model": widths.x[0],
        "commit": _commit(),
        "data": os.path.abspath(member.data) if "://" not in member.data else member.data,
        "config": {"sae": config.to_dict(member.sae), "train": config.to_dict(member.train), "sites": sites.to_json()},
    }
    wanted = Wanted(at, flops.dense(member.sae, widths), facts)
    n_bytes, executed = on.state_bytes, flops.executed(member.sae, widths)
    return Planned(member, wanted, sites, n_bytes, on.peak_bytes - n_bytes, executed)


def in_passes(command: Sweep, planned: dict[str, Planned], worker: tuple[int, int]) -> dict[str, list[str]]:
    """{folder of a pass: its members} of this worker: a function of the plan, the worker and the memory alone."""
    lanes = _lanes(planned, command.mesh.member)
    mine = [lanes[i] for i in share([sum(planned[name].cost for name in lane) for lane in lanes], *worker)]
    groups: dict[Any, list[list[str]]] = {}
    for lane in mine:
        first = planned[lane[0]]
        groups.setdefault((first.sites, first.command.sae.learns), []).append(lane)
    room = command.sweep.memory_gib * GIB if command.sweep.memory_gib else _memory()
    passes: list[list[str]] = []
    for group in groups.values():
        needs = [(planned[lane[0]].n_bytes, planned[lane[0]].beside) for lane in group]
        most = command.sweep.per_pass and max(command.sweep.per_pass // command.mesh.member, 1)
        packed = pack([n for n, _ in needs], [more for _, more in needs], room, most)
        passes += [[name for i in own for name in group[i]] for own in packed]
    return {f"{worker[0]}of{worker[1]}-{i}": names for i, names in enumerate(passes)}


def _lanes(planned: dict[str, Planned], n_slices: int) -> list[list[str]]:
    """Members that are stepped at once: those of one program, as many as the mesh has slices for."""
    groups: dict[Any, list[str]] = {}
    for name, member in planned.items():
        own = member.command
        groups.setdefault((member.sites, own.sae.program, program(own.train)), []).append(name)
    for names in groups.values():
        if len(names) % n_slices:
            raise UsageError(
                f"mesh.member={n_slices}: members that share a program must fill {n_slices} slices, these do not: "
                f"{', '.join(names)}; use mesh.member=1, or one that divides {len(names)}"
            )
    return [names[i : i + n_slices] for names in groups.values() for i in range(0, len(names), n_slices)]


def show(command: Sweep, planned: dict[str, Planned], passes: dict[str, list[str]]) -> None:
    """What would be trained, and what it takes."""
    target = targets.parse(command.target) if command.target else None
    rate = MFU * (target.chip.flops * target.n_devices if target else _measured_rate())
    table = Table("member", "n", "k", "lr", "tokens", "points", "FLOP", "hours", title=command.out)
    for name, member in planned.items():
        facts, tokens = member.wanted.facts, max(member.wanted.marks) * member.command.train.batch_size
        table.add_row(
            *(name, str(facts["n_latents"]), str(facts["k"] or ""), f"{facts['lr']:.2g}", f"{tokens:.3g}"),
            *(str(len(member.wanted.marks)), f"{tokens * member.wanted.flop_per_token:.2e}"),
            f"{member.cost / rate / 3600:.3g}",
        )
    output = Console()
    output.print(table)
    for folder, names in passes.items():
        own = [planned[name] for name in names]
        memory = sum(member.n_bytes for member in own) / command.mesh.member + max(member.beside for member in own)
        hours = sum(member.cost for member in own) / rate / 3600
        output.print(f"pass {folder}: {len(names)} members, {memory / GIB:.2f} GiB a device, {hours:.3g} hours")
    where = command.target or "this machine, by the rate of one product on it"
    output.print(f"hours: executed FLOP at {MFU:.0%} of the matrix rate of {where}; small members take longer")


def _measured_rate() -> float:
    """FLOP/s of a bfloat16 product on all devices here."""
    n, repeats = 2048, 5
    product = jax.jit(lambda a: jnp.einsum("ij,kj->ik", a, a, preferred_element_type=jnp.float32))
    a = jnp.ones((n, n), jnp.bfloat16)
    product(a).block_until_ready()
    began = time.monotonic()
    for _ in range(repeats):
        product(a).block_until_ready()
    # Devices that are shares of one CPU are not faster together.
    several = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return several * repeats * 2 * n**3 / (time.monotonic() - began)


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
    rule = (storage.read_json(settings.lr_from) or {}).get("lr")
    if not isinstance(rule, dict) or not {"coefficient", "exponent"} <= rule.keys():
        raise UsageError(
            f"sweep.lr_from={settings.lr_from}: no learning-rate rule in it; give the fit.json of a sweep over train.lr"
        )
    return lambda n_latents: rule["coefficient"] * n_latents ** rule["exponent"]


@functools.cache
def _commit() -> str:
    """The version of this program, and the commit if it lies in a checkout."""
    version = importlib.metadata.version("sae_jax")
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return version
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
        )
    except OSError:
        return version
    return f"{version}+{found.stdout.strip()}" if found.stdout.strip() else version
