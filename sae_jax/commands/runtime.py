"""What a command does before it touches a device."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

import jax
from jax._src import distributed  # whether this is one of several, without starting the devices

from sae_jax.progress import console
from sae_jax.types import UsageError

_WE_WERE_TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
SECONDS_TO_SAY_WHY = 5.0
SECONDS_UNTIL_AGAIN = 0.1
SECONDS_ASLEEP = 30 * 24 * 3600


def start_distributed() -> None:
    """Join the other processes of this job, or start a job of one.

    Told by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local.sh), or found by JAX under
    Slurm, MPI and on TPU hosts. A single process needs it too: only then is SIGTERM caught and agreed upon, so that
    the loop can save before the machine is taken away.
    """
    logging.getLogger("jax._src.distributed").setLevel(logging.WARNING)
    _leave_errors_to_us()
    told = [os.environ.get(name) for name in _WE_WERE_TOLD]
    if all(told):
        jax.distributed.initialize(told[0], int(told[1] or 1), int(told[2] or 0))
    elif any(told[1:]):
        raise UsageError(f"set all of {', '.join(_WE_WERE_TOLD)}, or none of them")
    elif "SLURM_STEP_NODELIST" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ or _has_tpu():
        jax.distributed.initialize()
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        # It has nobody to miss, and would take Ctrl-Z or a laptop's sleep for its own death.
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, heartbeat_timeout_seconds=SECONDS_ASLEEP
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


def warn_of_idle_gpu() -> None:
    """One line if there is a GPU that JAX does not use."""
    if jax.default_backend() == "cpu" and Path("/dev/nvidia0").exists() and not os.environ.get("JAX_PLATFORMS"):
        console.print(
            "warning: this machine has a GPU but JAX runs on the CPU; pip install 'sae_jax[cuda13]'", markup=False
        )


def _leave_errors_to_us() -> None:
    """training/checkpoint.py says what is wrong in one line; Orbax and tensorstore would add pages from threads."""
    for talker in ("absl", "asyncio"):
        logging.getLogger(talker).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            # Ctrl-C met a callback, such as JAX's of the garbage collector, out of which Python lets nothing pass.
            threading.Timer(SECONDS_UNTIL_AGAIN, signal.raise_signal, [signal.SIGINT]).start()
        # Closed: from each write that was under way when another one failed and Orbax closed the loop.
        elif str(unraisable.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(unraisable)

    sys.unraisablehook = hook


def _has_tpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None and any(Path("/dev").glob("accel*"))
