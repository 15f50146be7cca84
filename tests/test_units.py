"""How numbers with units read."""

import pytest

from sae_jax import units


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0000015, "0.0015 ms"),
        (0.03521, "35.2 ms"),
        (11.12, "11.1 s"),
        (119.99, "120 s"),
        (170, "2.83 min"),
        (3 * 3600, "3 hours"),
        (26.0 * 3600, "26 hours"),
        (12.5 * 86400, "12.5 days"),
        (4000 * 86400, "4,000 days"),
        (float("inf"), "unknown"),
    ],
)
def test_duration(seconds, text):
    assert units.duration(seconds) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (999.6, "1 kB"), (16.4e9, "16.4 GB"), (0.77e12, "770 GB"), (5e18, "5,000 PB")],
)
def test_size(n_bytes, text):
    assert units.size(n_bytes) == text


@pytest.mark.parametrize(("n_bytes", "text"), [(1.25 * 2**30, "1.25 GiB"), (-(2**20), "-1 MiB"), (1023.9, "1 KiB")])
def test_memory(n_bytes, text):
    assert units.memory(n_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"), [(31_930.2, "31,930"), (4.2174, "4.217"), (999.96, "1000"), (-2e6, "-2,000,000")]
)
def test_number(value, text):
    assert units.number(value) == text
