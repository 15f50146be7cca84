"""Dictionaries for the libraries to load, with what we make of some rows: python -m tests.interchange.peers.export DIR

Of every variant, in every format that can hold it; and for circuit-tracer, trained on the bundled language model.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import sae_jax
from sae_jax import UserError
from sae_jax.activations.sample import sample_rows
from sae_jax.artifact import Dictionary
from sae_jax.saes.base import AbstractSae
from tests.test_artifact import D, forms

FORMATS = ("saelens", "sparsify", "saelens_and_sparsify", "dictionary_learning")
LAYERS, TOKENS = 4, 20_000
TRAINING = {"steps": 60, "batch_size": 512, "dtype": "float32", "dead_after_tokens": 10_000}
B = 40


def main(folder: Path) -> None:
    """Write all of them."""
    x = np.random.default_rng(9).standard_normal((B, D)).astype(np.float32)
    for name, sae in {**forms(), **_with_thresholds(forms())}.items():
        for layout in FORMATS:
            path = folder / layout / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                sae_jax.export(sae, layout, path)
            except UserError as error:
                print(f"{layout}: {error}", flush=True)
            else:
                np.savez(path.with_suffix(".npz"), x=x, z=_dense(sae, x), y=np.asarray(sae(x)))
    _for_circuit_tracer(folder / "circuit_tracer", folder / "set")


def _with_thresholds(saes: dict[str, AbstractSae]) -> dict[str, AbstractSae]:
    """Transcoders as they are imported, with thresholds and with a ReLU."""
    made: dict[str, AbstractSae] = {}
    for name in ("transcoder", "transcoder-skip"):
        sae = saes[name]
        threshold = jnp.asarray(np.random.default_rng(5).standard_normal(len(sae.b_enc)), jnp.float32)
        settings = dataclasses.replace(sae.config, activation="jumprelu")
        made[f"jumprelu-{name}"] = dataclasses.replace(sae, config=settings, log_threshold=threshold)
        made[f"relu-{name}"] = dataclasses.replace(sae, config=dataclasses.replace(sae.config, activation="relu"))
    return made


def _for_circuit_tracer(out: Path, data: Path) -> None:
    reads, writes = ([f"{point}.{i}" for i in range(LAYERS)] for point in ("mlp_in", "mlp_out"))
    hooks = (*reads, *writes)
    sae_jax.harvest(data, model="bundled", text="heldout", hooks=hooks, tokens=TOKENS, context=128)
    rows = np.stack([sample_rows(sae_jax.open_activations(data), name)[:B] for name in reads])
    out.mkdir(parents=True)
    for name, settings in {"relu": {"activation": "relu"}, "skip": {"activation": "relu", "skip": True}}.items():
        members = [
            sae_jax.train(data, variant="transcoder", site=x, reconstruct=y, n_latents=256, **settings, **TRAINING)
            for x, y in zip(reads, writes, strict=True)
        ]
        sae_jax.export(members, "circuit_tracer", out / name)
        _expect(
            out / f"{name}.npz",
            rows,
            [_dense(d, x) for d, x in zip(members, rows, strict=True)],
            [np.asarray(d(x)) for d, x in zip(members, rows, strict=True)],
        )
    for name in ("relu", "batch_topk"):
        settings = {"activation": name, "mask": "weakly_causal", "n_latents": LAYERS * 128}
        d = sae_jax.train(
            data, variant="crosscoder", site=tuple(reads), reconstruct=tuple(writes), **settings, **TRAINING
        )
        sae_jax.export(d, "circuit_tracer", out / f"clt_{name}")
        x = np.concatenate(rows, 1)
        _expect(out / f"clt_{name}.npz", rows, np.split(_dense(d, x), LAYERS, 1), np.split(np.asarray(d(x)), LAYERS, 1))


def _expect(path: Path, x: np.ndarray, z: list[np.ndarray], y: list[np.ndarray]) -> None:
    np.savez(path, x=x, z=np.stack(z), y=np.stack(y))


def _dense(d: Dictionary | AbstractSae, x: np.ndarray) -> np.ndarray:
    n_latents = (d.sae if isinstance(d, Dictionary) else d).config.n_latents
    return np.asarray(d.encode(x).to_dense(n_latents))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
