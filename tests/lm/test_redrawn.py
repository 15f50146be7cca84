"""A model with random weights: drawn as stated, known by its reference, and never taken for the trained one."""

import jax
import numpy as np
import pytest

import sae_jax
from sae_jax import lm
from sae_jax import mesh as meshes
from sae_jax.evaluation.text import open_set
from sae_jax.lm import redrawn
from sae_jax.types import UsageError


@pytest.fixture(scope="module")
def models():
    return {name: lm.load(f"bundled{name}") for name in ("", "+random:0", "+random:1")}


def test_each_tensor_keeps_its_mean_and_deviation_and_nothing_else(models):
    """Of every layer by itself. A mean and a deviation of n draws lie within 5 standard errors."""
    tensors = {"": {}, "+random:0": {}, "+random:1": {}}
    for name, found in tensors.items():
        params = models[name].params
        for key, leaf in params.items():
            if key != "layers":
                found[key] = np.asarray(leaf, np.float64)
        for key, leaf in params["layers"].items():
            found |= {f"{key} {i}": np.asarray(each, np.float64) for i, each in enumerate(leaf)}
    assert len(tensors[""]) > 50
    for key, trained in tensors[""].items():
        drawn, other = tensors["+random:0"][key], tensors["+random:1"][key]
        error = trained.std() / np.sqrt(trained.size)
        assert abs(drawn.mean() - trained.mean()) <= 5 * error + 1e-9, key
        assert abs(drawn.std() - trained.std()) <= 5 * error + 1e-9, key
        if trained.std() > 0:
            for one, two in ((drawn, trained), (drawn, other)):
                assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 5 / np.sqrt(trained.size), key
    assert len({model.digest for model in models.values()}) == 3
    assert models["+random:0"].digest == lm.digest("bundled+random:0")


def test_draws_are_the_same_on_any_mesh(models):
    again = lm.load("bundled+random:0", mesh=meshes.lm_mesh(2, jax.devices()[:2]))
    jax.tree.map(np.testing.assert_array_equal, again.params, models["+random:0"].params)


def test_references_mean_the_same_anywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lm.resolve("./model+random:7") == f"{tmp_path / 'model'}+random:7"
    assert lm.resolve("bundled+random:007") == "bundled+random:7"
    assert lm.resolve("owner/name@main+random:7") == "owner/name@main+random:7"
    assert lm.tokenizer("bundled+random:7").digest == lm.tokenizer("bundled").digest
    for wrong in ("bundled+random:", "bundled+random:x", "bundled+random:-1", f"bundled+random:{2**32}", "+random:1"):
        with pytest.raises(UsageError, match="model"):
            lm.resolve(wrong)
    with pytest.raises(UsageError, match="says twice"):
        lm.resolve("bundled+random:1+random:2")


def test_a_model_that_moved_is_as_random_as_it_was():
    assert lm.moved(None, "a+random:1") == "a+random:1"
    assert lm.moved("b", "a+random:1") == lm.moved("b+random:1", "a+random:1") == "b+random:1"
    assert lm.moved("b", "a") == "b"
    with pytest.raises(UsageError, match=r"seed 1; leave out \+random:2"):
        lm.moved("b+random:2", "a+random:1")
    with pytest.raises(UsageError, match=r"trained weights; leave out \+random:2"):
        lm.moved("b+random:2", "a")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.long
def test_a_run_on_a_random_model_is_measured_on_it(tmp_path):
    settings = {"text": "stdlib", "heldout": "heldout", "tokens": 4096, "context": 64, "hooks": ("resid_post.1",)}
    sae_jax.harvest(tmp_path / "set", model=("bundled+random:3",), **settings)
    d = sae_jax.train(
        tmp_path / "set", out=tmp_path / "run", n_latents=128, k=8, steps=4, decay=0, batch_size=64, dtype="float32"
    )
    assert open_set(d.record).source("resid_post.1").model == "bundled+random:3"
    (found,) = sae_jax.evaluate(tmp_path / "run", tokens=512).values()
    # Worse than all 2,048 tokens being as likely: the trained model has about 3 nats.
    assert found["ce_clean"] > np.log(2048)
    (moved,) = sae_jax.evaluate(tmp_path / "run", tokens=512, model="bundled").values()
    assert moved["ce_clean"] == found["ce_clean"]
    with pytest.raises(UsageError, match="random weights of seed 3"):
        sae_jax.evaluate(tmp_path / "run", tokens=512, model="bundled+random:4")
    subject = sae_jax.active(tmp_path / "run", "for x in y", 2)
    assert len(subject[0]) == len(subject[1])


def test_parted_and_joined_are_opposites():
    for reference in ("bundled", "/a/b+random:1/c", "owner/name"):
        assert redrawn.parted(reference) == (reference, None)
        assert redrawn.parted(redrawn.joined(reference, 5)) == (reference, 5)
