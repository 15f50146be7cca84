"""What a run asks of its storage, against the same by hand and the exact formula."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_jax.commands import main as cli
from sae_jax.planning import compile, storage
from sae_jax.planning.storage import StorageConfig
from sae_jax.types import UsageError
from tests.oracles import goodput as oracle

FLAGS = ("--sae.n-latents=1024", "--sae.k=8", "--train.batch-size=512", "--d-model=64")


@given(st.floats(10, 100), st.floats(10, 100), st.floats(1e5, 1e7), st.floats(0.3, 3))
def test_goodput_is_the_exact_one_to_first_order_and_best_at_youngs_interval(save, restore, between, times):
    """Where saves and restores are short beside the time between interruptions."""
    best = (2 * save * between) ** 0.5
    found = storage.goodput(best, save, restore, between)
    second_order = ((best + save + restore) / between) ** 2 + (save / best) ** 2 + save / between
    assert abs(found - oracle.exact(best, save, restore, between)) < 2 * second_order
    assert storage.goodput(times * best, save, restore, between) <= found + 1e-12


def test_a_demand_by_hand():
    """Checkpoints of 100 GB at 2 GB/s, each gone over twice; steps of half a second, a fifth at the floor."""
    found = storage.demand(StorageConfig(2.0, 5.0), 3 * 10**9, 0.5, 0.2, 10**11, 1000)
    assert (found.input_gb_per_second, found.most_input_gb_per_second) == (6, 15)
    assert found.save_seconds == found.restore_seconds == 100
    assert found.goodput == pytest.approx(1 - 100 / 250 - 250 / 36000 - 100 / 18000)
    assert found.best_interval_seconds == pytest.approx((2 * 100 * 18000) ** 0.5)
    assert found.best_checkpoint_every == round(2 * found.best_interval_seconds / 0.5)
    assert found.best_goodput > found.goodput
    assert storage.demand(StorageConfig(), 1, 0.5, 0.2, 10**15, 10).goodput == 0


def test_rates_that_cannot_be_are_refused():
    for settings in ({"gb_per_second": 0.0}, {"hours_between_preemptions": -1.0}, {"gb_per_second": float("inf")}):
        with pytest.raises(UsageError, match=f"storage.{next(iter(settings))}=.* must be above 0"):
            StorageConfig(**settings)


def planned(capsys, *flags: str) -> dict:
    assert cli.main(["plan", "--target=h200:2", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_says_what_a_step_reads_and_a_save_writes(capsys, monkeypatch):
    monkeypatch.setattr(compile, "is_installed", lambda target: False)
    one = planned(capsys, *FLAGS)
    assert one["storage"]["input_bytes"] == 512 * 2 * 64
    assert one["storage"]["save_bytes"] == 2 * one["device"]["state_bytes"]
    transcoder = ["--sae.variant=transcoder", "--site=a", "--reconstruct=b", "--harvest.dtype=int8"]
    int8 = planned(capsys, *FLAGS, *transcoder)["storage"]
    assert int8["input_bytes"] == 512 * 2 * (64 + 4)
    two = planned(capsys, *FLAGS, "--members", "a", "b --sae.k=4")
    assert two["storage"]["input_bytes"] == one["storage"]["input_bytes"]
    assert two["storage"]["save_bytes"] == pytest.approx(2 * one["storage"]["save_bytes"])
    assert two["storage"]["input_gb_per_second"] == pytest.approx(one["storage"]["input_gb_per_second"] / 2, rel=0.01)
    flags = ["--sae.variant=end_to_end", "--sae.n-latents=256", "--sae.k=8", "--train.batch-size=512"]
    through = planned(capsys, *flags, "--site=resid_post.1")["storage"]
    assert through["input_bytes"] == 512 * 4  # tokens
    assert cli.main(["plan", "--target=h200:2", *FLAGS, "--storage.gb-per-second=2.5"]) == 0
    assert "at 2.5 GB/s, with its digests" in capsys.readouterr().out
