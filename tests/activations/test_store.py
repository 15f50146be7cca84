"""The store gives back what it was given, survives interruption, and refuses what is damaged, by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae_jax import lm
from sae_jax.activations.ingest import write_activations
from sae_jax.activations.spec import SetSpec, SourceSpec, layout
from sae_jax.activations.store import ActivationSet, create, open_activations
from sae_jax.activations.verify import verify
from sae_jax.types import UsageError, UserError

TEXT_SPEC = SetSpec(
    (SourceSpec("resid.0", 6), SourceSpec("resid.1", 3, "float32")),
    n_shards=3,
    shard_rows=40,
    chunk_rows=8,
    context=5,
    sequences_per_shard=8,
)
SHARD_N_ROWS = (37, 0, 40)


def shard_content(shard: int) -> tuple[dict, dict, np.ndarray]:
    """Sources, index and sequences of a shard of TEXT_SPEC, some positions masked."""
    random = np.random.default_rng(shard)
    sequences = random.integers(0, 100, (8, 5), np.int32)
    seq, pos = np.divmod(np.sort(random.permutation(40)[: SHARD_N_ROWS[shard]]), 5)
    sources = {source.name: random.standard_normal((len(seq), source.d), np.float32) for source in TEXT_SPEC.sources}
    return sources, {"token": sequences[seq, pos], "seq": seq + shard * 8, "pos": pos}, sequences


def write_text_set(path: Path | str, shards: tuple[int, ...] = (0, 1, 2)) -> Path | str:
    writer = create(path, TEXT_SPEC)
    for shard in shards:
        writer.write_shard(shard, *shard_content(shard))
    if len(shards) == TEXT_SPEC.n_shards:
        writer.finish()
    return path


def all_rows(activations: ActivationSet, source: str) -> np.ndarray:
    return np.concatenate([activations.read_chunk(source, i) for i in range(activations.n_chunks)])


def in_order(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    return rows[np.lexsort(rows.T)]


def tree(path: Path) -> dict[str, str]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_round_trip_with_text(tmp_path: Path) -> None:
    activations = open_activations(write_text_set(tmp_path / "set"))
    assert activations.sources == ("resid.0", "resid.1")
    assert activations.n_rows == sum(SHARD_N_ROWS)
    assert activations.chunk_n_rows.tolist() == [8, 8, 8, 8, 5] + [8] * 5
    given_rows = {
        (int(seq), int(pos)): (sources["resid.0"][row], sources["resid.1"][row])
        for sources, index, _ in map(shard_content, range(3))
        for row, (seq, pos) in enumerate(zip(index["seq"], index["pos"], strict=True))
    }
    moved = 0
    for chunk in range(activations.n_chunks):
        index = activations.read_index(chunk)
        sequences = activations.read_sequences(index["seq"])
        np.testing.assert_array_equal(sequences[np.arange(len(sequences)), index["pos"]], index["token"])
        first, second = activations.read_chunk("resid.0", chunk), activations.read_chunk("resid.1", chunk)
        assert first.dtype == ml_dtypes.bfloat16
        assert second.dtype == np.float32
        for row, key in enumerate(zip(index["seq"].tolist(), index["pos"].tolist(), strict=True)):
            want = given_rows.pop(key)
            np.testing.assert_array_equal(first[row], want[0].astype(ml_dtypes.bfloat16))
            np.testing.assert_array_equal(second[row], want[1])
        moved += (np.diff(index["seq"] * 5 + index["pos"]) < 0).sum()
    assert not given_rows
    assert moved > 10, "rows are shuffled in their shard"


def test_any_zarr_reader_sees_the_same_rows(tmp_path: Path) -> None:
    activations = open_activations(write_text_set(tmp_path / "set"))
    array = ts.open({"driver": "zarr3", "kvstore": f"file://{tmp_path}/set/acts/resid.0/"}).result()
    assert array.shape == (120, 6)
    np.testing.assert_array_equal(array[80:88].read().result(), activations.read_chunk("resid.0", 5))


def test_urls_go_through_the_same_format(tmp_path: Path) -> None:
    write_text_set(tmp_path / "local")
    write_text_set(f"file://{tmp_path}/url")
    assert tree(tmp_path / "local") == tree(tmp_path / "url")
    local, url = open_activations(tmp_path / "local"), open_activations(f"file://{tmp_path}/url")
    for source in local.sources:
        np.testing.assert_array_equal(all_rows(local, source), all_rows(url, source))
    np.testing.assert_array_equal(local.read_sequences([0, 23]), url.read_sequences([0, 23]))
    (tmp_path / "url/acts/resid.0/c/0/0").unlink()
    with pytest.raises(UserError, match=f"file://{tmp_path}/url/acts/resid.0/c/0/0 is missing"):
        all_rows(url, "resid.0")


def test_statistics_equal_numpy(tmp_path: Path) -> None:
    activations = open_activations(write_text_set(tmp_path / "set"))
    for source in activations.sources:
        rows, stats = all_rows(activations, source).astype(np.float64), activations.stats(source)
        assert stats.count == len(rows)
        np.testing.assert_allclose(stats.mean, rows.mean(axis=0), rtol=1e-13, atol=1e-15)
        np.testing.assert_allclose(stats.m2, ((rows - rows.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-12)
        stored = json.loads((tmp_path / "set/stats.json").read_text())[source]
        assert stored["mean"] == stats.mean.tolist(), "stats.json is the same reduction, to the bit"


def test_shards_in_any_order_by_any_host_give_the_same_bytes(tmp_path: Path) -> None:
    write_text_set(tmp_path / "a")
    create(tmp_path / "b", TEXT_SPEC).write_shard(2, *shard_content(2))
    other_host = create(tmp_path / "b", TEXT_SPEC)
    assert other_host.committed() == {2}
    for shard in (1, 2, 0):
        other_host.write_shard(shard, *shard_content(shard))
    (tmp_path / "b/commits/1.owner.0.json").write_text("{}")  # of a process that was killed after its commit
    other_host.finish()
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_create_refuses_another_spec(tmp_path: Path) -> None:
    create(tmp_path / "set", TEXT_SPEC)
    before = tree(tmp_path / "set")
    with pytest.raises(UsageError, match="seed is 0, not 7"):
        create(tmp_path / "set", replace(TEXT_SPEC, seed=7))
    other = (TEXT_SPEC.sources[0], replace(TEXT_SPEC.sources[1], dtype="float16"))
    with pytest.raises(UsageError, match=r"dtype of source 'resid.1' is 'float32', not 'float16'"):
        create(tmp_path / "set", replace(TEXT_SPEC, sources=other))
    assert tree(tmp_path / "set") == before


def test_partial_set(tmp_path: Path) -> None:
    write_text_set(tmp_path / "set", shards=(2,))
    with pytest.raises(UserError, match=r"1 of 3 shards are committed; finish .* or pass --allow-partial"):
        open_activations(tmp_path / "set")
    activations = open_activations(tmp_path / "set", allow_partial=True)
    assert activations.n_rows == activations.stats("resid.0").count == 40
    assert verify(tmp_path / "set").damage == ()
    with pytest.raises(UsageError, match="no sequence 3"):
        activations.read_sequences([3])


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not an activation set: it has no dataset\.json"):
        open_activations(tmp_path)
    activations = open_activations(write_text_set(tmp_path / "set"))
    with pytest.raises(UsageError, match=r"no source 'resid.2'; it has resid.0, resid.1"):
        activations.read_chunk("resid.2", 0)
    no_text = write_activations(tmp_path / "no_text", np.ones((20, 2), np.float32))
    with pytest.raises(UsageError, match="has no text"):
        no_text.read_index(0)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def double(file: Path) -> None:
    file.write_bytes(file.read_bytes() * 2)


def replacing(old: str, new: str) -> Callable[[Path], None]:
    return lambda file: file.write_text(file.read_text().replace(old, new)) and None


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("acts/resid.1/c/2/0", Path.unlink, "acts/resid.1/c/2/0 is missing"),
        ("acts/resid.0/c/0/0", cut, "acts/resid.0/c/0/0 does not have the size"),
        ("acts/resid.0/c/0/0", double, "acts/resid.0/c/0/0 does not have the size"),
        ("acts/resid.0/c/0/0", lambda file: file.write_bytes(b""), "acts/resid.0/c/0/0 does not have the size"),
        ("index/seq/c/0", Path.unlink, "index/seq/c/0 is missing"),
        ("sequences/c/2/0", Path.unlink, "sequences/c/2/0 is missing"),
        ("commits/1.json", Path.unlink, "2 of 3 shards are committed"),
        ("commits/0.json", cut, "commits/0.json: .*it is damaged"),
        ("commits/0.json", lambda file: file.write_text(""), "commits/0.json: .*it is damaged"),
        ("commits/0.json", lambda file: file.write_text("[" * 100_000), "commits/0.json: .*it is damaged"),
        ("commits/2.json", lambda file: file.write_text('{"shard": 2}'), "commits/2.json: .*it is damaged"),
        ("commits/2.json", lambda file: file.write_text("[]"), "commits/2.json: .*it is damaged"),
        (
            "commits/2.json",
            lambda file: file.rename(file.with_name("7.json")),
            "7.json: the set has 3 shards; .*damaged",
        ),
        ("commits/1.json", replacing('"m2": [', '"m2": [1'), "commits/1.json: .* its digest differs"),
        ("commits/1.json", replacing('"sum": [', '"sum": [1'), "commits/1.json: .* its digest differs"),
        ("dataset.json", cut, "dataset.json cannot be used"),
        ("dataset.json", replacing("40", "48"), "does not match its sha256"),
        ("dataset.json", replacing('format": 3', 'format": 1'), "format 1, this version reads format 3;"),
        ("dataset.json", Path.unlink, "writing was cut off"),
    ],
)
def test_damage_refused_at_open(tmp_path: Path, name: str, damage: Callable, message: str) -> None:
    write_text_set(tmp_path / "set")
    damage(tmp_path / "set" / name)
    before = tree(tmp_path / "set")
    with pytest.raises(UserError, match=message) as caught:
        open_activations(tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "set") == before


def test_a_shard_has_bytes_that_can_be_counted() -> None:
    with pytest.raises(UsageError, match=r"acts/a has 4,611,686,018,427,387,920 bytes; .* lower shard_rows"):
        SetSpec((SourceSpec("a", 1 << 20, "float32"),), 1, 1 << 40, 1 << 40)


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("array", ["acts/resid.0/c/2/0", "index/token/c/2", "sequences/c/2/0"])
def test_flipped_byte_refused_when_read(tmp_path: Path, array: str, offset: int) -> None:
    write_text_set(tmp_path / "set")
    assert verify(tmp_path / "set").damage == ()
    flip(tmp_path / "set" / array, offset)
    before = tree(tmp_path / "set")
    activations = open_activations(tmp_path / "set")

    def read_all() -> None:
        all_rows(activations, "resid.0")
        activations.read_sequences([16])
        for chunk in range(activations.n_chunks):
            activations.read_index(chunk)

    with pytest.raises(UserError, match=f"{array}: chunk . is not what was written"):
        read_all()
    report = verify(tmp_path / "set")
    assert len(report.damage) == 1
    assert array in report.damage[0]
    assert tree(tmp_path / "set") == before


def test_verify_lists_all_damage_and_a_rewritten_shard_is_whole(tmp_path: Path) -> None:
    write_text_set(tmp_path / "set")
    good = tree(tmp_path / "set")
    flip(tmp_path / "set/acts/resid.0/c/0/0", 3)
    (tmp_path / "set/acts/resid.1/c/2/0").unlink()
    (tmp_path / "set/commits/1.json").write_text("{")
    seen = []
    report = verify(tmp_path / "set", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2, 2)
    for name in ("acts/resid.0/c/0/0", "acts/resid.1/c/2/0", "commits/1.json"):
        assert any(name in line for line in report.damage)
    write_text_set(tmp_path / "set")
    assert tree(tmp_path / "set") == good


def test_other_content_replaces_a_shard(tmp_path: Path) -> None:
    spec = SetSpec((SourceSpec("a", 2, "float32"),), n_shards=1, shard_rows=8, chunk_rows=4)
    writer = create(tmp_path / "set", spec)
    writer.write_shard(0, {"a": np.zeros((8, 2))})
    writer.write_shard(0, {"a": np.ones((3, 2))})
    np.testing.assert_array_equal(all_rows(open_activations(tmp_path / "set"), "a"), np.ones((3, 2)))


KILLED = """
import sys, numpy as np
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import create
writer = create(sys.argv[1], SetSpec((SourceSpec("a", 64),), n_shards=1000, shard_rows=512, chunk_rows=64))
for shard in range(1000):
    writer.write_shard(shard, {"a": np.full((512, 64), shard)})
    print(shard, flush=True)
