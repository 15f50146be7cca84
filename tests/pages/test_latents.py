"""What is shown of latents does not depend on how many are looked at together, and says what it leaves out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from sae_jax.pages import latents
from tests.pages.test_dashboard import DEAD, F, subject


def plain(latent):
    """A latent as nested lists."""
    found = dataclasses.asdict(latent)
    return repr({name: value if not isinstance(value, np.ndarray) else value.tolist() for name, value in found.items()})


def described(**changes):
    return list(latents.describe(subject(**changes), np.arange(F)))


def test_some_at_once_are_what_all_at_once_are(monkeypatch):
    whole = [plain(latent) for latent in described()]
    monkeypatch.setattr(latents, "_AT_ONCE", 7)
    assert [plain(latent) for latent in described()] == whole


@pytest.mark.parametrize(("most", "silent", "said"), [(F * 16, False, "those that never fire"), (1, None, "all")])
def test_too_many_cosines_are_left_out_and_said(monkeypatch, capsys, most, silent, said):
    """First of latents that never fire, 284 of 300; then of all."""
    monkeypatch.setattr(latents, "_MOST_COSINES", most)
    found = described()
    assert found[DEAD].near is None
    assert (found[0].near is None) is (silent is None)
    assert f"{said} are without neighbours" in " ".join(capsys.readouterr().err.split())


def test_only_those_that_are_named(capsys):
    some = np.array([DEAD, 3])
    assert [latent.number for latent in latents.describe(subject(), latents.chosen(F, some))] == [3, DEAD]
    silent = next(latents.describe(subject(), np.array([DEAD])))
    assert (silent.count, silent.mean, silent.max, silent.histogram, silent.contexts) == (0, 0, 0, None, None)
    assert len(silent.near[0]) == latents.N_NEAR
    assert not capsys.readouterr().err
