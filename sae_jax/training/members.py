"""Members: the SAEs that learn from one pass over the data, and how they lie on the devices.

    data, latent    one SAE is spread over these axes
    member          in a lane, every slice of the mesh along this axis steps an SAE of its own

Each batch is placed once, split over all devices, and gathered over `member` once. Then lane after lane is stepped on
it. Without a `member` axis a lane is one SAE. All lanes that share a program (same variant, sizes and dtypes; learning
rate, seed, coefficients and the like are data) share its compilation.

Members in turn, not stacked under `lax.map`: it takes as long, and the map would hold the stack of states twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import mesh as meshes
from sae_jax.saes.base import Batch, InputNorm, SaeConfig, Sample
from sae_jax.training.settings import TrainConfig, Values, program
from sae_jax.training.state import TrainState, abstract, initial
from sae_jax.training.step import Metrics, make_measure, make_step
from sae_jax.types import Sites, UsageError, Widths

T = TypeVar("T")
Program = tuple[SaeConfig, TrainConfig]


@dataclass(frozen=True, eq=False)
class Member:
    """One SAE of a run."""

    name: str  # "" if it is the only one
    sae: SaeConfig
    train: TrainConfig
    folder: Path  # of config.json and metrics.jsonl; the run's own if it is the only one
    facts: dict[str, Any]  # what config.json says

    @property
    def widths(self) -> Widths:
        """Of the sources."""
        return Widths.of(self.facts["widths"])

    @property
    def program(self) -> Program:
        """Members for which this is equal can share a compiled program."""
        return self.sae.program, program(self.train)

    def __str__(self) -> str:
        return f"member {self.name}" if self.name else "train"


class Lane:
    """Members that one call steps: one of them, or one on each slice of the mesh's member axis."""

    def __init__(
        self, members: Sequence[Member], states: dict[str, TrainState], mesh: Mesh, step: Any, measure: Any
    ) -> None:
        """`states` are consumed. A slice without a member repeats the first one, and nobody looks."""
        self.members = tuple(members)
        self._n_slices = meshes.sizes(mesh)["member"]
        self._mesh, self._step, self._measure = mesh, step, measure
        own = [states.pop(member.name) for member in members]
        if self._n_slices == 1:
            (self._state,) = own
        else:
            self._state = _in_order(jax.jit(_stack)(own + own[:1] * (self._n_slices - len(own))))

    def step(self, batch: Batch) -> Metrics:
        """Queue a step of all members; the metrics f32[], or f32[member]."""
        self._state, metrics = self._step(self._state, batch)
        return _in_order(metrics)

    def metrics_of(self, member: Member, metrics: Metrics) -> dict[str, float]:
        """A member's share of fetched metrics."""
        return {name: float(value) for name, value in self._share(member, metrics).items()}

    def measure(self, batches: Sequence[Batch]) -> dict[Member, dict[str, float]]:
        """What each member makes of rows that it does not learn from: fvu, l0, dead_fraction.

        The batches are of one size. Centred on the mean of all of them, in float64.
        """
        found = [jax.device_get(_in_order(self._measure(self._state, batch))) for batch in batches]
        return {member: _over([self._share(member, of) for of in found]) for member in self.members}

    def _share(self, member: Member, found: Metrics) -> Metrics:
        i = self.members.index(member)
        return found if self._n_slices == 1 else {name: value[i] for name, value in found.items()}

    def states(self, members: Sequence[Member]) -> dict[str, TrainState]:
        """The states of some of the members, as they are at rest."""
        if self._n_slices == 1:
            return {member.name: self._state for member in members}
        own = _in_order(jax.jit(_unstack, static_argnums=(1, 2))(self._state, self._mesh, len(self.members)))
        return {member.name: state for member, state in zip(self.members, own, strict=True) if member in members}


def check_lanes(members: Sequence[Member], mesh: Mesh) -> None:
    """Refuse members that leave slices of the member axis idle, and sizes that the mesh cannot split."""
    n_slices = meshes.sizes(mesh)["member"]
    for own in _by_program(members).values():
        meshes.check_divides(mesh, own[0].sae.n_latents, own[0].train.batch_size)
        if len(own) % n_slices:
            names = ", ".join(member.name for member in own) or "one SAE"
            raise UsageError(
                f"mesh.member={n_slices}: the members that share a program must fill {n_slices} slices, these do not: "
                f"{names}; use mesh.member=1, or one that divides {len(own)}"
            )


def lanes_of(members: Sequence[Member], states: dict[str, TrainState], mesh: Mesh) -> list[Lane]:
    """All members in as few lanes as possible; `states` are consumed."""
    n_slices = meshes.sizes(mesh)["member"]
    found = []
    for (sae_config, train_config), own in _by_program(members).items():
        step: Any = make_step(sae_config, train_config)
        measure: Any = make_measure(sae_config)
        if n_slices > 1:
            step, measure = _on_slices(step, moves=True), _on_slices(measure, moves=False)
        found += [Lane(own[i : i + n_slices], states, mesh, step, measure) for i in range(0, len(own), n_slices)]
    return found


