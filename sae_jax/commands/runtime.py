"""Joining the other processes of a job, and leaving them."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
import traceback

import jax
from jax._src import distributed  # whether this is one of several, without starting the devices

from sae_jax.commands import alive, joining, quiet
from sae_jax.progress import console

SECONDS_TO_SAY_WHY = 5.0
SECONDS_ASLEEP = 30 * 24 * 3600


def start_distributed() -> None:
    """Join the other processes of this job, or start a job of one.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local.sh), or found under Slurm, Open
    MPI and on TPU hosts; with SAE_JAX_DISTRIBUTED=none neither is looked at. A single process needs it too: only then
    is SIGTERM caught and agreed upon, so that the loop can save before the machine is taken away.

    Raises UserError on every process that is there if one does not come (joining.py).
    """
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    quiet.leave_errors_to_us()
    job = distributed.global_state
    if job.client is None:  # else a launcher has joined them already, as Ray's does
        found = joining.find_job()
        if found is None:
            _start_alone()
        else:
            _join(found)
    if job.num_processes > 1:
        alive.watch(job.client, job.process_id)


def _join(found: joining.Job) -> None:
    joining.call_roll(found)
    if found.process == 0:
        console.print(f"{found.n_processes} processes, by {found.by}; the first at {found.address}")
    jax.distributed.initialize(
        found.address,
        found.n_processes,
        found.process,
        found.devices,
        initialization_timeout=int(joining.patience()),
    )


def _start_alone() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # A single process needs no heartbeat; suspending it must not look like a failure. Nothing is detected: what is
    # asked to be on its own has all devices.
    jax.distributed.initialize(
        address,
        1,
        0,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        heartbeat_timeout_seconds=SECONDS_ASLEEP,
    )


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
