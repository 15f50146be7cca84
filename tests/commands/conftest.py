"""Commands that tests run in their own process."""

from collections.abc import Iterator

import jax
import pytest

from sae_jax.commands import runtime


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The test process has used JAX already; joining a job of one must come first, and is tested in processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "start_distributed", lambda: None)
        with jax.numpy_dtype_promotion("standard"):  # optax
            yield
