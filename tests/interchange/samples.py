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
    save_file({name: np.array(array, order="C") for name, array in arrays.items()}, path)


@contextlib.contextmanager
def _names_of_torch() -> Iterator[Any]:
    """Something to pickle under torch's names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("BFloat16Storage", "FloatStorage", "HalfStorage", "LongStorage", "IntStorage", "DoubleStorage"):
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
    kinds = {
        "bfloat16": "BFloat16",
        "float32": "Float",
        "float16": "Half",
        "int64": "Long",
        "int32": "Int",
        "float64": "Double",
    }

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


def saelens_abstopk(folder: Path) -> Sample:
    """Values of both signs: each latent is two, one for each."""
    w = numbers(8)
    norms = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)
    cfg = {"k": K, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True}
    _saelens(folder, "abstopk", _of(w, *PLAIN), **cfg)

    def forward(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        h = ((x - w["b_dec"]) @ w["W_enc"].astype(np.float64) + w["b_enc"]) * norms
        ranks = np.argsort(np.argsort(-np.abs(h), axis=1), axis=1)
        z = np.where(ranks < K, h, 0)
        return np.concatenate([np.maximum(z, 0), np.maximum(-z, 0)], 1), z @ (w["W_dec"] / norms[:, None]) + w["b_dec"]

    return Sample(folder, "saelens", forward)


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


def _sparsify(folder: Path, w: Mapping[str, np.ndarray], **cfg: Any) -> None:
    base = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K}
    base |= {"multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D}
    write_json(folder / "cfg.json", {**base, **cfg})
    arrays = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save(folder / "sae.safetensors", {**arrays, **({"W_skip": w["W_skip"]} if cfg.get("skip_connection") else {})})


def sparsify_autoencoder(folder: Path) -> Sample:
    w = numbers(20)
    _sparsify(folder / "layers.6", w)
    return Sample(folder / "layers.6", "sparsify", autoencoder(w, lambda h: foreign.topk(foreign.relu(h), K), True))


def sparsify_skip_transcoder(folder: Path) -> Sample:
    w = numbers(21)
    _sparsify(folder / "layers.6.mlp", w, transcode=True, skip_connection=True)
    return Sample(folder / "layers.6.mlp", "sparsify", transcoder(w, lambda h: foreign.topk(foreign.relu(h), K), True))


def sparsify_skip(folder: Path) -> Sample:
    """An autoencoder with a linear map beside it."""
    w = numbers(22)
    _sparsify(folder, w, skip_connection=True, num_latents=N)
    v = f64(w)

    def forward(x):
        z = foreign.topk((x - v["b_dec"]) @ v["W_enc"] + v["b_enc"], K)
        return z, z @ v["W_dec"] + v["b_dec"] + x @ v["W_skip"].T

    return Sample(folder, "sparsify", forward)


def saelens_and_sparsify(folder: Path) -> Sample:
    w = numbers(23)
    _sparsify(folder, w)
    cfg = json.loads((folder / "cfg.json").read_text())
    _saelens(folder, "topk", _of(w, *PLAIN), **cfg, apply_b_dec_to_input=True)
    return Sample(folder, "saelens_and_sparsify", autoencoder(w, lambda h: foreign.topk(h, K), True))


def gemma_scope(folder: Path) -> Sample:
    w = numbers(30)
    path = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **_of(w, *PLAIN, "threshold"))
    return Sample(path, "gemma_scope", autoencoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), False))


def gemma_scope_embedding(folder: Path) -> Sample:
    w = numbers(31)
    path = folder / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **_of(w, *PLAIN, "threshold"))
    root = np.sqrt(np.float64(D))
    v = {**w, "W_enc": w["W_enc"] / root, "W_dec": w["W_dec"] * root}
    forward = autoencoder(v, lambda h: foreign.jumprelu(h, w["threshold"]), False)
    return Sample(path / "params.npz", "gemma_scope", forward)


def gemma_scope_transcoder(folder: Path) -> Sample:
    w = numbers(32)
    path = folder / "gemma-scope-2b-pt-transcoders" / "layer_3" / "width_16k" / "average_l0_9"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **_of(w, *PLAIN, "threshold"))
    return Sample(path, "gemma_scope", transcoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), False))


def gemma_scope_2(folder: Path) -> Sample:
    """A folder without settings."""
    w = numbers(33)
    path = folder / "gemma-scope-2-4b-it" / "resid_post" / "layer_9_width_16k_l0_medium"
    save(path / "params.safetensors", {name.lower(): w[name] for name in (*PLAIN, "threshold")})
    return Sample(path, "gemma_scope_2", autoencoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), False))


def gemma_scope_2_affine(folder: Path) -> Sample:
    w = numbers(34, d_out=6)
    path = folder / "gemma-scope-2-1b-pt" / "transcoder" / "layer_13_width_16k_l0_big_affine"
    arrays = {name.lower(): w[name] for name in (*PLAIN, "threshold")}
    save(path / "params.safetensors", {**arrays, "affine_skip_connection": w["W_skip"].T})
    config = {"architecture": "jump_relu", "affine_connection": True, "model_name": "google/gemma-3-1b-pt"}
    points = {f"hf_hook_point_{side}": f"model.layers.13.{side}" for side in ("in", "out")}
    write_json(path / "config.json", {**config, **points})
    return Sample(path, "gemma_scope_2", transcoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), True))


def gemma_scope_2_clt(folder: Path) -> Sample:
    """Latents of a layer read it and write it and later ones; what they would write to earlier ones is not used."""
    n_layers, w = 3, [numbers(70 + i) for i in range(3)]
    rng = np.random.default_rng(5)
    decoders = rng.standard_normal((n_layers, N, n_layers, D)).astype(np.float32)
    path = folder / "gemma-scope-2-1b-pt" / "clt" / "width_262k_l0_big"
    for i in range(n_layers):
        arrays = {name.lower(): w[i][name] for name in ("W_enc", "b_enc", "b_dec", "threshold")}
        save(path / f"params_layer_{i}.safetensors", {**arrays, "w_dec": decoders[i]})
    v = [f64(each) for each in w]

    def forward(x):
        parts = np.split(x.astype(np.float64), n_layers, axis=1)
        z = [
            foreign.jumprelu(x_ @ each["W_enc"] + each["b_enc"], each["threshold"])
            for x_, each in zip(parts, v, strict=True)
        ]
        written = [
            sum(z[i] @ decoders[i, :, j].astype(np.float64) for i in range(j + 1)) + v[j]["b_dec"]
            for j in range(n_layers)
        ]
        return np.concatenate(z, axis=1), np.concatenate(written, axis=1)

    return Sample(path, "gemma_scope_2_clt", forward)


def _dictionary_learning(folder: Path, kind: str, content: Mapping[str, Any], forward: Forward) -> Sample:
    path = folder / "resid_post_layer_3" / "trainer_0"
    write_torch(path / "ae.pt", content)
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "EleutherAI/pythia-70m"}
    write_json(path / "config.json", {"trainer": {**trainer, "submodule_name": "resid_post_layer_3"}, "buffer": {}})
    return Sample(path, "dictionary_learning", forward)


def _linear(w: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}


def _unit(w: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """With decoder rows of norm 1, and the norms."""
    norms = np.linalg.norm(w["W_dec"].astype(np.float64), axis=1)
    return {**w, "W_dec": w["W_dec"] / norms[:, None]}, norms


def dictionary_learning_autoencoder(folder: Path) -> Sample:
    w = numbers(40)
    unit, norms = _unit(w)
    forward = autoencoder(unit, lambda h: foreign.relu(h) * norms, True)
    return _dictionary_learning(folder, "AutoEncoder", {**_linear(w), "bias": w["b_dec"]}, forward)


def dictionary_learning_new(folder: Path) -> Sample:
    w = numbers(41)
    content = {**_linear(w), "decoder.bias": w["b_dec"]}
    return _dictionary_learning(folder, "AutoEncoderNew", content, autoencoder(w, foreign.relu, False))


def dictionary_learning_gated(folder: Path) -> Sample:
    w = numbers(42)
    content = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "decoder_bias": w["b_dec"]}
    content |= {"r_mag": w["r_mag"], "gate_bias": w["b_gate"], "mag_bias": w["b_mag"]}
    v = f64(w)

    def forward(x):
        z = foreign.gated(x - v["b_dec"], v["W_enc"], v["b_gate"], v["b_mag"], v["r_mag"])
        return z, z @ v["W_dec"] + v["b_dec"]

    return _dictionary_learning(folder, "GatedAutoEncoder", content, forward)


def dictionary_learning_jumprelu(folder: Path) -> Sample:
    w = numbers(43)
    forward = autoencoder(w, lambda h: foreign.jumprelu(h, w["threshold"]), False)
    return _dictionary_learning(folder, "JumpReluAutoEncoder", _of(w, *PLAIN, "threshold"), forward)


def _selection(k: int = K, threshold: float = -1.0) -> dict[str, np.ndarray]:
    return {"k": np.asarray(k, np.int32), "threshold": np.asarray(threshold, np.float32)}


def dictionary_learning_topk(folder: Path) -> Sample:
    w = numbers(44)
    content = {**_linear(w), "b_dec": w["b_dec"], **_selection()}
    forward = autoencoder(w, lambda h: foreign.topk(foreign.relu(h), K), True)
    return _dictionary_learning(folder, "AutoEncoderTopK", content, forward)


def dictionary_learning_batch_topk(folder: Path) -> Sample:
    w = numbers(45)
    content = {**_linear(w), "b_dec": w["b_dec"], **_selection(threshold=0.75)}
    forward = autoencoder(w, lambda h: foreign.jumprelu(h, 0.75), True)
    return _dictionary_learning(folder, "BatchTopKSAE", content, forward)


def dictionary_learning_matryoshka(folder: Path) -> Sample:
    w = numbers(46)
    content = {**_of(w, *PLAIN), **_selection(threshold=0.5), "group_sizes": np.asarray([3, 7, N - 10])}
    forward = autoencoder(w, lambda h: foreign.jumprelu(h, 0.5), True)
    return _dictionary_learning(folder, "MatryoshkaBatchTopKSAE", content, forward)


def _openai(folder: Path, name: str, w: Mapping[str, np.ndarray], is_tied: bool, more: Mapping[str, Any]) -> Path:
    content = {"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"].T, "latent_bias": w["b_enc"]}
    if not is_tied:
        content["decoder.weight"] = w["W_dec"].T
    counts = {"stats_last_nonzero": np.zeros(N, np.int64), "latents_mean_square": np.ones(N, np.float32)}
    path = folder / name / "autoencoders" / "6.pt"
    write_torch(path, {**content, **counts, **more})
    return path


def openai_topk(folder: Path) -> Sample:
    w = numbers(50)
    more = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    path = _openai(folder, "resid_post_mlp_v5_32k", w, False, more)
    return Sample(path, "openai", autoencoder(w, lambda h: foreign.topk(h, K), True, "layer_norm"))


def openai_relu_tied(folder: Path) -> Sample:
    w = numbers(51)
    path = _openai(folder, "mlp_post_act", w, True, {"activation": "ReLU", "activation_state_dict": {}})
    return Sample(path, "openai", autoencoder({**w, "W_dec": w["W_enc"].T}, foreign.relu, True))


def qwen_scope(folder: Path) -> Sample:
    w = numbers(52)
    path = folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / "layer7.sae.pt"
    arrays = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    write_torch(path, {name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return Sample(path, "qwen_scope", autoencoder(w, lambda h: foreign.topk(h, K), False))


def _scoped(w: Mapping[str, np.ndarray], threshold: Any, norm: float) -> Forward:
    """Of rows that were scaled to sqrt(d)."""
    v, scale = f64(w), np.sqrt(D) / norm

    def forward(x):
        z = foreign.jumprelu(scale * x.astype(np.float64) @ v["W_enc"] + v["b_enc"], threshold)
        return z, (z @ v["W_dec"] + v["b_dec"]) / scale

    return forward


def llama_scope(folder: Path) -> Sample:
    w = numbers(53)
    path = folder / "Llama3_1-8B-Base-L19R-8x"
    linear = {**_linear(w), "decoder.bias": w["b_dec"]}
    save(path / "checkpoints" / "final.safetensors", linear)
    cfg = {"hook_point_in": "blocks.19.hook_resid_post", "d_model": D, "d_sae": N, "jump_relu_threshold": 0.53}
    cfg |= {"act_fn": "jumprelu", "norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False}
    write_json(path / "hyperparams.json", {**cfg, "dataset_average_activation_norm": {"in": 17.125, "out": 17.125}})
    return Sample(path, "llama_scope", _scoped(w, 0.53, 17.125))


def llama_scope_r1(folder: Path) -> Sample:
    w = numbers(54)
    log = np.random.default_rng(3).standard_normal(N).astype(np.float32)
    save(folder / "L5R" / "sae_weights.safetensors", {**_linear(w), "decoder.bias": w["b_dec"], LOG: log})
    cfg = {"d_model": D, "expansion_factor": 3, "hook_point_in": "blocks.5.hook_resid_post"}
    write_json(folder / "L5R" / "config.json", {**cfg, "dataset_average_activation_norm": {"in": 2.5}})
    return Sample(folder / "L5R", "llama_scope", _scoped(w, np.exp(log.astype(np.float64)), 2.5))


LOG = "log_jumprelu_threshold"


def goodfire(folder: Path) -> Sample:
    w = numbers(55)
    content = {"encoder_linear.weight": w["W_enc"].T, "encoder_linear.bias": w["b_enc"]}
    content |= {"decoder_linear.weight": w["W_dec"].T, "decoder_linear.bias": w["b_dec"]}
    write_torch(folder / "Llama-3.1-8B-Instruct-SAE-l19.pth", content)
    return Sample(folder, "goodfire", autoencoder(w, foreign.relu, False))


def mwhanna(folder: Path) -> Sample:
    w = numbers(56)
    arrays = {**_of(w, "b_enc", "W_dec", "b_dec"), "W_enc": w["W_enc"].T}
    save(folder / "layer_11.safetensors", arrays)
    return Sample(folder / "layer_11.safetensors", "mwhanna", transcoder(w, foreign.relu, False))


def _across(sources: list[dict[str, np.ndarray]], b_enc: np.ndarray, activation: Callable) -> Forward:
    """One code for several sources."""
    parts = [f64(w) for w in sources]

    def forward(x):
        x = np.split(x.astype(np.float64), len(parts), axis=1)
        z = activation(sum(x_ @ w["W_enc"] for x_, w in zip(x, parts, strict=True)) + b_enc)
        return z, np.concatenate([z @ w["W_dec"] + w["b_dec"] for w in parts], axis=1)

    return forward


def crosscoder(folder: Path) -> Sample:
    w = [numbers(60), numbers(61)]
    content = {
        "W_enc": np.stack([each["W_enc"] for each in w]),
        "W_dec": np.stack([each["W_dec"] for each in w], axis=1),
        "b_enc": w[0]["b_enc"],
        "b_dec": np.stack([each["b_dec"] for each in w]),
    }
    write_torch(folder / "cc_weights.pt", content)
    write_json(folder / "cfg.json", {"d_in": D, "dict_size": N, "seed": 49})
    return Sample(folder, "crosscoder", _across(w, w[0]["b_enc"].astype(np.float64), foreign.relu))


def _sof(folder: Path, w: list[dict[str, np.ndarray]], kind: str, more: Mapping[str, np.ndarray]) -> None:
    arrays = {
        "encoder.weight": np.stack([each["W_enc"] for each in w]),
        "encoder.bias": w[0]["b_enc"],
        "decoder.weight": np.stack([each["W_dec"] for each in w]),
        "decoder.bias": np.stack([each["b_dec"] for each in w]),
        "target_rms": np.asarray(1, np.float32),
        "activation_global_scale": np.ones(len(w), np.float32),
        "activation_mean": np.full((len(w), D), np.nan, np.float32),
        "activation_std": np.full((len(w), D), np.nan, np.float32),
    }
    save(folder / "model.safetensors", {**arrays, **more})
    write_json(folder / "config.json", {"dict_class": kind, "activation_dim": D, "dict_size": N, "num_layers": len(w)})


def sof_relu(folder: Path) -> Sample:
    w = [numbers(62), numbers(63), numbers(64)]
    _sof(folder, w, "CrossCoder", {"code_normalization_id": np.asarray(1)})
    return Sample(folder, "sof", _across(w, w[0]["b_enc"].astype(np.float64), foreign.relu))


def sof_batch_topk(folder: Path) -> Sample:
    """Rows are centred and scaled, values ranked by the sum of their decoders' norms."""
    w = [numbers(65), numbers(66)]
    rng = np.random.default_rng(4)
    mean, std = rng.standard_normal((2, D)).astype(np.float32), rng.uniform(1, 2, (2, D)).astype(np.float32)
    scale = (1 / np.sqrt((std.astype(np.float64) ** 2).sum(1) + 1e-8)).astype(np.float32)
    more = {"activation_mean": mean, "activation_std": std, "activation_global_scale": scale}
    more |= {"code_normalization_id": np.asarray(1), "k": np.asarray(K), "threshold": np.asarray(2.5, np.float32)}
    _sof(folder, w, "BatchTopKCrossCoder", more)
    norms = sum(np.linalg.norm(each["W_dec"].astype(np.float64), axis=1) for each in w)
    unit = [{**each, "W_dec": each["W_dec"] / norms[:, None]} for each in w]
    ranked = _across(unit, w[0]["b_enc"].astype(np.float64), lambda h: foreign.jumprelu(h * norms, 2.5))
    m, s = mean.astype(np.float64).reshape(-1), np.repeat(scale.astype(np.float64), D)

    def forward(x):
        z, y = ranked((x - m) * s)
        return z, y / (s + 1e-8) + m

    return Sample(folder, "sof", forward)


