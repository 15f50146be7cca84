import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.lm import Hook, logit_effect, run
from tests.lm.tiny import jit_run


def test_logit_effect_is_the_slope_of_the_logits_up_to_the_norm_s_scale(model, ids_BT):
    last = Hook(model.spec.n_layers - 1, "resid_post")
    x_D = jit_run(model, ids_BT, (last,)).acts[last][0, -1]
    centred_D = x_D - x_D.mean()
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
