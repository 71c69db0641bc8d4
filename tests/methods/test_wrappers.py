"""Skipping spikes, and carrying on what was cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_close, assert_same, norm, sample

import clipfx

# ------------------------------------------------------------------------ skip_spikes


def decisions(norms, losses, window=20, k=3.0, least=5):
    """The rule in float64 NumPy: which steps are taken, and where spikes begin."""
    seen, taken = [], []
    for row in zip(norms, losses, strict=True):
        row = np.array(row, np.float64)
        past = np.array(seen[-window:])
        edge = np.full(2, np.inf)
        if len(past) >= least:
            edge = past.mean(axis=0) + k * past.std(axis=0, ddof=1)
            edge += 2.0**-20 * np.abs(past.mean(axis=0))
        good = np.isfinite(row).all()
        taken.append(bool(good and (row <= edge).all()))
        if good:
            seen.append(row)
    return np.array(taken)


def run(tx, norms, losses=None):
    """Whether each step moved, and the last state."""
    params = {"w": jnp.ones(4)}

    def step(state, row):
        grads = {"w": jnp.full(4, row[0] / 2)}
        value = {} if losses is None else {"value": row[1]}
        out, state = tx.update(grads, state, params, **value)
        return state, (out["w"][0], state.skipped)

    rows = np.stack([norms, norms if losses is None else losses], axis=1)
    scan = jax.jit(lambda s, r: jax.lax.scan(step, s, r))
    state, (moved, _) = scan(tx.init(params), jnp.asarray(rows, jnp.float32))
    return np.asarray(moved) != 0, state


def series(seed, steps=300):
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0, 0.3, steps)
    losses = -1 + 0.1 * rng.normal(size=steps)
    norms[rng.integers(20, steps, 6)] *= 50
    losses[rng.integers(20, steps, 6)] += 5
    norms[rng.integers(20, steps, 3)] = np.nan
    losses[rng.integers(20, steps, 3)] = np.inf
    return norms.astype(np.float32), losses.astype(np.float32)


def test_skip_spikes_follows_the_rule():
    for seed in range(5):
        norms, losses = series(seed)
        want = decisions(norms, losses)
        tx = clipfx.skip_spikes(optax.scale(-1.0), window=20, num_std=3.0, min_steps=5)
        moved, state = run(tx, norms, losses)
        np.testing.assert_array_equal(moved, want)
        assert 10 < int(state.skipped) == (~want).sum() < 40


def test_skip_spikes_without_a_loss_looks_at_the_norm_alone():
    norms, _ = series(0)
    tx = clipfx.skip_spikes(optax.scale(-1.0), window=20, num_std=3.0, min_steps=5)
    moved, state = run(tx, norms)
    np.testing.assert_array_equal(moved, decisions(norms, np.zeros_like(norms)))
    assert state.clip.metrics.clipped.tolist()[1] == 0


@jax.numpy_dtype_promotion("standard")  # for Optax's Adam
def test_a_skipped_step_leaves_the_optimizer_as_it_was():
    tx = clipfx.skip_spikes(optax.adam(0.1), min_steps=2, window=4, num_std=3.0)
    params, update = sample(), jax.jit(tx.update)
    state = tx.init(params)
    for seed in range(4):
        _, state = update(sample(seed=seed), state, params)
    for bad in (sample(scale=1e4), sample(scale=jnp.nan)):
        out, after = update(bad, state, params)
        assert all((x == 0).all() for x in jax.tree.leaves(out))
        assert_same(after.inner, state.inner)
        assert int(after.skipped) == 1
    # The NaN never entered the window; the spike did.
    assert_same(after.clip.rule_state, state.clip.rule_state)
    out, after = update(sample(seed=9), after, params)
    plain = clipfx.skip_spikes(optax.adam(0.1), min_steps=2, window=4, num_std=3.0)
    expected, _ = jax.jit(plain.update)(sample(seed=9), state, params)
    assert_same(out, expected)


def test_a_new_level_is_accepted_in_the_end():
    norms = np.concatenate([np.linspace(0.9, 1.1, 40), np.linspace(9, 11, 60)])
    tx = clipfx.skip_spikes(optax.scale(-1.0), window=20, num_std=6.0, min_steps=5)
    moved, _ = run(tx, norms)
    assert moved[:40].all()
    assert not moved[40]
    assert moved[60:].all()


def test_a_constant_loss_is_no_spike():
    value = np.full(50, 0.1, np.float32)
    tx = clipfx.skip_spikes(optax.scale(-1.0), min_steps=2, window=7)
    moved, _ = run(tx, np.full(50, 0.3, np.float32), value)
    assert moved.all()


def test_infinitely_many_deviations_skip_nothing():
    tx = clipfx.skip_spikes(optax.scale(-1.0), min_steps=2, window=4, num_std=np.inf)
    moved, state = run(tx, np.array([0.3] * 6 + [1e9], np.float32))
    assert moved.all()
    assert np.isfinite(state.clip.metrics.threshold).all()


def test_skip_spikes_shows_its_counters():
    tx = clipfx.skip_spikes(optax.sgd(1.0), min_steps=2, window=8)
    norms, losses = np.ones(10), np.ones(10)
    norms[5], losses[6], losses[7] = 100, 50, np.nan
    norms += 1e-3 * np.arange(10)
    moved, state = run(tx, norms, losses)
    assert moved.tolist() == [True] * 5 + [False] * 3 + [True] * 2
    read = clipfx.metrics.read(state)
    assert read["clip0/clipped/global"] == 1
    assert read["clip0/clipped/loss"] == 1
    assert read["clip0/nonfinite/loss"] == 1
    assert read["clip0/steps/global"] == 10
    assert read["clip0/factor/global"] == 1.0
    assert int(state.skipped) == 3


def test_skip_spikes_inside_and_around_chains():
    inner = optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))
    tx = optax.chain(clipfx.skip_spikes(inner), optax.scale(2.0))
    params = sample()
    out, state = jax.jit(tx.update)(sample(), tx.init(params), params, value=1.0)
    assert norm(out) == pytest.approx(0.2, rel=1e-6)
    keys = clipfx.metrics.read(state)
    assert "clip0/norm/loss" in keys
    assert "clip1/norm/global" in keys


# --------------------------------------------------------------------- error_feedback


def feedback_oracle(grads, cap, ratio):
    error, out = np.zeros(grads.shape[1]), []
    for g in grads.astype(np.float64):
        total = g + error
        u = total * min(1, cap / max(np.linalg.norm(total), 1e-300))
        if not np.isfinite(u).all():
            out.append(np.full_like(g, np.nan))
            continue
        left = total - u
        limit = ratio * np.linalg.norm(u) if ratio < np.inf else np.inf
        length = np.linalg.norm(left)
        error = left * min(1, limit / length) if length > 0 else left
        out.append(u)
    return np.array(out), error


@pytest.mark.parametrize("ratio", [0.0, 1.0, 5.0, np.inf])
def test_error_feedback_follows_the_recursion(ratio):
    rng = np.random.default_rng(0)
    grads = (rng.normal(size=(100, 4)) * rng.lognormal(size=(100, 1))).astype(
        np.float32
    )
    grads[40] = 0
    grads[60] *= 1e3
    grads[70, 1] = np.nan
    tx = clipfx.error_feedback(clipfx.clip_by_global_norm(1.0), max_ratio=ratio)

    def step(state, g):
        out, state = tx.update({"w": g}, state)
        return state, out["w"]

    state, out = jax.lax.scan(step, tx.init({"w": grads[0]}), jnp.asarray(grads))
    want, error = feedback_oracle(grads, 1.0, ratio)
    np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(state.error["w"], error, rtol=1e-3, atol=1e-3)


def test_error_feedback_removes_the_bias_of_clipping():
    """10 with probability 0.1, else -1: mean 0.1, and -0.8 after a clip at 1."""
    grads = np.where(np.random.default_rng(0).random(20_000) < 0.1, 10.0, -1.0)
    mean = grads.mean()

    def average(tx):
        step = lambda state, g: tx.update({"w": g}, state)[::-1]
        _, out = jax.lax.scan(
            step, tx.init({"w": jnp.zeros([])}), jnp.asarray(grads, jnp.float32)
        )
        return float(out["w"].mean())

    clip = clipfx.clip_by_global_norm(1.0)
    assert average(clip) == pytest.approx(-0.8, abs=0.02)
    assert average(clipfx.error_feedback(clip, max_ratio=np.inf)) == pytest.approx(
        mean, abs=0.01
    )
    bounded = average(clipfx.error_feedback(clip, max_ratio=5.0))
    assert -0.8 < bounded < mean


def test_error_feedback_does_not_play_a_spike_back_for_long():
    clip = clipfx.clip_by_global_norm(1.0)
    for ratio, steps in ((1.0, 1), (np.inf, 998)):
        tx = clipfx.error_feedback(clip, max_ratio=ratio)
        state = tx.init({"w": jnp.zeros(2)})
        _, state = tx.update({"w": jnp.array([1000.0, 0.0])}, state)
        step = lambda s, g, tx=tx: tx.update(g, s)[::-1]
        zeros = {"w": jnp.zeros((1100, 2))}
        _, lengths = jax.lax.scan(step, state, zeros)
        moving = np.linalg.norm(lengths["w"], axis=1) > 0.5
        assert moving.sum() == pytest.approx(steps, abs=2)


def test_error_feedback_is_clean_after_a_bad_step_that_its_clip_drops():
    clip = clipfx.clip_by_global_norm(1.0, nonfinite="zero")
    tx = clipfx.error_feedback(clip, max_ratio=np.inf)
    tree = {"w": jnp.array([3.0, 4.0])}
    _, state = tx.update(tree, tx.init(tree))
    for bad in (jnp.nan, jnp.inf):
        out, after = tx.update({"w": jnp.array([bad, 1.0])}, state)
        assert out["w"].tolist() == [0, 0]
        assert_same(after.error, state.error)
    np.testing.assert_allclose(state.error["w"], [2.4, 3.2], rtol=1e-6)


def test_error_feedback_keeps_what_half_precision_rounds_off():
    tx = clipfx.error_feedback(clipfx.clip_by_global_norm(1.0), max_ratio=np.inf)
    tree = {"w": jnp.full(5, 0.3, jnp.bfloat16), "n": jnp.arange(3)}
    state = tx.init(tree)
    assert state.error["w"].dtype == jnp.float32
    out, state = tx.update(tree, state)
    total = np.asarray(out["w"], np.float64) + np.asarray(state.error["w"], np.float64)
    np.testing.assert_allclose(total, np.float64(tree["w"][0]), rtol=1e-6)
    assert_same(out["n"], tree["n"])
    assert_close(state.error["n"], jnp.zeros(0))


# ------------------------------------------------------------------ per_stacked_layer


def test_states_of_stacked_layers_are_mapped():
    layers = {"w": jnp.ones((3, 2)), "v": jnp.ones(3)}
    for inner in (clipfx.clip_per_layer(1.0, groups="leaf"), optax.adam(0.1)):
        tx = optax.chain(clipfx.per_stacked_layer(inner), optax.trace(0.9))
        state = tx.init(layers)
        assert_same(optax.tree.map_params(tx, lambda x: x, state), state)
        seen = []
        optax.tree.map_params(tx, lambda x, seen=seen: seen.append(x.shape), state)
        assert set(seen) == {(3, 2), (3,)}


def test_a_stack_without_leaves_passes():
    tx = clipfx.per_stacked_layer(clipfx.clip_by_global_norm(1.0))
    tree = {"w": optax.MaskedNode(), "v": None}
    out, _ = tx.update(tree, tx.init(tree))
    assert out == tree


def test_steps_above_an_absolute_norm_are_skipped_from_the_first_on():
    tx = clipfx.skip_spikes(optax.identity(), max_norm=2.0)
    state = tx.init({"w": jnp.ones(1)})
    for size, taken in ((3.0, False), (2.0, True), (2.1, False), (1.0, True)):
        updates, state = tx.update({"w": jnp.full(1, size)}, state)
        assert float(updates["w"][0]) == (size if taken else 0.0)
    assert int(state.skipped) == 2
