"""What storage promises: a reader sees the old or the new, one of many creates, and what returned is on the disk."""

import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sae_jax import storage
from sae_jax.storage import disk
from sae_jax.storage import lines as lines_module
from sae_jax.storage.lines import ROWS_PER_SEGMENT
from sae_jax.types import UsageError, UserError


@pytest.fixture(params=["disk", "url", "s3"])
def place(request, tmp_path) -> str:
    """A folder by its path, and by a URL."""
    if request.param == "s3":
        return request.getfixturevalue("bucket")
    return f"{'file://' * (request.param == 'url')}{tmp_path}"


def test_what_is_written_is_read(place):
    assert storage.read_bytes(f"{place}/a/b") is None
    for data in (b"old", b"", b"\x00new"):
        storage.write_bytes(f"{place}/a/b", data)
        assert storage.read_bytes(f"{place}/a/b") == data
    storage.write_json(f"{place}/a/c.json", {"name": "Größe"})
    assert storage.read_json(f"{place}/a/c.json") == {"name": "Größe"}
    assert storage.read_json(f"{place}/a/none.json") is None
    storage.delete(f"{place}/a/b")
    storage.delete(f"{place}/a/b")
    assert storage.read_bytes(f"{place}/a/b") is None
    assert storage.Files(f"{place}/a").keys("") == ["c.json"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_json_file_that_holds_no_object_is_refused(place, damage):
    storage.write_bytes(f"{place}/x.json", damage)
    with pytest.raises(UserError, match=r"x\.json: .*it is damaged: .*delete it"):
        storage.read_json(f"{place}/x.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_has_no_word_for_a_number_that_is_not_finite(tmp_path, value):
    storage.write_json(tmp_path / "x.json", {"fvu": 0.5})
    with pytest.raises(UserError, match=rf"x\.json: metrics\.1\.fvu is {value}"):
        storage.write_json(tmp_path / "x.json", {"metrics": [1.0, {"fvu": value}]})
    assert storage.read_json(tmp_path / "x.json") == {"fvu": 0.5}


KILLED = """
import sys
from sae_jax import storage
from sae_jax.storage import disk
from sae_jax.storage.lines import ROWS_PER_SEGMENT
for i in range(10**6):
    storage.write_bytes(sys.argv[1], bytes([i % 256]) * 3_000_000)
    print(i, flush=True)
"""


def test_a_kill_leaves_the_old_or_the_new(tmp_path):
    path = tmp_path / "x"
    for delay in (0.0, 0.003, 0.006):
        process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        data = path.read_bytes()
        assert len(data) == 3_000_000
        assert len(set(data)) == 1


def test_leftovers_of_a_kill_are_removed_once_they_are_old(tmp_path):
    old, fresh, folder, other = (
        tmp_path / name
        for name in (f".x.{'a' * 16}.tmp", f".x.{'b' * 16}.tmp", f".x.{'c' * 16}.tmp", f".y.{'a' * 16}.tmp")
    )
    folder.mkdir()
    for path in (old, fresh, folder / "part", other):
        path.write_bytes(b"half")
    for path in (old, folder, other):
        os.utime(path, (time.time() - 2 * disk.LEFTOVER_SECONDS,) * 2)
    storage.write_bytes(tmp_path / "x", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([fresh.name, other.name, "x"])


def test_temporaries_of_two_processes_with_one_pid_differ(tmp_path):
    assert len({disk.temporary_name(tmp_path / "x") for _ in range(100)}) == 100
    assert len(disk.temporary_name(tmp_path / ("x" * 255)).name) <= 255


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """Names of what was made durable, in order."""
    names, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: names.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    return names


def test_what_returned_is_durable(tmp_path, synced):
    storage.write_bytes(tmp_path / "new/x", b"1")
    # The new folder's own name, the file, then the file's name.
    assert synced[0] == str(tmp_path)
    assert ".x." in synced[1]
    assert synced[2] == f"{tmp_path}/new"
    synced.clear()
    assert storage.create(tmp_path / "y", b"1")
    assert ".y." in synced[0]
    assert synced[1] == str(tmp_path)
    synced.clear()
    with storage.new_folder(tmp_path / "z") as folder:
        synced.clear()  # of its lease
        (folder / "sub").mkdir()
        (folder / "sub/file").write_bytes(b"1")
    assert [Path(name).name for name in synced[:2]] == ["file", "sub"]
    assert str(tmp_path) in synced[2:]


def test_an_error_names_the_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for attempt in (storage.write_bytes, storage.create):
        with pytest.raises(FileExistsError) as caught:
            attempt(tmp_path / "file/x", b"1")
        assert str(tmp_path / "file") in str(caught.value.filename)

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_bytes(tmp_path / "x", b"1")
    assert caught.value.filename == str(tmp_path / "x")
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(OSError, match="No space left") as caught:
        storage.write_bytes(tmp_path / "new/x", b"1")
    assert caught.value.filename == str(tmp_path)  # which could not be told of the new folder


def _create(path: str, value: int, answers) -> None:
    answers.put((value, storage.create(path, bytes([value]) * 1000)))


def test_one_of_many_creates(place):
    answers: multiprocessing.Queue = multiprocessing.get_context("spawn").Queue()
    threads = [threading.Thread(target=_create, args=(f"{place}/x", i, answers)) for i in range(8)]
    spawn = multiprocessing.get_context("spawn")
    threads += [spawn.Process(target=_create, args=(f"{place}/x", i, answers)) for i in (8, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = [value for value, created in (answers.get(timeout=10) for _ in threads) if created]
    assert len(won) == 1
    assert storage.read_bytes(f"{place}/x") == bytes(won) * 1000
    assert not storage.create(f"{place}/x", b"late")


def test_create_where_a_disk_has_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert [storage.create(tmp_path / "x", data) for data in (b"1", b"2")] == [True, False]
    assert storage.read_bytes(tmp_path / "x") == b"1"
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "up" / "folder"
    with contextlib.suppress(KeyError), storage.new_folder(path) as building:
        (building / "half").write_bytes(b"")
        raise KeyError
    assert os.listdir(tmp_path) == []
    path.mkdir(parents=True)  # an empty one is no obstacle
    with storage.new_folder(path) as building:
        (building / "all").write_bytes(b"1")
        assert os.listdir(path) == []
    assert os.listdir(path) == ["all"]
    assert os.listdir(path.parent) == ["folder"]
    with pytest.raises(UsageError, match="not empty"), storage.new_folder(path):
        raise AssertionError("the block must not run")
    with storage.new_folder(path, replace=True) as building:
        (building / "new").write_bytes(b"1")
        assert os.listdir(path) == ["all"]
    assert os.listdir(path) == ["new"]
    assert os.listdir(path.parent) == ["folder"]
    with pytest.raises(UsageError, match="is a file"), storage.new_folder(path / "new"):
        raise AssertionError("the block must not run")


def test_arrays_that_cannot_be_written_are_an_error_of_the_disk(tmp_path):
    """The library has an error of its own. Of a folder that appears whole, the final name is said."""
    arrays = {"a": np.zeros(2, np.float32)}
    with pytest.raises(FileNotFoundError) as caught:
        storage.write_safetensors(tmp_path / "no/x", arrays)
    assert caught.value.filename == str(tmp_path / "no/x")
    with pytest.raises(FileNotFoundError) as caught, storage.new_folder(tmp_path / "folder") as building:
        storage.write_safetensors(building / "no/x", arrays)
    assert caught.value.filename == str(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


def test_lines_are_appended_and_read(place):
    path = f"{place}/lines.jsonl"
    assert storage.read_lines(path) == []
    for start in (0, 3):
        with storage.Lines(path) as lines:
            for i in range(start, start + 3):
                lines.write({"i": i, "loss": float("nan") if i == 1 else 0.5})
    rows = storage.read_lines(path)
    assert [row["i"] for row in rows] == [*range(6)]
    assert [row["loss"] for row in rows][:3] == [0.5, None, 0.5]
    storage.write_lines(path, rows[:2])
    with storage.Lines(path) as lines:
        lines.write({"i": "last"})
    assert [row["i"] for row in storage.read_lines(path)] == [0, 1, "last"]


def test_a_line_on_a_disk_has_left_the_process(tmp_path):
    lines = storage.Lines(tmp_path / "x.jsonl")
    lines.write({"step": 1})
    assert (tmp_path / "x.jsonl").read_text() == '{"step": 1}\n'
    lines.close()


def test_segments_at_a_url_are_put_as_they_fill(tmp_path):
    lines = storage.Lines(f"file://{tmp_path}/x.jsonl")
    for i in range(2 * ROWS_PER_SEGMENT + 1):
        lines.write({"i": i})
    assert len(storage.read_lines(f"file://{tmp_path}/x.jsonl")) == 2 * ROWS_PER_SEGMENT
    lines.close()
    assert len(storage.read_lines(f"file://{tmp_path}/x.jsonl")) == 2 * ROWS_PER_SEGMENT + 1


def test_a_log_at_a_url_stays_few_objects(monkeypatch):
    """However long it grows and wherever its writer is killed, each line is read once, and in order."""
    monkeypatch.setattr(lines_module, "ROWS_PER_SEGMENT", 1)
    monkeypatch.setattr(lines_module, "GATHERED", 4)
    url = f"memory://logs/{secrets.token_hex(4)}"
    deleted, delete = [], storage.Files.delete_many

    def killed_before_it_deletes(self, keys):
        deleted.extend(keys)
        if len(deleted) != 8:
            delete(self, deleted[-4:])

    monkeypatch.setattr(storage.Files, "delete_many", killed_before_it_deletes)
    log = storage.Lines(url)
    for i in range(18):
        log.write({"i": i})
        assert [row["i"] for row in storage.read_lines(url)] == [*range(i + 1)]
    assert len(storage.Files(url).keys("")) == 4 + 2 + 4  # the objects of four, the rest, and what was not deleted
    monkeypatch.setattr(storage.Files, "delete_many", delete)
    with storage.Lines(url) as other:  # its numbers are between those of the first
        other.write({"i": 18})
        log.write({"i": 19})
    assert [row["i"] for row in storage.read_lines(url)] == [*range(20)]
    storage.write_lines(url, [{"i": "all"}])
    assert storage.Files(url).keys("") == ["00000020-whole.jsonl"]
    log.write({"i": "after"})
    assert [row["i"] for row in storage.read_lines(url)] == ["all", "after"]


def test_a_reader_looks_again_for_segments_that_were_replaced_meanwhile(monkeypatch):
    url = f"memory://logs/{secrets.token_hex(4)}"
    storage.write_lines(url, [{"i": 0}])
    keys = storage.Files.keys

    def then_replaced(self, prefix):
        found = keys(self, prefix)
        if storage.Files(url).read("00000000-whole.jsonl") is not None:
            monkeypatch.setattr(storage.Files, "keys", keys)
            storage.write_lines(url, [{"i": 0}, {"i": 1}])
        return found

    monkeypatch.setattr(storage.Files, "keys", then_replaced)
    assert [row["i"] for row in storage.read_lines(url)] == [0, 1]


def test_lines_are_not_put_where_another_writes(monkeypatch):
    def check():
        raise storage.LostError("another has it")

    url = f"memory://logs/{secrets.token_hex(4)}"
    log = storage.Lines(url, check)
    log.write({"i": 0})
    with pytest.raises(storage.LostError):
        log.close()
    assert storage.read_lines(url) == []


def test_torn_and_bad_lines_are_said(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"i": 0}\nnonsense\n[1]\n\xff\n\n{"i": 5}\n{"i": ')
    assert [row["i"] for row in storage.read_lines(path)] == [0, 5]
    said = capsys.readouterr().err
    assert all(f"x.jsonl, line {number}: not a JSON object" in said for number in (2, 3, 4))
    assert "x.jsonl: the last line was cut off" in said
    with storage.Lines(path) as lines:  # what follows must not be glued to it
        lines.write({"i": 6})
    assert "the last line was cut off" in capsys.readouterr().err
    assert [row["i"] for row in storage.read_lines(path)] == [0, 5, 6]


def test_a_last_line_that_lacks_its_end_alone_is_kept(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"i": 0}))
    with storage.Lines(path) as lines:
        lines.write({"i": 1})
    assert [row["i"] for row in storage.read_lines(path)] == [0, 1]
    assert not capsys.readouterr().err
