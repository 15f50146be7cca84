"""The threshold that a selection over a batch stands for, where none is stored: from rows of a set.

Rows by themselves have no batch. Of N rows the N k largest positive pre-activations are active, and the threshold lies
just below the smallest of these: k latents of a row are active on average, as in one batch of all the rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sae_jax.activations.sample import sample_rows
from sae_jax.activations.store import open_activations
from sae_jax.interchange.foreign import Foreign
from sae_jax.interchange.lazy import SLAB_BYTES, Lazy
from sae_jax.record import SourceRecord
from sae_jax.types import UsageError, UserError

N_ROWS = 4096  # of a set


def rows_for(sources: Sequence[SourceRecord], calibrate: Any) -> np.ndarray:
    """Rows f32[N, X] of what a dictionary encodes.

    Args:
        sources: that it encodes.
        calibrate: rows, or the path of a set that has these sources, or one and no other.

    Raises:
        UserError: rows of another width, or a set that lacks a source.
    """
    if isinstance(calibrate, str | os.PathLike):
        activations = open_activations(calibrate)
        names, there = [source.name for source in sources], [source.name for source in activations.spec.sources]
        if len(names) == len(there) == 1:
            names = there
        calibrate = np.concatenate([sample_rows(activations, name)[:N_ROWS] for name in names], axis=1)
    rows, width = np.asarray(calibrate, np.float32), sum(source.width for source in sources)
    if rows.ndim != 2 or rows.shape[1] != width or not len(rows):
        raise UserError(f"rows to calibrate with have shape {list(rows.shape)}; the dictionary encodes rows of {width}")
    return rows


def with_threshold(foreign: Foreign, calibrate: Any) -> Foreign:
    """The dictionary with the threshold that it needs and has not.

    Args:
        foreign: with w_enc, b_enc and b_dec, which is subtracted before encoding, and k in its config.
        calibrate: as for `rows_for`; None: none is given.
    """
    if foreign.has_all:
        if calibrate is not None:
            raise UsageError("the dictionary is whole, and nothing is to be calibrated; leave --calibrate out")
        return foreign
    if calibrate is None:
        raise UserError(
            f"{foreign.arrays['w_enc'].name}: selects the largest values of a batch, and has no threshold for rows by "
            f"themselves; give --calibrate SET, from whose rows one is taken"
        )
    x = rows_for(foreign.encodes, calibrate) - foreign.arrays["b_dec"].array()
    b_enc, n_active = foreign.arrays["b_enc"].array(), len(x) * (foreign.config.n_active or 0)
    largest = np.zeros(0, np.float32)
    w_enc, step = foreign.arrays["w_enc"], max(1, SLAB_BYTES // (4 * max(x.shape)))
    for start in range(0, len(b_enc), step):
        stop = min(start + step, len(b_enc))
        pre = x @ w_enc.rows(start, stop).T + b_enc[start:stop]
        largest = np.concatenate([largest, pre[pre > 0]])
        if len(largest) > n_active:
            largest = np.partition(largest, -n_active)[-n_active:]
    threshold = float(largest.min(initial=np.inf)) if len(largest) == n_active else 0.0
    said = f"no threshold was stored: {threshold:.4g} leaves {foreign.config.n_active} latents of a row given active"
    arrays = {**foreign.arrays, "threshold": Lazy.of(np.asarray(threshold * (1 - 1e-6), np.float32))}
    return replace(foreign, arrays=arrays, changes=(*foreign.changes, said))
