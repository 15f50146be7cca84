"""Float64 numpy definition of latent scaling, by least squares one latent at a time; imports nothing of ours."""

import numpy as np


def beta(f_B, d_D, target_BD) -> float:
    """The beta that minimises sum ||target - beta f d||^2."""
    written_BD = f_B[:, None] * d_D[None]
    return float(np.linalg.lstsq(written_BD.reshape(-1, 1), target_BD.ravel(), rcond=None)[0][0])


def scaling(f_BF, latents, dec_own, x_own, x_hat_own, x_other, x_hat_other):
    """(error, reconstruction, own error without the latent, own reconstruction), each [L]."""
    found = []
    for i in latents:
        written_BD = f_BF[:, i, None] * dec_own[i]
        targets = (x_other - x_hat_other, x_hat_other, x_own - x_hat_own + written_BD, x_hat_own)
        found.append([beta(f_BF[:, i], dec_own[i], target) for target in targets])
    return np.array(found).T
