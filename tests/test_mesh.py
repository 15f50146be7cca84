"""Meshes: what divides, what does not, and who is told."""

import jax
import pytest

from sae_jax import mesh as meshes
from sae_jax.types import UsageError


def test_latent_takes_what_data_leaves():
    mesh = meshes.make_mesh(meshes.MeshConfig(data=2))
    assert meshes.sizes(mesh) == {"data": 2, "latent": 4}
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