def _clt(folder: Path, w: list[dict[str, np.ndarray]], has_threshold: bool) -> Forward:
    """A layer each of w, whose W_dec is [N, L - i, D]."""
    folder.mkdir(parents=True)
    for i, layer in enumerate(w):
        names = ("b_enc", "b_dec", *(["threshold"] if has_threshold else []))
        encoder = {f"W_enc_{i}": np.ascontiguousarray(layer["W_enc"].T)}
        save_file(encoder | {f"{name}_{i}": layer[name] for name in names}, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": layer["W_dec"]}, folder / f"W_dec_{i}.safetensors")
    _circuit_tracer_config(folder, "cross_layer_transcoder")

    def forward(x):
        x, y, codes = x.astype(np.float64), np.zeros(x.shape), []
        for i, layer in enumerate(map(f64, w)):
            y[:, i * D : (i + 1) * D] += layer["b_dec"]
            h = x[:, i * D : (i + 1) * D] @ layer["W_enc"] + layer["b_enc"]
            codes.append(foreign.jumprelu(h, layer["threshold"]) if has_threshold else np.maximum(h, 0))
            for j in range(len(w) - i):
                y[:, (i + j) * D : (i + j + 1) * D] += codes[-1] @ layer["W_dec"][:, j]
        return np.concatenate(codes, 1), y

    return forward


def _circuit_tracer_config(folder: Path, kind: str) -> None:
    settings = {"model_name": "someone/model", "model_kind": kind, "scan": "x"}
    settings |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))


