"""Matrices of known singular values, bounded in float64."""

import numpy as np

TARGETS = {
    "soft": lambda s, c: s / np.sqrt(1 + np.square(s / c)),
    "hard": lambda s, c: np.minimum(s, c),
    "rescale": lambda s, c: s * min(1, c / s.max()),
}


def drawn(shape, values, seed=0):
    """A float64 matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, len(values))))[0] for n in shape)
    return (left * values) @ right.T


def oracle(x, limit, response):
    u, s, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return (u * TARGETS[response](s, limit)[..., None, :]) @ v


def worst(got, x, response, above=3e-5):
    """The largest relative error of a singular value of `x`, bounded by 1."""
    got, s = (np.linalg.svd(np.float64(y), compute_uv=False) for y in (got, x))
    expected = np.sort(TARGETS[response](s, 1.0))[::-1]
    assert got[0] <= 1 + above
    return np.max(np.abs(got - expected) / expected)
