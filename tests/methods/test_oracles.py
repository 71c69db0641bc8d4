"""Against the papers in plain float64 NumPy, and against Optax where it is right."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiers import in_tiers
from trees import assert_close, assert_same, norm, once, sample

import clipfx
from clipfx._core import groups as grouping
from clipfx._core import reductions

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=list(HealthCheck)
)


def scale(tree, factor):
    return jax.tree.map(lambda x: np.asarray(x, np.float64) * factor, tree)


def assert_equals_oracle(out, oracle, rtol=1e-6):
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(oracle), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol)


@pytest.mark.parametrize("ord", [1, 1.5, 2, 2.5, 7, 60, math.inf])
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 100.0])
def test_global_norm_is_pascanus_rule(ord, max_norm):
    for seed in range(5):
        tree = sample(seed=seed, scale=4.0 ** (seed - 2))
        out, metrics = clipfx.tree_clip(tree, max_norm, ord=ord)
        length = norm(tree, ord)
        assert float(metrics.norm[0]) == pytest.approx(length, rel=1e-6)
        assert_equals_oracle(out, scale(tree, min(1, max_norm / length)), 2e-6)
        assert float(clipfx.global_norm(tree, ord=ord)) == float(metrics.norm[0])


def test_known_numbers():
    # A norm of 113.13 with threshold 10 gives a factor of 0.0884.
    _, metrics = clipfx.tree_clip({"w": jnp.array([80.0, 80.0])}, 10.0)
    assert float(metrics.factor[0]) == pytest.approx(0.0884, abs=5e-5)
    # 100 entries of 0.1 and a threshold of 0.2, in three norms.
    tree = {"w": jnp.full(100, 0.1)}
    for ord, factor in ((math.inf, 1), (2, 1 / 5), (1, 1 / 50)):
        out, _ = clipfx.tree_clip(tree, 0.2, ord=ord)
        np.testing.assert_allclose(out["w"], 0.1 * factor, rtol=1e-6)
    # Value clipping turns (10, 0.1) into (1, 0.1).
    out = once(clipfx.clip_by_value(1.0), jnp.array([10.0, 0.1]))
    np.testing.assert_array_equal(out, np.array([1.0, 0.1], np.float32))


OPTAX = {
    "clip": (optax.clip, clipfx.clip_by_value),
    "clip_by_global_norm": (optax.clip_by_global_norm, clipfx.clip_by_global_norm),
    "clip_by_block_rms": (optax.clip_by_block_rms, clipfx.clip_by_block_rms),
}


@pytest.mark.parametrize("name", OPTAX)
def test_equals_optax_on_well_scaled_float32(name):
    theirs, ours = (make(0.3) for make in OPTAX[name])
    for seed in range(5):
        tree = sample(seed=seed)
        expected, _ = theirs.update(tree, theirs.init(tree))
        out, _ = ours.update(tree, ours.init(tree))
        assert_close(out, expected, rtol=1e-6)


MANY = {
    "4096-bfloat16": (4096, jnp.bfloat16),
    "600-bfloat16": (600, jnp.bfloat16),
    "300-float16": (300, jnp.float16),
    "300-float32": (300, jnp.float32),
    "1-bfloat16": (1, jnp.bfloat16),
}


@pytest.mark.parametrize("many", in_tiers(MANY, {"600-bfloat16", "1-bfloat16"}))
def test_wide_accumulation_over_many_leaves(many):
    """optax.clip_by_global_norm leaves a norm of 4.0 for 4,096 leaves of bfloat16."""
    count, dtype = many
    tree = {str(i): jnp.ones([], dtype) for i in range(count)}
    with jax.disable_jit(count > 500):  # compiling so many leaves takes a minute
        out, metrics = jax.jit(lambda t: clipfx.tree_clip(t, 1.0))(tree)
    assert float(metrics.norm[0]) == pytest.approx(norm(tree), rel=1e-6)
    assert 0.99 < norm(out) <= 1 + 1e-6


def test_ten_thousand_leaves():
    """Sums over leaves stay exact to rounding in any number."""
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    tree = list(values)
    groups = grouping.group_leaves("global", tree)
    scalars = [jnp.asarray(x * x) for x in values]
    layout = reductions.Layout(groups.index, 1, jnp.float32, (), frozenset())
    total = reductions.combine(jnp.add, scalars, layout)
    exact = np.sum(np.float64(values) ** 2)
    assert float(total[0]) == pytest.approx(exact, rel=3e-7)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (300.0, jnp.float16),
        (1e-4, jnp.float16),
        (1e38, jnp.float32),
        (3e38, jnp.float32),
        (1e-30, jnp.float32),
        (1e38, jnp.bfloat16),
    ],
)
def test_one_value_everywhere(value, dtype):
    tree = {"a": jnp.full(64, value, dtype), "b": jnp.full((3, 7), -value, dtype)}
    length = norm(tree)
    target = min(length, 0.5) if value > 1e-3 else 0.5 * length
    out, metrics = clipfx.tree_clip(tree, target)
    seen = min(length, 3.4028235e38)
    assert float(metrics.norm[0]) == pytest.approx(seen, rel=1e-6, abs=0)
    assert norm(out) <= target * (1 + 1e-6)
    expected = scale(tree, target / length)
    spacing = 2.0 ** -jnp.finfo(dtype).nmant
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), y, 1e-6 + spacing)


@pytest.mark.parametrize(("ord", "most"), [(1, 50**0.5), (2, 1.0), (math.inf, 7.0)])
def test_only_scaling_to_the_2_norm_never_moves_two_gradients_apart(ord, most):
    """Elsewhere by up to the root of the dimension, here 50."""
    clip = lambda x: np.asarray(clipfx.tree_clip(x, 1.0, ord=ord)[0], np.float64)
    step = 1e-3
    start = np.zeros(50) if ord == 1 else np.ones(50)
    other = start.copy()
    if ord == 1:
        start[0] = other[0] = 1
        other[1:] = step
    else:
        start = start / np.linalg.norm(start, ord)
        other = start.copy()
        other[0] += step
    x, y = (v.astype(np.float32) for v in (start, other))
    ratio = np.linalg.norm(clip(x) - clip(y)) / np.linalg.norm(x - y)
    assert ratio == pytest.approx(most, rel=0.06)


# ------------------------------------------------------------------ property tests

# One shape for all examples, padded with zeros: everything is compiled once.
SIZES = {"a": 1, "b": 5, "c": 6}
CLIP = {
    ord: jax.jit(lambda tree, c, ord=ord: clipfx.tree_clip(tree, c, ord=ord))
    for ord in (1, 2, 3, math.inf)
}
VALUE = jax.jit(lambda x, c: once(clipfx.clip_by_value(c), x))


def padded(values, dtype):
    flat = np.zeros(sum(SIZES.values()), np.float32)
    flat[: len(values)] = values
    parts = np.split(flat, np.cumsum(list(SIZES.values()))[:-1])
    return {k: jnp.asarray(v).astype(dtype) for k, v in zip(SIZES, parts, strict=True)}


def floats(bound, width):
    # Numbers below the smallest normal one are the hardware's affair.
    smallest = {16: 2.0**-14, 32: 2.0**-120}[width]
    return st.lists(
        st.floats(-bound, bound, width=width).filter(
            lambda x: not 0 < abs(x) < smallest
        ),
        min_size=1,
        max_size=12,
    )


@SETTINGS
@given(
    values=floats(2.0**127, 32),
    max_norm=st.floats(1e-6, 1e6),
    ord=st.sampled_from(list(CLIP)),
)
def test_any_finite_tree_is_clipped_right(values, max_norm, ord):
    tree = padded(values, jnp.float32)
    max_norm = np.float32(max_norm)
    out, metrics = CLIP[ord](tree, max_norm)
    length, limit = norm(tree, ord), float(max_norm)
    assert norm(out, ord) <= limit * (1 + 1e-6)
    if length <= limit:
        assert_same(out, tree)
    elif length > limit * (1 + 1e-5):
        for name, x in tree.items():
            exact = np.asarray(x, np.float64) * (limit / length)
            stored = np.asarray(out[name], np.float64)
            np.testing.assert_allclose(stored, exact, rtol=3e-6, atol=1.2e-38)
    assert float(metrics.norm[0]) == pytest.approx(
        min(length, 3.4028235e38), rel=1e-6, abs=1e-37
    )


@SETTINGS
@given(values=floats(65504, 16), max_abs=st.floats(0, 1e5))
@pytest.mark.parametrize("half", [jnp.float16, jnp.bfloat16])
def test_any_half_precision_value_is_within_the_bound(values, max_abs, half):
    x = padded(values, half)["c"]
    exact = np.asarray(x, np.float64)
    stored = np.asarray(VALUE(x, np.float32(max_abs)), np.float64)
    assert (np.abs(stored) <= np.float64(np.float32(max_abs))).all()
    inside = np.abs(exact) <= max_abs * (1 - 1e-6)
    np.testing.assert_array_equal(stored[inside], exact[inside])
    # At most one spacing of the dtype is lost.
    spacing = np.maximum(np.abs(stored) * float(jnp.finfo(half).eps), 6e-8)
    assert (
        np.minimum(np.abs(exact), max_abs) - np.abs(stored) <= spacing * 1.001
    ).all()


@SETTINGS
@given(values=floats(60000, 16), max_norm=st.floats(1e-6, 100))
@pytest.mark.parametrize("half", [jnp.float16, jnp.bfloat16])
def test_any_half_precision_tree_is_within_the_bound(values, max_norm, half):
    max_norm = np.float32(max_norm)
    once, _ = CLIP[2](padded(values, half), max_norm)
    assert norm(once) <= max_norm * (1 + 1e-6)
    assert_same(CLIP[2](once, max_norm)[0], once)
