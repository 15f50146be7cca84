import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import Hook, logit_effect, run
from sae_jax.types import UsageError
from tests.lm.tiny import SPEC, jit_run, random_model

GEMMA = dataclasses.replace(
    SPEC,
    family="gemma2",
    norm="rms_norm",
    norm_offset=1.0,
    post_norms=True,
    positions="rotary",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)


@pytest.mark.parametrize("spec", [SPEC, GEMMA], ids=["layer_norm", "rms_norm"])
def test_logit_effect_is_the_slope_of_the_logits_up_to_the_norm_s_scale(spec, ids_BT):
    model, last = random_model(spec), Hook(spec.n_layers - 1, "resid_post")
    x_D = jit_run(model, ids_BT, (last,)).acts[last][0, -1]
    centred_D = x_D - x_D.mean() if spec.norm == "layer_norm" else x_D
    direction_D = jax.random.normal(jax.random.key(3), x_D.shape)
    # Along x itself the norm's scale moves as well; orthogonally to it the scale stands still.
    direction_D -= centred_D * (direction_D @ centred_D) / (centred_D @ centred_D)

    def last_logits(strength):
        edits = {last: lambda v: v + strength * direction_D[None, None, :]}
        return run(model, ids_BT, edits=edits).logits[0, -1]

    slope_V = jax.jit(jax.jacfwd(last_logits))(jnp.float32(0))
    scale = jnp.sqrt(jnp.square(centred_D).mean() + model.spec.norm_eps)
    expected_V = (slope_V - slope_V.mean()) * scale
    np.testing.assert_allclose(logit_effect(model, last, direction_D[None])[0], expected_V, atol=1e-4)


@pytest.mark.parametrize(("point", "matrix"), [("mlp_act", "down.w"), ("attn_z", "o.w")])
def test_logit_effect_inside_a_block_passes_its_output_matrix(model, point, matrix):
    matrix_MD = model.params["layers"][matrix][1]
    directions_NM = jax.random.normal(jax.random.key(4), (3, matrix_MD.shape[0]))
    inside = logit_effect(model, (1, point), directions_NM)
    outside = logit_effect(model, (1, "resid_post"), directions_NM @ matrix_MD)
    np.testing.assert_allclose(inside, outside, atol=1e-5)
    np.testing.assert_allclose(inside.mean(axis=-1), 0, atol=1e-5)


def test_logit_effect_of_a_half_precision_model_is_f32(model):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), model)
    assert logit_effect(half, (0, "mlp_act"), jnp.ones((2, 40))).dtype == jnp.float32


def test_logit_effect_before_a_post_norm_passes_its_weight():
    model, layer = random_model(GEMMA), GEMMA.n_layers - 1
    direction_D = jax.random.normal(jax.random.key(2), (GEMMA.d_model,))
    after_D = direction_D * (model.params["layers"]["mlp_norm.w"][layer] + 1)
    before = logit_effect(model, (layer, "mlp_raw"), direction_D[None])
    np.testing.assert_allclose(before, logit_effect(model, (layer, "mlp_out"), after_D[None]), atol=1e-5)


def test_what_a_block_reads_has_no_direct_effect(model):
    with pytest.raises(UsageError, match=r"mlp_in is read by the block and does not add to the stream"):
        logit_effect(model, (1, "mlp_in"), jnp.ones((1, 16)))
