"""Chunks of a set at a URL are read from there once for any number of epochs, and what is kept stays below a limit."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax.activations import cache
from sae_jax.activations.cache import GIB, ChunkCache
from sae_jax.activations.loader import Loader
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.storage import Files
from sae_jax.types import UsageError, UserError

N, D, BATCH = 4096, 16, 256
SET_BYTES = N * D * 2


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Where chunks are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sae_jax" / "chunks"


@pytest.fixture
def url(request) -> str:
    url = f"memory://cache/{request.node.name}"
    sae_jax.write_activations(url, np.random.default_rng(0).standard_normal((N, D)), dtype="bfloat16")
    return url


@pytest.fixture
def requests(monkeypatch) -> list[tuple[str, int]]:
    """(object, offset) of each range that is asked for at a URL."""
    asked, original = [], Files.read_into

    def read_into(self, key, offset, out):
        asked.append((key, offset))
        original(self, key, offset, out)

    monkeypatch.setattr(Files, "read_into", read_into)
    return asked


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != cache.LOCK)


def epochs(activations: ActivationSet, n: int) -> list[np.ndarray]:
    with Loader(activations, ("acts",), BATCH, seed=0) as loader:
        return [loader.batch(step)["acts"] for step in range(n * N // BATCH)]


def test_three_epochs_ask_for_each_chunk_once(home, url, requests):
    plain = epochs(open_activations(url), 3)
    n_without = len(requests)
    requests.clear()
    activations = open_activations(url, cache_gib=1)
    np.testing.assert_array_equal(epochs(activations, 3), plain)
    assert len(requests) == len(set(requests)) == activations.n_chunks < n_without
    np.testing.assert_array_equal(epochs(open_activations(url, cache_gib=1), 1), plain[: N // BATCH])
    assert len(requests) == activations.n_chunks  # nor does another run
    assert kept_bytes(home) == SET_BYTES


def test_threads_that_want_one_chunk_ask_once(home, url, requests, monkeypatch):
    """As they do where two groups of rows meet in a chunk."""
    answered = Files.read_into

    def slowly(self, *args):
        time.sleep(0.05)
        answered(self, *args)

    monkeypatch.setattr(Files, "read_into", slowly)
    activations = open_activations(url, cache_gib=1)
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(lambda _: activations.read_chunk("acts", 0), range(4)))
    assert len(requests) == 1
    np.testing.assert_array_equal(rows, [rows[0]] * 4)


def test_a_full_cache_serves_what_it_holds(home, url, requests):
    """Half of the set fits: half is asked for anew in each epoch, and the limit holds."""
    activations = open_activations(url, cache_gib=SET_BYTES / 2 / GIB)
    half = activations.n_chunks // 2
    for epoch in range(3):
        for chunk in np.random.default_rng(epoch).permutation(activations.n_chunks):
            activations.read_chunk("acts", int(chunk))
    assert len(requests) == activations.n_chunks + 2 * half
    assert kept_bytes(home) == SET_BYTES // 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]])
def test_a_damaged_file_is_replaced(home, url, requests, damage):
    expected = open_activations(url).read_chunk("acts", 0)
    activations = open_activations(url, cache_gib=1)
    activations.read_chunk("acts", 0)
    (path,) = (path for path in home.iterdir() if path.name != cache.LOCK)
    path.write_bytes(damage(path.read_bytes()))
    requests.clear()
    for _ in range(2):
        np.testing.assert_array_equal(activations.read_chunk("acts", 0), expected)
    assert len(requests) == 1
    assert kept_bytes(home) == expected.nbytes


def test_a_set_written_anew_is_not_mistaken_for_the_old_one(home, url):
    open_activations(url, cache_gib=1).read_chunk("acts", 0)
    spec = open_activations(url).spec
    writer = sae_jax.activations.store.create(url, spec)
    rows = np.ones((spec.shard_rows, D), np.float32)
    for shard in range(spec.n_shards):
        writer.write_shard(shard, {"acts": rows})
    assert (open_activations(url, cache_gib=1).read_chunk("acts", 0) == 1).all()


def test_a_set_on_a_disk_is_not_copied(home, tmp_path):
    sae_jax.write_activations(tmp_path / "set", np.ones((64, 4)))
    open_activations(tmp_path / "set", cache_gib=1).read_chunk("acts", 0)
    assert kept_bytes(home) == 0


def test_what_nobody_has_read_for_a_day_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "LOOK_SECONDS", 0)
    kept, rows = ChunkCache(tmp_path, 100), np.arange(40, dtype=np.uint8)
    for name in "abc":
        kept.keep(name, rows)  # the third finds no room
    assert [kept.read_into(name, np.empty(40, np.uint8)) for name in "abc"] == [True, True, False]
    os.utime(kept._path("a"), (0, 0))
    kept.keep("c", rows)
    assert [kept.read_into(name, np.empty(40, np.uint8)) for name in "abc"] == [False, True, True]
    (tmp_path / ".x.0123456789abcdef.tmp").write_bytes(b"of a process that was killed")
    assert ChunkCache(tmp_path, 50).read_into("c", np.empty(40, np.uint8))  # a lower limit: the oldest goes
    assert kept_bytes(tmp_path) == 40


@settings(max_examples=20)
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30), n_threads=st.integers(1, 4))
def test_the_limit_holds_for_all_that_share_the_folder(tmp_path_factory, sizes, n_threads):
    folder = tmp_path_factory.mktemp("shared")

    def work(part: int) -> None:
        kept = ChunkCache(folder, 200)  # one a process, in a run
        for i in range(part, len(sizes), n_threads):
            kept.keep(str(i), np.zeros(sizes[i], np.uint8))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kept_bytes(folder) <= 200
    if sum(sizes) <= 200:
        assert kept_bytes(folder) == sum(sizes)


@pytest.mark.parametrize("gib", [-1, float("nan"), float("inf")])
def test_a_size_that_is_none_is_refused(url, gib):
    with pytest.raises(UsageError, match="cache_gib="):
        open_activations(url, cache_gib=gib)


def test_a_folder_that_cannot_be_used_is_refused(home, url):
    home.parent.mkdir(parents=True)
    home.write_text("a file")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        open_activations(url, cache_gib=1)


def test_a_full_disk_is_told_once_and_ends_nothing(home, url, monkeypatch, capsys):
    activations = open_activations(url, cache_gib=1)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for chunk in range(activations.n_chunks):
        assert len(activations.read_chunk("acts", chunk))
    assert capsys.readouterr().err.count("No space left") == 1
    assert kept_bytes(home) == 0
