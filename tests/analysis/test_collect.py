"""The latents of a set's text are those of its rows, each where its token stands."""

import jax
import numpy as np
import pytest

from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.activations.store import open_activations
from sae_jax.analysis import collect as module
from sae_jax.analysis.collect import collect_set
from sae_jax.saes import init, topk


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collect")
    (folder / "text.txt").write_text("\n".join(f"value_{i} = compute({i * i})" for i in range(400)))
    config = HarvestConfig(text=str(folder / "text.txt"), context=16, batch_tokens=256, hooks=("resid_post.1",))
    harvest(config, str(folder / "set"))
    return open_activations(folder / "set")


@pytest.fixture(scope="module")
def sae(activations):
    rows = np.float32(activations.read_chunk("resid_post.1", 0))
    config = topk.Config(n_latents=64, k=4, dtype="float32")
    return config.init(jax.random.key(0), init.sample_statistics(rows, "none"))


@pytest.mark.parametrize("n_tokens", [10**9, 320])
def test_every_activation_stands_where_its_row_came_from(activations, sae, n_tokens, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 50)  # so that blocks cross chunks
    seen = []
    table, sequences = collect_set(sae, activations, ("resid_post.1",), n_tokens, seen.append)
    np.testing.assert_array_equal(sequences[table.seq, table.pos], table.token)
    assert table.n_rows == seen[-1]
    if n_tokens > activations.n_rows:
        assert table.n_rows == activations.n_rows
    else:
        assert n_tokens * 0.8 < table.n_rows < n_tokens * 1.3
    # Each row's active latents, found by its place, are the row's own code.
    spec = activations.spec
    place = {(s, p): r for r, (s, p) in enumerate(zip(table.seq, table.pos, strict=True))}
    whole = {tuple(ids): number for number, ids in enumerate(sequences)}
    active = {}
    for latent in range(table.n_latents):
        for row, value in zip(*table.of_latent(latent), strict=True):
            active.setdefault(int(row), {})[latent] = value
    checked = 0
    for chunk in range(0, activations.n_chunks, 7):
        index = activations.read_index(chunk)
        code = sae.encode(np.float32(activations.read_chunk("resid_post.1", chunk)))
        ids = activations.read_sequences(index["seq"])
        for i in range(len(ids)):
            row = place.get((whole.get(tuple(ids[i])), int(index["pos"][i])))
            if row is None:
                continue
            want = {int(f): float(v) for f, v in zip(code.indices[i], code.values[i], strict=True) if v > 0}
            assert active.get(row, {}) == pytest.approx(want, rel=1e-4)
            checked += 1
    assert checked > 20
    assert spec.context == sequences.shape[1]
