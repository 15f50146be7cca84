"""What a study is, and what it is given.

An evaluator (base.py) adds up what batches contribute. What cannot be put so, because it picks examples of its own,
edits the model or trains probes, is a study. Every file of studies/ is one: a dataclass `Study`, whose fields say how
much it looks at, with one method and a table that describes its metrics.

    metrics(case) -> Metric, ...

A study is deterministic: a function of the case, its seed and its own fields. A new study is one new file.
"""

from __future__ import annotations

import abc
import importlib
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sae_jax.activations.forward import read_hooks
from sae_jax.evaluation.base import Description, Metric
from sae_jax.evaluation.prompts import Subject
from sae_jax.evaluation.text import HeldOut
from sae_jax.saes.base import AbstractSae


@dataclass(frozen=True)
class Block:
    """Sequences, and the rows of them that a set would hold."""

    ids: np.ndarray  # i32[S, T]; S is the same for all blocks: the last is filled up with zeros
    is_row: np.ndarray  # bool[S, T]
    x: np.ndarray  # f32[S, T, X]: what is encoded


@dataclass(frozen=True)
class Case:
    """A dictionary in its language model, and text that no row of its set came from."""

    subject: Subject
    text: HeldOut
    seed: int = 0

    @classmethod
    def of(cls, sae: AbstractSae, text: HeldOut, first_token: int | None) -> Case:
        """A dictionary at the hooks of a text; `first_token` as its set has it."""
        first = text.tokenizer.separator_id if first_token is None else first_token
        return cls(Subject(sae, text.model, text.tokenizer, text.encoded, text.reconstructed, first), text)

    def blocks(self, n_sequences: int, size: int = 16) -> Iterator[Block]:
        """The first sequences of the text, at most `n_sequences`, `size` at a time."""
        n = min(n_sequences, len(self.text.sequences))
        size = min(size, n)
        for first in range(0, n, max(size, 1)):
            parts = (part[first : min(first + size, n)] for part in (self.text.sequences, self.text.text))
            ids_ST, text_ST = (np.pad(part, ((0, size - len(part)), (0, 0))) for part in parts)
            acts, norm_STH = read_hooks(self.subject.model, ids_ST, self.subject.encoded, "float32")
            x_STX = np.concatenate([np.asarray(acts[str(hook)]) for hook in self.subject.encoded], axis=-1)
            yield Block(ids_ST, self.text.keep(text_ST, np.asarray(norm_STH)), x_STX)


class Study(abc.ABC):
    """Measures one dictionary, with examples of its own."""

    SUITE: ClassVar[str]  # openai, probing or causal
    ORDER: ClassVar[int]  # lower ones are shown first
    VERSION: ClassVar[int] = 1  # of what is measured: records of another one do not count
    METRICS: ClassVar[Mapping[str, Description]]  # of every metric, in the order in which they are shown

    @abc.abstractmethod
    def metrics(self, case: Case) -> Iterable[Metric]:
        """What is measured."""


def studies() -> dict[str, type[Study]]:
    """The study in each file of studies/, in the order in which they are shown."""
    package = importlib.import_module("sae_jax.evaluation.studies")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    kinds = {name: importlib.import_module(f"{package.__name__}.{name}").Study for name in names}
    return dict(sorted(kinds.items(), key=lambda item: (item[1].ORDER, item[0])))
