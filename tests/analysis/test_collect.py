"""The latents of a set's text are those of its rows, each where its token stands; a store holds them on disk."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.store import open_activations
from sae_jax.analysis import collect as module
from sae_jax.analysis import examples, store
from sae_jax.analysis.collect import collect_set
from sae_jax.analysis.store import Store
from sae_jax.saes import init, topk
from sae_jax.types import UsageError, UserError

SOURCE = ("resid_post.1",)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """A part is several blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 64)
        yield


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    (folder / "text.txt").write_text("\n".join(f"value_{i} = compute({i * i})" for i in range(400)))
    config = HarvestConfig(text=str(folder / "text.txt"), context=16, batch_tokens=256, hooks=SOURCE)
    harvest(config, str(folder / "set"))
    return open_activations(folder / "set")


@pytest.fixture(scope="module")
def sae(activations):
    rows = np.float32(activations.read_chunk(SOURCE[0], 0))
    config = topk.Config(n_latents=64, k=4, dtype="float32")
    return config.init(jax.random.key(0), init.sample_statistics(rows, "none"))


@pytest.fixture(scope="module")
def whole(activations, sae, tmp_path_factory):
    """The store of the whole set, made in one go on one device."""
    path = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        collect_set(sae, activations, SOURCE, 10**9, path)
    return path


def contents(path):
    """Every file of the finished store but its record."""
    return {p.relative_to(path): p.read_bytes() for p in (path / "latents").rglob("*") if p.is_file()}


