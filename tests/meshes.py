"""Meshes that tests of arrays run on: both axes split in `make test`, one axis over all devices in `make test-long`."""

import pytest

MESHES = (
    pytest.param((1, 8), marks=pytest.mark.long),
    (2, 4),
    pytest.param((8, 1), marks=pytest.mark.long),
)
