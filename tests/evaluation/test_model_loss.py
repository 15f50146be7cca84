"""What putting reconstructions into the bundled language model does, in cases whose answer is known."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from sae_jax import lm
from sae_jax.evaluation.base import Subject
from sae_jax.evaluation.batches import Candidate, of_text
from sae_jax.evaluation.evaluate import Measured, accumulate
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes import topk
from sae_jax.types import Code, Sites, Widths

HOOK = lm.Hook(2, "resid_post")


@struct.dataclass
class Scaled:
    """A dictionary that returns its input times a factor."""

    factor: Any
    b_enc: Any
    w_dec: Any
    b_dec: Any
    config: Any = struct.field(pytree_node=False)

    def encode(self, x):
        return Code(jnp.zeros((*x.shape[:-1], 1), jnp.int32), jnp.ones((*x.shape[:-1], 1)))

    def __call__(self, x):
        return x * self.factor


@pytest.fixture(scope="module")
def model():
    return lm.load("bundled")


@pytest.fixture(scope="module")
def batches(model):
    return [np.random.default_rng(i).integers(1, model.spec.n_vocab, (2, 12)) for i in range(2)]


class First(HeldOut):
    """Text of which a set holds one position."""

    def keep(self, text_BT, norm_BTS):
        return np.arange(text_BT.size).reshape(text_BT.shape) < 1


class All(HeldOut):
    """Text of which a set holds every position, special tokens too."""

    def keep(self, text_BT, norm_BTS):
        return np.ones(text_BT.shape, bool)


def measure(model, batches, factor, kind=All, hooks=(HOOK,)):
    width = model.spec.d_model
    w_dec = jnp.ones((4, width * len(hooks)))
    sae = Scaled(jnp.float32(factor), jnp.zeros(4), w_dec, w_dec[0], topk.Config(n_latents=4, k=1, input_norm="none"))
    sites, widths = Sites(*[tuple(map(str, hooks))] * 2), Widths(*[(width,) * len(hooks)] * 2)
    ids = np.concatenate(batches)
    text = kind("text", model, hooks, hooks, ids, ids != 0, None)
    subject = Subject(sae, dict.fromkeys(sites.y, width), np.full(width * len(hooks), 0.1))
    candidate = Candidate(sae, sites, widths, activations=None)
    _, made = of_text({"": candidate}, {"": subject}, {sites: text}, batch_tokens=24, shard=(0, 1))
    return Measured(subject, {}, accumulate({"": subject}, made)[""]).to_json()


def test_the_identity_changes_nothing(model, batches):
    got = measure(model, batches, 1.0)
    assert got["ce_sae"] == pytest.approx(got["ce_clean"], abs=1e-4)
    assert got["kl"] == pytest.approx(0, abs=1e-5)
    assert got["loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert got["fvu"] == pytest.approx(0, abs=1e-9)
    assert got["n_predictions"] == 2 * 2 * 11


def test_zeros_are_the_zero_ablation(model, batches):
    got = measure(model, batches, 0.0)
    assert got["ce_sae"] == pytest.approx(got["ce_zero"], rel=1e-5)
    assert got["kl"] > 0.1
    assert got["loss_recovered_zero"] == pytest.approx(0, abs=1e-5)


def test_left_out_positions_keep_their_activations(model, batches):
    got = measure(model, batches, 0.0, First)
    everywhere = measure(model, batches, 0.0)
    assert got["n_rows"] == 2
    assert abs(got["ce_sae"] - got["ce_clean"]) < abs(everywhere["ce_sae"] - everywhere["ce_clean"])


def test_predictions_from_and_of_special_tokens_do_not_count(model, batches):
    marked = [ids.copy() for ids in batches]
    marked[0][0, 3] = 0
    got = measure(model, marked, 1.0)
    assert got["n_predictions"] == 2 * 2 * 11 - 2
    nll = [np.asarray(lm.cross_entropy(lm.run(model, ids).logits, ids)) for ids in marked]
    counted = [(ids[:, :-1] != 0) & (ids[:, 1:] != 0) for ids in marked]
    want = sum((n * c).sum() for n, c in zip(nll, counted, strict=True)) / (2 * 2 * 11 - 2)
    assert got["ce_clean"] == pytest.approx(want, rel=1e-4)


def test_several_sites_are_replaced_together(model, batches):
    hooks = (lm.Hook(3, "mlp_out"), lm.Hook(1, "resid_post"))
    same = measure(model, batches, 1.0, hooks=hooks)
    assert same["ce_sae"] == pytest.approx(same["ce_clean"], abs=1e-4)
    zeros = measure(model, batches, 0.0, hooks=hooks)
    assert list(zeros["fvu_by_source"]) == ["mlp_out.3", "resid_post.1"]
    edits = {hook: jnp.zeros_like for hook in hooks}
    nll = [np.asarray(lm.cross_entropy(lm.run(model, ids, edits=edits).logits, ids)).mean() for ids in batches]
    assert zeros["ce_sae"] == pytest.approx(np.mean(nll), rel=1e-4)


def test_clean_cross_entropy_is_the_models_own(model, batches):
    got = measure(model, batches, 1.0)
    nll = [np.asarray(lm.cross_entropy(lm.run(model, ids).logits, ids)).mean() for ids in batches]
    assert got["ce_clean"] == pytest.approx(np.mean(nll), rel=1e-4)
