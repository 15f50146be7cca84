"""Numbers of the bundled model, kept so that a change of any of its parts shows.

python -m tests.golden.make_bundled_lm     # writes bundled_lm.npz beside this file

Made with JAX 0.10.2 on a CPU. The ids are the first tokens of the held-out text. Rounding differs between
versions of JAX by about 1e-5, so compare to 1e-4.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.activations.tokens import sequences
from sae_jax.lm import Hook, load, run, tokenizer

GOLDEN = Path(__file__).with_name("bundled_lm.npz")
HOOK = Hook(2, "resid_post")


def numbers() -> dict[str, np.ndarray]:
    """Two sequences of held-out text, the logits at every 8th position and the activations at HOOK."""
    ids_BT = np.stack(list(sequences("heldout", tokenizer("bundled"), 32, stop=2)))
    out = jax.jit(lambda model, ids_BT: run(model, ids_BT, capture=[HOOK]))(load("bundled"), jnp.asarray(ids_BT))
    return {"ids": ids_BT, "logits": np.asarray(out.logits)[:, 7::8], "acts": np.asarray(out.acts[HOOK])}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **numbers())
