"""Sample trees and their norms in float64, for every test."""

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

SHAPES = {"decoder": {"kernel": (8, 5)}, "encoder": {"bias": (4,), "kernel": (3, 8)}}
# Since JAX 0.8 it is `jax.enable_x64`.
enable_x64 = (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def sample(dtype=jnp.float32, seed: int = 0, scale: float = 1.0):
    """A tree of two layers with normal entries; the sizes divide over 8 devices."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(scale * rng.normal(size=shape), dtype)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def mixed(seed: int = 0):
    """Every kind of leaf that a tree of gradients can hold."""
    tree = sample(seed=seed)
    return {
        "bf16": tree["decoder"]["kernel"].astype(jnp.bfloat16),
        "complex": jax.lax.complex(tree["encoder"]["bias"], tree["encoder"]["bias"]),
        "empty": jnp.zeros((0, 3)),
        "f16": {"w": tree["encoder"]["kernel"].astype(jnp.float16)},
        "f32": tree["encoder"]["bias"],
        "flags": jnp.array([True, False]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "ints": jnp.arange(3),
        "none": None,
        "scalar": jnp.float32(2.0),
    }


def norm(tree, ord=2.0) -> float:
    """The p-norm in float64 over everything of floating dtype."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    parts = [np.abs(np.asarray(x, np.complex128)).ravel() for x in leaves]
    flat = np.concatenate([np.zeros(1), *parts])
    peak = flat.max()
    if ord == np.inf or peak == 0 or not np.isfinite(peak):
        return float(peak)
    return float(peak * np.sum((flat / peak) ** ord) ** (1 / ord))


def assert_same(a, b) -> None:
    """Equal in structure, shapes, dtypes and every bit, NaN included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if x.dtype.itemsize == 2:  # where NumPy knows no NaN
            x, y = x.astype(np.float32), y.astype(np.float32)
        np.testing.assert_array_equal(x, y)


def assert_close(a, b, rtol: float = 1e-6, atol: float = 0.0) -> None:
    """Equal in structure, shapes and dtypes, and up to rounding in float64."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x, y = np.asarray(x, np.complex128), np.asarray(y, np.complex128)
            np.testing.assert_allclose(x, y, rtol, atol)
        else:
            np.testing.assert_array_equal(x, y)


def once(tx, tree):
    """The first update of a transform."""
    return tx.update(tree, tx.init(tree), tree)[0]


def trained(rate, length, scan=True):
    """A loss after two steps that are clipped by `length`, of a weight with a scale."""
    start, slope = jnp.arange(1.0, 6.0) / 4, jnp.arange(1.0, 6.0)

    def body(w, _):
        grad = w * slope
        return w - rate * grad * jnp.minimum(1, 0.5 / length(grad)), None

    if scan:
        return jnp.sum(jax.lax.scan(body, start, None, length=2)[0] ** 2)
    return jnp.sum(body(body(start, None)[0], None)[0] ** 2)
