"""How fast is a harvest, beside torch running the same model on the same CPU?

Ours is `harvest` itself: text, tokens, model, masks, shuffle, digests, disk. Torch gets the tokens for free and keeps
nothing: transformers' model in f32, inference mode, stopped by an exception from a hook after the block whose output is
wanted, its fastest honest setting. Both do the same sequences in batches of the same size, in turns within one run.

    python experiments/benchmarks/harvest.py --out harvest.json      # needs torch and transformers; a few minutes
    python experiments/benchmarks/harvest.py --smoke                 # without torch: ours alone

Guess beforehand: 1.2 to 1.5 times torch, what the forward pass alone gives.

Answer: RESULTS.md.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import tyro
from rich.table import Table

from sae_jax import lm
from sae_jax.activations import tokens
from sae_jax.activations.harvest import HarvestConfig, harvest
from sae_jax.lm import weights
from sae_jax.lm.family import family
from sae_jax.lm.params import init
from sae_jax.progress import plain_console

CONTEXT = 128
GPT2_SMALL = lm.Spec("gpt2", 12, 768, 12, 64, 3072, 50257, 1024)
SMOLLM2 = family("llama").read_spec(
    {
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
)


@dataclass(frozen=True)
class Benchmark:
    """Sizes of the benchmark."""

    tokens: int = 400_000
    small_tokens: int = 65_536  # of the models with the shapes of GPT-2 small and SmolLM2-135M
    batch_tokens: int = 4096
    runs: int = 5
    smoke: bool = False
    out: Path | None = None


def main(config: Benchmark) -> None:
    n_tokens, n_small, runs = (8192, 0, 1) if config.smoke else (config.tokens, config.small_tokens, config.runs)
    with tempfile.TemporaryDirectory() as folder:
        cases = [("bundled", "resid_post.2", n_tokens)]
        if n_small:
            cases.append((str(random_model(Path(folder) / "gpt2-small", GPT2_SMALL)), "resid_post.5", n_small))
            cases.append((str(random_model(Path(folder) / "smollm2", SMOLLM2)), "resid_post.10", n_small))
        rows = [measure(model, hook, n, config.batch_tokens, runs, Path(folder)) for model, hook, n in cases]
    table = Table("model", "hook", "ours tokens/s", "torch tokens/s", "ours / torch, min median max")
    for row in rows:
        ratio = " ".join(f"{r:.2f}" for r in row["ratio"]) or "torch is not installed"
        table.add_row(Path(row["model"]).name, row["hook"], f"{row['ours']:,.0f}", f"{row['torch']:,.0f}", ratio)
    plain_console().print(table)
    if config.out:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(rows, indent=1))


def measure(model: str, hook: str, n_tokens: int, batch_tokens: int, runs: int, folder: Path) -> dict:
    """Tokens per second of both, medians over the runs, and the ratios of neighbouring runs."""
    theirs = torch_seconds(model, hook, n_tokens, batch_tokens) if importlib.util.find_spec("torch") else None
    ours_s, torch_s = [], []
    for run in range(runs + 1):
        began = time.perf_counter()
        settings = {"context": CONTEXT, "tokens": n_tokens, "batch_tokens": batch_tokens, "text": "stdlib"}
        harvest(HarvestConfig(model=(model,), hooks=(hook,), **settings), str(folder / f"{Path(model).name}-{run}"))
        seconds = time.perf_counter() - began
        if run:  # the first compiles
            ours_s.append(seconds)
            torch_s.append(theirs() if theirs else float("inf"))
    n = n_tokens // CONTEXT * CONTEXT
    ratios = sorted(t / o for t, o in zip(torch_s, ours_s, strict=True)) if theirs else []
    return {
        "model": model,
        "hook": hook,
        "ours": n / statistics.median(ours_s),
        "torch": n / statistics.median(torch_s),
        "ratio": [ratios[0], statistics.median(ratios), ratios[-1]] if ratios else [],
    }


def torch_seconds(model: str, hook: str, n_tokens: int, batch_tokens: int):
    """A function that runs torch over the same sequences once and says how long it took."""
    import torch
    from transformers import AutoModelForCausalLM

    class Stop(Exception):  # noqa: N818
        pass

    net = AutoModelForCausalLM.from_pretrained(lm.locate(model), dtype=torch.float32).eval()
    kept: list[torch.Tensor] = []

    def stop(module, arguments, output):
        kept.append(output[0] if isinstance(output, tuple) else output)
        raise Stop

    blocks = net.transformer.h if hasattr(net, "transformer") else net.model.layers
    blocks[int(hook.rpartition(".")[2])].register_forward_hook(stop)
    ids_ST, _ = tokens.TokenText("stdlib", lm.tokenizer(model), CONTEXT).stacked(0, n_tokens // CONTEXT)
    ids = torch.tensor(ids_ST, dtype=torch.long)

    def once() -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            for first in range(0, len(ids), batch_tokens // CONTEXT):
                kept.clear()
                try:
                    net(ids[first : first + batch_tokens // CONTEXT], use_cache=False)
                except Stop:
                    continue
        return time.perf_counter() - began

    once()
    return once


def random_model(folder: Path, spec: lm.Spec) -> Path:
    """A model of this shape with random weights and the bundled tokenizer."""
    weights.save(folder, spec, init(spec, jax.random.key(0)))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((lm.locate("bundled") / name).read_bytes())
    return folder


if __name__ == "__main__":
    main(tyro.cli(Benchmark))
