"""Float64 numpy definitions of what compares dictionaries, a latent and a row at a time; imports nothing of ours."""

import numpy as np


def cosines(a_FD: np.ndarray, b_GD: np.ndarray) -> np.ndarray:
    """f64[F, G]; 0 for a row of zeros."""
    a_FD, b_GD = np.float64(a_FD), np.float64(b_GD)
    out = np.zeros((len(a_FD), len(b_GD)))
    for f, a in enumerate(a_FD):
        for g, b in enumerate(b_GD):
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            out[f, g] = a @ b / norms if norms else 0.0
    return out


def mmcs(a_FD: np.ndarray, b_GD: np.ndarray) -> float:
    return float(cosines(a_FD, b_GD).max(1).mean())


def duplicates(w_FD: np.ndarray, above: float) -> list[tuple[int, int]]:
    cos = cosines(w_FD, w_FD)
    return [(i, j) for i in range(len(w_FD)) for j in range(i + 1, len(w_FD)) if cos[i, j] > above]


def absorption(z_NF, w_dec_FD, codes_NG, directions_GD, parents_G, min_cosine, min_share) -> list[float]:
    """Share of each parent's rows on which its latent is silent while its children's carry its direction."""
    z_NF, w_dec_FD, directions_GD = map(np.float64, (z_NF, w_dec_FD, directions_GD))
    cos = cosines(w_dec_FD, directions_GD)
    shares = []
    for parent in sorted({int(p) for p in parents_G if p >= 0}):
        own = int(np.argmax(cos[:, parent]))
        children = [g for g, p in enumerate(parents_G) if p == parent]
        theirs = [
            f
            for f in range(len(w_dec_FD))
            if f != own and cos[f, parent] >= min_cosine and max(cos[f, g] for g in children) >= min_cosine
        ]
        n_absorbed = n_there = 0
        for z, codes in zip(z_NF, codes_NG, strict=True):
            if codes[parent] > 0:
                n_there += 1
                carried = sum(z[f] * (w_dec_FD[f] @ directions_GD[parent]) for f in theirs)
                n_absorbed += z[own] == 0 and carried >= min_share * codes[parent]
        shares.append(n_absorbed / n_there if n_there else np.nan)
    return shares
