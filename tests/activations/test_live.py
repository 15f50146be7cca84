"""Live rows are those of a stored set, in an order that depends on seed and step alone, within a budget."""

from __future__ import annotations

import errno
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import sae_jax
from sae_jax import mesh as meshes
from sae_jax.activations import segments as segments_file
from sae_jax.activations import shares
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.live import OWNERS, LiveBatches, LiveConfig, LiveRows, ModelShards
from sae_jax.activations.segments import (
    AT_WORK,
    BESIDE_BYTES,
    GIB,
    IN_MEMORY,
    ON_DISK,
    Cut,
    Segments,
    ShardMaker,
    cut,
    shard_rows,
)
from sae_jax.activations.source import Batches
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.storage import absolute
from sae_jax.types import Sites, UsageError, UserError
from tests import runs

SITES, HOOK = Sites.one("acts"), "resid_post.1"
SETTINGS = {"n_latents": 64, "k": 4, "dtype": "float32", "batch_size": 64, "lr": 1e-2, "dead_after_tokens": 1000}
SETTINGS |= {"log_every": 1, "decay": 0.0, "site": HOOK}
STEPS = 90  # more than an epoch


class Numbered(ShardMaker):
    """Shards of given numbers of rows, of which each holds its own number and stands in a place of its own."""

    def __init__(self, counts: list[int], room: int = 8, d: int = 2) -> None:
        self.spec = SetSpec((SourceSpec("acts", d, "float32"),), len(counts), room, room)
        self.counts, self.made = counts, []

    def fill(self, shard: int, out: dict[str, np.ndarray], on_rows: Callable[[int], None]) -> np.ndarray:
        on_rows(len(out["acts"]))
        self.made.append(shard)
        first, n = sum(self.counts[:shard]), self.counts[shard]
        places = np.arange(len(out["acts"]))[::-1][:n]
        out["acts"][:] = np.nan
        out["acts"][places] = np.arange(first, first + n)[:, None]
        return places


class OfSet(ShardMaker):
    """The shards of a set that is stored."""

    def __init__(self, activations: ActivationSet) -> None:
        self.set, self.spec = activations, activations.spec

    def fill(self, shard: int, out: dict[str, np.ndarray], on_rows: Callable[[int], None]) -> np.ndarray:
        end = 0
        for chunk in np.flatnonzero(self.set.chunk_shard == shard):
            start, end = end, end + int(self.set.chunk_n_rows[chunk])
            for name, rows in out.items():
                rows[start:end] = self.set.read_chunk(name, int(chunk))
        return np.arange(end)


def gib(maker: ShardMaker, shards: int) -> float:
    """The memory that has room for segments of so many shards."""
    shard_bytes = shard_rows(maker.spec) * sum(s.d * 4 if s.dtype == "float32" else s.d * 2 for s in maker.spec.sources)
    return (IN_MEMORY * shards + AT_WORK) * shard_bytes / GIB


def batches(maker: ShardMaker, batch_size: int, seed: int = 0, shards: int = 1, folder: Path | None = None) -> Batches:
    source = LiveRows(maker, LiveConfig(memory_gib=gib(maker, shards)), folder=folder)
    return source.open(SITES, batch_size, seed, meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1]))


def numbers(of: Batches, steps: range) -> np.ndarray:
    """The numbers that the rows of batches hold, laid end to end."""
    with closing(of.batches(steps.start)) as stream:
        return np.concatenate([rows["acts"][:, 0].astype(int) for _, rows in islice(stream, len(steps))])


counts = st.lists(st.integers(0, 8), min_size=1, max_size=7).filter(any)