"""


def test_killed_writer_leaves_whole_shards(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "set"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    process.kill()
    process.communicate()
    activations = open_activations(tmp_path / "set", allow_partial=True)
    assert len(activations.commits) >= 5
    rows = all_rows(activations, "a").astype(np.float32)
    np.testing.assert_array_equal(rows[:, 0], np.repeat(sorted(activations.commits), 512))
    assert verify(tmp_path / "set").damage == ()


FULL_DISK = """
import resource, sys, numpy as np
from sae_jax.activations.ingest import write_activations
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_activations(sys.argv[1], np.ones((4096, 64), np.float32))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_failed_write_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, tmp_path / "set"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith("UserError cannot write shard 0 of")
    assert printed.count("\n") == 1
    with pytest.raises(UserError, match="not an activation set"):
        open_activations(tmp_path / "set")


def test_wrong_shards_refused(tmp_path: Path) -> None:
    writer = create(tmp_path / "set", TEXT_SPEC)
    sources, index, sequences = shard_content(0)
    with pytest.raises(UsageError, match="shard 3 is not in a set of 3 shards"):
        writer.write_shard(3, sources, index, sequences)
    with pytest.raises(UsageError, match="a shard of this set is"):
        writer.write_shard(0, sources)
    with pytest.raises(UsageError, match=r"acts/resid.0 is \[37, 5\]; it must be \[37, 6\]"):
        writer.write_shard(0, sources | {"resid.0": sources["resid.0"][:, :5]}, index, sequences)
    with pytest.raises(UsageError, match=r"acts/resid.1 is \[30, 3\]; it must be \[37, 3\]"):
        writer.write_shard(0, sources | {"resid.1": sources["resid.1"][:30]}, index, sequences)
    with pytest.raises(UsageError, match="disagree on a token"):
        writer.write_shard(0, sources, index | {"pos": np.roll(index["pos"], 1)}, sequences)
    bad = sources["resid.1"].copy()
    bad[11, 2] = np.inf
    with pytest.raises(UserError, match=r"row 11 \(shard 0\) of source resid.1 is not finite"):
        writer.write_shard(0, sources | {"resid.1": bad}, index, sequences)
    assert writer.committed() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_rows": 41}, "not a multiple of chunk_rows"),
        ({"n_shards": 0}, "n_shards=0"),
        ({"seed": -1}, "seed=-1"),
        ({"context": None}, "both context and sequences_per_shard"),
        ({"sequences_per_shard": 9}, "do not fit in shard_rows=40; use at most 8"),
        ({"sources": ()}, "at least one source"),
        ({"sources": TEXT_SPEC.sources[:1] * 2}, "source names must differ"),
    ],
)
def test_wrong_specs_refused(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        replace(TEXT_SPEC, **change)


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "../../etc"])
def test_source_names_are_folder_names(name: str) -> None:
    with pytest.raises(UsageError, match="is not a folder name"):
        SourceSpec(name, 4)


