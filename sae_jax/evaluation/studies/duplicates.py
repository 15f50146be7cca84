"""Latents that say the same: the share of latents whose decoder row has a cosine above 0.9 with that of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sae_jax.evaluation import dictionaries, study
from sae_jax.evaluation.base import OF_WEIGHTS, Description, Metric
from sae_jax.evaluation.study import Case


@dataclass(frozen=True)
class Study(study.Study):
    """Duplicates among latents."""

    above: float = 0.9

    SUITE = "probing"
    ORDER = 290
    METRICS: ClassVar[Mapping[str, Description]] = {
        "duplicate_fraction": Description(
            "duplicates", "share of latents with a cosine above 0.9 with another", no_interval=OF_WEIGHTS
        )
    }

    def metrics(self, case: Case) -> Iterator[Metric]:
        """See Study."""
        w_dec = case.subject.sae.w_dec
        pairs_P2 = dictionaries.duplicates(w_dec, self.above)
        yield Metric("duplicate_fraction", len(np.unique(pairs_P2)) / len(w_dec))
