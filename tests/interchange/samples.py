"""One dictionary of each layout that others publish, written by numpy as it is described, and what it computes."""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.oracles import foreign

D, N, K = 8, 24, 4

Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # x [B, X] -> (z [B, N], y [B, Y]), float64


@dataclass(frozen=True)
class Sample:
    """A dictionary on disk."""

    path: Path  # what a user gives
    format: str
    forward: Forward
    k: int | None = None  # what a user has to say


def numbers(seed: int = 0, d: int = D, d_out: int | None = None, n: int = N) -> dict[str, np.ndarray]:
    """Weights, float32, canonical; decoder rows of many norms."""
    rng = np.random.default_rng(seed)
    arrays = {
        "W_enc": rng.standard_normal((d, n)),
        "b_enc": 0.3 * rng.standard_normal(n),
        "W_dec": rng.standard_normal((n, d_out or d)) * rng.uniform(0.3, 2, (n, 1)),
        "b_dec": 0.5 * rng.standard_normal(d_out or d),
        "threshold": rng.uniform(0, 1.5, n),
        "W_skip": rng.standard_normal((d_out or d, d)),
        **{name: 0.3 * rng.standard_normal(n) for name in ("b_gate", "b_mag", "r_mag")},
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def rows(d: int = D) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((40, d)).astype(np.float32) + np.float32(0.3)


def f64(w: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in w.items()}


def autoencoder(w: Mapping[str, np.ndarray], activation: Callable, is_subtracted: bool, norm: str = "none") -> Forward:
    """h = (x - b_dec) W_enc + b_enc, or without the subtraction."""
    w = f64(w)

    def forward(x):
        x, mean, scale = foreign.normalise(x.astype(np.float64), norm)
        h = (x - w["b_dec"] * is_subtracted) @ w["W_enc"] + w.get("b_enc", 0)
        z = activation(h)
        return z, (z @ w["W_dec"] + w["b_dec"]) * scale + mean

    return forward


def transcoder(w: Mapping[str, np.ndarray], activation: Callable, skip: bool) -> Forward:
    w = f64(w)

    def forward(x):
        x = x.astype(np.float64)
        z = activation(x @ w["W_enc"] + w["b_enc"])
        return z, z @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)

    return forward


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


