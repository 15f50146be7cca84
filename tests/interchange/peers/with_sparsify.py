"""eai-sparsify 1.3.3 loads what we export, and writes what we import."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read at import; its kernels need a GPU

from common import D, K, N, cases, compare, drawn, golden, main, rows
from sparsify import SparseCoder, SparseCoderConfig

SETTINGS = {
    "autoencoder": {},
    "transcoder": {"transcode": True},
    "skip_transcoder": {"transcode": True, "skip_connection": True},
}


def computed(coder: SparseCoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dense code, reconstruction)."""
    with torch.no_grad():
        encoded = coder.encode(torch.tensor(x))
        z = torch.zeros(len(x), coder.num_latents).scatter(1, encoded.top_indices, encoded.top_acts)
        return z.numpy(), coder(torch.tensor(x)).sae_out.numpy()


def check(folder: Path) -> None:
    """Of both formats that it reads."""
    for name in ("sparsify", "saelens_and_sparsify"):
        for case in cases(folder / name):
            coder = SparseCoder.load_from_disk(case.folder, device="cpu")
            compare("sparsify", case, *computed(coder, case.x))


def write(folder: Path) -> None:
    """An autoencoder and transcoders."""
    for seed, (name, settings) in enumerate(SETTINGS.items()):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, **settings), dtype=torch.float32)
        arrays = drawn({each: tuple(p.shape) for each, p in coder.state_dict().items()}, seed)
        coder.load_state_dict({each: torch.tensor(array) for each, array in arrays.items()})
        coder.save_to_disk(folder / name)
        golden(folder / name, rows(), *computed(coder, rows()))


if __name__ == "__main__":
    main(check, write)