@given(
    n_rows=st.integers(1, 10**12),
    row_bytes=st.lists(st.integers(2, 2**16), min_size=1, max_size=4),
    unit_rows=st.sampled_from([1, 7, 64, 1024]),
)
def test_layout_holds_all_rows(n_rows: int, row_bytes: list[int], unit_rows: int) -> None:
    n_shards, shard_rows, chunk_rows = layout(n_rows, row_bytes, unit_rows)
    assert shard_rows % chunk_rows == 0
    assert n_shards * (shard_rows // unit_rows) * unit_rows >= n_rows
    assert chunk_rows * max(row_bytes) <= 4 << 20
    assert shard_rows * max(row_bytes) <= (260 << 20) + unit_rows * max(row_bytes)
    if n_rows >= 256 * unit_rows:
        assert n_shards * shard_rows // chunk_rows >= 128
        assert n_shards >= 4


quick = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(
    n_rows=st.integers(1, 700),
    d=st.integers(1, 9),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    cuts=st.lists(st.integers(0, 700), max_size=5),
    stream=st.booleans(),
)
def test_any_array_comes_back(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, d: int, dtype: str, cuts: list[int], stream: bool
) -> None:
    rows = np.random.default_rng(n_rows).standard_normal((n_rows, d), np.float32)
    blocks = np.split(rows, sorted(min(cut, n_rows) for cut in cuts))
    path = tmp_path_factory.mktemp("any") / "set"
    activations = write_activations(path, iter(blocks) if stream else rows, dtype=dtype)
    stored = all_rows(activations, "acts")
    assert stored.dtype.name == dtype
    np.testing.assert_array_equal(in_order(stored), in_order(rows.astype(stored.dtype)))


def test_streams_longer_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_jax.activations.ingest.BUFFER_BYTES", 1000)
    monkeypatch.setattr("sae_jax.activations.spec.SHARD_BYTES", 4096)
    rows = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    same_memory = np.empty((10, 3), np.float32)

    def stream():
        for low in range(0, 1000, 10):
            same_memory[:] = rows[low : low + 10]
            yield same_memory

    activations = write_activations(tmp_path / "set", stream(), dtype="float32")
    assert activations.spec.n_shards == 3
    np.testing.assert_array_equal(in_order(all_rows(activations, "acts")), rows)
    assert verify(tmp_path / "set").damage == ()


def test_several_sources_with_tokens_from_jax_and_numpy(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 60, 16, 4), np.float32)
    tokens = random.integers(0, 50, (60, 16))
    given_rows = {"first": jnp.asarray(first, jnp.bfloat16), "second": second}
    activations = write_activations(tmp_path / "set", given_rows, tokens=tokens, dtype="float32", tokenizer="t")
    assert activations.spec.tokenizer == "t"
    for chunk in (0, activations.n_chunks - 1):
        index = activations.read_index(chunk)
        seq, pos = index["seq"], index["pos"]
        np.testing.assert_array_equal(index["token"], tokens[seq, pos])
        np.testing.assert_array_equal(activations.read_sequences(seq), tokens[seq])
        np.testing.assert_array_equal(activations.read_chunk("second", chunk), second[seq, pos])
        want = first.astype(ml_dtypes.bfloat16).astype(np.float32)[seq, pos]
        np.testing.assert_array_equal(activations.read_chunk("first", chunk), want)


