"""GPU kernels compiled ahead of time for three generations of GPU, with none present.

Needs the CUDA plugin, which is large: `pip install jax-cuda13-plugin` of JAX's own version (no nvidia wheels), then

    JAX_PLATFORMS=cpu python -m pytest -m aot
"""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sae_jax.ops import pallas_encode, pallas_sparse

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)), reason="needs jax-cuda13-plugin"
    ),
    pytest.mark.skipif(jax.config.jax_platforms != "cpu", reason="needs JAX_PLATFORMS=cpu, or the plugin wants a GPU"),
]

# Capability, multiprocessors, their FPUs, threads, shared memory and a block's share, GB/s, L2 and memory bytes, GHz.
GPUS = {
    "NVIDIA A100": (8, 0, 108, 64, 2048, 167936, 166912, 2039, 41943040, 85100068864, 1.41),
    "NVIDIA GeForce RTX 4090": (8, 9, 128, 128, 1536, 102400, 101376, 1008, 75497472, 25386352640, 2.52),
    "NVIDIA H200": (9, 0, 132, 128, 2048, 233472, 232448, 4800, 52428800, 151397597184, 1.98),
}


@pytest.fixture(scope="module", params=GPUS)
def gpu(request) -> Mesh:
    major, minor, cores, fpus, threads, shared, block_shared, rate, l2, memory, clock = GPUS[request.param]
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    config = f"""
    gpu_device_info {{
      cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block_shared}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
      memory_bandwidth: {rate}000000000 l2_cache_size: {l2} device_memory_size: {memory}
      driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
      name: "{request.param}" device_vendor: "NVIDIA Corporation" device_address_bits: 64
    }}
    platform_name: "CUDA" device_description_str: "{request.param}"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    """
    target = topologies.get_topology_desc("", "cuda", target_config=config, topology="1x1x1")
    return Mesh(np.array(target.devices), ("device",))


def compiled(gpu, function, *shapes, donated=()):
    whole = NamedSharding(gpu, PartitionSpec())
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    with jax.set_mesh(gpu):  # from which JAX 0.11 reads what to lower a kernel for
        executable = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    assert "triton" in executable.as_text()
    return executable


@pytest.mark.parametrize(
    ("n_rows", "depth", "n_latents", "k", "dtype"),
    [
        (512, 768, 131072, 32, jnp.bfloat16),
        (256, 4096, 262144, 64, jnp.bfloat16),
        (512, 768, 131072, 32, jnp.float32),
        (37, 100, 10007, 7, jnp.bfloat16),
        (128, 768, 2**19, 512, jnp.bfloat16),  # the widest selection there is
    ],
)
def test_encoder(gpu, n_rows, depth, n_latents, k, dtype):
    """It fits a block's registers and shared memory, and both passes write one buffer: no copy of it is made."""
    executable = compiled(
        gpu,
        partial(pallas_encode.block_topk, k=k),
        ((n_rows, depth), dtype),
        ((n_latents, depth), dtype),
        ((n_latents,), jnp.float32),
    )
    padded_rows, padded_latents = n_rows + -n_rows % 64, n_latents + -n_latents % 128
    buffer_bytes = padded_rows * padded_latents * 4
    assert buffer_bytes < executable.memory_analysis().temp_size_in_bytes < 1.1 * buffer_bytes


@pytest.mark.parametrize(
    ("depth", "n_latents", "dtype"),
    [(768, 131072, jnp.bfloat16), (4096, 262144, jnp.float32), (100, 999, jnp.float32)],
)
def test_sparse(gpu, depth, n_latents, dtype):
    index, weight = ((512, 32), jnp.int32), ((512, 32), jnp.float32)
    rows, table = ((512, depth), dtype), ((n_latents, depth), dtype)
    compiled(gpu, pallas_sparse.gather_rows, index, weight, table)
    compiled(gpu, pallas_sparse.sampled_products, index, weight, rows, table)
    sums = ((n_latents, depth), jnp.float32)
    in_place = compiled(gpu, pallas_sparse.scatter_rows, sums, index, weight, rows, donated=0)
    assert in_place.memory_analysis().temp_size_in_bytes < 4 * (2 * n_latents + 8 * index[0][0] * index[0][1]) + 2**20
