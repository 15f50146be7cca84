"""Fixtures of the language-model tests."""

import jax
import numpy as np
import pytest

from tests.golden.make_families import GOLDEN
from tests.lm.tiny import SPEC, random_model


@pytest.fixture(scope="session")
def model():
    return random_model(SPEC)


@pytest.fixture(scope="session")
def ids_BT():  # noqa: N802, fixtures are named as the locals they become
    return jax.random.randint(jax.random.key(1), (3, 9), 0, SPEC.n_vocab)


@pytest.fixture(scope="session")
def golden():
    """{variant/what: array} of tests/golden/make_families.py."""
    with np.load(GOLDEN) as file:
        return dict(file)
