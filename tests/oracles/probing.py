"""SCR, TPP and absorption in float64 loops, from their definitions.

SCR, TPP: Karvonen et al. 2024, arXiv 2411.18895. Absorption: Karvonen et al. 2025, arXiv 2503.09532, appendix on
absorption fraction, after Chanin et al. 2024, arXiv 2409.14507.

A probe is (weights, bias). Activations are x; a latent i adds codes[:, i] times decoder row i to them.
"""

import numpy as np


def accuracy(probe, x, y):
    weight, bias = probe
    return np.mean([(np.dot(row, weight) + bias > 0) == label for row, label in zip(x, y, strict=True)])


def without(x, codes, w_dec, latents):
    out = np.array(x, np.float64)
    for i in latents:
        out = out - np.outer(codes[:, i], w_dec[i])
    return out


def effects(codes, y, w_dec, probe):
    difference = codes[y].mean(0) - codes[~y].mean(0)
    return difference, np.array([d * np.dot(row, probe[0]) for d, row in zip(difference, w_dec, strict=True)])


def largest(effect, n):
    order = sorted(range(len(effect)), key=lambda i: -effect[i])
    return [i for i in order if effect[i] != 0][:n]


def scr(biased, balanced, spurious, train, test, w_dec, n):
    """train: (codes, spurious label); test: (x, codes, target)."""
    x, codes, target = test
    before = accuracy(biased, x, target)
    clean = accuracy(balanced, x, target)
    if clean - before < 0.001:
        return 0.0
    latents = largest(abs(effects(*train, w_dec, spurious)[1]), n)
    return (accuracy(biased, without(x, codes, w_dec, latents), target) - before) / (clean - before)


def tpp(probes, train, test, w_dec, n):
    """train: [(codes, label)], test: [(x, codes, label)] of each class. The score of each class."""
    scores = []
    for i, probe in enumerate(probes):
        difference, effect = effects(*train[i], w_dec, probe)
        latents = largest(np.where(difference < 0, 0.0, effect), n)
        lost = [
            accuracy(probe_j, x, y) - accuracy(probe_j, without(x, codes, w_dec, latents), y)
            for probe_j, (x, codes, y) in zip(probes, test, strict=True)
        ]
        scores.append(lost[i] - np.mean([each for j, each in enumerate(lost) if j != i]))
    return scores


def absorption_fraction(code, x, w_dec, direction, main, min_cosine, min_share, max_absorbing):
    p = direction / np.sqrt(np.dot(direction, direction))
    cosine = [np.dot(row, p) / np.sqrt(np.dot(row, row)) for row in w_dec]
    projection = [value * np.dot(row, p) for value, row in zip(code, w_dec, strict=True)]
    whole, by_main = np.dot(x, p), sum(projection[i] for i in main)
    others = [
        projection[i] for i in range(len(code)) if i not in main and cosine[i] >= min_cosine and projection[i] > 0
    ]
    absorbing = sum(sorted(others, reverse=True)[:max_absorbing])
    if by_main >= whole or absorbing / whole < min_share:
        return 0.0
    if by_main <= 0:
        return 1.0
    taken = min(absorbing, whole - by_main)
    return taken / (taken + by_main)


def is_full(code, x, w_dec, direction, main, min_cosine, min_share):
    p = direction / np.sqrt(np.dot(direction, direction))
    if any(code[i] > 0 for i in main):
        return False
    projection = [value * np.dot(row, p) for value, row in zip(code, w_dec, strict=True)]
    top = int(np.argmax(projection))
    cosine = np.dot(w_dec[top], p) / np.sqrt(np.dot(w_dec[top], w_dec[top]))
    return cosine >= min_cosine and np.dot(x, p) >= 0 and projection[top] / np.dot(x, p) >= min_share
