"""Meshes: what divides, what does not, and who is told."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from sae_jax import mesh as meshes
from sae_jax.types import UsageError


def test_latent_takes_what_data_leaves():
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2))
    assert meshes.sizes(mesh) == {"data": 2, "latent": 4, "member": 1}
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


@pytest.mark.parametrize(("data", "latent"), [(3, 0), (2, 3), (16, 1)])
def test_a_mesh_that_does_not_divide_is_refused(data, latent):
    with pytest.raises(UsageError, match="8 are visible"):
        meshes.make_mesh(meshes.MeshConfig(data, latent))


def test_sizes_that_do_not_divide_name_the_nearest(monkeypatch):
    mesh = meshes.make_mesh(meshes.MeshConfig())
    meshes.check_divides(mesh, 64, 16)
    with pytest.raises(UsageError, match=r"sae.n_latents=100 does not divide over 8 devices; use 96 or 104"):
        meshes.check_divides(mesh, 100, 16)
    with pytest.raises(UsageError, match=r"train.batch_size=5 .* use 8"):
        meshes.check_divides(mesh, 64, 5)
    with pytest.raises(UsageError):
        meshes.MeshConfig(data=0)


def test_no_mesh_is_one_device():
    assert meshes.current() is None
    assert meshes.axis_size(meshes.LATENT) == 1


@dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU device."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"


@pytest.mark.parametrize(
    ("torus", "cores", "data", "shape"),
    [((4, 4, 8), 1, 1, (1, 8, 4, 4)), ((4, 4, 8), 1, 16, (16, 1, 2, 4)), ((2, 2, 1), 2, 2, (2, 1, 1, 4))],
)
def test_every_direction_of_a_torus_is_a_line_of_neighbours(torus, cores, data, shape):
    """In whatever order the devices are listed; `data` takes its part of the directions, not of the neighbours."""
    chips = [Chip((x, y, z), core) for x, y, z, core in np.ndindex(*torus, cores)]
    np.random.default_rng(0).shuffle(chips)
    grid = meshes._torus(chips, data)
    assert grid.shape == shape
    assert set(grid.ravel()) == set(chips)
    for axis in (1, 2, 3):
        lines = np.moveaxis(grid, axis, -1).reshape(-1, shape[axis])
        for before, after in zip(lines[:, :-1].ravel(), lines[:, 1:].ravel(), strict=True):
            assert np.abs(np.subtract(before.coords, after.coords)).sum() <= 1


def test_devices_that_are_no_torus_have_no_directions():
    chips = [Chip((x, y, 0)) for x, y in ((0, 0), (0, 1), (1, 0))]
    assert meshes._torus(chips, 1) is None
    assert meshes._torus(jax.devices(), 1) is None
