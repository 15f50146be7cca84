"""Adam in float64."""

import numpy as np


def adam(weight, gradient, mean, square, step, rate, b1=0.9, b2=0.999, eps=6.25e-10):
    """One Adam step (Kingma and Ba 2015, algorithm 1): new weight and moments; `step` counts from 1."""
    mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
    update = (mean / (1 - b1**step)) / (np.sqrt(square / (1 - b2**step)) + eps)
    return weight - rate * update, mean, square