def test_small_sets_have_many_chunks(tmp_path: Path) -> None:
    activations = write_activations(tmp_path / "set", np.ones((40_000, 8), np.float32))
    assert activations.n_chunks >= 128
    assert activations.spec.n_shards >= 4


def test_rows_that_cannot_be_written(tmp_path: Path) -> None:
    rows = np.zeros((500, 4), np.float32)
    rows[321, 1] = np.nan
    with pytest.raises(UserError, match=r"row 321 \(shard 2\) of source acts is not finite in bfloat16"):
        write_activations(tmp_path / "nan", rows)
    with pytest.raises(UserError, match=r"row 3 .* is not finite in float16; leave such rows out"):
        write_activations(
            tmp_path / "overflow", np.full((500, 4), 1e5) * (np.arange(500) == 3)[:, None], dtype="float16"
        )
    with pytest.raises(UsageError, match="block 1 has source widths"):
        write_activations(tmp_path / "widths", iter([np.zeros((5, 4)), np.zeros((5, 3))]))
    with pytest.raises(UsageError, match="all sources need the same rows"):
        write_activations(tmp_path / "lengths", {"a": np.zeros((5, 4)), "b": np.zeros((6, 4))})
    blocks = (np.zeros((2, 3, 4)) for _ in range(2))
    with pytest.raises(UsageError, match="tokens end before block 1"):
        write_activations(tmp_path / "tokens", blocks, tokens=iter([np.zeros((2, 3), int)]))
    texts = np.zeros((2, 3, 4))
    for tokens in (np.zeros((2, 3)), np.full((2, 3), -1), np.full((2, 3), 2**31), np.zeros((2, 3), bool)):
        with pytest.raises(UsageError, match=r"must be integers in \[0, 2\^31\)"):
            write_activations(tmp_path / "tokens", texts, tokens=tokens)
    for tokens in (np.zeros((3, 3), int), 5):
        with pytest.raises(UsageError, match=r"rows \[n, context, d\] need \(2, 3\)"):
            write_activations(tmp_path / "tokens", texts, tokens=tokens)
    with pytest.raises(UsageError, match="name no source"):
        write_activations(tmp_path / "none", {})
    for none in (None, 5, {"a": [[1.0]]}):
        with pytest.raises(UsageError, match="give arrays, a dict of arrays, or an iterator"):
            write_activations(tmp_path / "none", none)
    for shape in ((), (5,)):
        with pytest.raises(UsageError, match=r"rows are \[\.\.\., d\]"):
            write_activations(tmp_path / "shape", np.zeros(shape))
    for dtype in (np.complex64, "M8[s]", "U4", object, int, bool, np.uint8):
        with pytest.raises(UsageError, match="give real numbers"):
            write_activations(tmp_path / "kind", np.zeros((5, 4)).astype(dtype))
    assert not list(tmp_path.glob("[tnsk]*/dataset.json"))
    with pytest.raises(UsageError, match="there are no rows"):
        write_activations(tmp_path / "none", iter([]))
    with pytest.raises(UsageError, match="dtype='int4'"):
        write_activations(tmp_path / "dtype", rows, dtype="int4")


