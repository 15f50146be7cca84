"""How the members of a run lie on the devices: groups that one call steps.

    data, latent    one SAE is spread over these axes
    member          in a group, every slice of the mesh along this axis steps an SAE of its own

Each batch is placed once, split over all devices, and gathered over `member` once. Then group after group is stepped
on it. Without a `member` axis a group is one SAE. All groups that share a program (same variant, sizes and dtypes;
learning rate, seed, coefficients and the like are data) share its compilation.

Groups are stepped in turn, not stacked under `lax.map`: it takes as long, and the map would hold the stack of states
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import mesh as meshes
from sae_jax.ops import tuning
from sae_jax.record import RunRecord
from sae_jax.saes.base import Batch, Hyperparameters, SaeConfig
from sae_jax.saes.init import Sample
from sae_jax.saes.normalise import InputNorm
from sae_jax.storage import AnyPath
from sae_jax.training.settings import TrainConfig, hyperparameters, program
from sae_jax.training.start import Start, started
from sae_jax.training.state import TrainState, abstract, initial, with_config
from sae_jax.training.step import Metrics, Step, make_measure
from sae_jax.types import UsageError

Program = tuple[SaeConfig, TrainConfig]


@dataclass(frozen=True, eq=False)
class Member:
    """One SAE of a run."""

    name: str  # "" if it is the only one
    sae: SaeConfig
    train: TrainConfig
    folder: AnyPath | None  # of config.json and metrics.jsonl; the run's if it is the only one; None: nowhere
    record: RunRecord  # what config.json says
    start: Start | None = None  # the dictionary whose weights it begins with; None: random ones

    @property
    def program(self) -> Program:
        """Members for which this is equal can share a compiled program."""
        return self.sae.program, program(self.train)

    @property
    def hparams(self) -> Hyperparameters:
        """What tells it from others of its program."""
        return hyperparameters(self.train, self.sae)

    def abstract(self, place: Mesh | jax.sharding.Sharding) -> TrainState:
        """Shapes and placement of its state."""
        return abstract(self.sae, self.train, self.record.dictionary.widths, place)

    def __str__(self) -> str:
        return f"member {self.name}" if self.name else "train"


class MemberGroup:
    """Members that one call steps: one of them, or one on each slice of the mesh's member axis."""

    def __init__(
        self, members: Sequence[Member], states: dict[str, TrainState], mesh: Mesh, step: Step, measure: tuning.Jitted
    ) -> None:
        """`states` are consumed. Unused slices repeat the first member; their output is ignored."""
        self.members = tuple(members)
        self._mesh, self._n_slices = mesh, meshes.sizes(mesh)["member"]
        member_states = [states.pop(member.name) for member in members]
        hparams = [member.hparams for member in members]
        if self._n_slices == 1:
            (self._state,), (self._hparams,) = member_states, hparams
            self._step, self._measure = step, measure
            return
        n_unused = self._n_slices - len(members)
        # Slices share one program, so a stack of states cannot say what each member's settings are.
        shared = [with_config(state, members[0].sae.program) for state in member_states]
        self._state = meshes.in_order(jax.jit(_stack)(shared + shared[:1] * n_unused))
        along = meshes.sharding(mesh, P(meshes.MEMBER))
        self._hparams = jax.tree.map(
            lambda *values: jax.device_put(np.stack(values), along), *hparams, *(hparams[:1] * n_unused)
        )
        self._step, self._measure = _on_slices(step.compiled, moves=True), _on_slices(measure, moves=False)

    def step(self, batch: Batch) -> Metrics:
        """Queue a step of all members; the metrics f32[], or f32[member]."""
        self._state, metrics = self._step(self._state, self._hparams, batch)
        return meshes.in_order(metrics)

    def metrics_of(self, member: Member, metrics: Metrics) -> dict[str, float]:
        """A member's share of fetched metrics."""
        return {name: float(value) for name, value in self._share(member, metrics).items()}

    def measure(self, batches: Sequence[Batch]) -> dict[Member, dict[str, float]]:
        """How well each member does on rows that it does not learn from: fvu, l0, dead_fraction, decoder_cosine and
        decoder_projection (ops/mixing.py), the last as a share of the rows' root mean square distance from their mean.

        The batches are of one size. Centred on the mean of all of them, in float64.
        """
        sums = [jax.device_get(meshes.in_order(self._measure(self._state, self._hparams, b))) for b in batches]
        return {member: _figures([self._share(member, part) for part in sums]) for member in self.members}

    def states(self, members: Sequence[Member]) -> dict[str, TrainState]:
        """The states of some of the members, as they are at rest."""
        if self._n_slices == 1:
            return {member.name: self._state for member in members}
        states = jax.jit(_unstack, static_argnums=(1, 2))(self._state, self._mesh, len(self.members))
        pairs = zip(self.members, meshes.in_order(states), strict=True)
        return {member.name: with_config(state, member.sae) for member, state in pairs if member in members}

    def _share(self, member: Member, metrics: Metrics) -> Metrics:
        i = self.members.index(member)
        return metrics if self._n_slices == 1 else {name: value[i] for name, value in metrics.items()}


