"""Joining the other processes of a job: by real processes of which one never comes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from sae_jax.commands import joining
from sae_jax.types import UsageError
from tests import runs

JOIN = """
import sys
from sae_jax.commands import main, runtime, verify

def run(argv):
    runtime.start_distributed()
    import jax
    print(jax.process_count(), jax.process_index())

verify.run = run
sys.argv[1:] = ["verify"]
sys.exit(main.main())
"""


@pytest.fixture(autouse=True)
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*joining.TOLD, joining.MODE, joining.PATIENCE, "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def start(address: str, n: int, process: int, seconds: int = 5, **env: str) -> subprocess.Popen[str]:
    told = dict(zip(joining.TOLD, (address, str(n), str(process)), strict=True))
    env = {**runs.environment(), **told, joining.PATIENCE: str(seconds), **env}
    return subprocess.Popen([sys.executable, "-c", JOIN], env=env, cwd=runs.ROOT, stdout=-1, stderr=-1, text=True)


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, list[str]]]:
    """Exit code, output and lines of errors of each."""
    found = []
    for process in processes:
        try:
            out, said = process.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        found.append((process.returncode, out.strip(), said.splitlines()))
    return found


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_who_never_comes_is_named_by_all_who_did() -> None:
    address = free_address()
    began = time.monotonic()
    found = ends([start(address, 4, i, seconds=15) for i in (0, 1, 3)])
    assert time.monotonic() - began < 60
    host = socket.gethostname()
    expected = f"sae-jax: process 2 of 4 has not come within 15 s (process 3 on {host} did); see why in the log"
    for code, _, said in found:
        assert code == 1
        assert len(said) == 1, said
        assert said[0].startswith(expected)
        assert said[0].endswith("start all 4 again, or set SAE_JAX_JOIN_SECONDS to wait longer")


def test_a_first_process_that_never_comes_is_named() -> None:
    address = free_address()
    ((code, _, said),) = ends([start(address, 2, 1, seconds=2)])
    assert (code, len(said)) == (1, 1), said
    assert said[0].startswith(f"sae-jax: process 0 of 2, at {address}, has not come within 2 s; see to it")


def test_processes_that_come_late_join_and_strangers_are_left_alone() -> None:
    address = free_address()
    first = start(address, 2, 0, seconds=60)
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 50
    while True:  # someone who looks for open ports
        try:
            with socket.create_connection((host, int(port)), timeout=1) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    (code, out, said), other = ends([first, start(address, 2, 1, seconds=60)])
    assert (code, out, other[:2]) == (0, "2 0", (0, "2 1")), (said, other)
    assert said == [f"2 processes, by JAX_NUM_PROCESSES and JAX_PROCESS_ID; the first at {address}"]
    assert other[2] == [], "one speaks for all"


def test_two_of_one_number_and_another_count_are_said() -> None:
    job = joining.Job(free_address(), 3, 0, "a test")
    for me, expected in (
        (
            [{"process": 1, "n": 3, "host": "a"}, {"process": 1, "n": 3, "host": "b"}],
            "two processes are number 1, on a",
        ),
        ([{"process": 1, "n": 4, "host": "a"}], "process 1 on a is one of 4, and this is one of 3"),
    ):
        said: list[str] = []

        def call(said: list[str] = said) -> None:
            try:
                joining.call_roll(job)
            except Exception as error:
                said.append(str(error))

        thread = threading.Thread(target=call)
        thread.start()
        host, _, port = job.address.rpartition(":")
        others = []
        for message in me:
            for _ in range(100):
                try:
                    others.append(socket.create_connection((host, int(port))))
                    break
                except OSError:
                    time.sleep(0.05)
            others[-1].sendall(json.dumps(message).encode() + b"\n")
            time.sleep(0.1)
        thread.join(10)
        assert expected in said[0]
        assert json.loads(others[0].makefile().readline())["problem"] == said[0], "the others hear it, too"
        for other in others:
            other.close()


def test_none_is_a_job_of_one_whatever_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(joining.TOLD, ("there:1", "4", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert joining.find_job() == joining.Job("there:1", 4, 2, "JAX_NUM_PROCESSES and JAX_PROCESS_ID")
    monkeypatch.setenv(joining.MODE, "none")
    assert joining.find_job() is None
    monkeypatch.setenv(joining.MODE, "no")
    with pytest.raises(UsageError, match="SAE_JAX_DISTRIBUTED='no' must be none"):
        joining.find_job()


def test_a_step_of_slurm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"JOB_ID": "7", "STEP_NODELIST": "node[3-4]", "NTASKS": "4", "PROCID": "2", "LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    found = joining.find_job()
    assert found is not None
    assert (found.n_processes, found.process, found.by, found.address.partition(":")[0]) == (4, 2, "Slurm", "node3")
    assert list(found.devices or ()) == [0]
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert joining.find_job() is None, "a step of one task"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (("there", "2", "0"), "must be host:port and two numbers"),
        (("there:1", "two", "0"), "must be host:port and two numbers"),
        (("there:1", "2", "2"), "JAX_PROCESS_ID=2 must be at least 0 and below JAX_NUM_PROCESSES=2"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], says: str) -> None:
    for name, value in zip(joining.TOLD, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=says):
        joining.find_job()


def test_a_busy_port_is_one_line() -> None:
    with socket.create_server(("", 0)) as busy:
        address = f"127.0.0.1:{busy.getsockname()[1]}"
        ((code, _, said),) = ends([start(address, 2, 0, JAX_COORDINATOR_BIND_ADDRESS=address)])
    assert (code, len(said)) == (1, 1), said
    assert "cannot listen at" in said[0]
    assert "give another port in JAX_COORDINATOR_ADDRESS" in said[0]
