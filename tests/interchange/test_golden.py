"""What other libraries wrote themselves, and computed of some rows: imported here, it computes the same.

The files are made by `make test-interchange`: tests/interchange/peers/with_LIBRARY.py write.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sae_jax

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.npz"))


@pytest.fixture(autouse=True)
def _one_device(one_device):
    pass


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_library_did(case: str, tmp_path: Path) -> None:
    record = sae_jax.import_dictionary(GOLDEN / case, tmp_path / "d")
    assert record.origin is not None
    assert record.origin.format == case.partition("/")[0]
    expected = np.load((GOLDEN / case).with_suffix(".npz"))
    members = [sae_jax.load(path.parent) for path in sorted(tmp_path.glob("d/**/dictionary.json"))]
    x, z, y = (expected[name] for name in "xzy")
    if len(members) > 1:  # a set
        ours = [(d.encode(rows).to_dense(d.config.n_latents), d(rows)) for d, rows in zip(members, x, strict=True)]
        codes, reconstructed = (np.stack(part) for part in zip(*ours, strict=True))
    elif x.ndim > 2:  # layers apart, which are side by side here
        rows, (d,) = np.concatenate(x, 1), members
        codes = np.stack(np.split(np.asarray(d.encode(rows).to_dense(d.config.n_latents)), len(x), 1))
        reconstructed = np.stack(np.split(np.asarray(d(rows)), len(x), 1))
    else:
        (d,) = members
        codes, reconstructed = d.encode(x).to_dense(d.config.n_latents), d(x)
        if (z < 0).any():  # values of both signs: each of their latents is two here
            codes = codes[:, : z.shape[1]] - codes[:, z.shape[1] :]
    np.testing.assert_array_equal(codes != 0, z != 0)
    np.testing.assert_allclose(codes, z, atol=1e-5 * np.abs(z).max(), rtol=1e-5)
    np.testing.assert_allclose(reconstructed, y, atol=1e-5 * np.abs(y).max(), rtol=1e-5)


def test_every_library_is_there() -> None:
    assert {case.partition("/")[0] for case in CASES} == {
        *("circuit_tracer", "dictionary_learning", "saelens", "sparsify")
    }
