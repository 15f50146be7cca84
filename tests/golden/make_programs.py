"""Makes program_*.txt: a small program with all that sae_jax/planning/hlo.py must see, as two compilers print it.

    python tests/golden/make_programs.py        # with sae_jax[plan] installed; jax 0.10.2, libtpu 0.0.42.1

What an instruction says for debuggers and for the code generator is left out, but for the trip counts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies

from sae_jax import mesh as meshes
from sae_jax.ops import spmd
from sae_jax.planning import compile, targets

N_BLOCKS, ROWS, D, F = 3, 8192, 2048, 4096  # rows of a block, and latents of a device


def program(x_NRD: jax.Array, w_FD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Three times: rows gathered, one product, a sort, a sum scattered. Then a branch, then a loop over data."""

    def local(x_NrD, w_FD):
        def block(total, x_rD):
            x_RD = spmd.gather(x_rD, meshes.LATENT)
            pre_RF = jnp.einsum("rd,fd->rf", x_RD, w_FD, preferred_element_type=jnp.float32)
            best_RF = jnp.sort(pre_RF, axis=-1)
            return total + best_RF.sum(), spmd.reduce_scatter(best_RF[:, :D] * x_RD, meshes.LATENT)

        total, y_NrD = lax.scan(block, jnp.float32(0), x_NrD)
        y_rD = lax.cond(
            total > 0,
            lambda y: lax.all_to_all(y, meshes.LATENT, 0, 0, tiled=True),
            lambda y: y,
            y_NrD[0],
        )
        y_rD = lax.while_loop(lambda y: y.sum() < 9, lambda y: y @ w_FD.T @ w_FD, y_rD)
        return lax.psum(total, meshes.LATENT), y_rD

    return spmd.per_device(local, (jax.P(None, meshes.LATENT), meshes.DICT), (meshes.REPLICATED, meshes.ROWS))(
        x_NRD, w_FD
    )


def main() -> None:
    """Compile for both and write what they print."""
    os.environ.update(compile.ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    for name in ("v5p:4x4x4", "h200:16"):
        target = targets.parse(name)
        mesh = meshes.make_mesh(meshes.MeshConfig(), list(topologies.get_topology_desc(**target.topology).devices))
        with jax.set_mesh(mesh):
            x = jax.ShapeDtypeStruct(
                (N_BLOCKS, ROWS, D), jnp.float32, sharding=meshes.sharding(mesh, jax.P(None, meshes.LATENT))
            )
            w = jax.ShapeDtypeStruct((F * mesh.size, D), jnp.float32, sharding=meshes.sharding(mesh, meshes.DICT))
            text = jax.jit(program).lower(x, w).compile().as_text()
        text = re.sub(r"^(FileNames|FunctionNames|FileLocations|StackFrames)\n(.+\n)*\n*", "", text, flags=re.MULTILINE)
        text = re.sub(r", backend_config=(?!.*known_trip_count).*$", "", text, flags=re.MULTILINE)
        text = re.sub(r" stack_frame_id=\d+|, frontend_attributes=\{[^}]*\}", "", text)
        Path(__file__).with_name(f"program_{target.name.partition(':')[0]}.txt").write_text(text)


if __name__ == "__main__":
    main()
