"""Attention in blocks of queries is that of all queries at once, in values, gradients and splits, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax import mesh as meshes
from sae_jax.lm import block as blocks
from sae_jax.lm import cross_entropy, generate, place, run
from sae_jax.lm.spec import Attention, Rotary
from tests.lm.tiny import SPEC, random_model

WINDOWS = (Attention(window=3, rotary=Rotary()), Attention(rotary=Rotary(theta=1e6)))
SMALL = dataclasses.replace(SPEC, n_layers=2)
GEMMA = dataclasses.replace(
    SMALL, n_kv_heads=1, positions="rotary", attention=WINDOWS, kind_of_layer=(0, 1), attn_cap=2.0, query_scale=0.3
)
SPECS = {"gpt2": SMALL, "caps, windows, one kv": GEMMA}
IDS = jax.random.randint(jax.random.key(0), (8, 11), 0, SPEC.n_vocab)


def loss(model, ids_BT):
    out = run(model, ids_BT, capture=[(1, "attn_z")])
    return cross_entropy(out.logits, ids_BT).mean(), out


def evaluated(model, ids_BT=IDS):
    # A function of its own each time: what JAX compiled before knows of another limit.
    return jax.jit(jax.value_and_grad(lambda m, ids: loss(m, ids), has_aux=True))(model, ids_BT)


def assert_close(found, expected, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), atol=atol), found, expected)


def limit(monkeypatch, n_queries, n_heads=SPEC.n_heads, ids_BT=IDS):
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * n_heads * n_queries * ids_BT.size)


@pytest.mark.parametrize(("name", "n_queries"), [("gpt2", 1), ("caps, windows, one kv", 4)])
def test_blocks_change_neither_values_nor_gradients(name, n_queries, monkeypatch):
    """Eleven blocks, and three of which the last is filled up."""
    model = random_model(SPECS[name])
    expected = evaluated(model)
    limit(monkeypatch, n_queries)
    assert blocks.query_block(4 * SPEC.n_heads * IDS.size * 11, 11) == n_queries
    assert_close(evaluated(model), expected, 5e-6)


def test_bf16_and_single_layers(monkeypatch):
    model = jax.tree.map(lambda p: p.astype(jnp.bfloat16), random_model(GEMMA))
    everywhere = [(layer, "attn_z") for layer in range(2)]
    expected = jax.jit(lambda m: run(m, IDS, capture=everywhere).acts)(model)
    limit(monkeypatch, 4)
    found = jax.jit(lambda m: run(m, IDS, capture=everywhere).acts)(model)
    assert {x.dtype for x in found.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_close(found, expected, 0.02)


def test_each_device_has_the_limit_on_an_explicit_mesh(monkeypatch):
    model = random_model(GEMMA)
    expected = evaluated(model)
    monkeypatch.setattr(blocks, "SCORE_BYTES", 4 * SPEC.n_heads * 4 * IDS.size // 8)
    sizes = []
    query_block = blocks.query_block
    monkeypatch.setattr(blocks, "query_block", lambda *args: sizes.append(query_block(*args)) or sizes[-1])
    mesh = jax.make_mesh((2, 4), ("data", "latent"))
    with jax.set_mesh(mesh):
        found = evaluated(model, jax.device_put(IDS, jax.NamedSharding(mesh, P(("data", "latent")))))
    assert set(sizes) == {4}
    assert_close(found, expected, 5e-6)


def test_a_model_that_is_split(monkeypatch):
    model = random_model(GEMMA)
    expected = evaluated(model)
    limit(monkeypatch, 1)
    mesh = meshes.lm_mesh(2, jax.devices()[:8])
    ids_BT = jax.device_put(IDS, meshes.sharding(mesh, meshes.lm_rows(mesh)))
    with jax.set_mesh(mesh):
        found = evaluated(place(model, mesh), ids_BT)
    assert_close(found, expected, 5e-6)


def test_generation_is_the_same(monkeypatch):
    model = random_model(GEMMA)
    expected = generate(model, IDS[:, :5], 6, jax.random.key(0))
    jax.clear_caches()
    limit(monkeypatch, 1)
    np.testing.assert_array_equal(generate(model, IDS[:, :5], 6, jax.random.key(0)), expected)


def test_memory_does_not_grow_with_the_square_of_the_context(monkeypatch):
    spec = dataclasses.replace(GEMMA, n_context=2048)
    limit_bytes = 1 << 20
    monkeypatch.setattr(blocks, "SCORE_BYTES", limit_bytes)
    model = random_model(spec)

    def temporary(f, n):
        compiled = jax.jit(f).lower(model, jnp.zeros((1, n), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for f in (
        lambda m, ids: run(m, ids, capture=[(1, "resid_post")], logits=False).acts,
        jax.grad(lambda *a: loss(*a)[0]),
    ):
        short, long = temporary(f, 512), temporary(f, 2048)
        assert long < 4.5 * short + limit_bytes  # whole scores would be 16 times as large
        assert long < 4 * spec.n_heads * 2048**2  # one layer's scores