def test_existing_and_cut_off_sets_are_not_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_activations(tmp_path / "set", np.ones((9, 2)))
    before = tree(tmp_path / "set")
    with pytest.raises(UsageError, match="is an activation set already"):
        write_activations(tmp_path / "set", np.zeros((9, 2)))
    assert tree(tmp_path / "set") == before

    monkeypatch.setattr("sae_jax.activations.ingest.BUFFER_BYTES", 1000)
    monkeypatch.setattr("sae_jax.activations.spec.SHARD_BYTES", 4096)

    def broken():
        for _ in range(500):
            yield np.ones((10, 3))
        raise RuntimeError("the source of rows failed")

    with pytest.raises(RuntimeError, match="failed"):
        write_activations(tmp_path / "cut", broken())
    with pytest.raises(UserError, match="its writing was cut off"):
        open_activations(tmp_path / "cut")
    with pytest.raises(UserError, match="delete it first"):
        write_activations(tmp_path / "cut", np.ones((9, 2)))


def test_what_is_under_a_mask_is_not_stored(tmp_path: Path) -> None:
    rows, tokens = np.ma.masked_array(np.ones((10, 4))), np.ma.masked_array(np.ones((2, 5), int))
    rows[3, 2] = tokens[0, 0] = np.ma.masked
    for arrays in ({"rows": rows}, {"rows": iter([rows])}, {"rows": np.ones((2, 5, 4)), "tokens": tokens}):
        with pytest.raises(UsageError, match="are a masked array; leave out the masked rows"):
            write_activations(tmp_path / "set", **arrays)
    assert not (tmp_path / "set" / "dataset.json").exists()


