import numpy as np


def interval(after, before, times=2000):
    rng = np.random.default_rng(1)
    difference = 100 * (np.array(after, float) - np.array(before, float))
    draws = rng.integers(len(difference), size=(times, len(difference)))
    return np.percentile(difference[draws].mean(1), [2.5, 97.5])
