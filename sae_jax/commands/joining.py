"""Which processes make up this job, and a roll call before they join.

JAX waits for all processes of a job, and ends those that are there with a stack trace that does not say which one never
came. So the first process asks before it: the others tell it who they are, at the address where JAX's own service will
be, and it answers once all have come, or when time is up with who has not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from jax._src import clusters, hardware_utils

from sae_jax.types import UsageError, UserError

TOLD = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MODE, PATIENCE = "SAE_JAX_DISTRIBUTED", "SAE_JAX_JOIN_SECONDS"
SECONDS = 300.0
BETWEEN_TRIES = 0.2
MAX_BYTES = 10_000  # of what one process tells another
CURE = "give each its own JAX_PROCESS_ID, and all the same JAX_NUM_PROCESSES"


@dataclass(frozen=True)
class Job:
    """A job as this process sees it."""

    address: str  # host:port of the first process
    n_processes: int
    process: int
    by: str  # what says so
    devices: Sequence[int] | None = None  # of this host, that are this process's; None: as JAX has it


def find_job() -> Job | None:
    """The job that the environment describes; None for a process on its own. UsageError where that is unclear."""
    mode = os.environ.get(MODE, "")
    if mode not in ("", "none"):
        raise UsageError(f"{MODE}={mode!r} must be none, for a process on its own, or not set")
    if mode == "none":
        return None
    told = [os.environ.get(name) for name in TOLD]
    if all(told):
        return _told(*map(str, told))
    if any(told[1:]):
        raise UsageError(f"set all of {', '.join(TOLD)}, or none of them")
    places = {"Slurm": "SLURM_STEP_NODELIST" in os.environ, "Open MPI": "OMPI_COMM_WORLD_SIZE" in os.environ}
    by = next((name for name, is_there in places.items() if is_there), "the TPU's metadata" if _has_tpu() else None)
    if by is None:
        return None
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, n, process, devices = detect(told[0], None, None, None, None, int(patience()))
    if os.environ.get("JAX_LOCAL_DEVICE_IDS"):
        devices = None  # JAX reads it
    if address is None and by.startswith("the TPU"):
        return None  # a TPU in a machine that knows of no others
    if address is None or n is None or process is None:
        raise UsageError(
            f"{by} does not say what this process is part of; set {', '.join(TOLD)}, or {MODE}=none for it alone"
        )
    return Job(address, n, process, by, devices) if n > 1 else None


def patience() -> float:
    """Seconds to wait for the others."""
    text = os.environ.get(PATIENCE, str(SECONDS))
    with contextlib.suppress(ValueError):
        if 1 <= float(text) < 1e6:
            return float(text)
    raise UsageError(f"{PATIENCE}={text!r} must be a number of seconds, at least 1")


def call_roll(job: Job) -> None:
    """Return once all processes of the job are there.

    Raises UserError on every process that is, in one line that names those which are not, when `patience` is over.
    """
    (_call if job.process == 0 else _answer)(job, time.monotonic() + patience())


def _call(job: Job, deadline: float) -> None:
    """The first process: hear of the others, then tell them."""
    me, there = socket.gethostname(), dict[int, str]()  # {process: host}
    listening: list[socket.socket] = []
    problem = ""
    with _listening(job) as server, contextlib.ExitStack() as stack:
        while len(there) < job.n_processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                other = stack.enter_context(server.accept()[0])
                other.settimeout(5)
                said = json.loads(_line(other))
                process, n, host = int(said["process"]), int(said["n"]), str(said["host"])
            except TimeoutError:
                if time.monotonic() > deadline:
                    problem = _missing(job, there, me)
                continue
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            listening.append(other)
            if n != job.n_processes:
                problem = f"process {process} on {host} is one of {n}, and this is one of {job.n_processes}; {CURE}"
            elif process in there or not 0 < process < n:
                problem = f"two processes are number {process}, on {there.get(process, me)} and on {host}; {CURE}"
            else:
                there[process] = host
        for other in listening:
            with contextlib.suppress(OSError):
                other.sendall(json.dumps({"problem": problem}).encode() + b"\n")
    if problem:
        raise UserError(problem)


def _answer(job: Job, deadline: float) -> None:
    """Another process: tell the first one, and wait for what it says."""
    host, _, port = job.address.rpartition(":")
    me = {"process": job.process, "n": job.n_processes, "host": socket.gethostname()}
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError):
            with socket.create_connection((host.strip("[]"), int(port)), timeout=min(left, 5)) as first:
                first.sendall(json.dumps(me).encode() + b"\n")
                first.settimeout(left + 5)  # it speaks first when time is up
                said = _line(first)
            problem = json.loads(said)["problem"]
            if problem:
                raise UserError(problem)
            return
        time.sleep(BETWEEN_TRIES)
    raise UserError(
        f"process 0 of {job.n_processes}, at {job.address}, has not come within {patience():.0f} s; see to it, or set "
        f"{PATIENCE} to wait longer (this is process {job.process} on {socket.gethostname()}, by {job.by})"
    )


def _missing(job: Job, there: dict[int, str], me: str) -> str:
    missing = [str(i) for i in range(1, job.n_processes) if i not in there]
    last = max(there, default=0)
    which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
    return (
        f"{which} of {job.n_processes} {'has' if len(missing) == 1 else 'have'} not come within {patience():.0f} s "
        f"(process {last} on {there.get(last, me)} did); see why in the log of the launcher, start all "
        f"{job.n_processes} again, or set {PATIENCE} to wait longer"
    )


def _listening(job: Job) -> socket.socket:
    host, _, port = (os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or job.address).rpartition(":")
    is_bound = "JAX_COORDINATOR_BIND_ADDRESS" in os.environ
    try:
        if is_bound and host not in ("", "[::]"):
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=job.n_processes)
        if socket.has_dualstack_ipv6():
            family = socket.AF_INET6
            return socket.create_server(("", int(port)), family=family, backlog=job.n_processes, dualstack_ipv6=True)
        return socket.create_server(("", int(port)), backlog=job.n_processes)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot listen at {job.address} for the other processes: {error}; give another port in {TOLD[0]}"
        ) from None


def _line(of: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < MAX_BYTES:
        part = of.recv(4096)
        if not part:
            break
        data += part
    return data


def _told(address: str, n: str, process: str) -> Job:
    try:
        job = Job(address, int(n), int(process), "JAX_NUM_PROCESSES and JAX_PROCESS_ID")
        int(address.rpartition(":")[2])
    except ValueError:
        raise UsageError(
            f"JAX_COORDINATOR_ADDRESS={address!r}, JAX_NUM_PROCESSES={n!r} and JAX_PROCESS_ID={process!r} must be "
            f"host:port and two numbers"
        ) from None
    if not 0 <= job.process < job.n_processes:
        raise UsageError(f"JAX_PROCESS_ID={process} must be at least 0 and below JAX_NUM_PROCESSES={n}")
    return job


def _has_tpu() -> bool:
    # By PCI: newer TPUs are no /dev/accel*.
    return (
        importlib.util.find_spec("libtpu") is not None and hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0
    )
