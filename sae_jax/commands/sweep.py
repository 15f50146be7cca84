"""`sae-jax sweep RECIPE --data SET --out DIR`: a grid of autoencoders, measured at marks, as one table.

DIR/sweep.json       what is trained, and where each member is measured
DIR/passes/<i>/      members that learn from one pass: a run such as `sae-jax train` makes
DIR/points/          what was found so far, a file a member
DIR/results.jsonl    all of it, a point a line: for `sae-jax fit`
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.table import Table

from sae_jax import config
from sae_jax import mesh as meshes
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.commands import recipe, runtime
from sae_jax.commands.train import S, Train, choose_sites, train
from sae_jax.evaluation.text import held_out
from sae_jax.plan import analytic, targets
from sae_jax.plan.targets import GIB
from sae_jax.progress import console
from sae_jax.scaling import flops, marks
from sae_jax.scaling.marks import Marks, Wanted
from sae_jax.scaling.sweep import SweepConfig, cells, due, pack, share
from sae_jax.train import checkpoint, optim
from sae_jax.train.state import program
from sae_jax.types import Sites, UsageError, UserError

MFU = 0.3  # share of the matrix rate that training is taken to reach, where hours are told
MAY_CHANGE = ("memory_gib", "per_pass", "log_every", "checkpoint_every", "tensorboard")  # of the plan
USABLE = 0.8  # share of the memory that may be filled: of the device, or of what the machine has free


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


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, sweep."""
    command = recipe.parse(Sweep, argv, "sae-jax sweep")
    worker = runtime.worker(command.shard)
    if "://" in command.out:
        raise UsageError(f"--out={command.out}: a sweep needs a directory that all workers share; URLs are for sets")
    if not command.dry_run:
        runtime.start_distributed()
    runtime.warn_of_idle_gpu()
    activations = open_activations(command.data, command.allow_partial)
    planned, refused = plan(command, argv, activations)
    passes = in_passes(command, planned, worker)
    if jax.process_index() == 0 and command.dry_run:
        show(command, planned, passes)
    for line in refused:
        console.print(f"left out: {line}", markup=False)
    problems = [] if command.dry_run else sweep(command, planned, passes)
    if refused or problems:
        what = [f"{len(refused)} left out"] * bool(refused) + problems
        raise UserError(f"{command.out}: {'; '.join(what)}")


def plan(command: Sweep, argv: Sequence[str], activations: ActivationSet) -> tuple[dict[str, Planned], list[str]]:
    """{name: member} of all that can be trained, and a line for each member or budget that cannot.

    Raises UsageError if nothing can.
    """
    listed = recipe.member_flags(command.members) or {"": []}
    parse_together = functools.cache(lambda words: recipe.parse(Sweep, [*argv, *words], "sae-jax sweep"))
    lr = _rates(command.sweep)
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
        "lr": optim.learning_rate(member.train, member.sae),
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
        key = (member.sites, own.sae, program(dataclasses.replace(own.train, steps=1, warmup_steps=0)))
        groups.setdefault(key, []).append(name)
    for names in groups.values():
        if len(names) % n_slices:
            raise UsageError(
                f"mesh.member={n_slices}: members that share a program must fill {n_slices} slices, these do not: "
                f"{', '.join(names)}; use mesh.member=1, or one that divides {len(names)}"
            )
    return [names[i : i + n_slices] for names in groups.values() for i in range(0, len(names), n_slices)]


def _kept(out: Path, passes: dict[str, list[str]], worker: tuple[int, int], first: bool) -> dict[str, list[str]]:
    """The passes as this worker's first attempt made them: another machine's memory may suggest others."""
    path = out / "passes" / f"{worker[0]}of{worker[1]}.json"
    before = config.read_json(path)
    if before is None and first:
        path.parent.mkdir(parents=True, exist_ok=True)
        config.write_json(path, passes)
    return before or passes


def sweep(command: Sweep, planned: dict[str, Planned], passes: dict[str, list[str]]) -> list[str]:
    """Train what is not there yet, pass after pass; a line for each pass that something is wrong with."""
    out, first = Path(command.out), jax.process_index() == 0
    _keep_plan(out, command, planned, first)
    passes, problems = _kept(out, passes, runtime.worker(command.shard), first), []
    for i, (folder, names) in enumerate(passes.items()):
        path = out / "passes" / folder
        names = checkpoint.members(path) or [name for name in names if not _is_done(out, name, planned)]
        if all(_is_done(out, name, planned) for name in names):
            continue
        with _held(path, first) as held:
            if not held and command.claim:
                continue
            if not held:
                raise UserError(f"{path}: another worker is at it; give each --shard=i/n, or all of them --claim")
            if first:
                console.print(f"pass {i + 1} of {len(passes)}: {len(names)} members", markup=False)
            try:
                train({name: _as_run(out, path, name, planned) for name in names}, _marks(command, planned, names))
            except UserError as error:
                problems.append(str(error))
            else:
                if not all(_is_done(out, name, planned) for name in names):
                    break  # the machine is to be taken away; the loop has said so
        if first:
            marks.collect(out)
    if first:
        n = marks.collect(out)
        console.print(f"{out / 'results.jsonl'}: {n} points of {sum(len(m.wanted.marks) for m in planned.values())}")
    return problems


