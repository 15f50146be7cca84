"""Paths at URLs are those of pathlib; an S3 that is slow, fails or has races is used as a disk is."""

import concurrent.futures
import os

import pytest

from sae_jax import storage
from sae_jax.storage import Url


@pytest.mark.parametrize("url", ["s3://b/a/c", "gs://b/a/c/", "file:///t/a/c", "memory://a/c"])
def test_parts_of_a_url(url):
    path = storage.path(url)
    assert isinstance(path, Url)
    assert os.fspath(path) == str(path) == url.rstrip("/")
    assert path.name == "c"
    assert path == path.parent / "c" == path.with_name("c") == Url(f"{url}//")
    assert str(path / "d/e") == f"{url.rstrip('/')}/d/e"
    assert (path / "d").parent == path
    assert sorted([path / "b", path / "a"]) == [path / "a", path / "b"]


def test_a_path_stays_one(tmp_path):
    assert storage.path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("kind", ["path", "file", "s3"])
def test_what_is_below(request, tmp_path, kind):
    root = {"path": lambda: tmp_path, "file": lambda: Url(f"file://{tmp_path}")}.get(
        kind, lambda: Url(request.getfixturevalue("bucket"))
    )()
    assert not root.joinpath("x").exists() if kind == "path" else not (root / "x").exists()
    names = ["passes/0/members/a/checkpoints/4/x", "passes/1/members/b/checkpoints/4/x", "passes/2/owner", "pass"]
    for name in names:
        storage.write_bytes(root / name, b"1")

    def found(pattern):
        return sorted(str(each).removeprefix(f"{root}/") for each in root.glob(pattern))

    assert found("*") == ["pass", "passes"]
    assert found("passes/*/members/*/checkpoints") == [name.rpartition("/4")[0] for name in names[:2]]
    assert found("passes/*/owner") == ["passes/2/owner"]
    assert found("pass*/2/own*") == ["passes/2/owner"]
    assert found("none/*") == []
    assert sorted(each.name for each in root.iterdir()) == ["pass", "passes"]
    kinds = {"pass": (True, True, False), "passes": (True, False, True), "passe": (False, False, False)}
    for name, expected in kinds.items():
        assert ((root / name).exists(), (root / name).is_file(), (root / name).is_dir()) == expected
    (root / "pass").unlink()
    assert not (root / "pass").exists()
    assert (root / "passes").exists()


def test_requests_that_fail_are_made_again_and_all_may_be_slow(bucket, door):
    door.fails, door.slow = 0.05, 0.01
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: storage.write_bytes(f"{bucket}/{i}", b"%d" % i), range(200)))
        assert list(threads.map(lambda i: storage.read_bytes(f"{bucket}/{i}"), range(200))) == [
            b"%d" % i for i in range(200)
        ]
    assert len(storage.Files(bucket).keys("")) == 200
    assert len(door.requests) > 400


def test_one_of_many_creates_though_answers_are_lost(bucket, door):
    door.fails = 0.2
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for i in range(20):
            made = list(threads.map(lambda j: storage.create(f"{bucket}/{i}", b"%d" % j), range(4)))
            assert made.count(True) == 1, made
            assert storage.read_bytes(f"{bucket}/{i}") == b"%d" % made.index(True)


def test_nothing_is_said_where_there_is_no_file_of_credentials(bucket, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.write_bytes(f"{bucket}/a", b"1")
    assert capfd.readouterr().err == ""
