"""The batch of a step is a function of set, seed and step; every sequence comes once an epoch."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest

from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.activations import sequences as sequences_file
from sae_jax.activations.sequences import SequenceRows, Sequences, model_at
from sae_jax.activations.spec import SetSpec, SourceSpec
from sae_jax.activations.store import ActivationSet, create, open_activations
from sae_jax.types import Sites, UsageError, UserError

CONTEXT, COUNTS = 4, (5, 0, 3)  # sequences of each shard
SITES = Sites.one("resid_post.1")


@pytest.fixture(scope="module")
def text_set(tmp_path_factory: pytest.TempPathFactory) -> ActivationSet:
    """Activations of the bundled model on random ids, of which those divisible by 5 are left out."""
    model = lm.load("bundled")
    source = SourceSpec("resid_post.1", model.spec.d_model, "float32", "bundled", model.digest, "resid_post.1")
    spec = SetSpec((source,), len(COUNTS), 20, 4, tokenizer="bundled", context=CONTEXT, sequences_per_shard=5)
    path = tmp_path_factory.mktemp("sequences") / "set"
    writer, first = create(path, spec), 0
    all_ids = np.random.default_rng(0).integers(1, model.spec.n_vocab, (sum(COUNTS), CONTEXT)).astype(np.int32)
    out = jax.jit(partial(lm.run, capture=[(1, "resid_post")], logits=False))(model, all_ids)
    for shard, n in enumerate(COUNTS):
        ids, acts = all_ids[first : first + n], np.asarray(out.acts[1, "resid_post"])[first : first + n]
        seq, pos = np.nonzero(ids % 5)
        index = {"token": ids[seq, pos], "seq": seq + 5 * shard, "pos": pos}
        writer.write_shard(shard, {source.name: acts[seq, pos]}, index, ids)
        first += n
    return open_activations(path)


def make(activations: ActivationSet, n: int = 3, seed: int = 0, process: int = 0, processes: int = 1) -> Sequences:
    return Sequences(activations, n * CONTEXT, seed, processes, (process, processes))


def test_every_sequence_once_an_epoch_in_an_order_of_its_own(text_set: ActivationSet) -> None:
    sequences = make(text_set)
    stream = np.concatenate([sequences.row_ids(step) for step in range(16)]).reshape(6, 8)
    there = [0, 1, 2, 3, 4, 10, 11, 12]
    assert all(sorted(epoch) == there for epoch in stream.tolist())
    assert len(np.unique(stream, axis=0)) == 6
    assert not np.array_equal(stream[0], np.concatenate([make(text_set, 8, seed=1).row_ids(0)]))


def test_the_parts_of_processes_are_the_batch_of_one(text_set: ActivationSet) -> None:
    whole = make(text_set, 6)
    for step in (0, 7):
        parts = [make(text_set, 6, process=p, processes=3).batch(step) for p in range(3)]
        for name, rows in whole.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)


def test_a_batch_says_which_positions_have_a_row(text_set: ActivationSet) -> None:
    sequences = make(text_set)
    for step, batch in islice(sequences.batches(2), 3):
        ids = text_set.read_sequences(sequences.row_ids(step))
        np.testing.assert_array_equal(batch["ids"], ids)
        np.testing.assert_array_equal(batch["keep"], ids % 5 != 0)


def test_rows_on_the_devices_are_those_of_the_set(text_set: ActivationSet) -> None:
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:2])
    with jax.set_mesh(mesh):
        sequences = SequenceRows(text_set, later=True).open(SITES, 8 * CONTEXT, 0, mesh)
        batch = sequences.place(sequences.batch(0), mesh)  # pyrefly: ignore (sequences)
        assert jax.typeof(batch.x).sharding.spec[0] == meshes.ROWS[0]
    rows = np.concatenate([text_set.read_chunk("resid_post.1", c) for c in range(text_set.n_chunks)])
    kept = np.asarray(batch.x)[np.asarray(batch.model.keep).ravel()]
    assert len(kept) == len(rows)
    ordered = [a[np.lexsort(a.T[:2].round(3))] for a in (kept, rows)]
    np.testing.assert_allclose(*ordered, rtol=1e-3, atol=1e-3)
    assert len(batch.model.later) == lm.load("bundled").spec.n_layers - 2


def test_what_cannot_be_run_is_refused(text_set: ActivationSet, small_set: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no text: .*harvest"):
        Sequences(open_activations(small_set), 8, 0, 1)
    with pytest.raises(UsageError, match=r"train.batch_size=30 .* 4 tokens, .* 2 devices; use 32"):
        Sequences(text_set, 30, 0, 2)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with pytest.raises(UsageError, match=r"acts of .* names no language model"):
        model_at(open_activations(small_set), "acts", mesh, later=False)
    model = lm.load("bundled")
    last = f"resid_post.{model.spec.n_layers - 1}"
    for digest, error, message in ((model.digest, UsageError, f"after {last}"), ("other", UserError, "harvest again")):
        source = SourceSpec("a", model.spec.d_model, "float32", "bundled", digest, last)
        writer = create(tmp_path / digest, SetSpec((source,), 1, 4, 4))
        writer.write_shard(0, {"a": np.ones((4, model.spec.d_model))})
        with pytest.raises(error, match=message):
            model_at(open_activations(tmp_path / digest), "a", mesh, later=True)


def test_a_model_that_no_device_has_room_for_is_refused(text_set: ActivationSet, monkeypatch) -> None:
    """Before it is read."""
    monkeypatch.setattr(sequences_file, "_device_bytes", lambda mesh: 2**20)
    monkeypatch.setattr(lm, "load", None)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    with pytest.raises(
        UsageError,
        match=r"^the parameters of bundled take 4.09 MiB in float32, and a device has 1 MiB: [^\n]*precision=bfloat16$",
    ):
        SequenceRows(text_set, later=False).open(SITES, CONTEXT, 0, mesh)


def test_ids_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    """A set may hold tokens of another tokenizer than that of the model it names."""
    model = lm.load("bundled")
    source = SourceSpec("resid_post.1", 4, "float32", "bundled", model.digest, "resid_post.1")
    spec = SetSpec((source,), 1, 12, 4, context=CONTEXT, sequences_per_shard=3)
    ids = np.full((3, CONTEXT), 2048, np.int32)
    seq, pos = np.indices(ids.shape).reshape(2, -1)
    writer = create(tmp_path / "set", spec)
    writer.write_shard(0, {source.name: np.ones((12, 4))}, {"token": ids[seq, pos], "seq": seq, "pos": pos}, ids)
    mesh = meshes.make_mesh(meshes.MeshConfig(), jax.devices()[:1])
    activations = open_activations(tmp_path / "set")
    with (
        SequenceRows(activations, later=False).open(SITES, CONTEXT, 0, mesh) as batches,
        pytest.raises(UserError, match="token id 2048 is outside 0 to 2047; the embedding has 2048 rows"),
    ):
        next(batches.batches())
