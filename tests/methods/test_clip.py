"""The builder: state, metrics, policies, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sentences import raises_one_sentence
from trees import assert_same, enable_x64, norm, sample

import clipfx
from clipfx import responses
from clipfx._core import paths

LARGEST = float(np.finfo(np.float32).max)


def step(tx, tree, state=None):
    return tx.update(tree, tx.init(tree) if state is None else state)


def test_metrics_count_over_steps():
    tx = clipfx.clip_by_norm(1.0, groups="layer")
    state = tx.init(sample())
    assert state.metrics.threshold.tolist() == [LARGEST, LARGEST]
    trees = [
        sample(scale=10.0),
        sample(scale=1e-3),
        {"decoder": sample()["decoder"], "encoder": {"bias": jnp.full(4, jnp.nan),
         "kernel": sample()["encoder"]["kernel"]}},
    ]  # fmt: skip
    for tree in trees:
        _, state = tx.update(tree, state)
    m = state.metrics
    assert tuple(m.groups) == ("decoder", "encoder")
    assert m.steps.tolist() == [3, 3]
    assert m.clipped.tolist() == [2, 1]
    assert m.nonfinite.tolist() == [0, 1]
    assert m.threshold.tolist() == [1.0, 1.0]
    assert float(m.factor[0]) == pytest.approx(1 / norm(trees[2]["decoder"]), rel=1e-6)


@pytest.mark.parametrize("nonfinite", ["propagate", "zero"])
def test_policies_for_a_nonfinite_norm(nonfinite):
    tree = {"good": {"w": jnp.ones(3)}, "bad": {"w": jnp.array([1.0, jnp.inf, 2.0])}}
    tx = clipfx.clip_by_norm(0.1, groups="layer", nonfinite=nonfinite)
    out, state = step(tx, tree)
    assert norm(out["good"]) == pytest.approx(0.1)
    if nonfinite == "zero":
        assert_same(out["bad"]["w"], jnp.zeros(3))
    else:
        assert np.isnan(out["bad"]["w"]).all()
    assert state.metrics.factor[0] == 0
    assert state.metrics.norm[0] == LARGEST
    assert state.metrics.clipped.tolist() == [0, 1]
    assert state.metrics.nonfinite.tolist() == [1, 0]


def test_thresholds_for_each_group():
    tree = sample(scale=10.0)
    as_dict = clipfx.clip_by_norm({"encoder": 2.0, "decoder": 0.5}, groups="layer")
    as_array = clipfx.clip_by_norm(jnp.array([0.5, 2.0]), groups="layer")
    out, state = step(as_dict, tree)
    assert_same(step(as_array, tree), (out, state))
    assert norm(out["decoder"]) == pytest.approx(0.5)
    assert norm(out["encoder"]) == pytest.approx(2.0)


def test_a_response_of_ones_own():
    cauchy = lambda n, c: n / (1 + (n / c) ** 2)
    tree = {"w": jnp.array([3.0, 4.0])}
    out, _ = clipfx.tree_clip(tree, 2.0, response=cauchy)
    assert norm(out) == pytest.approx(5 / (1 + 2.5**2))


def test_a_factor_may_exceed_one():
    out, metrics = clipfx.tree_clip(
        {"w": jnp.full(4, 1e-35)}, 1.0, response=clipfx.responses.normalize
    )
    np.testing.assert_allclose(out["w"], 0.5, rtol=1e-6)
    assert float(metrics.norm[0]) == pytest.approx(2e-35, rel=1e-6, abs=0)


def test_tree_clip_is_one_step_of_clip_by_norm():
    tree = sample()
    tx = clipfx.clip_by_norm(0.3, groups="leaf", ord=1)
    out, state = step(tx, tree)
    assert_same(clipfx.tree_clip(tree, 0.3, groups="leaf", ord=1), (out, state.metrics))


def test_derivative_with_respect_to_the_threshold():
    length = lambda c, tree: clipfx.global_norm(clipfx.tree_clip(tree, c)[0])
    slope = jax.jit(jax.grad(length))
    assert float(slope(0.5, sample())) == pytest.approx(1.0, rel=1e-5)
    assert float(slope(1e3, sample())) == 0.0
    assert float(slope(0.5, sample(scale=1e25))) == pytest.approx(1.0, rel=1e-5)


def test_derivative_at_enormous_norms_is_that_of_the_direction():
    x = jnp.array([3e25, 4e25])
    jacobian = jax.jit(jax.jacobian(lambda x: clipfx.tree_clip(x, 1.0)[0]))(x)
    unit = np.array([0.6, 0.8])
    exact = (np.eye(2) - np.outer(unit, unit)) / 5e25
    np.testing.assert_allclose(np.float64(jacobian), exact, rtol=1e-5, atol=1e-33)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 3e38, 0.0, 1e-38])
def test_states_are_finite_before_and_after_any_step(value):
    tree = {"a": {"w": jnp.array([1.0, value])}, "b": {"w": jnp.full(3, value)}}
    for limit in (1.0, math.inf, optax.constant_schedule(math.inf)):
        for response in (None, responses.normalize):
            tx = clipfx.clip_by_norm(limit, groups="layer", response=response)
            state = tx.init(tree)
            for _ in range(2):
                assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
                _, state = tx.update(tree, state)
            blend = lambda a, b: 0.0 * a + 1.0 * b  # as optax.contrib.sam does
            blended = map(blend, tx.init(tree).metrics[:3], state.metrics[:3])
            assert all(np.isfinite(x).all() for x in blended)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1.0, 1e38])
def test_finite_gradients_make_nothing_that_is_not_finite(size):
    """Every single operation, as what is debugged is run one by one."""
    tree = {"a": {"w": jnp.full(4, size)}, "b": {"w": jnp.full(2, 3.0)}}
    kinds = [None, responses.tanh, responses.arctan, responses.log, responses.normalize,
             responses.reject, responses.softsign]  # fmt: skip
    with jax.debug_infs(True), jax.debug_nans(True):
        for response in kinds:
            tx = clipfx.clip_by_norm(1e-5, groups="layer", response=response)
            tx.update(tree, tx.init(tree))


def test_bound_of_norms_just_above_the_threshold():
    tx = clipfx.clip_by_norm(1.0)
    update = jax.jit(tx.update)
    for k in range(24):
        for parts in (1, 4):  # a norm that is exact
            x = jnp.full(parts, (1 + k * 2.0**-23) / math.sqrt(parts), jnp.float32)
            out, state = update(x, tx.init(x))
            assert norm(out) <= 1 + 1e-6
            again, _ = update(out, tx.init(x))
            assert_same(again, out)
            assert int(state.metrics.clipped[0]) == (norm(x) * (1 - 2.0**-21) > 1)


def test_thresholds_in_float64_stay_so_where_norms_are():
    with enable_x64(True):
        tree = {"w": jnp.arange(1.0, 6.0)}
        each = {"w": np.float64(0.1)}
        made = (0.1, np.float64(0.1), jnp.float64(0.1), jnp.array([0.1]), each,
                lambda count: jnp.float64(0.1), lambda count: each)  # fmt: skip
        for limit in made:
            tx = clipfx.clip_by_norm(limit, groups="leaf")
            out, state = tx.update(tree, tx.init(tree))
            assert norm(out) == pytest.approx(0.1, rel=1e-14, abs=0)
            assert all(x.dtype.itemsize <= 4 for x in jax.tree.leaves(state.metrics))
        single = jax.tree.map(jnp.float32, tree)
        for limit in made:
            tx = clipfx.clip_by_norm(limit, groups="leaf")
            out, _ = tx.update(single, tx.init(single))
            assert out["w"].dtype == jnp.float32
            assert norm(out) == pytest.approx(0.1, rel=1e-6, abs=0)


def test_none_stands_for_what_injection_would_take_for_a_schedule():
    tree = {"w": jnp.array([3.0, 4.0])}
    tx = optax.inject_hyperparams(clipfx.clip_by_norm)(threshold=1.0)
    out, state = jax.jit(tx.update)(tree, tx.init(tree))
    assert norm(out) == pytest.approx(1.0, rel=1e-6, abs=0)
    assert set(state.hyperparams) == {"threshold"}
    plain = clipfx.tree_clip(tree, 1.0, response=responses.hard, ord=2)
    assert_same(clipfx.tree_clip(tree, 1.0, response=None, ord=None), plain)
    tx = optax.inject_hyperparams(clipfx.clip_by_norm)(threshold=1.0, ord=3)
    with pytest.raises(TypeError, match='static_args="ord"'):
        tx.init(tree)


def test_groups_may_be_a_function_of_the_tree():
    labels = lambda tree: jax.tree.map(
        lambda x: "big" if x.size > 20 else "small", tree
    )
    tree = sample(scale=10.0)
    tx = clipfx.clip_by_norm({"big": 2.0, "small": 0.5}, groups=labels)
    out, state = step(tx, tree)
    small = tree["encoder"]["bias"]
    assert norm(out["encoder"]["bias"]) == pytest.approx(min(0.5, norm(small)))
    assert tuple(paths.ordered(state.metrics.groups)) == ("big", "small")
    hidden = optax.masked(tx, {"decoder": False, "encoder": True})
    hidden.update(tree, hidden.init(tree))
    optax.tree.map_params(tx, lambda x: x, state)


def test_bound_where_norm_and_threshold_are_the_largest_numbers():
    limit = float(np.nextafter(np.float32(np.finfo(np.float32).max), np.float32(0)))
    out, _ = clipfx.tree_clip({"w": jnp.full(16, 3e38)}, limit)
    assert limit * (1 - 1e-6) <= norm(out) <= limit * (1 + 1e-6)


def test_a_threshold_that_is_no_number_leaves_the_state_finite():
    tree = {"w": jnp.ones(3)}
    out, state = step(clipfx.clip_by_norm(lambda count: jnp.float32(math.nan)), tree)
    assert np.isnan(out["w"]).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_norm_that_was_measured_elsewhere():
    stages = [{"w": jnp.array([3.0, 0.0])}, {"w": jnp.full(4, 2.0, jnp.bfloat16)}]
    whole = clipfx.global_norm(*stages)
    assert float(whole) == 5.0
    clipped = [clipfx.clip_with_norm(x, whole, 1.0)[0] for x in stages]
    assert float(clipfx.global_norm(*clipped)) == pytest.approx(1.0, rel=4e-3)
    assert clipped[1]["w"].dtype == jnp.bfloat16
    traced = jax.jit(lambda n: clipfx.clip_with_norm(stages[0], n, 1.0)[0])
    np.testing.assert_array_equal(traced(whole)["w"], clipped[0]["w"])
    each = {"a": jnp.ones(1), "b": jnp.ones(1)}
    out, metrics = clipfx.clip_with_norm(
        each, jnp.array([4.0, math.nan]), 1.0, groups="leaf", nonfinite="zero"
    )
    assert (float(out["a"][0]), float(out["b"][0])) == (0.25, 0.0)
    assert metrics.nonfinite.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [("2", TypeError, "a number or an array"), (None, TypeError, "got None"),
     (-1.0, ValueError, ">= 0"), (jnp.ones(3), ValueError, "one entry for each")],
)  # fmt: skip
def test_a_norm_that_is_none(given, kind, words):
    call = lambda: clipfx.clip_with_norm({"w": jnp.ones(2)}, given, 1.0)
    raises_one_sentence((call, kind, words))
