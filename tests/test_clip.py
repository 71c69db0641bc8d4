"""The builder: state, metrics, policies, bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same, norm, sample

import clipfx


def step(tx, tree, state=None):
    return tx.update(tree, tx.init(tree) if state is None else state)


def test_metrics_count_over_steps():
    tx = clipfx.clip_by_norm(1.0, groups="layer")
    state = tx.init(sample())
    assert state.metrics.threshold.tolist() == [math.inf, math.inf]
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
        assert state.metrics.factor[0] == 0
    else:
        assert np.isnan(out["bad"]["w"]).all()
        assert np.isnan(state.metrics.factor[0])


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
    tree = sample()
    length = lambda c: clipfx.global_norm(clipfx.tree_clip(tree, c)[0])
    assert float(jax.grad(length)(0.5)) == pytest.approx(1.0, rel=1e-5)
    assert float(jax.grad(length)(1e3)) == 0.0
    tree = sample(scale=1e25)
    assert float(jax.grad(length)(0.5)) == pytest.approx(1.0, rel=1e-5)


def test_derivative_at_enormous_norms_is_that_of_the_direction():
    x = jnp.array([3e25, 4e25])
    jacobian = jax.jacobian(lambda x: clipfx.tree_clip(x, 1.0)[0])(x)
    unit = np.array([0.6, 0.8])
    exact = (np.eye(2) - np.outer(unit, unit)) / 5e25
    np.testing.assert_allclose(np.float64(jacobian), exact, rtol=1e-5, atol=1e-33)