@pytest.mark.parametrize(
    "rows", [iter([[[1.0], [1.0, 2.0]]]), np.array([{}])[:, None], iter([["a"]])], ids=["ragged", "objects", "text"]
)
def test_what_is_no_array_of_numbers_is_one_line(tmp_path: Path, rows) -> None:
    with pytest.raises(UsageError) as caught:
        write_activations(tmp_path / "set", rows)
    assert "\n" not in str(caught.value)


def test_tokens_fit_the_tokenizer_and_the_model_that_are_named(tmp_path: Path) -> None:
    """Else another token's row would be read for them."""
    rows, tokens = np.ones((8, 32, 128)), np.full((8, 32), 2047)
    activations = write_activations(
        tmp_path / "set", rows, tokens=tokens, tokenizer="bundled", model="bundled", hook="resid_post.0"
    )
    assert activations.spec.sources[0].model_digest == lm.load("bundled").digest
    tokens[5, 3] = 2048
    for name in ("tokenizer", "model"):
        with pytest.raises(UserError, match=f"token id 2048 is outside 0 to 2047; the {name} bundled has 2048 ids"):
            write_activations(tmp_path / name, rows, tokens=tokens, **{name: "bundled"})
        assert not (tmp_path / name / "dataset.json").exists()
    with pytest.raises(UserError, match="tokens have 200 positions, and the model 128"):
        write_activations(tmp_path / "long", np.ones((8, 200, 4)), tokens=np.ones((8, 200), int), model="bundled")


