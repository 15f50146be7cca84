"""Metrics against the sizes of a sweep's dictionaries: planted planes are found, and what cannot be fitted is said."""

import numpy as np
import pytest

from sae_jax import storage
from sae_jax.errors import UsageError, UserError
from sae_jax.scaling import quality, table
from sae_jax.scaling.table import Point


def point(n, k, flops=1.0, name="", tokens=100):
    return Point(n_latents=n, k=k, lr=1e-3, seed=0, tokens=tokens, flops=flops * n, fvu=0.5, name=name or f"n{n}k{k}")


def planted(noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        quality.Measured(
            point(n, k), {"kl": 3 - 0.25 * np.log2(n) + 0.5 * np.log2(k) + noise * rng.standard_normal(), "ce": 2.0}
        )
        for n in (64, 128, 256, 512)
        for k in (4, 8, 16)
    ]


def test_a_planted_plane_is_found():
    trend, flat = quality.trends(planted(), ["kl", "ce"])
    assert trend.slopes["latents"].value == pytest.approx(-0.25)
    assert trend.slopes["k"].value == pytest.approx(0.5)
    assert trend.slopes["compute"].value == pytest.approx(-0.25)  # FLOP go with the width alone here
    assert trend.r2 == pytest.approx(1)
    assert flat.slopes["latents"].value == pytest.approx(0, abs=1e-12)
    assert flat.r2 is None
    assert quality.rows([trend])[0][:2] == ("kl", "12")


def test_intervals_cover_the_planted_slope():
    inside = 0
    for seed in range(200):
        (trend,) = quality.trends(planted(0.1, seed), ["kl"])
        low, high = trend.slopes["latents"].interval
        inside += low <= -0.25 <= high
    assert 165 <= inside <= 195


def test_what_does_not_vary_has_no_slope_and_too_few_are_refused():
    one_k = [one for one in planted() if one.point.k == 8]
    (trend,) = quality.trends(one_k, ["kl"])
    assert set(trend.slopes) == {"latents", "compute"}
    with pytest.raises(UsageError, match="metric 'kll' was measured of 0 members, and a trend needs 4; choose ce, kl"):
        quality.trends(planted(), ["kll"])
    with pytest.raises(UsageError, match="measured of 3 members, and a trend needs 4; choose none: run sae-jax"):
        quality.trends(one_k[:3], ["kl"])


def test_members_are_read_at_their_last_point_and_those_not_measured_are_named(tmp_path):
    table.write(tmp_path, [point(64, 4, tokens=50), point(64, 4, tokens=100), point(128, 4)])
    run = tmp_path / "run"
    storage.make_folder(run)
    storage.write_json(run / "evaluation.json", storage.sealed({"kl": 0.5, "text": "heldout", "fvu": None, "l0": 4}))
    measured, missing = quality.read(tmp_path, {"n64k4": run})
    assert missing == ["n128k4"]
    assert (measured[0].point.tokens, dict(measured[0].metrics)) == (100, {"kl": 0.5, "l0": 4.0})
    (run / "evaluation.json").write_text((run / "evaluation.json").read_text().replace("0.5", "0.1"))
    with pytest.raises(UserError, match="not what was written"):
        quality.read(tmp_path, {"n64k4": run})


def test_the_figure_has_a_panel_for_each_metric(tmp_path):
    measured = planted()
    quality.draw(measured, quality.trends(measured, ["kl", "ce"]), tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 5000
