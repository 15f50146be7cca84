"""`sae-jax evaluate RUN`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from sae_jax import config, lm
from sae_jax.activations import tokens
from sae_jax.activations.harvest import keep
from sae_jax.activations.store import ActivationSet, open_activations
from sae_jax.commands import runtime
from sae_jax.evaluation.reconstruction import Reconstruction
from sae_jax.evaluation.splice import evaluate_on_text
from sae_jax.progress import Progress, console
from sae_jax.train.checkpoint import load, read_config
from sae_jax.train.logs import read_metrics
from sae_jax.types import UsageError

SHOWN = (
    "fvu",
    "nmse_uncentered",
    "l0",
    "cosine",
    "dead_fraction",
    "silent_fraction",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "kl",
    "loss_recovered",
)


@dataclass(frozen=True)
class Evaluate:
    """Measure a run on held-out text, or on rows of a set where there is no text. Writes RUN/evaluation.json."""

    run: tyro.conf.Positional[str]
    """directory of the run"""
    data: str | None = None
    """another activation set to take rows, text and language model from; default: the run's own"""
    model: str | None = None
    """another reference for the language model, if it moved"""
    tokens: int = 100_000
    """tokens (or rows) to measure on, at most"""
    batch_tokens: int = 4096
    """tokens of one forward pass"""
    ema: bool = False
    """measure the averaged weights instead of the live ones"""

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.batch_tokens < 1:
            raise UsageError(f"--tokens={self.tokens} and --batch-tokens={self.batch_tokens} must be at least 1")


def run(argv: Sequence[str]) -> None:
    """Parse, measure, show."""
    command = config.parse(Evaluate, argv, "sae-jax evaluate")
    runtime.warn_of_idle_gpu()
    result = evaluate(command)
    table = Table("metric", "value", title=f"{command.run} on {result['text'] or 'rows of ' + result['data']}")
    for name in SHOWN:
        if name in result:
            table.add_row(name, f"{result[name]:.4f}")
    Console().print(table)


def evaluate(command: Evaluate) -> dict[str, Any]:
    """All metrics of a run, as written to RUN/evaluation.json."""
    facts = read_config(Path(command.run))
    sae = load(command.run, ema=command.ema)
    activations = open_activations(command.data or facts["data"])
    source = activations.source(facts["site"])
    if source.d != facts["d_model"]:
        raise UsageError(f"{activations.path}: {source.name} has {source.d} dimensions, the run {facts['d_model']}")
    text = activations.spec.heldout
    if text and (command.model or source.model):
        result = _on_text(command, sae, activations, source, text)
    else:
        missing = "held-out text" if source.model else "language model"
        console.print(
            f"{activations.path} names no {missing}: downstream metrics are left out, rows of the set are used"
        )
        result = _on_rows(command, sae, activations, source.name)
        text = None
    logged = read_metrics(Path(command.run))
    result = {
        "text": text,
        "data": activations.path,
        "site": source.name,
        "weights": "ema" if command.ema else "live",
        # Of the run, over train.dead_after_tokens; silent_fraction is over the rows measured here.
        **({"dead_fraction": logged[-1]["dead_fraction"]} if logged else {}),
        **result,
    }
    config.write_json(Path(command.run) / "evaluation.json", result)
    return result


def _on_text(command: Evaluate, sae, activations: ActivationSet, source, text: str) -> dict[str, Any]:
    model = lm.load(command.model or source.model)
    tokenizer = lm.tokenizer(command.model or source.model)
    if model.digest != source.model_digest:
        console.print(f"warning: the weights of {command.model or source.model} are not those the set was made with")
    context = activations.spec.context
    special = np.asarray(tokenizer.special_ids, np.int32)
    wanted = max(command.tokens // context, 1)
    sequences = np.stack(list(tokens.sequences(text, tokenizer, context, 0, wanted)))
    size = max(command.batch_tokens // context, 1)
    with Progress("evaluate", len(sequences), "sequences") as progress:
        return evaluate_on_text(
            sae,
            model,
            lm.parse_hook(source.hook, model.spec),
            activations.stats(source.name).mean,
            (sequences[i : i + size] for i in range(0, len(sequences), size)),
            lambda ids_BT, norm_BT: keep(ids_BT, norm_BT[..., None], special, activations.spec.max_norm_multiple),
            progress.update,
        )


def _on_rows(command: Evaluate, sae, activations: ActivationSet, source: str) -> dict[str, Any]:
    reconstruction = Reconstruction(sae.b_enc.shape[0])
    total, done = min(command.tokens, activations.n_rows), 0
    with Progress("evaluate", total, "rows") as progress:
        for rows_ND in itertools.takewhile(lambda _: done < total, _chunks(activations, source)):
            reconstruction.add(sae, rows_ND[: total - done])
            done += len(rows_ND)
            progress.update(min(done, total))
    return reconstruction.result()


def _chunks(activations: ActivationSet, source: str) -> Iterator[np.ndarray]:
    for chunk in range(activations.n_chunks):
        yield activations.read_chunk(source, chunk).astype(np.float32)
