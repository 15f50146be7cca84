"""Share of the time that goes into work which is kept, written from Daly 2006; imports nothing of ours."""

import numpy as np


def exact(interval: float, save: float, restore: float, between: float) -> float:
    """Of interruptions at exponential intervals that may also meet a save (equation 13: the time to get T seconds done,
    M e^(R/M) (e^((T + C)/M) - 1))."""
    interval, save, restore, between = np.float64([interval, save, restore, between])
    return float(interval / (between * np.exp(restore / between) * np.expm1((interval + save) / between)))
