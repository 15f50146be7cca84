"""One owner at a time: who is refused, who takes over from whom, and what an owner that was stopped learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sae_jax import storage
from sae_jax.storage import HeldError, Lease, LostError
from sae_jax.storage import lease as leases
from tests import runs

SHORT = 0.3  # seconds of a lease

HOLD = """
import sys, time
from sae_jax.storage import Lease
with Lease(sys.argv[1], "it", seconds=float(sys.argv[2])) as lease:
    print("holds", flush=True)
    for line in sys.stdin:
        lease.check()
        print("still", flush=True)
"""


def holder(path: Path, seconds: float = leases.SECONDS) -> subprocess.Popen[str]:
    """A process that has the lease; it checks that at every line that it is sent."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(seconds)],
        env=runs.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "holds\n"
    return process


def test_the_second_is_refused_by_name_and_the_next_is_not(tmp_path: Path) -> None:
    with Lease(tmp_path / "new" / "run", "RUN") as lease:
        lease.check()
        said = rf"RUN is in use: process {os.getpid()} on host .*, since .* UTC, writes it; wait until it has ended"
        with pytest.raises(HeldError, match=said), Lease(tmp_path / "new" / "run", "RUN"):
            raise AssertionError
        lease.check()
        with Lease(tmp_path / "new" / "other", "OTHER"):
            pass
    assert list(tmp_path.iterdir()) == []  # nor are folders left that were made for it
    with Lease(tmp_path / "new" / "run", "RUN"):
        pass


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    for _ in range(8):
        start, leave, outcomes = threading.Barrier(6), threading.Barrier(6), []

        def contend(start=start, leave=leave, outcomes=outcomes) -> None:
            start.wait()
            try:
                with Lease(tmp_path / "x", "it"):
                    outcomes.append("won")
                    leave.wait()
            except HeldError:
                outcomes.append("refused")
                leave.wait()

        threads = [threading.Thread(target=contend) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["refused"] * 5 + ["won"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["x", "memory://leases/x"])
def test_one_that_gives_no_sign_of_life_is_succeeded_and_learns_it(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another host, where nothing but its silence is known."""
    path = path if storage.is_url(path) else str(tmp_path / path)
    monkeypatch.setattr(leases, "_process_table", lambda: "")
    monkeypatch.setattr(Lease, "_beat", lambda self: None)

    def succeed(first: Lease) -> None:
        began = time.monotonic()
        with Lease(path, "it", seconds=SHORT) as second:
            assert time.monotonic() - began >= SHORT
            second.check()
            with pytest.raises(
                LostError, match=f"it: process {os.getpid()} on host .* has taken over while this process"
            ):
                first.check()
        with Lease(path, "it", seconds=SHORT):  # what is left is no obstacle
            pass
        raise OSError("as of a write into a folder that is another's")

    first = Lease(path, "it", seconds=SHORT)
    with pytest.raises(LostError, match="it: others took over, or deleted it, while this process was stopped"), first:
        succeed(first)


@pytest.mark.parametrize("path", ["x", "memory://alive/x"])
def test_one_that_lives_elsewhere_is_seen_to(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its signs of life alone: its clock may say anything."""
    path = path if storage.is_url(path) else str(tmp_path / path)
    monkeypatch.setattr(leases, "_process_table", lambda: "")
    with Lease(path, "it", seconds=20.0) as lease:
        if not storage.is_url(path):
            os.utime(f"{path}.0.json", (0, 0))
        began = time.monotonic()
        with pytest.raises(HeldError), Lease(path, "it", seconds=20.0):
            raise AssertionError
        assert time.monotonic() - began < 15
        lease.check()


def test_the_impatient_believe_a_file_that_looks_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_process_table", lambda: "")
    with Lease(tmp_path / "x", "it"):
        began = time.monotonic()
        with pytest.raises(HeldError), Lease(tmp_path / "x", "it", is_patient=False):
            raise AssertionError
        assert time.monotonic() - began < 15


def test_a_dead_process_is_succeeded_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path / "x")
    with pytest.raises(HeldError, match=f"process {process.pid} on host"), Lease(tmp_path / "x", "it"):
        raise AssertionError
    process.kill()  # and not waited for
    while (seen := leases._process(process.pid)) and seen.state != "Z":
        time.sleep(0.01)
    began = time.monotonic()
    with Lease(tmp_path / "x", "it") as lease:
        lease.check()
        assert time.monotonic() - began < 15
    process.communicate()


def test_its_number_may_be_another_processs(tmp_path: Path) -> None:
    with Lease(tmp_path / "x", "it"):
        file = tmp_path / "x.0.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "start": "1"}))
        with Lease(tmp_path / "x", "it"):
            pass


def test_a_process_that_is_stopped_and_woken_finds_another_in_its_place(tmp_path: Path) -> None:
    process = holder(tmp_path / "x", SHORT)
    runs.stop(process)
    with Lease(tmp_path / "x", "it", seconds=SHORT) as lease:
        process.send_signal(signal.SIGCONT)
        said, error = process.communicate("\n")
        assert "still" not in said
        assert f"LostError: it: process {os.getpid()} on host" in error
        lease.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_a_holder_of_which_nothing_is_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.3.json").write_bytes(content)
    with Lease(tmp_path / "x", "it", seconds=SHORT):
        assert [path.name for path in tmp_path.iterdir()] == ["x.4.json"]


def test_a_folder_that_goes_away_takes_the_lease_along(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "run" / "x", "it").__enter__()
    lease.check()
    (tmp_path / "run" / "x.0.json").unlink()
    with pytest.raises(LostError, match="others took over, or deleted it"):
        lease.check()
    lease.__exit__(None, None, None)


def test_threads_end_with_their_lease(tmp_path: Path) -> None:
    before = threading.active_count()
    for _ in range(10):
        with Lease(tmp_path / "x", "it"):
            assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_new_folder_has_one_writer(tmp_path: Path) -> None:
    """And what a dead one left of it goes."""
    left = tmp_path / ".page.0123456789abcdef.tmp"
    left.mkdir()
    with storage.new_folder(tmp_path / "page", replace=True) as building:
        assert not left.exists()
        (building / "index").write_text("mine")
        with pytest.raises(HeldError, match="page is in use"), storage.new_folder(tmp_path / "page", replace=True):
            raise AssertionError
    assert [path.name for path in tmp_path.rglob("*")] == ["page", "index"]
