"""Joining the other processes of a job, and leaving them."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import sys
import time
import traceback
from pathlib import Path

import jax
from jax._src import distributed  # whether this is one of several, without starting the devices

from sae_jax.commands import alive, quiet
from sae_jax.types import UsageError

_TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SECONDS_TO_SAY_WHY = 5.0
SECONDS_ASLEEP = 30 * 24 * 3600


def start_distributed() -> None:
    """Join the other processes of this job, or start a job of one.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local.sh), or found by JAX under
    Slurm, MPI and on TPU hosts. A single process needs it too: only then is SIGTERM caught and agreed upon, so that
    the loop can save before the machine is taken away.
    """
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    quiet.leave_errors_to_us()
    told = [os.environ.get(name) for name in _TOLD]
    if all(told):
        jax.distributed.initialize(told[0], int(told[1] or 1), int(told[2] or 0))
    elif any(told[1:]):
        raise UsageError(f"set all of {', '.join(_TOLD)}, or none of them")
    elif "SLURM_STEP_NODELIST" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ or _has_tpu():
        jax.distributed.initialize()
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        # A single process needs no heartbeat; suspending it must not look like a failure.
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, heartbeat_timeout_seconds=SECONDS_ASLEEP
        )
    job = distributed.global_state
    if job.num_processes > 1:
        alive.watch(job.client, job.process_id)


def leave_the_others(code: int) -> None:
    """End this process now if it is one of several. It failed, and the usual way out waits for the others for minutes.

    They may have failed as well, and the first process coordinates: when it goes they are cut off in what they say.
    Called while an exception is handled, it shows that one first.
    """
    job = distributed.global_state
    if job.client is None or job.num_processes == 1:
        return
    if sys.exception() is not None:
        traceback.print_exc()
    if job.process_id == 0:
        time.sleep(SECONDS_TO_SAY_WHY)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _has_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))
