"""The home of mesh axes and of how the arrays of a run lie on them.

    data     rows of a batch are split over it; weights are gathered along it where they are used (FSDP)
    latent   the dictionary is split over it: each latent shard owns a contiguous range of latents
    member   several autoencoders of one run are split over it: each slice of the devices steps its own

`latent` is three names, one for each direction of a TPU's torus: a collective over the whole torus at once compiles to
an all-reduce of everything, one direction at a time it moves each byte once. Elsewhere two of the three have size 1.

A mesh has `member` only where members are split over it. Whatever concerns one autoencoder speaks of the other axes
alone, inside a `jax.shard_map` over `member` (training/members.py).

Every array belongs to one of the roles below. The axes are Explicit: a sharding is part of an array's type, so an
operation that would have to guess is refused when the program is traced. One device is a 1 x 1 mesh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.types import UsageError

T = TypeVar("T")

DATA = "data"
LATENT = ("latent_x", "latent_y", "latent_z")
AXES = (DATA, *LATENT)  # those that one autoencoder is spread over
MEMBER = "member"

DICT = P((*LATENT, DATA))  # [F, ...]: weights, moments, counters; latent-major, so a latent shard is contiguous
# [B, ...]: batches and errors over all devices, in process order: a host owns adjacent rows, but for one that holds a
# square of a torus, which owns as many.
ROWS = P((DATA, *LATENT))
CODE = P(DATA, LATENT)  # [B, K]: each latent shard's own slots for the rows of its data shard
REPLICATED = P()

# A language model that is split has a mesh of its own: copies of the model side by side, each over several devices. Its
# axes are Auto: where the parameters lie decides what the compiler does in between (Shoeybi et al. 2019, arXiv
# 1909.08053: two sums over the devices of a copy in each block).
COPIES, MODEL = "copies", "model"
LM_SPLIT = ("heads", "kv_heads", "mlp", "vocab")  # axes of parameters (sae_jax/lm/params.py) that are split over MODEL


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged. `latent=0` takes all devices that `data` leaves."""

    data: int = 1
    """rows are split this many ways; keep it the smallest that feeds the devices"""
    latent: int = 0
    """the dictionary is split this many ways; 0 = all devices / (data x member)"""
    member: int = 1
    """this many members of a set are stepped at once, each on its own share of the devices"""

    def __post_init__(self) -> None:
        if self.data < 1 or self.latent < 0 or self.member < 1:
            raise UsageError(
                f"mesh.data={self.data} mesh.latent={self.latent} mesh.member={self.member}: data and member must be "
                f">= 1 and latent >= 0"
            )


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all visible). Raises UsageError if they do not divide."""
    devices = jax.devices() if devices is None else devices
    shape, axes = _shape(config, len(devices))
    torus = _torus(devices, config.member * config.data)
    if torus is not None:
        return Mesh(torus.reshape(*shape[:-3], *torus.shape[1:]), axes, axis_types=_explicit(axes))
    return jax.make_mesh(shape, axes, _explicit(axes), devices=devices)


def abstract_mesh(config: MeshConfig, n_devices: int) -> AbstractMesh:
    """The same of devices that are only counted, for shapes and shardings. Raises UsageError as `make_mesh` does."""
    shape, axes = _shape(config, n_devices)
    return AbstractMesh(shape, axes, _explicit(axes))


def first_slice(mesh: Mesh) -> Mesh:
    """The devices of one member, without the member axis."""
    if MEMBER not in mesh.shape:
        return mesh
    return Mesh(mesh.devices[0], AXES, axis_types=_explicit(AXES))


def check_divides(mesh: Mesh | AbstractMesh, n_latents: int, batch_size: int) -> None:
    """Refuse a dictionary or a batch that the mesh cannot split evenly, naming the nearest sizes that it can."""
    for name, size in (("sae.n_latents", n_latents), ("train.batch_size", batch_size)):
        if size % mesh.size:
            below = size // mesh.size * mesh.size
            cure = f"use {below} or {below + mesh.size}" if below else f"use {mesh.size}"
            raise UsageError(f"{name}={size} does not divide over {mesh.size} devices; {cure}")


def sizes(mesh: Mesh) -> dict[str, int]:
    """How many ways a mesh splits along each axis of MeshConfig."""
    latent = math.prod(mesh.shape[name] for name in LATENT)
    return {"data": mesh.shape[DATA], "latent": latent, "member": mesh.shape.get(MEMBER, 1)}


def current() -> jax.sharding.AbstractMesh | None:
    """The mesh in use (`jax.set_mesh`), or None on plain single-device arrays such as those of `load()`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def placed(role: P) -> P | None:
    """`role` where there is a mesh to place an array on, else None: for the `out_sharding` of what makes arrays."""
    return None if current() is None else role


def reshape(x: jax.Array, *shape: int) -> jax.Array:
    """`x` in another shape whose first axis is split over the devices as the first of x is, and no other.

    Left to itself, JAX forgets how a first axis of size 1 is split where another such axis comes or goes. It splits
    both of two axes that were one.
    """
    now = jax.typeof(x).sharding
    where = NamedSharding(now.mesh, P(now.spec[0])) if AxisType.Explicit in now.mesh.axis_types else None
    return jnp.reshape(x, shape, out_sharding=where)


def everywhere(x: jax.Array) -> jax.sharding.Sharding:
    """Whole on each device that has a part of `x`."""
    return NamedSharding(x.sharding.mesh, REPLICATED) if isinstance(x.sharding, NamedSharding) else x.sharding


