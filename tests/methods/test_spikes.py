"""Spike clips of single elements: Stable-SPAM's and SPAM's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_tiers
from trees import DTYPES, assert_same

import clipfx


def gradients(seed, steps=150, size=6):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, size)).astype(np.float32)
    values[rng.integers(1, steps, 8), rng.integers(size, size=8)] *= 1e4
    values[rng.integers(1, steps, 4)] = 0.0
    values[:, 2] = 0.0  # silent at first
    values[100:, 2] = rng.normal(size=steps - 100)
    return values


def outputs(tx, values):
    def step(state, g):
        out, state = tx.update({"w": g}, state)
        return state, out["w"]

    scan = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))
    state, out = scan(tx.init({"w": values[0]}), jnp.asarray(values))
    return np.asarray(out, np.float64), state


@pytest.mark.parametrize("theta", in_tiers([0.0, 0.9, 0.999], {0.9}))
def test_clip_spikes_follows_the_recursion(theta):
    for seed in range(3):
        values = gradients(seed)
        values[[30, 60], [1, 4]] = np.nan, np.inf
        mean, count, want = 0.0, 0, []
        for g in values.astype(np.float64):
            if not np.isfinite(g).all():
                want.append(np.full_like(g, np.nan))
                continue
            count += 1
            peak = np.abs(g).max()
            mean = theta * mean + (1 - theta) * peak
            limit = mean / (1 - theta**count)
            spiked = np.abs(g) > limit * (1 + 1e-6)
            want.append(np.where(spiked, g * limit / max(peak, 1e-300), g))
        out, _ = outputs(clipfx.clip_spikes(theta), values)
        np.testing.assert_allclose(out, want, rtol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_clip_spikes_keeps_proportions_and_lands_on_the_mean(dtype):
    tx = clipfx.clip_spikes(0.9)
    calm = {"w": jnp.array([1.0, -1.0, 0.5], dtype)}
    out, state = tx.update(calm, tx.init(calm))
    assert_same(out, calm)  # the first step is the identity
    spike = {"w": jnp.array([100.0, -80.0, 0.5], dtype)}
    out, state = tx.update(spike, state)
    limit = float(state.metrics.threshold[0])
    ulp = 2.0 ** -jnp.finfo(dtype).nmant
    got = np.asarray(out["w"], np.float64)
    np.testing.assert_allclose(got, [limit, -0.8 * limit, 0.5], rtol=ulp + 1e-6)
    assert np.abs(got).max() <= limit * (1 + 1e-6)
    assert state.metrics.norm.tolist() == [100.0]
    assert state.metrics.clipped.tolist() == [1]


def test_clip_spikes_is_not_put_to_sleep_by_time():
    """The released code restarts its bias correction and clips nothing for long."""
    values = np.ones((1100, 2), np.float32)
    values[1001, 0] = 1000.0
    out, _ = outputs(clipfx.clip_spikes(), values)
    assert out[1001, 0] < 3


def test_clip_spikes_may_drop_a_bad_group():
    tree = {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
    tx = clipfx.clip_spikes(nonfinite="zero")
    out, state = tx.update(tree, tx.init(tree))
    assert out["a"].tolist() == [0.0, 0.0]
    assert_same(out["b"], tree["b"])
    assert state.metrics.nonfinite.tolist() == [1, 0]
    assert int(state.rule_state.count) == 0


@pytest.mark.parametrize(("theta", "decay", "warm"), [(5000, 0.999, 20), (4, 0.9, 5)])
def test_spam_clip_follows_the_recursion(theta, decay, warm):
    for seed in range(3):
        values = gradients(seed)
        v, want = np.zeros(values.shape[1]), []
        for step, g in enumerate(values.astype(np.float64)):
            spiked = (g**2 > theta * v) & (v > 0) & (step >= warm)
            g = np.where(spiked, np.sign(g) * np.sqrt(theta * v), g)
            v = decay * v + (1 - decay) * g**2
            want.append(g)
        tx = clipfx.spam_clip(theta, decay=decay, warmup_steps=warm)
        out, state = outputs(tx, values)
        np.testing.assert_allclose(out, want, rtol=1e-4)
        np.testing.assert_allclose(state.rule_state.rms["w"], np.sqrt(v), rtol=1e-4)
        assert int(state.rule_state.count) == len(values)


def test_spam_clip_learns_no_bad_element_and_frees_silent_ones():
    tx = clipfx.spam_clip(4.0, decay=0.9, warmup_steps=1)
    state = tx.init({"w": jnp.zeros(4)})
    _, state = tx.update({"w": jnp.array([1.0, 1.0, 1.0, 0.0])}, state)
    before = state.rule_state.rms["w"]
    out, state = tx.update({"w": jnp.array([jnp.nan, jnp.inf, -9.0, 7.0])}, state)
    limit = 2 * float(before[2])
    assert np.isnan(out["w"][0])
    np.testing.assert_allclose(out["w"][1:], [limit, -limit, 7.0], rtol=1e-6)
    np.testing.assert_array_equal(state.rule_state.rms["w"][:2], before[:2])
    assert float(state.rule_state.rms["w"][3]) > 0


def test_spam_clip_remembers_in_float32_what_comes_in_half():
    tx = clipfx.spam_clip()
    tree = {"w": jnp.full(3, 3e-4, jnp.float16), "z": jnp.full(2, 3 + 4j)}
    state = tx.init(tree)
    out, state = tx.update(tree, state)
    assert_same(out, tree)
    assert {k: v.dtype for k, v in state.rule_state.rms.items()} == {
        "w": "float32",
        "z": "float32",
    }
    np.testing.assert_allclose(state.rule_state.rms["z"], 5 * np.sqrt(0.001), rtol=1e-4)
