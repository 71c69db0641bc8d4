"""The table of ways in which a norm goes wrong, and its derivative."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import in_tiers
from trees import enable_x64, mixed, norm, sample, trained

import clipfx
from clipfx._core import groups as grouping


def measured(tree, **kwargs) -> float:
    return float(clipfx.global_norm(tree, **kwargs))


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"a": jnp.ones(10**6, jnp.bfloat16)}, 1000.0),
        ({str(i): jnp.ones(1, jnp.bfloat16) for i in range(200)}, math.sqrt(200)),
        ({"a": jnp.full(4, 300.0, jnp.float16)}, 600.0),
        ({"a": jnp.full(10**4, 1e-4, jnp.float16)}, 0.01),
        ({"a": jnp.full(3, 6e4, jnp.float16), "b": jnp.ones(3)}, 6e4 * math.sqrt(3)),
        ({"a": jnp.full(4, 1e20)}, 2e20),
        ({"a": jnp.full(4, 1e-23)}, 2e-23),
        ({"a": jnp.full(70_000, 1.0, jnp.float16)}, math.sqrt(70_000)),
        ({"a": jnp.zeros(5)}, 0.0),
        ({}, 0.0),
        ({"a": None, "b": optax.MaskedNode()}, 0.0),
        ({"a": jnp.zeros((0, 4)), "b": jnp.full(4, 2.0)}, 4.0),
        ({"a": jnp.array([3 + 4j, 0], jnp.complex64)}, 5.0),
        ({"a": jnp.array([100, 100], jnp.int8), "b": jnp.full(1, 2.0)}, 2.0),
        ({"a": np.zeros(3, jax.dtypes.float0), "b": jnp.full(1, 2.0)}, 2.0),
        ({"a": jnp.array([True]), "b": 2.0}, 2.0),
        ({"a": jnp.full(4, 2.0, jnp.float8_e4m3fn)}, 4.0),
        ({"a": np.full(4, 2.0, np.float32)}, 4.0),
    ],
)
def test_norms_that_others_get_wrong(tree, expected):
    result = clipfx.global_norm(tree)
    assert result.dtype == jnp.float32
    assert not result.weak_type
    assert result.shape == ()
    assert float(result) == pytest.approx(
        expected, rel=2e-4 if expected == 0.01 else 1e-6, abs=0
    )
    clipped, metrics = clipfx.tree_clip(tree, 1.0)
    assert float(metrics.norm[0]) == float(result)
    leaves = [x for x in jax.tree.leaves(clipped) if grouping.is_counted(x)]
    leaves = [jnp.asarray(x) for x in leaves]
    assert norm(leaves) <= 1 + 1e-6


@pytest.mark.parametrize(
    "ord", in_tiers([1, 1.5, 2, 3, 10, math.inf], {1.5, 2, math.inf})
)
def test_mixed_trees_and_all_ords(ord):
    tree = mixed()
    assert measured(tree, ord=ord) == pytest.approx(norm(tree, ord), rel=1e-6, abs=0)
    assert measured(tree, ord=ord) == pytest.approx(
        float(jax.jit(lambda t: clipfx.global_norm(t, ord=ord))(
            {k: v for k, v in tree.items() if k != "float0"})), rel=1e-6)  # fmt: skip


def test_float64_is_measured_in_float64():
    with enable_x64(True):
        tree = {"a": jnp.full(4, 1e200), "b": jnp.ones(3, jnp.float32)}
        measure = jax.jit(clipfx.global_norm)
        result = measure(tree)
        assert result.dtype == jnp.float64
        assert float(result) == pytest.approx(2e200, rel=1e-14)
        tiny = measure({"a": jnp.full(4, 1e-250)})
        assert float(tiny) == pytest.approx(2e-250, rel=1e-14, abs=0)
        clipped, metrics = jax.jit(clipfx.tree_clip)(tree, 1.0)
        np.testing.assert_allclose(clipped["a"], 0.5, rtol=1e-14)
        assert metrics.norm.dtype == jnp.float32
        assert float(metrics.norm[0]) == float(np.finfo(np.float32).max)


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("size", [1e30, 1e-30, 2.0**-140])
def test_float32_beside_float64_is_measured_in_float64(ord, size):
    with enable_x64(True):
        tree = {"a": jnp.full(4, size, jnp.float32), "b": jnp.zeros(1, jnp.float64)}
        exact = norm(tree, ord) if size > 1e-38 else 0.0  # XLA:CPU flushes subnormals
        assert measured(tree, ord=ord) == pytest.approx(exact, rel=1e-14, abs=0)


@pytest.mark.parametrize("ord", in_tiers([1.5, 10, 200, 1000], {1.5, 1000}))
@pytest.mark.parametrize("size", [1e38, 1e10, 1.0, 1e-3, 1e-30])
def test_powers_that_leave_the_range(ord, size):
    tree = {"a": jnp.full(4, size), "b": jnp.full(9, size / 3)}
    exact = min(norm(tree, ord), 3.4028235e38)
    assert measured(tree, ord=ord) == pytest.approx(exact, rel=2e-7, abs=0)
    both = jnp.stack([jnp.full(4, size), jnp.ones(4)])
    each = jax.vmap(lambda x: clipfx.global_norm(x, ord=ord))(both)
    exact = [min(norm(x, ord), 3.4028235e38) for x in both]
    np.testing.assert_allclose(each, exact, rtol=2e-7)


def test_nonfinite_elements_are_seen():
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        tree = {"a": jnp.array([1.0, bad]), "b": jnp.ones(2, jnp.bfloat16)}
        for ord in (1, 2, 3, math.inf):
            assert not math.isfinite(measured(tree, ord=ord))


def test_groups_of_different_magnitude_do_not_disturb_each_other():
    tree = {
        "big": {"w": jnp.full(4, 1e38)},
        "nan": {"w": jnp.full(4, jnp.nan)},
        "one": {"w": jnp.full(4, 1.0)},
        "tiny": {"w": jnp.full(4, 1e-30)},
        "zero": {"w": jnp.zeros(4)},
    }
    for ord in (1, 2, 3, math.inf):
        power = 0 if ord == math.inf else 1 / ord
        clip = functools.partial(clipfx.tree_clip, groups="layer", ord=ord)
        clipped, metrics = jax.jit(clip)(tree, 0.5)
        got = dict(zip(metrics.groups, metrics.norm.tolist(), strict=True))
        for name, size in (("big", 1e38), ("one", 1.0), ("tiny", 1e-30)):
            exact = min(size * 4**power, 3.4028235e38)
            assert got[name] == pytest.approx(exact, rel=1e-6, abs=0)
            bound = min(exact, 0.5)
            assert norm(clipped[name], ord) == pytest.approx(bound, rel=1e-6, abs=0)
        assert got["zero"] == 0
        assert metrics.factor[1] == 0


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("size", [1.0, 1e30, 1e-30])
def test_derivative_of_the_norm(ord, size):
    tree = sample(scale=size)
    slopes = jax.grad(lambda t: clipfx.global_norm(t, ord=ord))(tree)
    flat = lambda t: np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(t)])
    x = flat(tree) / norm(tree, ord)
    exact = np.sign(x) * np.abs(x) ** (ord - 1) if ord < math.inf else (
        np.where(np.abs(x) > 1 - 1e-7, np.sign(x), 0))  # fmt: skip
    np.testing.assert_allclose(flat(slopes), exact, rtol=1e-5, atol=1e-7)


def test_derivative_at_zero_ties_complex_and_second_order():
    zeros = {"a": jnp.zeros(3)}
    for ord in (1, 2, 3, math.inf):
        length = functools.partial(clipfx.global_norm, ord=ord)
        slope = jax.jit(jax.grad(length))(zeros)
        assert not np.asarray(slope["a"]).any()
    tie = jax.grad(lambda t: clipfx.global_norm(t, ord=math.inf))(
        jnp.array([2.0, -2.0])
    )
    np.testing.assert_allclose(tie, [0.5, -0.5])
    z = jnp.array([3 + 4j], jnp.complex64)
    ours = jax.jit(jax.grad(lambda z: clipfx.global_norm(z)))(z)
    np.testing.assert_allclose(ours, jax.grad(lambda z: jnp.abs(z[0]))(z), rtol=1e-6)
    x = jnp.array([3.0, 4.0])
    ours = jax.jit(jax.hessian(lambda x: clipfx.global_norm(x)))(x)
    exact = jax.hessian(lambda x: jnp.sqrt(jnp.sum(x * x)))(x)
    np.testing.assert_allclose(ours, exact, atol=1e-6)


def test_errors_of_ord():
    for bad in (0.5, 0, -1, math.nan):
        with pytest.raises(ValueError, match="ord must be a number >= 1"):
            clipfx.global_norm(jnp.ones(3), ord=bad)
    for bad in ("2", True, [2]):
        with pytest.raises(TypeError, match="ord must be a number >= 1"):
            clipfx.clip_by_global_norm(1.0, ord=bad)
    with pytest.raises(TypeError, match="static_args"):
        jax.jit(lambda p: clipfx.global_norm(jnp.ones(3), ord=p))(2)
    for good in (np.float32(3), np.int64(3), np.float64(3)):
        clipfx.global_norm(jnp.ones(3), ord=good)


def test_overflow_and_underflow_in_one_tree():
    tree = {"big": jnp.full(4, 1e30), "small": jnp.full(9, 1e-30)}
    for _ in range(2):
        for run in (lambda f: f, jax.jit):
            clip = run(lambda t: clipfx.tree_clip(t, 1e-33, groups="leaf"))
            out, metrics = clip(tree)
            for k, name in enumerate(sorted(tree)):
                exact = norm(tree[name])
                assert float(metrics.norm[k]) == pytest.approx(exact, rel=1e-6, abs=0)
                assert norm(out[name]) == pytest.approx(1e-33, rel=1e-6, abs=0)
        exact = norm(tree)
        assert measured(tree) == pytest.approx(exact, rel=1e-6, abs=0)
        tree = dict(zip(tree, reversed(tree.values()), strict=True))


def test_squares_that_vanish_each_add_up():
    many = jnp.full(2**20, 1e-19)  # squares of 1e-38, below what float32 holds
    for one in (0.0, 2.0**-50):
        tree = {"many": many, "one": jnp.full(1, one)}
        assert measured(tree) == pytest.approx(norm(tree), rel=1e-6, abs=0)


@pytest.mark.parametrize("ord", in_tiers([1, 2, 3, math.inf], {3}))
def test_reverse_over_reverse_through_a_scan(ord):
    """Hoisting out of a scan drops rules of derivatives; loops have none in reverse."""
    slope = jnp.arange(1.0, 6.0)

    def plain(x):
        size = jnp.abs(x)
        return size.max() if ord == math.inf else jnp.sum(size**ord) ** (1 / ord)

    ours = lambda x: clipfx.global_norm(x, ord=ord)
    twice = lambda f: jax.grad(jax.grad(f))
    want = jax.jit(twice(lambda r: trained(r, plain)))(0.05)
    for scan in (True, False):
        got = jax.jit(twice(lambda r, scan=scan: trained(r, ours, scan)))(0.05)
        assert float(got) == pytest.approx(float(want), rel=1e-4, abs=0)
    got = jax.jit(jax.jacrev(jax.jacrev(ours)))(slope)
    np.testing.assert_allclose(got, jax.hessian(plain)(slope), atol=1e-6)


def test_reverse_over_reverse_equals_optax():
    def trained(rate, clip):
        tx = optax.chain(clip, optax.sgd(rate))

        def body(carry, _):
            w, state = carry
            updates, state = tx.update(w * jnp.arange(1.0, 6.0), state, w)
            return (optax.apply_updates(w, updates), state), None

        carry = jnp.ones(5), tx.init(jnp.ones(5))
        return jnp.sum(jax.lax.scan(body, carry, None, length=3)[0][0] ** 2)

    slope = jax.jit(jax.grad(jax.grad(trained)), static_argnums=1)
    got, want = (slope(0.05, clip) for clip in (
        clipfx.clip_by_global_norm(0.5), optax.clip_by_global_norm(0.5)))  # fmt: skip
    assert float(got) == pytest.approx(float(want), rel=1e-4, abs=0)


@pytest.mark.parametrize("shape", [(31, 31), (3, 3, 16, 16), (30, 30, 4), (16, 16)])
@pytest.mark.parametrize("value", in_tiers([0.77, 1.1, 1.3, 1.9], {1.1}))
def test_equal_numbers_in_small_arrays_are_added_up_well(shape, value):
    """XLA:CPU adds them one after the other, and rounds each time in one direction."""
    tree = {"w": jnp.full(shape, value, jnp.float32)}
    clipped = jax.jit(lambda tree: clipfx.tree_clip(tree, 0.5)[0])(tree)
    size = np.linalg.norm(np.asarray(clipped["w"], np.float64).ravel())
    assert abs(size / 0.5 - 1) <= 1e-6
