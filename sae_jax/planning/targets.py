"""The machines a plan can be made for: `KIND:SHAPE`.

    v4:4x4x4  v5e:16x16  v5p:8x8x8  v6e:16x16  tpu7x:4x4x4      a TPU slice, chips along each direction
    rtx4090:1  a100:8  h100:8  h200:64                          NVIDIA GPUs, from 8 on in nodes of 8

Figures are per device as JAX counts devices: v4 and tpu7x chips are two. Matrix rates are dense bfloat16 with float32
sums and bandwidths are those of device memory, both from the makers' data sheets. The memory of a TPU is what its
compiler enforces, that of a GPU what CUDA reports.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from sae_jax.types import UsageError

GIB = 2**30
GPUS_PER_NODE = 8
CHIPS_PER_HOST = 4  # of TPUs, as the compiler has them by default


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator, per device."""

    memory_bytes: int
    flops: float  # FLOP/s
    bandwidth: float  # bytes/s
    usable: float  # share of the memory that a step may take
    dimensions: int = 0  # of a TPU's torus
    devices_per_chip: int = 1
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Gpu:
    """What the compiler asks about an NVIDIA GPU: `cudaDeviceProp`, in the main."""

    name: str
    capability: tuple[int, int]
    n_cores: int  # streaming multiprocessors
    fpus_per_core: int
    threads_per_core: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float


def _tpu(
    dimensions: int, memory_gib: float, tera_flops: float, gb_per_second: float, devices_per_chip: int = 1
) -> Chip:
    # The compiler checks the memory itself; the rest is for what runs beside the step.
    return Chip(int(memory_gib * GIB), tera_flops * 1e12, gb_per_second * 1e9, 0.92, dimensions, devices_per_chip)


def _gpu(memory_bytes: int, tera_flops: float, gb_per_second: float, gpu: Gpu) -> Chip:
    # Nobody checks, and neither NCCL's buffers nor the workspaces of libraries are counted.
    return Chip(memory_bytes, tera_flops * 1e12, gb_per_second * 1e9, 0.85, gpu=gpu)


_HOPPER = ((9, 0), 132, 128, 2048, 233472, 232448, 52428800, 1.98)

CHIPS = {
    "v4": _tpu(3, 15.25, 137.5, 614, devices_per_chip=2),
    "v5e": _tpu(2, 15.75, 197, 819),
    "v5p": _tpu(3, 95.74, 459, 2765),
    "v6e": _tpu(2, 31.25, 918, 1640),
    "tpu7x": _tpu(3, 94.75, 1153.5, 3690, devices_per_chip=2),
    "h200": _gpu(151397597184, 989.5, 4800, Gpu("NVIDIA H200", *_HOPPER)),
    "h100": _gpu(85045477376, 989.5, 3350, Gpu("NVIDIA H100 80GB HBM3", *_HOPPER)),
    "a100": _gpu(
        85100068864, 312, 2039, Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 166912, 41943040, 1.41)
    ),
    "rtx4090": _gpu(
        25386352640,
        165.2,
        1008,
        Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 102400, 101376, 75497472, 2.52),
    ),
}
# What JAX calls the devices of each kind of TPU; those of GPUs stand in CHIPS.
TPUS = {
    **{"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"},
    **{"TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x"},
}
EXAMPLES = "v5p:8x8x8, v6e:16x16, h200:64, rtx4090:1"


