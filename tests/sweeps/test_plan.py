"""What a sweep plans: which members, with which settings."""

import numpy as np
import pytest

from sae_jax.activations.memory import ArrayRows
from sae_jax.saes.topk import Config
from sae_jax.sweeps.grid import SweepConfig
from sae_jax.sweeps.plan import SweepJob, plan
from sae_jax.training.settings import TrainConfig
from sae_jax.types import UsageError

ROWS = ArrayRows(np.ones((64, 8), np.float32))
MEMBERS = (("narrow", {"sae.n_latents": 16, "train.lr": 1e-2}), ("wide", {"sae.n_latents": 32, "train.lr": 1e-3}))


def job(grid: dict, members=MEMBERS, **train) -> SweepJob:
    sweep = SweepConfig(grid=grid)  # pyrefly: ignore (a mapping, as recipes give it)
    settings = TrainConfig(steps=3, batch_size=8, **train)
    return SweepJob(
        data="rows", out="sweep", sae=Config(n_latents=16, k=2), train=settings, members=members, sweep=sweep
    )


def test_the_grid_is_trained_of_every_listed_member():
    planned, refused = plan(job({"sae.k": [2, 4]}), ROWS)
    assert refused == []
    settings = {n: (p.job.sae.n_latents, p.job.sae.k, p.job.train.lr) for n, p in planned.items()}
    assert settings == {
        "narrow-k2": (16, 2, 1e-2),
        "wide-k2": (32, 2, 1e-3),
        "narrow-k4": (16, 4, 1e-2),
        "wide-k4": (32, 4, 1e-3),
    }


@pytest.mark.parametrize(("train", "order"), [({}, 0), ({"seed": 3}, 3), ({"seed": 3, "order_seed": 5}, 5)])
def test_members_of_other_seeds_have_the_batches_of_all(train, order):
    planned, refused = plan(job({"train.seed": [7, 8]}, **train), ROWS)
    assert refused == []
    assert {p.job.train.seed for p in planned.values()} == {7, 8}
    assert {p.job.train.order for p in planned.values()} == {order}


def test_an_order_of_its_own_is_refused():
    with pytest.raises(UsageError, match="order_seed=4, but members share one pass"):
        plan(job({"sae.k": [2]}, members=(("own", {"train.order_seed": 4}),)), ROWS)
