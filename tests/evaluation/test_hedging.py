"""Hedging: latents that had mixed in a planted feature let go of it once it gets a latent."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.evaluation import baselines, study
from sae_jax.evaluation.studies.hedging import Study
from sae_jax.saes import topk
from sae_jax.types import UsageError
from tests.evaluation import cases

pytestmark = pytest.mark.usefixtures("one_device")

D, N = 32, 8  # dimensions; features, each with a second one that is correlated with it by 0.5


def planted(n_rows=4096):
    """Rows of 2 N orthonormal features, and their directions [2 N, D]."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((D, D)))[0][: 2 * N]
    first = rng.random((n_rows, N)) < 0.2
    second = np.where(rng.random((n_rows, N)) < 0.5, first, rng.random((n_rows, N)) < 0.2)
    codes = np.concatenate([2 * first, 0.8 * second], 1) * rng.uniform(1, 1.5, (n_rows, 2 * N))
    return np.float32(codes @ directions), directions


def dictionary(rows_FD, norm="none"):
    rows_FD = np.asarray(rows_FD / np.linalg.norm(rows_FD, axis=1, keepdims=True), np.float32)
    config = topk.Config(n_latents=len(rows_FD), k=4, dtype="float32", input_norm=norm)
    w = jnp.asarray(rows_FD)
    return topk.TopK(w, jnp.zeros(len(w)), w, jnp.zeros(rows_FD.shape[1]), config)


def hedging(grown):
    """The share of the change along new latents, once more."""
    basis = np.linalg.svd(grown.new.T, full_matrices=False)[0]
    change = (grown.after - grown.without)[grown.fires]
    return ((change @ basis) ** 2).sum() / (change**2).sum()


@pytest.mark.parametrize("norm", ["dataset_rms", pytest.param("none", marks=pytest.mark.long)])
def test_hedged_latents_change_along_what_they_had_mixed_in(norm):
    x, directions = planted()
    # The best that so few latents can do: of each pair the direction of greatest second moment.
    codes = (x @ directions.T).reshape(-1, 2, N)
    mix = np.linalg.eigh(np.einsum("nip,njp->ij", codes, codes))[1][:, -1]
    mix = mix * np.sign(mix[0])
    hedged = dictionary(mix[0] * directions[:N] + mix[1] * directions[N:], norm)
    grown = Study(n_new=N, n_steps=400, batch_size=256).grown(hedged, x, 0)
    assert grown.fires.all()
    found = np.abs(grown.new @ directions[N:].T).max(0) > 0.7
    assert found.sum() >= N / 2, "new latents find the second features"
    after, without = (np.diag(rows @ directions[N:].T) for rows in (grown.after, grown.without))
    assert (after - without)[found].mean() < -0.03, "which the first latents let go of"
    assert hedging(grown) > 0.85


def test_of_a_case_it_is_told_with_an_interval_beside_chance():
    case = cases.case(make=lambda rows: baselines.random(rows, 48, k=4))
    found = {m.name: m for m in Study(n_new=3, n_steps=5, batch_size=64).metrics(case)}
    assert set(found) == {"hedging", "hedging_chance"}
    assert 0 <= found["hedging"].value <= 1
    assert found["hedging"].interval[0] < found["hedging"].value < found["hedging"].interval[1]
    assert found["hedging_chance"].value in (1 / 16, 2 / 16, 3 / 16)
    assert study.studies()["hedging"] is Study


def test_what_cannot_grow_is_refused():
    case = cases.case()
    elsewhere = dataclasses.replace(case.subject, reconstructed=(case.subject.encoded[0]._replace(layer=2),))
    with pytest.raises(UsageError, match="one hook that it reads"):
        list(Study().metrics(dataclasses.replace(case, subject=elsewhere)))
    config = dataclasses.replace(case.subject.sae.config)
    object.__setattr__(config, "variant", "matryoshka")
    other = dataclasses.replace(case.subject, sae=dataclasses.replace(case.subject.sae, config=config))
    with pytest.raises(UsageError, match="matryoshka is not grown"):
        list(Study().metrics(dataclasses.replace(case, subject=other)))