@dataclass(frozen=True)
class Target:
    """`n_devices` of one kind. Build it with `parse`."""

    name: str
    chip: Chip
    n_devices: int
    topology: dict[str, Any]  # arguments of `jax.experimental.topologies.get_topology_desc`

    @property
    def is_tpu(self) -> bool:
        """Whether it is a TPU slice, else NVIDIA GPUs."""
        return self.chip.gpu is None

    @property
    def host(self) -> Target:
        """The part of it that one host has, with its own devices alone."""
        kind = self.name.partition(":")[0]
        if not self.is_tpu:
            return parse(f"{kind}:{min(self.n_devices, GPUS_PER_NODE)}")
        if self.n_devices <= CHIPS_PER_HOST * self.chip.devices_per_chip:
            return self
        return parse(f"{kind}:{'2x2' if self.chip.dimensions == 2 else '2x2x1'}")

    def rate(self, precision: str) -> float:
        """FLOP/s of products of float32 or bfloat16 numbers.

        Float32 means float32 (`encode.EXACT`): a TPU takes six products of bfloat16 numbers for one, and a GPU has its
        plain cores for them, two FLOP each in a cycle.
        """
        if precision == "bfloat16":
            return self.chip.flops
        gpu = self.chip.gpu
        return self.chip.flops / 6 if gpu is None else gpu.n_cores * gpu.fpus_per_core * 2 * gpu.clock_ghz * 1e9

    @property
    def usable_bytes(self) -> int:
        """What a step may take of a device's memory."""
        return int(self.chip.memory_bytes * self.chip.usable)


def of_devices(device_kind: str, n_devices: int) -> Target | None:
    """The target that devices are which are here, named as JAX names them; None for a kind without a data sheet.

    It says how fast they are, not how they are connected: nothing can be compiled for it.
    """
    gpus = {chip.gpu.name: kind for kind, chip in CHIPS.items() if chip.gpu}
    kind = {**TPUS, **gpus}.get(device_kind)
    return None if kind is None else Target(device_kind, CHIPS[kind], n_devices, {})


def parse(text: str) -> Target:
    """The target that `text` names. Raises UsageError: no such kind, or a shape that this kind does not have."""
    kind, _, shape = text.partition(":")
    if kind not in CHIPS:
        raise UsageError(f"--target={text}: no kind {kind!r}; there are {', '.join(CHIPS)}, as in {EXAMPLES}")
    chip = CHIPS[kind]
    if chip.gpu is not None:
        return _gpu_target(text, shape, chip, chip.gpu)
    example = "x".join(["4"] * chip.dimensions)
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})*", shape) or shape.count("x") != chip.dimensions - 1:
        raise UsageError(
            f"--target={text}: the shape of {kind} is {chip.dimensions} numbers of chips, such as {kind}:{example}"
        )
    n_chips = math.prod(map(int, shape.split("x")))
    topology: dict[str, Any] = {"platform": "tpu", "topology_name": text}
    if n_chips == 1:
        topology["chips_per_host_bounds"] = (1, 1, 1)
    return Target(text, chip, n_chips * chip.devices_per_chip, topology)


def _gpu_target(text: str, count: str, chip: Chip, gpu: Gpu) -> Target:
    n = int(count) if re.fullmatch(r"[1-9]\d{0,5}", count) else 0
    if not n or (n > GPUS_PER_NODE and n % GPUS_PER_NODE):
        raise UsageError(
            f"--target={text}: give a number of GPUs, up to {GPUS_PER_NODE} or whole nodes of {GPUS_PER_NODE}: "
            f"{text.partition(':')[0]}:{max(1, n // GPUS_PER_NODE) * GPUS_PER_NODE}"
        )
    per_node = min(n, GPUS_PER_NODE)
    topology = {
        "platform": "cuda",
        "topology_name": "",
        "target_config": _target_config(chip, gpu),
        "topology": f"1x{n // per_node}x{per_node}",  # groups of nodes, nodes, GPUs
    }
    return Target(text, chip, n, topology)


def _target_config(chip: Chip, gpu: Gpu) -> str:
    """The GPU as the text form of XLA's GpuTargetConfigProto."""
    major, minor = gpu.capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  name: "{gpu.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {gpu.n_cores}
  fpus_per_core: {gpu.fpus_per_core}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory_bytes}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {gpu.shared_memory_per_core}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: {gpu.threads_per_core}
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""