def _marks(command: Sweep, planned: dict[str, Planned], names: list[str]) -> Any:
    """Where and on what members of a pass are measured, once the set is open."""
    settings, batch_size = command.sweep, command.train.batch_size
    window = max(round(settings.window / batch_size), 1)

    def begin(activations: ActivationSet, sites: Sites, n_devices: int) -> Marks:
        rows = unseen_rows(activations, sites, settings.held_out)
        n = len(next(iter(rows.values())))
        size = min(batch_size, n // n_devices * n_devices)
        if not size:
            raise UserError(f"{activations.path}: {n} rows to measure on do not divide over {n_devices} devices")
        part = size // jax.process_count()
        own = range(jax.process_index() * part, (jax.process_index() + 1) * part)
        batches = [
            {source: of[start + own.start : start + own.stop] for source, of in rows.items()}
            for start in range(0, n - size + 1, size)
        ]
        wanted = {name: planned[name].wanted for name in names}
        silent = jax.process_index() > 0
        return Marks(Path(command.out), batches, wanted, settings.tolerance, window, silent)

    return begin


def unseen_rows(activations: ActivationSet, sites: Sites, n_rows: int) -> dict[str, np.ndarray]:
    """{source: f32[N, D]} of held-out text, up to `n_rows`; rows of the set itself if it names no text."""
    text = held_out(activations, sites, n_rows)
    if text:
        hooks = dict(zip(sites.x + sites.y, text.encoded + text.reconstructed, strict=True))
        return dict(zip(hooks, text.rows_of(tuple(hooks.values())), strict=True))
    console.print(f"{activations.path} names no held-out text: members are measured on rows they have learnt from")
    wanted = min(-(-n_rows // activations.spec.chunk_rows), activations.n_chunks)
    chunks = np.linspace(0, activations.n_chunks - 1, wanted).round().astype(int)
    return {
        name: np.concatenate([activations.read_chunk(name, int(chunk)).astype(np.float32) for chunk in chunks])[:n_rows]
        for name in sites.all
    }


def _as_run(out: Path, path: Path, name: str, planned: dict[str, Planned]) -> Sweep:
    """A member's part of a pass: as long as its last mark, or as it took to converge."""
    found, member = marks.read(out, name), planned[name]
    steps = max(member.wanted.marks)
    if found and found[-1].converged:
        steps = found[-1].tokens // member.command.train.batch_size
    train_config = dataclasses.replace(member.command.train, steps=steps)
    return dataclasses.replace(member.command, out=str(path), train=train_config, members=())


def _is_done(out: Path, name: str, planned: dict[str, Planned]) -> bool:
    found = marks.read(out, name)
    return bool(found) and (found[-1].converged or found[-1].steps == max(planned[name].wanted.marks))


def _keep_plan(out: Path, command: Sweep, planned: dict[str, Planned], first: bool) -> None:
    """Write DIR/sweep.json; refuse to go on with another plan."""
    now = {
        "sweep": config.to_dict(command.sweep),
        "members": {
            name: {**member.wanted.facts["config"], "marks": [*member.wanted.marks]} for name, member in planned.items()
        },
    }
    before = config.read_json(out / "sweep.json")
    if before is None:
        if first:
            out.mkdir(parents=True, exist_ok=True)
            config.write_json(out / "sweep.json", now)
        return
    was, is_now = (dict(config.flatten(content)) for content in (before, json.loads(json.dumps(now))))
    for key in sorted(was.keys() | is_now.keys()):
        if was.get(key) != is_now.get(key) and not key.endswith(MAY_CHANGE):
            raise UsageError(
                f"{out} was started with {key}={was.get(key)}, not {is_now.get(key)}; keep the plan to go on, or give "
                f"another --out"
            )


@contextlib.contextmanager
def _held(path: Path, first: bool) -> Iterator[bool]:
    """Whether this worker has a pass for itself, until it ends in whatever way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        held = True
        if first:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held = False
        yield bool(multihost_utils.broadcast_one_to_all(np.array(held)))


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


def _rates(settings: SweepConfig) -> Callable[[int], float] | None:
    """The learning rate of a width, by the rule of a fit."""
    if settings.lr_from is None:
        return None
    if any(words.startswith("train.lr=") for words in settings.grid):
        raise UsageError("sweep.lr_from does not go with train.lr in sweep.grid; leave one out")
    rule = (config.read_json(settings.lr_from) or {}).get("lr")
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
