"""Effective compute: a stated curve inverted, and what is no curve refused."""

import math

import numpy as np
import pytest

from sae_jax.evaluation import effective_compute
from sae_jax.evaluation.base import Metric
from sae_jax.types import UsageError


def written(path, text):
    path.write_text(text)
    return effective_compute.read_curve(path)


def test_the_share_is_where_the_curve_has_the_added_loss(tmp_path):
    curve = written(tmp_path / "curve.csv", "loss,compute\n3.0,1e18\n4.0,1e16\n2.0,1e20\n")
    assert effective_compute.share(curve, 1.0) == pytest.approx(1e-2)
    assert effective_compute.share(curve, 1.5) == pytest.approx(1e-3)
    assert effective_compute.share(curve, 2.0) == pytest.approx(1e-4)
    assert effective_compute.share(curve, 0.0) == effective_compute.share(curve, -0.1) == 1
    assert math.isnan(effective_compute.share(curve, 2.1))
    assert math.isnan(effective_compute.share(curve, np.nan))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("compute,los\n1,2\n", "not a csv file with numbers in the columns compute and loss"),
        ("compute,loss\n1,two\n2,1\n", "not a csv file with numbers"),
        ("compute,loss\n1\n2,1\n", "not a csv file with numbers"),
        ("compute,loss\n1,2\n", "needs two points or more"),
        ("compute,loss\n0,3\n1,2\n", "of compute above 0"),
        ("compute,loss\n1,inf\n2,2\n", "finite"),
        ("compute,loss\n1,2\n2,3\n", "the loss has to fall"),
        ("compute,loss\n1,3\n1,2\n", "the loss has to fall"),
    ],
)
def test_what_is_no_curve_is_refused(text, said, tmp_path):
    with pytest.raises(UsageError, match=said):
        written(tmp_path / "curve.csv", text)
    with pytest.raises(UsageError, match="No such file"):
        effective_compute.read_curve(tmp_path / "nowhere.csv")


def test_the_interval_is_that_of_the_added_loss(tmp_path):
    curve = written(tmp_path / "curve.csv", "loss,compute\n3.0,1e18\n4.0,1e16\n2.0,1e20\n")
    (metric,) = effective_compute.of([Metric("ce_added", 1.0, (0.5, 1.5))], curve)
    assert metric.value == pytest.approx(1e-2)
    assert metric.interval == pytest.approx((1e-3, 1e-1))
    (metric,) = effective_compute.of([Metric("ce_added", 1.0, (0.5, 2.5))], curve)
    assert metric.interval is None, "an end of it lies beyond the curve"
    assert effective_compute.of([Metric("fvu", 1.0)], curve) == []