@pytest.mark.parametrize("n_tokens", [10**9, 320])
def test_every_activation_stands_where_its_row_came_from(activations, sae, n_tokens, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BLOCK", 50)  # so that blocks cross chunks
    table = collect_set(sae, activations, SOURCE, n_tokens, tmp_path / "store")
    if n_tokens > activations.n_rows:
        assert table.n_rows == activations.n_rows
    else:
        assert n_tokens * 0.8 < table.n_rows < n_tokens * 1.3
    # Each row's active latents, found by its place, are the row's own code.
    active = {}
    for latent in range(table.n_latents):
        for place, value in zip(*table.of_latent(latent), strict=True):
            active.setdefault(int(place), {})[latent] = value
    whole = {tuple(ids): number for number, ids in enumerate(table.sequences)}
    checked = 0
    for chunk in range(0, activations.n_chunks, 7):
        index = activations.read_index(chunk)
        code = sae.encode(np.float32(activations.read_chunk(SOURCE[0], chunk)))
        ids = activations.read_sequences(index["seq"])
        for i in range(len(ids)):
            number, pos = whole.get(tuple(ids[i])), int(index["pos"][i])
            if number is None:
                continue
            assert table.has_row[number, pos]
            want = {int(f): float(v) for f, v in zip(code.indices[i], code.values[i], strict=True) if v > 0}
            assert active.get(number * table.sequences.shape[1] + pos, {}) == pytest.approx(want, rel=1e-4)
            checked += 1
    assert checked > 20


def test_what_is_read_from_a_store_is_what_memory_holds(activations, sae, whole):
    plan = Store(whole).plan
    blocks, base = [], 0
    for part, n in enumerate(plan.n_sequences):
        for indices, values, place in module._codes(sae, module._rows(activations, plan, part)):
            blocks.append((indices, values, place + base * plan.context))
        base += n
    sequences = np.concatenate([module._sequences(activations, plan, p) for p in range(len(plan.shards))])
    memory, disk = examples.collect(blocks, plan.n_latents, sequences), Store(whole).open()
    for name in ("sequences", "has_row", "offsets"):
        np.testing.assert_array_equal(getattr(memory, name), getattr(disk, name))
    for name in ("places", "values"):
        np.testing.assert_array_equal(getattr(memory, name), getattr(disk, name)[:])
    for latent in (0, 13, 63):
        for mine, theirs in zip(memory.of_latent(latent), disk.of_latent(latent), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for name in ("value", "seq", "pos", "token"):
        np.testing.assert_array_equal(getattr(memory.strongest(5), name), getattr(disk.strongest(5), name))


def test_two_workers_short_runs_and_a_shared_file_of_columns_leave_the_same_bytes(
    activations, sae, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(store, "RUN", 100)
    monkeypatch.setattr(examples, "_SORT_BLOCK", 300)
    assert collect_set(sae, activations, SOURCE, 10**9, tmp_path / "store", (1, 2)) is None
    with pytest.raises(UserError, match=r"2 of 4 parts are missing; run the same sae-jax collect again"):
        Store(tmp_path / "store").open()
    assert len(list(tmp_path.glob("store/parts/00001/run-*"))) > 2
    assert collect_set(sae, activations, SOURCE, 10**9, tmp_path / "store", (0, 2)) is not None
    assert contents(tmp_path / "store") == contents(whole)
    assert not (tmp_path / "store" / "parts").exists()


def test_eight_devices_hold_what_one_does(activations, sae, whole, tmp_path):
    many, one = collect_set(sae, activations, SOURCE, 10**9, tmp_path / "store"), Store(whole).open()
    np.testing.assert_array_equal(many.places[:], one.places[:])
    np.testing.assert_allclose(many.values[:], one.values[:], rtol=1e-5)


def test_a_killed_collection_is_resumed(activations, sae, whole, tmp_path):
    """Killed in its second part; the first is not made again."""
    out = tmp_path / "store"
    program = f"""
import os, pickle, signal
from sae_jax.activations.store import open_activations
from sae_jax.analysis import collect
collect.BLOCK = 64
rows = collect._rows
def dying(activations, plan, part):
    for number, block in enumerate(rows(activations, plan, part)):
        if part == 1 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield block
collect._rows = dying
sae = pickle.loads(open({str(tmp_path / "sae")!r}, "rb").read())
collect.collect_set(sae, open_activations({str(activations.path)!r}), {SOURCE!r}, 10**9, {str(out)!r})
"""
    (tmp_path / "sae").write_bytes(pickle.dumps(jax.tree.map(np.asarray, sae)))
    ended = subprocess.run([sys.executable, "-c", program], env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [p.name for p in sorted((out / "parts").iterdir()) if p.name[0] != "."] == ["00000"]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            module, "_sequences", lambda a, plan, part, read=module._sequences: seen.append(part) or read(a, plan, part)
        )
        collect_set(sae, activations, SOURCE, 10**9, out)
    assert seen == [1, 2, 3]
    assert contents(out) == contents(whole)
    (out / "parts/00002/run-0000").mkdir(parents=True)  # of a removal that was cut off
    collect_set(sae, activations, SOURCE, 10**9, out)
    assert not (out / "parts").exists()
    assert contents(out) == contents(whole)


def test_a_dictionary_that_never_fires_has_an_empty_store(activations, sae, tmp_path):
    silent = dataclasses.replace(sae, b_enc=sae.b_enc - 1e6)
    table = collect_set(silent, activations, SOURCE, 320, tmp_path / "store")
    assert table.n_rows > 200
    assert table.counts.sum() == 0
    assert len(table.top(3, 5).value) == 0
    assert (table.strongest(2).seq == -1).all()


def test_another_dictionary_or_sample_is_refused(activations, sae, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    with pytest.raises(UsageError, match=r"is a store of another n_sequences; use the same settings"):
        collect_set(sae, activations, SOURCE, 320, tmp_path / "store")
    other = dataclasses.replace(sae, b_enc=sae.b_enc + 1)
    with pytest.raises(UsageError, match=r"is a store of another dictionary; use the same settings"):
        collect_set(other, activations, SOURCE, 10**9, tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="exists and is no store of latents"):
        collect_set(sae, activations, SOURCE, 320, tmp_path / "mine")
    with pytest.raises(UserError, match="is no store of latents; make one with sae-jax collect"):
        Store(tmp_path / "mine")


@pytest.mark.parametrize("name", ["places/c/0", "values/c/0", "offsets/c/0", "sequences/c/0/0", "has_row/c/0/0"])
def test_a_flipped_byte_is_refused(whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "store")
    file = tmp_path / "store" / "latents" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{name.partition('/')[0]} is damaged: .*; make the store anew"):
        Store(tmp_path / "store").open().strongest(1)


def test_a_changed_or_foreign_record_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "store")
    record = tmp_path / "store" / "store.json"
    text = record.read_text()
    record.write_text(text.replace('"n_latents": 64', '"n_latents": 65'))
    with pytest.raises(UserError, match="its digest differs"):
        Store(tmp_path / "store")
    record.write_text(text.replace('"version": 2', '"version": 9'))
    with pytest.raises(UserError, match="version 9, and this program reads 2"):
        Store(tmp_path / "store")
    record.write_text("[]")
    with pytest.raises(UserError, match=r"store\.json"):
        Store(tmp_path / "store")