def n_shards(x: jax.Array) -> int:
    """Over how many devices x is spread. Of axes that are Auto, where the compiler decides, all devices count."""
    now = jax.typeof(x).sharding
    kinds = zip(now.mesh.axis_names, now.mesh.axis_types, strict=True)
    auto = math.prod(now.mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto)
    return auto * (x.size // math.prod(now.shard_shape(x.shape)))


def axis_size(axis: str | tuple[str, ...]) -> int:
    """How many ways the mesh in use splits along `axis`, one name or several; 1 without a mesh."""
    mesh = current()
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names(axis))


def names(axis: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names that `axis` stands for."""
    return (axis,) if isinstance(axis, str) else axis


def sharding(mesh: Mesh | AbstractMesh, role: P) -> NamedSharding:
    """Where an array of this role lies on a mesh."""
    return NamedSharding(mesh, role)


def lm_mesh(split: int, devices: list[jax.Device]) -> Mesh:
    """Where a language model runs, each copy over `split` devices. Raises UsageError if they do not divide."""
    if split == 1:
        return make_mesh(MeshConfig(), devices)
    return jax.make_mesh(*_lm_shape(split, len(devices)), devices=devices)


def one_copy(split: int) -> Mesh | None:
    """The mesh of a single language model over `split` devices of this process; None: it lies whole on one.

    Raises UsageError if there are not so many.
    """
    devices = jax.local_devices()
    if not 1 <= split <= len(devices):
        raise UsageError(f"split={split}: this process has {len(devices)} devices for a model; use 1 to {len(devices)}")
    return None if split == 1 else jax.make_mesh(*_lm_shape(split, split), devices=devices[:split])


def abstract_lm_mesh(split: int, n_devices: int) -> AbstractMesh:
    """The same of devices that are only counted. Raises UsageError as `lm_mesh` does."""
    if split == 1:
        return abstract_mesh(MeshConfig(), n_devices)
    return AbstractMesh(*_lm_shape(split, n_devices))


def lm_rows(mesh: Mesh | AbstractMesh) -> P:
    """Where the sequences lie that a language model reads on this mesh."""
    return P(COPIES) if COPIES in mesh.shape else ROWS


def lm_role(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], units: Mapping[str, int]) -> P:
    """The role of a language model's parameter: split over the devices of a copy where its units divide over them.

    `units`: of each axis in LM_SPLIT the number of parts that must stay whole, such as heads.
    """
    n = mesh.shape.get(MODEL, 1)
    return P(*(MODEL if name in LM_SPLIT and n > 1 and units[name] % n == 0 else None for name in axes))


def input_rows(mesh: Mesh | AbstractMesh) -> P:
    """ROWS of a batch as it comes to the devices: split over `member`, too, so that each byte is sent once."""
    return P((MEMBER, DATA, *LATENT)) if MEMBER in mesh.shape else ROWS


def at_rest(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """Where an array of a single member lies while it is not worked on: what is split is split over `member`, too."""
    if MEMBER not in mesh.shape:
        return spec
    return P(*((*part, MEMBER) if isinstance(part, tuple) and DATA in part else part for part in spec))


def in_order(x: T) -> T:
    """`x`; on several CPU devices once it is done.

    They start programs that do not depend on each other in any order. With collectives in them they wait for each other
    for ever, as they do, over several processes, with more than some thirty programs in flight.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.block_until_ready(x)
    return x


def _shape(config: MeshConfig, n_devices: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """(sizes, names) of the axes."""
    others = config.member * config.data
    latent = config.latent or n_devices // others
    if others * latent != n_devices:
        members = f"mesh.member={config.member} x " if config.member > 1 else ""
        raise UsageError(
            f"{members}mesh.data={config.data} x mesh.latent={latent} is {others * latent} devices, but {n_devices} "
            f"are visible; choose numbers whose product is {n_devices}"
        )
    shape = (config.data, latent, 1, 1)
    return ((config.member, *shape), (MEMBER, *AXES)) if config.member > 1 else (shape, AXES)


def _lm_shape(split: int, n_devices: int) -> tuple[tuple[int, int], tuple[str, str], tuple[AxisType, AxisType]]:
    """(sizes, names, types) of the axes of a language model that is split."""
    if n_devices % split:
        raise UsageError(f"harvest.split={split} does not divide {n_devices} devices; use a divisor of it")
    return (n_devices // split, split), (COPIES, MODEL), (AxisType.Auto, AxisType.Auto)


def _explicit(axes: tuple[str, ...]) -> tuple[AxisType, ...]:
    return (AxisType.Explicit,) * len(axes)


def _torus(devices: list[jax.Device], others: int) -> np.ndarray | None:
    """TPU devices by place, [others, *directions], the slowest direction first, as processes are numbered.

    `others` (member x data) take from each direction in turn what divides both. None for what is no full torus.
    """
    if devices[0].platform != "tpu":
        return None
    places = {(*reversed(device.coords), device.core_on_chip): device for device in devices}
    along = [sorted(set(axis)) for axis in zip(*places, strict=True)]
    if math.prod(map(len, along)) != len(devices):
        return None
    grid = np.empty(len(devices), object)
    grid[:] = [places[place] for place in itertools.product(*along)]
    z, y, x, cores = map(len, along)
    split = []
    for size in (z, y, x * cores):
        taken = math.gcd(size, others)
        others //= taken
        split += [taken, size // taken]
    return grid.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(-1, *split[1::2])