@contextlib.contextmanager
def _names_of_torch() -> Iterator[Any]:
    """Something to pickle under torch's names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "HalfStorage", "LongStorage", "IntStorage", "DoubleStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    rebuild = types.FunctionType((lambda *args: None).__code__, {}, "_rebuild_tensor_v2")
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]
    kept = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        yield torch
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def write_torch(path: Path, content: Any) -> None:
    """What torch.save writes of a dict with arrays in the place of tensors."""
    from collections import OrderedDict

    storages: list[np.ndarray] = []
    kinds = {"float32": "Float", "float16": "Half", "int64": "Long", "int32": "Int", "float64": "Double"}

    class Storage:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array

    with _names_of_torch() as torch:

        class Pickler(pickle.Pickler):
            def persistent_id(self, obj):
                if not isinstance(obj, Storage):
                    return None
                storages.append(obj.array)
                kind = getattr(torch, f"{kinds[obj.array.dtype.name]}Storage")
                return ("storage", kind, str(len(storages) - 1), "cpu", obj.array.size)

            def reducer_override(self, obj):
                if not isinstance(obj, np.ndarray):
                    return NotImplemented
                flat = np.ascontiguousarray(obj)
                strides = tuple(stride // flat.itemsize for stride in flat.strides)
                rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
                return rebuild, (Storage(flat), 0, obj.shape, strides[: obj.ndim], False, OrderedDict())

        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("archive/data.pkl", "w") as file:
                Pickler(file, 2).dump(content)
            archive.writestr("archive/byteorder", b"little")
            for number, array in enumerate(storages):
                archive.writestr(f"archive/data/{number}", array.tobytes())


def _saelens(folder: Path, architecture: str, arrays: Mapping[str, np.ndarray], **cfg: Any) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.6.hook_resid_pre"}
    base = {"architecture": architecture, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu"}
    write_json(folder / "cfg.json", {**base, "normalize_activations": "none", "metadata": metadata, **cfg})
    save(folder / "sae_weights.safetensors", arrays)


def _of(w: Mapping[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: w[name] for name in names}


PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")


def saelens_topk(folder: Path) -> Sample:
    w = numbers()
    _saelens(folder, "topk", _of(w, *PLAIN), k=K, apply_b_dec_to_input=True)
    return Sample(folder, "saelens", autoencoder(w, lambda h: foreign.topk(h, K), True))


def saelens_topk_rescaled(folder: Path) -> Sample:
    """Latents rank by value times norm of the decoder row; nothing is subtracted."""
    w = numbers(1)
    norms = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)
    cfg = {"k": K, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}
    _saelens(folder, "topk", _of(w, *PLAIN), **cfg)
    scaled = {**w, "W_dec": (w["W_dec"] / norms[:, None])}
    return Sample(folder, "saelens", autoencoder(scaled, lambda h: foreign.topk(h * norms, K), False))


def saelens_topk_layer_norm(folder: Path) -> Sample:
    w = numbers(2)
    _saelens(folder, "topk", _of(w, *PLAIN), k=K, apply_b_dec_to_input=True, normalize_activations="layer_norm")
    return Sample(folder, "saelens", autoencoder(w, lambda h: foreign.topk(h, K), True, "layer_norm"))


def saelens_standard_rescaled_rows(folder: Path) -> Sample:
    w = numbers(3)
    norm = "constant_norm_rescale"
    _saelens(folder, "standard", _of(w, *PLAIN), apply_b_dec_to_input=True, normalize_activations=norm)
    return Sample(folder, "saelens", autoencoder(w, foreign.relu, True, norm))


def saelens_standard_not_subtracted(folder: Path) -> Sample:
    w = numbers(4)
    _saelens(folder, "standard", _of(w, *PLAIN), apply_b_dec_to_input=False)
    return Sample(folder, "saelens", autoencoder(w, foreign.relu, False))


def saelens_jumprelu(folder: Path) -> Sample:
    w = numbers(5)
    w["threshold"][:3] = (0, -0.5, 0.25)
    _saelens(folder, "jumprelu", _of(w, *PLAIN, "threshold"), apply_b_dec_to_input=False)
    return Sample(folder, "saelens", autoencoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), False))


def saelens_gated(folder: Path) -> Sample:
    w = numbers(6)
    gates = ("b_gate", "b_mag", "r_mag")
    _saelens(folder, "gated", _of(w, "W_enc", "W_dec", "b_dec", *gates), apply_b_dec_to_input=False)
    v = f64(w)

    def forward(x):
        z = foreign.gated(x.astype(np.float64), v["W_enc"], v["b_gate"], v["b_mag"], v["r_mag"])
        return z, z @ v["W_dec"] + v["b_dec"]

    return Sample(folder, "saelens", forward)


def saelens_skip_transcoder(folder: Path) -> Sample:
    w = numbers(7, d_out=6)
    cfg = {"d_out": 6, "apply_b_dec_to_input": False}
    _saelens(folder, "skip_transcoder", _of(w, *PLAIN, "W_skip"), **cfg)
    return Sample(folder, "saelens", transcoder(w, foreign.relu, True))


def saelens_jumprelu_skip_transcoder(folder: Path) -> Sample:
    w = numbers(8)
    cfg = {"d_out": D, "apply_b_dec_to_input": False}
    _saelens(folder, "jumprelu_skip_transcoder", _of(w, *PLAIN, "W_skip", "threshold"), **cfg)
    return Sample(folder, "saelens", transcoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), True))


def saelens_before_6(folder: Path) -> Sample:
    """A flat config, older names, a factor of each latent on its way out."""
    w = numbers(10)
    factor = np.linspace(0.5, 2, N, dtype=np.float32)
    cfg = {
        "d_in": D,
        "d_sae": N,
        "hook_point": "blocks.3.hook_mlp_out",
        "model_name": "gpt2",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": True,
    }
    write_json(folder / "cfg.json", cfg)
    save(folder / "sae_weights.safetensors", {**_of(w, *PLAIN), "scaling_factor": factor})
    scaled = {**w, "W_dec": w["W_dec"] * factor[:, None]}
    return Sample(folder, "saelens", autoencoder(scaled, lambda h: foreign.topk(h, K), True))


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    make.__name__: make
    for make in (
        saelens_topk,
        saelens_topk_rescaled,
        saelens_topk_layer_norm,
        saelens_standard_rescaled_rows,
        saelens_standard_not_subtracted,
        saelens_jumprelu,
        saelens_gated,
        saelens_skip_transcoder,
        saelens_jumprelu_skip_transcoder,
        saelens_before_6,
    )
}
