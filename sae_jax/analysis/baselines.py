"""The neurons of the same layer, measured as latents are: what there is to interpret without a dictionary."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sae_jax import lm
from sae_jax.activations.forward import read_hooks
from sae_jax.analysis.examples import Activations, DenseBlock, strongest_dense, token_purity

BATCH = 64  # sequences


def neuron_token_purity(model: lm.LanguageModel, layer: int, table: Activations) -> float:
    """`token_purity` of the MLP neurons of a layer, on the rows of `table`."""
    lm.check_ids(table.sequences, model.spec)
    neurons = lm.Hook(layer, "mlp_act")

    def blocks() -> Iterator[DenseBlock]:
        for first in range(0, len(table.sequences), BATCH):
            ids_BT = table.sequences[first : first + BATCH]
            acts, _ = read_hooks(model, ids_BT, (neurons,), "float32")
            keep_BT = table.has_row[first : first + BATCH]
            seq, pos = np.nonzero(keep_BT)
            yield np.asarray(acts[str(neurons)])[keep_BT], ids_BT[keep_BT], seq + first, pos

    return token_purity(strongest_dense(blocks()))
