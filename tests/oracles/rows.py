"""Rows in int8 with a scale each, number by number in float64, from the head of sae_jax/activations/rows.py."""

import numpy as np


def encode(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8[N, D], scale f32[N]) of rows between the smallest and the largest that scales are made for."""
    numbers_ND, scale_N = np.zeros(rows_ND.shape, np.int8), np.zeros(len(rows_ND), np.float32)
    for n, row in enumerate(rows_ND.astype(np.float64)):
        scale_N[n] = max(abs(x) for x in row) / 127
        for d, x in enumerate(row):
            numbers_ND[n, d] = round(x / float(scale_N[n])) if scale_N[n] else 0  # ties to even
    return numbers_ND, scale_N


def read(stored: bytes, d: int) -> list[float]:
    """The d numbers of one stored row, which ends with its scale as a little-endian float32."""
    numbers, scale = np.frombuffer(stored[:d], "i1"), np.frombuffer(stored[d:], "<f4")
    return [float(number) * float(scale[0]) for number in numbers]
