"""The batch of a step is a function of set, seed and step; every row comes once an epoch; damage surfaces."""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.activations.loader import MAX_LEASES, Loader
from sae_jax.activations.order import RowOrder
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import ActivationSet, create, open_activations
from sae_jax.types import UsageError, UserError

RAGGED = (61, 0, 37, 64)


def write_set(path: Path, shard_n_rows: tuple[int, ...], chunk_rows: int = 4) -> ActivationSet:
    """Rows hold their own row id, in source "b" negated, so that content can be compared with row_ids."""
    shard_rows = -(-max(shard_n_rows) // chunk_rows) * chunk_rows
    sources = (SourceSpec("a", 3, "float32"), SourceSpec("b", 1, "float32"), SourceSpec("c", 2))
    writer = create(path, SetSpec(sources, len(shard_n_rows), shard_rows, chunk_rows))
    for shard, n_rows in enumerate(shard_n_rows):
        # The store shuffles a shard; two writes tell where it put each row.
        rows = {"a": np.zeros((n_rows, 3)), "b": np.arange(n_rows)[:, None], "c": np.ones((n_rows, 2))}
        writer.write_shard(shard, rows)
    plain = open_activations(path)
    for shard, n_rows in enumerate(shard_n_rows):
        chunks = np.flatnonzero(plain.chunk_shard == shard)
        order = [plain.read_chunk("b", int(chunk))[:, 0] for chunk in chunks]
        ids = np.zeros(n_rows)
        ids[np.concatenate([[], *order]).astype(int)] = shard * shard_rows + np.arange(n_rows)
        rows = {"a": np.repeat(ids[:, None], 3, axis=1), "b": -ids[:, None], "c": np.ones((n_rows, 2))}
        writer.write_shard(shard, rows)
    return open_activations(path)


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> ActivationSet:
    return write_set(tmp_path_factory.mktemp("loader") / "ragged", RAGGED)


def ids_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    np.testing.assert_array_equal(batch["a"][:, 0], -batch["b"][:, 0])
    return batch["a"][:, 0].astype(np.int64)


@given(
    chunk_n_rows=st.lists(st.integers(1, 9), min_size=1, max_size=300),
    batch_size=st.integers(1, 80).map(lambda n: n * 8),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=40)
def test_every_row_once_an_epoch_for_any_process_count(chunk_n_rows: list[int], batch_size: int, seed: int) -> None:
    order = RowOrder(np.array(chunk_n_rows), 1 << 20, batch_size, seed)
    starts = np.cumsum(chunk_n_rows) - chunk_n_rows

    def rows(step: int, process: int, processes: int) -> np.ndarray:
        parts, end = [], 0
        for run in order.runs(step, process, processes):
            group = order.group(run.group)
            assert group.first_step <= step <= group.last_step
            assert run.target == end
            end += run.high - run.low
            ranges = zip(starts[group.chunks] + group.first_row, group.n_rows, strict=True)
            linear = np.concatenate([np.arange(start, start + n) for start, n in ranges])
            parts.append(linear[order.permutation(run.group)][run.low : run.high])
        return np.concatenate(parts)

    n_steps = -(-2 * order.n_rows // batch_size)
    seen = np.zeros(order.n_rows, int)
    for step in range(n_steps):
        batch = rows(step, 0, 1)
        assert len(batch) == batch_size
        np.add.at(seen, batch, 1)
        epochs = (step + 1) * batch_size // order.n_rows
        assert epochs <= seen.min()
        assert seen.max() <= epochs + 1
    for processes in (2, 4, 8):
        step = min(n_steps - 1, 3)
        shares = [rows(step, process, processes) for process in range(processes)]
        np.testing.assert_array_equal(np.concatenate(shares), rows(step, 0, 1))


@pytest.mark.parametrize("batch_size", [8, 24, 64])
def test_processes_together_read_the_global_batch(ragged: ActivationSet, batch_size: int) -> None:
    n_steps = 2 * ragged.n_rows // batch_size + 2
    with Loader(ragged, ("a", "b"), batch_size, seed=3) as loader:
        batches = [ids_of(loader.batch(step)) for step in range(n_steps)]
        for step, batch in enumerate(batches):
            np.testing.assert_array_equal(loader.row_ids(step), batch)
    counts = np.unique(np.concatenate(batches), return_counts=True)[1]
    assert len(counts) == ragged.n_rows
    assert set(counts.tolist()) <= {2, 3}
    for processes in (1, 2, 4, 8):
        loaders = [Loader(ragged, ("b", "a"), batch_size, 3, p, processes) for p in range(processes)]
        streams = [loader.batches(1) for loader in loaders]
        for expected in batches[1:]:
            shares = [ids_of(next(stream)[1]) for stream in streams]
            np.testing.assert_array_equal(np.concatenate(shares), expected)
        for loader in loaders:
            loader.close()


def test_resume_at_any_step_and_random_access(ragged: ActivationSet) -> None:
    with Loader(ragged, ("a",), 16, seed=0) as loader:
        stream = [(step, batch["a"].copy()) for step, batch in islice(loader.batches(), 40)]
        assert [step for step, _ in stream] == list(range(40))
        for start in (1, 10, 11, 37):
            step, batch = next(loader.batches(start))
            assert step == start
            np.testing.assert_array_equal(batch["a"], stream[start][1])
        for step in (39, 0, 1, 2, 20, 19, 19):
            np.testing.assert_array_equal(loader.batch(step)["a"], stream[step][1])


def test_order_depends_on_seed_and_epoch_and_not_on_sources(ragged: ActivationSet) -> None:
    n = ragged.n_rows
    order = [Loader(ragged, ("a",), n, seed).row_ids(step) for seed, step in [(0, 0), (0, 1), (1, 0)]]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert (order[first] != order[second]).mean() > 0.9
        np.testing.assert_array_equal(np.sort(order[first]), np.sort(order[second]))
    np.testing.assert_array_equal(Loader(ragged, ("b", "c"), n, 0).row_ids(1), order[1])


def test_rows_of_a_shard_spread_over_the_epoch(tmp_path: Path) -> None:
    activations = write_set(tmp_path / "set", (512,) * 8, chunk_rows=8)
    loader = Loader(activations, ("a",), 256, seed=0)
    for step in range(activations.n_rows // 256):
        counts = np.bincount(loader.row_ids(step) // 512, minlength=8)
        assert counts.max() < 128, "no shard dominates a batch"


@pytest.mark.parametrize(("rows", "batch_size"), [((1,), 8), ((5,), 64), ((3, 2), 8)])
def test_tiny_sets_and_batches_over_many_epochs(tmp_path: Path, rows: tuple[int, ...], batch_size: int) -> None:
    activations = write_set(tmp_path / "set", rows)
    with Loader(activations, ("a", "b"), batch_size, seed=0) as loader:
        for step, batch in islice(loader.batches(), 5):
            np.testing.assert_array_equal(ids_of(batch), loader.row_ids(step))


def test_batches_kept_by_the_consumer_never_change(ragged: ActivationSet) -> None:
    n = 4 * MAX_LEASES
    with Loader(ragged, ("a",), 32, seed=0) as loader:
        kept = [batch["a"] for _, batch in islice(loader.batches(), n)]
        views = [batch["a"][3:5].view(np.uint8) for _, batch in islice(loader.batches(), n)]
        for _ in islice(loader.batches(), 50):
            pass
        for step in range(n):
            expected = loader.batch(step)["a"]
            np.testing.assert_array_equal(kept[step], expected)
            np.testing.assert_array_equal(views[step], expected[3:5].view(np.uint8))


def test_bfloat16_batches(ragged: ActivationSet) -> None:
    with Loader(ragged, ("c",), 8, seed=0) as loader:
        _, batch = next(loader.batches())
    assert batch["c"].dtype.name == "bfloat16"
    np.testing.assert_array_equal(batch["c"].astype(np.float32), np.ones((8, 2)))


def test_damage_surfaces_in_the_consumer(tmp_path: Path) -> None:
    activations = write_set(tmp_path / "set", (64, 64))
    file = tmp_path / "set/acts/a/c/1/0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with Loader(activations, ("a",), 16, seed=0) as loader:
        with pytest.raises(UserError, match=r"acts/a/c/1/0: chunk 2 is not what was written"):
            list(islice(loader.batches(), 9))
        with pytest.raises(UserError, match="is not what was written"):
            list(map(loader.batch, range(9)))
        with pytest.raises(UserError, match="is not what was written"):
            list(map(loader.batch, range(8, -1, -1)))
    file.unlink()
    with Loader(activations, ("a",), 16, seed=0) as loader, pytest.raises(UserError, match="acts/a/c/1/0"):
        list(islice(loader.batches(), 9))


def test_threads_end(ragged: ActivationSet) -> None:
    before = threading.active_count()
    with Loader(ragged, ("a",), 16, seed=0) as loader:
        stream = loader.batches()
        next(stream)
        next(loader.batches(5))  # dropped at once
        loader.batch(3)
        time.sleep(0.05)
        assert loader.wait_seconds > 0
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(stream)


def test_wrong_arguments(ragged: ActivationSet) -> None:
    with pytest.raises(UsageError, match="no source 'd'; it has a, b, c"):
        Loader(ragged, ("a", "d"), 8, 0)
    with pytest.raises(UsageError, match="batch_size=9 does not divide over 2 processes"):
        Loader(ragged, ("a",), 9, 0, 0, 2)
    with pytest.raises(UsageError, match="no source to read"):
        Loader(ragged, (), 8, 0)
    with pytest.raises(UsageError, match="seed=-1"):
        Loader(ragged, ("a",), 8, -1)
    with pytest.raises(UsageError, match="process_index=2"):
        Loader(ragged, ("a",), 8, 0, 2, 2)
