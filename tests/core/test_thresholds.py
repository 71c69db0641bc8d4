"""Rules from norms to thresholds."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import norm, sample

import clipfx
from clipfx import thresholds
from clipfx._core.groups import group_leaves


def test_what_a_threshold_may_be():
    rule = thresholds.constant(1.0)
    assert thresholds.as_threshold(rule) is rule
    for value in (1, 1.0, np.float32(1), jnp.float32(1), jnp.ones([])):
        groups = group_leaves("global", sample())
        rule = thresholds.as_threshold(value)
        limit, _ = rule.update(jnp.ones(1), rule.init(groups, sample()), groups=groups)
        assert limit.dtype == jnp.float32
        assert float(limit) == 1.0


def test_a_schedule_counts_steps_from_zero():
    tx = clipfx.clip_by_global_norm(optax.linear_schedule(1.0, 0.0, 4))
    state = tx.init(sample())
    lengths = []
    for _ in range(5):
        out, state = tx.update(sample(), state)
        lengths.append(norm(out))
    np.testing.assert_allclose(lengths, [1.0, 0.75, 0.5, 0.25, 0.0], rtol=1e-6)
    assert state.rule_state.dtype == jnp.int32


def test_a_schedule_may_give_one_threshold_for_each_group():
    schedule = lambda count: {
        "decoder": 1.0,
        "encoder": jnp.float32(0.5) * (count + 1).astype(jnp.float32),
    }
    tx = clipfx.clip_per_layer(schedule)
    state = tx.init(sample())
    _, state = tx.update(sample(), state)
    _, state = tx.update(sample(), state)
    assert state.metrics.threshold.tolist() == [1.0, 1.0]


def test_a_rule_sees_norms_context_and_extra_args():
    seen = {}

    def update(norm, state, *, groups, updates, params, scale, **extra):
        seen.update(groups=groups, updates=updates, params=params, extra=extra)
        return scale * jnp.median(norm), state + 1

    rule = thresholds.Threshold(lambda groups, params: jnp.zeros([], jnp.int32), update)
    tx = clipfx.clip_by_norm(rule, groups="layer")
    tree = sample()
    out, state = tx.update(tree, tx.init(tree), tree, scale=0.5, other=3)
    assert int(state.rule_state) == 1
    assert seen["groups"].names == ("decoder", "encoder")
    assert seen["params"] is tree
    assert seen["extra"] == {"other": 3}
    expected = 0.5 * (norm(tree["decoder"]) + norm(tree["encoder"])) / 2
    assert norm(out["decoder"]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(TypeError, match="scale"):
        tx.update(tree, tx.init(tree), tree)


def test_names_that_fit_no_group_are_errors():
    limits = {"decoder": 1.0, "encodr": 1.0, "encoder": 1.0}
    tx = clipfx.clip_per_layer(limits)
    with pytest.raises(ValueError, match=r"got 'encodr'; did you mean 'encoder'\?"):
        tx.init(sample())
    with pytest.raises(ValueError, match=r"got 'encodr'; did you mean 'encoder'\?"):
        clipfx.tree_clip(sample(), limits, groups="layer")
    tx = clipfx.clip_per_layer(lambda count: limits)
    with pytest.raises(ValueError, match="encodr"):
        tx.update(sample(), tx.init(sample()))
    tx = clipfx.clip_per_layer({"decoder": 1.0, "encoder": 1.0})
    optax.tree.map_params(tx, lambda x: x, tx.init(sample()))