def test_rows_are_of_a_hook_that_the_model_has(tmp_path: Path) -> None:
    for hook, d, said in (("resid_post.99", 128, "does not exist"), ("mlp_act.0", 128, "are 128 wide, and .* 512")):
        with pytest.raises(UsageError, match=said):
            write_activations(tmp_path / "set", np.ones((8, d)), model="bundled", hook=hook)
    assert not (tmp_path / "set" / "dataset.json").exists()


@pytest.mark.parametrize("config", [{"model_type": "opt"}, {"model_type": "llama", "hidden_act": "swiglu"}])
def test_rows_may_be_of_a_model_that_is_not_supported(tmp_path: Path, capsys, config: dict) -> None:
    """The message that refuses it names write_activations as a way out."""
    (tmp_path / "lm").mkdir()
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = dict.fromkeys((*sizes, "max_position_embeddings"), 8)
    (tmp_path / "lm" / "config.json").write_text(json.dumps(sizes | config))
    model, hook = str(tmp_path / "lm"), "model.decoder.layers.1"
    with pytest.raises(UserError, match=r"write them with sae_jax\.write_activations"):
        lm.read_spec(model)
    activations = write_activations(
        tmp_path / "set", np.ones((8, 4, 3)), tokens=np.ones((8, 4), int), model=model, hook=hook
    )
    (source,) = activations.spec.sources
    assert (source.model, source.model_digest, source.hook) == (model, None, hook)
    assert "is not supported: it is recorded, but" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "lm" / "config.json").write_text("{")
    with pytest.raises(UserError, match="config"):
        write_activations(tmp_path / "other", np.ones((8, 3)), model=model)


def test_rows_that_end_before_their_tokens_are_refused(tmp_path: Path) -> None:
    blocks, tokens = iter([np.ones((8, 4, 2))]), iter([np.ones((8, 4), int)] * 2)
    with pytest.raises(UsageError, match="rows end before the tokens"):
        write_activations(tmp_path / "set", blocks, tokens=tokens)
    assert not (tmp_path / "set" / "dataset.json").exists()


def test_a_seed_is_a_whole_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"seed=1\.5 must be a whole number"):
        write_activations(tmp_path / "set", np.ones((8, 2)), seed=1.5)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
    assert write_activations(tmp_path / "set", np.ones((8, 2)), seed=np.int64(3)).spec.seed == 3


def test_a_set_is_found_by_the_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system goes it: after a link, `..` is the folder above the one that it leads to."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    monkeypatch.chdir(tmp_path / "a" / "b")
    write_activations("../set", np.ones((8, 2)))
    for path in (tmp_path / "a" / "set", "../../a/set", tmp_path / "link" / ".." / "set"):
        assert open_activations(path).n_rows == 8
    with pytest.raises(UserError, match=r"~nobody-here/set: there is no such user; write \./~nobody-here/set"):
        open_activations("~nobody-here/set")


def test_a_file_is_no_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for call in (open_activations, verify, lambda path: write_activations(path, np.ones((8, 2)))):
        with pytest.raises(UserError, match="file is a file; give a folder"):
            call(tmp_path / "file")


def test_chunks_and_sequences_that_are_not_there_are_refused(tmp_path: Path) -> None:
    """Nor is a number cut to a whole one."""
    activations = write_activations(tmp_path / "set", np.ones((8, 4, 2)), tokens=np.ones((8, 4), int))
    for chunk in (activations.n_chunks, -1):
        for read in (lambda chunk: activations.read_chunk("acts", chunk), activations.read_index):
            with pytest.raises(UsageError, match=rf"has no chunk {chunk}; there are 0 to {activations.n_chunks - 1}"):
                read(chunk)
    for number in (8, -1):
        with pytest.raises(UsageError, match=f"has no sequence {number}"):
            activations.read_sequences([number])
    with pytest.raises(UsageError, match="are float64; give whole numbers"):
        activations.read_sequences(np.array([1.7]))


def test_references_of_rows_are_good_from_any_folder(tmp_path: Path, tuned: Path, monkeypatch) -> None:
    monkeypatch.chdir(tuned.parent)
    activations = write_activations(tmp_path / "set", np.ones((9, 2)), model=f"./{tuned.name}", text="./lm/config.json")
    assert activations.spec.sources[0].model == str(tuned)
    assert activations.spec.text == str(tuned / "config.json")