def _clt_weights(n_layers: int) -> list[dict[str, np.ndarray]]:
    w = [numbers(80 + i) for i in range(n_layers)]
    for i, layer in enumerate(w):
        more = [numbers(90 + 10 * i + j)["W_dec"] for j in range(n_layers - i - 1)]
        layer["W_dec"] = np.ascontiguousarray(np.stack([layer["W_dec"], *more], 1))
    return w


def circuit_tracer_clt(folder: Path) -> Sample:
    return Sample(folder, "circuit_tracer", _clt(folder, _clt_weights(3), False))


def circuit_tracer_jumprelu_clt(folder: Path) -> Sample:
    return Sample(folder, "circuit_tracer", _clt(folder, _clt_weights(2), True))


SAMPLES: dict[str, Callable[[Path], Sample]] = {
    make.__name__: make
    for make in (
        saelens_topk,
        saelens_topk_rescaled,
        saelens_abstopk,
        saelens_topk_layer_norm,
        saelens_standard_rescaled_rows,
        saelens_standard_not_subtracted,
        saelens_jumprelu,
        saelens_gated,
        saelens_skip_transcoder,
        saelens_jumprelu_skip_transcoder,
        saelens_before_6,
        sparsify_autoencoder,
        sparsify_skip_transcoder,
        sparsify_skip,
        saelens_and_sparsify,
        gemma_scope,
        gemma_scope_embedding,
        gemma_scope_transcoder,
        gemma_scope_2,
        gemma_scope_2_affine,
        gemma_scope_2_clt,
        dictionary_learning_autoencoder,
        dictionary_learning_new,
        dictionary_learning_gated,
        dictionary_learning_jumprelu,
        dictionary_learning_topk,
        dictionary_learning_batch_topk,
        dictionary_learning_matryoshka,
        openai_topk,
        openai_relu_tied,
        qwen_scope,
        llama_scope,
        llama_scope_r1,
        goodfire,
        mwhanna,
        crosscoder,
        circuit_tracer_clt,
        circuit_tracer_jumprelu_clt,
        sof_relu,
        sof_batch_topk,
    )
}