def initial_states(members: Sequence[Member], sample: Callable[[InputNorm], Sample], mesh: Mesh) -> dict[str, Any]:
    """{member: its state before the first step}, at rest."""
    states = {}
    for (sae_config, train_config), own in _by_program(members).items():
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract(sae_config, train_config, own[0].widths, mesh))

        def born(sample: Sample, values: Values, sae_config=sae_config, train_config=train_config, places=places):
            state = initial(sae_config, train_config, sample, values)
            return jax.tree.map(jax.sharding.reshard, state, places)

        born = jax.jit(born)
        for member in own:
            values = Values.of(member.train, member.sae)
            states[member.name] = _in_order(born(sample(sae_config.input_norm), values))
    return states


def place(rows: dict[str, np.ndarray], sites: Sites, mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch: sent to all devices once, ROWS in every slice."""

    def placed(sources: tuple[str, ...]) -> jax.Array:
        own = rows[sources[0]] if len(sources) == 1 else np.concatenate([rows[source] for source in sources], axis=1)
        own = jax.make_array_from_process_local_data(meshes.sharding(mesh, meshes.input_rows(mesh)), own)
        return _in_order(jax.sharding.reshard(own, meshes.sharding(mesh, meshes.ROWS)))

    return Batch(placed(sites.x), None if sites.y == sites.x else placed(sites.y))


def _in_order(x: T) -> T:
    """`x`; on the CPU done first, if there are several devices.

    Its devices start programs that do not depend on each other in any order. With collectives in them they wait for
    each other for ever, as they do, over several processes, with more than some thirty programs in flight.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(x)
    return x


def _by_program(members: Sequence[Member]) -> dict[Program, list[Member]]:
    groups: dict[Program, list[Member]] = {}
    for member in members:
        groups.setdefault(member.program, []).append(member)
    return groups


def _over(found: list[Metrics]) -> dict[str, float]:
    """Figures over batches of one size, from what `make_measure` says of each."""
    of = {name: np.asarray([batch[name] for batch in found], np.float64) for name in found[0]}
    spread = ((of["mean"] - of["mean"].mean(0)) ** 2).sum(-1)
    fvu = of["error"].mean() / (of["variance"] + spread).mean()
    return {"fvu": float(fvu), "l0": float(of["l0"].mean()), "dead_fraction": float(of["dead_fraction"][0])}


def _on_slices(one: Any, moves: bool) -> Any:
    """`one`, a step (`moves`) or a measure, for a stack of states, one on each slice.

    Slices may take different branches: no collective joins them.

    At the border of a `jax.shard_map` over one axis of several, arrays that are explicitly split along the others are
    gathered (JAX 0.10). So they are compiler-chosen there, and explicit again inside; what the compiler chooses is
    what stands on both sides.
    """
    member, others = {meshes.MEMBER}, meshes.AXES

    def all_at_once(stack: TrainState, batch: Batch) -> Any:
        stack_specs, batch_specs = (jax.tree.map(_spec, tree) for tree in (stack, batch))
        own_specs = jax.tree.map(lambda leaf: P(*_spec(leaf)[1:]), stack)

        def local(stack_1: TrainState, batch: Batch) -> Any:
            explicit: Any = jax.sharding.explicit_axes(one, axes=others, in_sharding=(own_specs, batch_specs))
            found = explicit(jax.tree.map(lambda leaf: leaf[0], stack_1), batch)
            return jax.tree.map(lambda leaf: leaf[None], found)

        specs = {"in_specs": (P(meshes.MEMBER), P()), "out_specs": P(meshes.MEMBER)}
        on_slices = jax.shard_map(local, **specs, axis_names=member, check_vma=False)
        out_specs = (stack_specs, P(meshes.MEMBER)) if moves else P(meshes.MEMBER)
        implicit: Any = jax.sharding.auto_axes(on_slices, axes=others, out_sharding=out_specs)
        found = implicit(stack, batch)
        # Every process logs all members.
        figures = jax.tree.map(lambda of: jax.sharding.reshard(of, meshes.REPLICATED), found[1] if moves else found)
        return (found[0], figures) if moves else figures

    return jax.jit(all_at_once, donate_argnums=0 if moves else ())


def _spec(leaf: jax.Array) -> P:
    return jax.typeof(leaf).sharding.spec


def _stack(states: list[TrainState]) -> TrainState:
    def stacked(*leaves: jax.Array) -> jax.Array:
        parts = map(_without_member, _spec(leaves[0]))
        return jax.sharding.reshard(jnp.stack(leaves), P(meshes.MEMBER, *parts))

    return jax.tree.map(stacked, *states)


def _unstack(state: TrainState, mesh: Mesh, n: int) -> list[TrainState]:
    def at_rest(leaf: jax.Array) -> jax.Array:
        spec = meshes.at_rest(P(*_spec(leaf)[1:]), mesh)
        return jax.sharding.reshard(leaf, P(None, *spec))

    state = jax.tree.map(at_rest, state)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(n)]


def _without_member(part: Any) -> Any:
    return tuple(name for name in part if name != meshes.MEMBER) if isinstance(part, tuple) else part
