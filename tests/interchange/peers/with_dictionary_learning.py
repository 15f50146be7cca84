"""dictionary-learning 0.1.0 loads what we export, and writes what we import."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import D, K, N, cases, compare, drawn, golden, main, rows
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary


def check(folder: Path) -> None:
    """Every class that we write."""
    for case in cases(folder / "dictionary_learning"):
        ae, _ = load_dictionary(str(case.folder), "cpu")
        z, y = computed(ae, case.x)
        compare(f"dictionary-learning {type(ae).__name__}", case, z, y)


def computed(ae: Any, x: Any) -> tuple[Any, Any]:
    """(code, reconstruction)."""
    with torch.no_grad():
        z = ae.encode(torch.tensor(x))
        return z.numpy(), ae(torch.tensor(x)).numpy()


def write(folder: Path) -> None:
    """One of each class, as its trainers save it: the state, and the trainer's config."""
    classes = {
        **{each.__name__: each(D, N) for each in (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder)},
        **{each.__name__: each(D, N, K) for each in (AutoEncoderTopK, BatchTopKSAE)},
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, N, K, [8, 16]),
    }
    for seed, (name, ae) in enumerate(classes.items()):
        state = ae.state_dict()
        arrays = drawn({each: tuple(p.shape) for each, p in state.items() if p.is_floating_point()}, seed)
        ae.load_state_dict(state | {each: torch.tensor(array) for each, array in arrays.items()})
        (folder / name).mkdir()
        torch.save(ae.state_dict(), folder / name / "ae.pt")
        settings = {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K, "lm_name": "someone/model"}
        (folder / name / "config.json").write_text(json.dumps({"trainer": settings, "buffer": {"ctx_len": 128}}))
        loaded, _ = load_dictionary(str(folder / name), "cpu")
        golden(folder / name, rows(), *computed(loaded, rows()))


if __name__ == "__main__":
    main(check, write)