def check_groups(members: Sequence[Member], mesh: Mesh) -> None:
    """Refuse members that leave slices of the member axis idle, and sizes that the mesh cannot split."""
    n_slices = meshes.sizes(mesh)["member"]
    for group in _by_program(members).values():
        meshes.check_divides(mesh, group[0].sae.n_latents, group[0].train.batch_size)
        if len(group) % n_slices:
            names = ", ".join(member.name for member in group) or "one SAE"
            raise UsageError(
                f"mesh.member={n_slices}: the members that share a program must fill {n_slices} slices, these do not: "
                f"{names}; use mesh.member=1, or one that divides {len(group)}"
            )


def group_members(members: Sequence[Member], states: dict[str, TrainState], mesh: Mesh) -> list[MemberGroup]:
    """All members in as few groups as possible; `states` are consumed."""
    n_slices = meshes.sizes(mesh)["member"]
    groups = []
    for (sae_config, train_config), same in _by_program(members).items():
        step, measure = Step(sae_config, train_config), make_measure(sae_config)
        groups += [
            MemberGroup(same[i : i + n_slices], states, mesh, step, measure) for i in range(0, len(same), n_slices)
        ]
    return groups


def initial_states(
    members: Sequence[Member], sample: Callable[[InputNorm], Sample], mesh: Mesh
) -> dict[str, TrainState]:
    """{member: its state before the first step}, at rest."""
    states = {}
    for (sae_config, train_config), same in _by_program(members).items():
        places = jax.tree.map(lambda leaf: leaf.sharding, with_config(same[0].abstract(mesh), sae_config))

        def born(sample: Sample, hparams: Hyperparameters, sae=sae_config, train=train_config, places=places):
            return jax.tree.map(jax.sharding.reshard, initial(sae, train, sample, hparams), places)

        born = tuning.jit(born)
        for member in same:
            of_data = sample(sae_config.input_norm)
            state = with_config(meshes.in_order(born(of_data, member.hparams)), member.sae)
            if member.start is not None:
                state = started(state, member.start, of_data.scale, member.record.dictionary)
            states[member.name] = state
    return states


def _by_program(members: Sequence[Member]) -> dict[Program, list[Member]]:
    groups: dict[Program, list[Member]] = {}
    for member in members:
        groups.setdefault(member.program, []).append(member)
    return groups


def _figures(sums: list[Metrics]) -> dict[str, float]:
    """Figures over batches of one size, from what `make_measure` says of each."""
    values = {name: np.asarray([batch[name] for batch in sums], np.float64) for name in sums[0]}
    spread = ((values["mean"] - values["mean"].mean(0)) ** 2).sum(-1)
    fvu = values["error"].mean() / (values["variance"] + spread).mean()
    projection = values["decoder_projection"].mean() / np.sqrt(values["square"].mean())
    return {
        "fvu": float(fvu),
        "l0": float(values["l0"].mean()),
        "dead_fraction": float(values["dead_fraction"][0]),
        "decoder_cosine": float(values["decoder_cosine"][0]),
        "decoder_projection": float(projection),
    }


def _on_slices(one: tuning.Jitted, moves: bool) -> tuning.Jitted:
    """`one`, a step (`moves`) or a measure, for a stack of states, one on each slice.

    Slices may take different branches: no collective joins them.

    At the border of a `jax.shard_map` over one axis of several, arrays that are explicitly split along the others are
    gathered (JAX 0.10). So they are compiler-chosen there, and explicit again inside; what the compiler chooses is
    what stands on both sides.
    """
    member, others = {meshes.MEMBER}, meshes.AXES

    def all_at_once(stack: TrainState, hparams: Hyperparameters, batch: Batch) -> Any:
        specs = [jax.tree.map(_spec, tree) for tree in (stack, hparams, batch)]
        state_specs = jax.tree.map(lambda leaf: P(*_spec(leaf)[1:]), stack)
        hparam_specs = jax.tree.map(lambda leaf: P(), hparams)

        def local(stack_1: TrainState, hparams_1: Hyperparameters, batch: Batch) -> Any:
            in_specs = (state_specs, hparam_specs, specs[2])
            explicit: Any = jax.sharding.explicit_axes(one, axes=others, in_sharding=in_specs)
            first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
            result = explicit(first(stack_1), first(hparams_1), batch)
            return jax.tree.map(lambda leaf: leaf[None], result)

        borders = {"in_specs": (P(meshes.MEMBER), P(meshes.MEMBER), P()), "out_specs": P(meshes.MEMBER)}
        on_slices = jax.shard_map(local, **borders, axis_names=member, check_vma=False)
        out_specs = (specs[0], P(meshes.MEMBER)) if moves else P(meshes.MEMBER)
        implicit: Any = jax.sharding.auto_axes(on_slices, axes=others, out_sharding=out_specs)
        result = implicit(stack, hparams, batch)
        # Every process logs all members.
        metrics = jax.tree.map(
            lambda value: jax.sharding.reshard(value, meshes.REPLICATED), result[1] if moves else result
        )
        return (result[0], metrics) if moves else metrics

    return tuning.jit(all_at_once, donate_argnums=0 if moves else ())


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
