"""Figures leave matplotlib as they found it, and have numbers on their axes."""

import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from sae_jax import figures

DRAW = """
import sys
from pathlib import Path
from sae_jax.pages.curves import plot_training
rows = [{"step": i, "tokens": 1e5 * i, "fvu": 0.9 / i, "l0": 16.0, "dead_fraction": 0.01 * i} for i in range(1, 20)]
plot_training(rows, Path(sys.argv[1]), "topk of resid_post.2")
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
print(matplotlib.rcParams._get_backend_or_none())
"""


def test_no_back_end_is_chosen(tmp_path):
    path = tmp_path / "training.png"
    done = subprocess.run([sys.executable, "-c", DRAW, path], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("low", "high"), [(0.19, 0.21), (0.08, 0.35), (0.03, 0.9), (1e-3, 1.0), (1e-8, 1.0)])
def test_a_logarithmic_axis_has_numbers_to_read_off(low, high):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [low, high])
    axes.set_yscale("log")
    figures.label_logarithmic(axes.yaxis)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    ticks = [*zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)]
    assert len([label for at, label in ticks if bottom <= at <= top and label.get_text()]) >= 3
