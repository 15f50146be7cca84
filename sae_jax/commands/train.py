"""`sae-jax train RECIPE --data SET --out RUN`: one autoencoder, or a set of members from one pass over the data."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar, get_args

import jax
import numpy as np

from sae_jax import config, recipe
from sae_jax import mesh as meshes
from sae_jax.activations.loader import Loader
from sae_jax.activations.sample import sample_rows
from sae_jax.activations.sequences import Sequences, through_model
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.commands import runtime
from sae_jax.ops import tuning
from sae_jax.progress import console
from sae_jax.saes.base import InputNorm, Learns, Sample, sample_statistics
from sae_jax.training import checkpoint, loop
from sae_jax.training.members import Member
from sae_jax.training.settings import TrainConfig
from sae_jax.types import Sites, UsageError, Widths

S = TypeVar("S")


@dataclass(frozen=True)
class Train(Generic[S]):
    """Train a sparse autoencoder on an activation set. Repeat the command to resume."""

    data: str
    """activation set to train on"""
    out: str
    """directory of the run"""
    sae: S
    site: tuple[str, ...] = ()
    """source of the set that is encoded; may be left out if there is only one. Several stand side by side"""
    reconstruct: tuple[str, ...] = ()
    """source that is reconstructed, for transcoders; none = what is encoded"""
    d_model: int | None = None
    """width each source must have; None = whatever it has"""
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: meshes.MeshConfig = field(default_factory=meshes.MeshConfig)
    engine: tuning.EngineConfig = field(default_factory=tuning.EngineConfig)
    allow_partial: bool = False
    """train although some shards of the set are not there yet"""
    members: tuple[str, ...] = ()
    """train several SAEs at once; each is 'NAME --sae.k=16 --train.lr=1e-3 ...': what it has of its own"""


def run(argv: Sequence[str]) -> None:
    """Parse, join the other processes, train."""
    commands = recipe.parse_members(Train, argv, "sae-jax train")
    out = next(iter(commands.values())).out
    if "://" in out:
        raise UsageError(f"--out={out}: a run needs a directory that all processes share; URLs are for sets")
    runtime.start_distributed()
    train(commands)


def train(commands: dict[str, Train], marks: Callable[[ActivationSet, Sites, int], loop.Marks] | None = None) -> int:
    """The run of the members {name: command}, or of one SAE named ""; the step it stands at.

    The commands differ in `sae` and in what is a member's own in `train`. `marks` says where they are measured, given
    the set, its sources and the number of devices.
    """
    runtime.warn_of_idle_gpu()
    command = next(iter(commands.values()))
    mesh = meshes.make_mesh(command.mesh)
    engine = command.engine.on(mesh.devices.flat[0].platform)
    activations = open_activations(command.data, command.allow_partial)
    sites, widths = choose_sites(activations, command)
    for own in commands.values():
        own.sae.check(widths, sites.x == sites.y)
    shared = {
        "data": os.path.abspath(command.data) if "://" not in command.data else command.data,
        "set": activations.content,
        "allow_partial": command.allow_partial,
        "sites": sites.to_json(),
        "widths": widths.to_json(),
        "mesh": config.to_dict(command.mesh),
        "engine": config.to_dict(command.engine),
    }
    run = Path(command.out)
    members = [
        Member(
            name,
            own.sae,
            own.train,
            run / checkpoint.MEMBERS / name if name else run,
            {**shared, "sae": config.to_dict(own.sae), "train": config.to_dict(own.train)},
        )
        for name, own in commands.items()
    ]
    rows = functools.cache(lambda names: np.concatenate([sample_rows(activations, name) for name in names], axis=1))

    def sample(norm: InputNorm) -> Sample:
        squares = [[activations.stats(name).mean_square for name in names] for names in sites]
        y_ND = None if sites.y == sites.x else rows(sites.y)
        return sample_statistics(rows(sites.x), norm, y_ND, widths, (squares[0], squares[1]))

    place = (jax.process_index(), jax.process_count())
    batch_size, order = command.train.batch_size, command.train.order
    learns = learning(commands)
    with tuning.using(engine), contextlib.ExitStack() as stack:
        if learns == "rows":
            prepare = None
            loader = stack.enter_context(Loader(activations, sites.all, batch_size, order, *place))
        else:
            loader = Sequences(activations, sites.x[0], batch_size, order, mesh.size, *place)
            prepare = through_model(activations, sites.x[0], mesh, later=learns == "through_layers")
        at = marks(activations, sites, mesh.size) if marks else None
        step = loop.train(run, members, mesh, loader, sites, sample, prepare, at)
    if jax.process_index() == 0:
        console.print(f"{command.out}: step {step} of {max(own.train.steps for own in commands.values())}")
    return step


def learning(commands: dict[str, Train]) -> Learns:
    """What the members learn from. Raises UsageError if it is rows of the set for some and the model for others."""
    found = {own.sae.learns: name for name, own in commands.items()}
    if "rows" in found and len(found) > 1:
        other = next(name for learns, name in found.items() if learns != "rows")
        raise UsageError(
            f"members {found['rows']} and {other}: one learns from rows, the other through the model, so not from the "
            f"same batches; train them apart"
        )
    return max(found, key=get_args(Learns).index)


def choose_sites(activations: ActivationSet, command: Train) -> tuple[Sites, Widths]:
    """The sources to work on, and their widths.

    Raises UsageError if one does not exist or is named twice, or none was named and there are several.
    """
    if not command.site and len(activations.sources) > 1:
        raise UsageError(f"{activations.path} has {', '.join(activations.sources)}; choose one with --site")
    x = command.site or (activations.sources[0],)
    sites = Sites(x, command.reconstruct or x)
    for names in sites:
        if len(set(names)) < len(names):
            raise UsageError(f"{', '.join(names)}: a source may be named once")
    for name in sites.all:
        width = activations.source(name).d
        if command.d_model not in (None, width):
            raise UsageError(f"d_model={command.d_model}, but {name} of {command.data} is {width} wide; leave it out")
    widths = [tuple(activations.source(name).d for name in names) for names in sites]
    return sites, Widths(*widths)