@hypothesis.given(counts, st.integers(1, 30), st.integers(1, 7), st.integers(0, 3), st.data())
@hypothesis.settings(max_examples=60)
def test_every_row_once_an_epoch_from_any_step(counts, batch_size, shards, seed, data) -> None:
    n, n_epochs = sum(counts), 3
    n_steps = -(-n_epochs * n // batch_size)
    stream = numbers(batches(Numbered(counts), batch_size, seed, shards), range(n_steps))
    for epoch in range(n_epochs):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    start = data.draw(st.integers(0, n_steps - 1))
    resumed = numbers(batches(Numbered(counts), batch_size, seed, shards), range(start, n_steps))
    np.testing.assert_array_equal(resumed, stream[start * batch_size :])


def test_segments_follow_the_text_and_are_shuffled_anew() -> None:
    maker = Numbered([8] * 6)
    stream = numbers(batches(maker, 16, shards=2), range(6)).reshape(2, 3, 16)
    for epoch in stream:
        for segment, rows in enumerate(epoch):
            assert sorted(rows) == list(range(16 * segment, 16 * segment + 16))
    assert not np.array_equal(stream[0], stream[1])
    assert not np.array_equal(stream[0], numbers(batches(Numbered([8] * 6), 16, seed=1, shards=2), range(3)))


def test_row_ids_are_those_of_a_set() -> None:
    maker = Numbered([3, 0, 8, 5])
    shard = np.repeat(np.arange(4), maker.counts)
    ids = shard * 8 + np.concatenate([np.arange(n) for n in maker.counts])
    with batches(maker, 5, shards=2) as of:
        for step, rows in islice(of.batches(), 9):
            np.testing.assert_array_equal(of.row_ids(step), ids[rows["acts"][:, 0].astype(int)])


def as_process(process: int, n: int, counts: list[int], batch_size: int, seed: int, shards: int) -> Batches:
    """Batches of one of n processes, of segments of so many shards. The others say what they would."""
    of = Cut(len(counts), min(shards, len(counts)), IN_MEMORY, False, process, n)

    def said(what: str, value, process: int, n_processes: int, poll) -> list:
        if not what.partition("/")[2].startswith("segment-"):
            return [value] * n
        segment = int(what.rpartition("-")[2])
        cuts = (Cut(len(counts), of.per_segment, IN_MEMORY, False, p, n) for p in range(n))
        return [[(shard, counts[shard]) for shard in each.mine(segment)] for each in cuts]

    def segments() -> Segments:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(segments_file, "exchange", said)
            made = Segments(Numbered(counts), of, "these", None)
        made._exchange = lambda what, value: said(f"0/{what}", value, process, n, None)
        return made

    return LiveBatches(segments, Numbered(counts).spec, SITES, batch_size, seed)


@hypothesis.given(counts, st.integers(2, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 3))
@hypothesis.settings(max_examples=25)
def test_processes_have_the_rows_of_one_between_them(counts, n, per_process, shards, seed) -> None:
    batch_size = n * per_process
    steps = range(-(-2 * sum(counts) // batch_size))
    all_of_one = numbers(as_process(0, 1, counts, batch_size, seed, shards), steps).reshape(-1, batch_size)
    whole = as_process(0, 1, counts, batch_size, seed, shards)
    parts = [as_process(p, n, counts, batch_size, seed, shards) for p in range(n)]
    for step, expected in zip(steps, all_of_one, strict=True):
        of_each = [part.batch(step) for part in parts]
        assert len({len(rows["acts"]) for rows in of_each}) == 1
        owners = of_each[0][OWNERS]
        found = [of_each[p]["acts"][rank, 0] for p, rank in zip(owners, shares.ranks(owners), strict=True)]
        np.testing.assert_array_equal(found, expected)
        ids = np.concatenate([part.row_ids(step) for part in parts])
        np.testing.assert_array_equal(ids, whole.row_ids(step))
    for each in (whole, *parts):
        each.close()


def test_processes_that_would_make_other_rows_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(segments_file, "exchange", lambda what, value, *rest: [["those", []], value])
    with pytest.raises(UserError, match=r"process 1 would make rows of another set than process 0: its model, text"):
        Segments(Numbered([8] * 4), Cut(4, 2, IN_MEMORY, False, 1, 2), "these", None)


def test_a_segment_that_the_first_process_did_not_note_is_made_again(tmp_path: Path, monkeypatch) -> None:
    """Both may be killed between the notes of one and of the other."""

    def said(what: str, value, *rest) -> list:
        return [["these", []] if "begun" in what else [(2 * int(what[-1]), 8)], value]

    monkeypatch.setattr(segments_file, "exchange", said)
    for _ in range(2):
        maker = Numbered([8] * 4)
        with closing(Segments(maker, Cut(4, 2, ON_DISK, True, 1, 2), "these", tmp_path)) as segments:
            assert segments.use(0, 0)["acts"][:, 0].tolist() == list(range(8, 16))
            assert segments.n_rows(0, 0) == 16
        assert maker.made[:1] == [1]


def test_what_fits_is_made_once() -> None:
    one, two, three = (Numbered([8] * 6) for _ in range(3))
    for maker, shards in ((one, 6), (two, 3), (three, 2)):
        numbers(batches(maker, 16, shards=shards), range(9))
    assert one.made == [0, 1, 2, 3, 4, 5]
    assert two.made == [0, 1, 2, 3, 4, 5]
    assert len(three.made) >= 18


def test_a_resumed_run_makes_what_it_needs_alone(tmp_path: Path) -> None:
    counts = [8, 3, 0, 8, 8, 8, 8, 2]
    whole = numbers(batches(Numbered(counts), 5, folder=tmp_path), range(20))
    maker = Numbered(counts)
    assert np.array_equal(numbers(batches(maker, 5, folder=tmp_path), range(6, 7)), whole[30:35])
    assert set(maker.made) <= {4, 5, 6}
    other = Numbered([*counts[:-1], 1])  # as where a filter is at the mercy of rounding
    with pytest.raises(UserError, match=r"segment 7 has 1 rows here and had 2 when it was made first"):
        numbers(batches(other, 5, folder=tmp_path), range(8, 9))
    (tmp_path / "live" / "segments.json").unlink()
    again = Numbered(counts)
    assert np.array_equal(numbers(batches(again, 5, folder=tmp_path), range(6, 7)), whole[30:35])
    assert again.made[:4] == [0, 1, 2, 3]


def test_the_budget_sets_the_size_of_segments() -> None:
    spec = Numbered([8] * 12).spec
    of_shard = 8 * 2 * 4 / GIB
    assert cut(spec, 13 * of_shard, 0) == Cut(12, 4, IN_MEMORY, False)  # five would fit; three segments of four will do
    assert cut(spec, 4 * of_shard, 0).per_segment == 1
    beside = BESIDE_BYTES / GIB
    on_disk = cut(spec, 1, beside + 9.6 * of_shard)  # the first shard has an index of its chunks, too
    assert on_disk == Cut(12, 2, ON_DISK, True)
    with pytest.raises(
        UsageError, match=r"live.memory_gib=\S+ has no room for 2 segments of one shard, 64 bytes each; "
    ):
        cut(spec, 3.9 * of_shard, 0)
    with pytest.raises(
        UsageError, match=r"live.disk_gib=\S+ has no room for 4 segments of one shard.*; use 0.00391 or"
    ):
        cut(spec, 1, beside + 4 * of_shard)


def test_a_segment_on_the_disk_stays_until_a_checkpoint_has_passed_it(tmp_path: Path) -> None:
    maker, of = Numbered([8] * 8), Cut(8, 1, ON_DISK, True)
    with closing(Segments(maker, of, "these", tmp_path)) as segments:
        for segment in range(4):
            assert segments.use(segment, segment)["acts"][0, 0] == 8 * segment
        assert segments.awaited == 2  # the batch of the second step may begin in 0
    assert maker.made == [0, 1, 2, 3]
    # As where the process was killed, while it wrote: all four are there.
    (tmp_path / f".segments.json.{'0' * 16}.tmp").touch()
    again = Numbered([8] * 8)
    with closing(Segments(again, of, "these", tmp_path)) as segments:
        segments.use(1, 1)
        assert segments.use(2, 2)["acts"][:, 0].tolist() == list(range(16, 24))
        assert again.made == []
        segments.use(3, 3)  # nobody has asked for 0, which makes way for 4
        assert segments.awaited is None
        assert segments.use(4, 4)["acts"][0, 0] == 32
        segments.saved(2)
        assert segments.awaited == 3  # 1 was needed for three steps
        segments.saved(3)
        assert segments.awaited is None
        assert segments.use(5, 5)["acts"][0, 0] == 40
        assert again.made == [4, 5]
    n_bytes = sum(path.stat().st_size for path in tmp_path.glob("slot-*"))
    assert n_bytes == ON_DISK * 8 * 2 * 4
    (slot,) = [path for path in tmp_path.glob("slot-*") if 16 in np.fromfile(path, np.float32)]
    slot.write_bytes(bytes(slot.stat().st_size))
    damaged = Numbered([8] * 8)
    with closing(Segments(damaged, of, "these", tmp_path)) as segments:
        assert segments.use(2, 2)["acts"][:, 0].tolist() == list(range(16, 24))
        assert damaged.made[0] == 2
        segments.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["segments.json"]


def test_memory_stays_within_the_budget() -> None:
    """Of arrays; 1 % more for the order of rows."""
    maker = Numbered([1000, 600, 1000, 1000, 0, 900, 1000, 1000], room=1000, d=1024)
    for shards in (1, 2):
        budget = gib(maker, shards) * GIB
        tracemalloc.start()
        numbers(batches(maker, 64, shards=shards), range(250))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert IN_MEMORY * shards * 1000 * 4096 < peak < 1.01 * budget


def test_waiting_for_a_segment_is_waiting_for_input() -> None:
    class Slow(Numbered):
        def fill(self, shard, out, on_rows):
            time.sleep(0.1)
            return super().fill(shard, out, on_rows)

    of = batches(Slow([8] * 6), 8)
    numbers(of, range(6))
    assert 0.5 < of.wait_seconds < 2


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    """Not by the end of the process, as where a row is put into a file that the disk has no room for."""

    def full(descriptor, start, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    maker = Numbered([8] * 8)
    with (
        closing(Segments(maker, Cut(8, 1, ON_DISK, True), "these", tmp_path)) as segments,
        pytest.raises(OSError, match=r"No space left on device: .*slot-0-acts.rows"),
    ):
        segments.use(0, 0)
    assert maker.made == []


def test_no_thread_is_left() -> None:
    before = threading.active_count()
    with batches(Numbered([8] * 6), 4) as of:
        next(of.batches())
    assert threading.active_count() == before


def test_rows_that_are_not_finite_are_refused() -> None:
    class Bad(Numbered):
        def fill(self, shard, out, on_rows):
            places = super().fill(shard, out, on_rows)
            out["acts"][places[1]] = np.inf
            return places

    with pytest.raises(UserError, match=r"row 1 \(shard 0\) of source acts is not finite in float32"):
        numbers(batches(Bad([8]), 4), range(1))
    with pytest.raises(UserError, match=r"the text leaves no rows"):
        numbers(batches(Numbered([0, 0]), 4), range(1))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    lines = (f"def name_{i}(self):\n    return self.value[{i}] + {i % 7} * self.other_{i % 11}\n" for i in range(260))
    path.write_text("".join(lines))
    return path


def config(text: Path, **changes) -> HarvestConfig:
    settings = {"text": str(text), "context": 16, "batch_tokens": 512, "hooks": (HOOK,), "max_norm_multiple": 1.5}
    return HarvestConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def stored(one_device, text: Path, tmp_path_factory: pytest.TempPathFactory) -> ActivationSet:
    path = tmp_path_factory.mktemp("stored") / "set"
    harvest(config(text), str(path))
    return open_activations(path)


@pytest.fixture(autouse=True)
def _as_users_have_it() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):  # optax
        yield


def test_rows_are_those_of_the_set_in_the_same_order(stored: ActivationSet, text: Path) -> None:
    live, of_set = ModelShards(config(text)), OfSet(stored)
    assert live.spec.sha256 == stored.spec.sha256
    assert stored.spec.n_shards == 4
    sites, mesh = Sites.one(HOOK), meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    both = [LiveRows(maker, LiveConfig(gib(maker, 1))).open(sites, 300, 3, mesh) for maker in (live, of_set)]
    with both[0], both[1]:
        for a, b in islice(zip(*(each.batches() for each in both), strict=True), 2 * stored.n_rows // 300):
            assert a[1][HOOK].tobytes() == b[1][HOOK].tobytes()
            np.testing.assert_array_equal(both[0].row_ids(a[0]), both[1].row_ids(b[0]))


@pytest.mark.parametrize("where", ["memory", pytest.param("disk", marks=pytest.mark.long)])
def test_a_live_run_has_the_bits_of_one_on_the_set(stored: ActivationSet, text: Path, tmp_path: Path, where) -> None:
    maker = ModelShards(config(text))
    of_one = LiveConfig(gib(maker, 1))
    settings = {**SETTINGS, "steps": STEPS, "checkpoint_every": 20}
    sae_jax.train(LiveRows(OfSet(stored), of_one), out=tmp_path / "stored", **settings)
    of_shard = int(gib(maker, 1) * GIB) // 4
    live = of_one if where == "memory" else LiveConfig(disk_gib=(BESIDE_BYTES + 6.5 * of_shard) / GIB)
    d = sae_jax.train(LiveRows(maker, live), out=tmp_path / "live", **settings)
    runs.assert_same_run(tmp_path / "live", tmp_path / "stored")
    assert d.record.data is not None
    assert d.record.data.path == str(absolute(tmp_path / "live" / "set"))
    assert d.record.encodes[0].hook == HOOK
    assert [path.name for path in (tmp_path / "live" / "live").iterdir()] == ["segments.json"]
    assert open_activations(d.record.data.path, allow_partial=True).commits.keys() == {0}


def test_from_python(text: Path, tmp_path: Path) -> None:
    rows = sae_jax.live(settings=config(text), memory_gib=1)
    assert rows.sources == (HOOK,)
    a = sae_jax.train(rows, steps=4, **SETTINGS)
    b = sae_jax.train(rows, steps=4, **SETTINGS)
    assert np.array_equal(a.w_enc, b.w_enc)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_gib": 1e-9}, r"live.memory_gib=1e-09 has no room for 2 segments of one shard"),
        ({"memory_gib": -1}, r"live.memory_gib=-1.0 must be a finite number, 0 or more"),
        ({"devices": -1}, r"live.devices=-1 must be 0 or more"),
        ({"devices": 64}, r"live.devices=64 leaves none of \d+ devices"),
        ({"disk_gib": 1}, r"live.disk_gib=1 needs the folder of a run; give out="),
        ({"hook": "resid_post.1"}, r"live: unknown key 'hook'; did you mean hooks"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(text: Path, changes, message) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        sae_jax.train(sae_jax.live(settings=config(text), **changes), steps=2, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_devices_of_its_own_need_one_process(text: Path, monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UsageError, match=r"live.devices=1 needs one process, and this job has 2; leave it out"):
        LiveRows(Numbered([8]), LiveConfig(devices=1))


def test_the_budgets_of_processes_add_up() -> None:
    spec, of_shard = Numbered([8] * 13).spec, 8 * 2 * 4 / GIB
    one, *of_three = (cut(spec, memory * of_shard, 0, p, n) for memory, p, n in ((14, 0, 1), (6, 0, 3), (6, 2, 3)))
    assert one.per_segment == 5
    assert [each.per_segment for each in of_three] == [5, 5]
    assert [list(of_three[1].mine(segment)) for segment in range(3)] == [[2], [5, 8], [11]]
    assert of_three[1].slot_shards == 2


def test_a_sweep_needs_a_set(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="live data of bundled: a sweep reads the same rows in pass after pass; store"):
        sae_jax.sweep(sae_jax.live(settings=config(text)), out=tmp_path / "s", grid={"k": [4, 8]}, **SETTINGS)
    assert not (tmp_path / "s").exists()


def test_other_variants_say_what_they_need(text: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "k"}
    with pytest.raises(
        UsageError, match=r"live data of bundled holds? rows alone, but this variant is trained through"
    ):
        sae_jax.train(sae_jax.live(settings=config(text)), variant="end_to_end", steps=2, **settings)
