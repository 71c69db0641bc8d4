"""AutoClip, quantile tracking and ZClip against their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sequences import LARGEST, Oracle, assert_follows, norms, run
from tiers import in_tiers

import clipfx

GROUPS = pytest.mark.parametrize("groups", in_tiers(["global", "leaf"], {"leaf"}))


def lognormal(sigma, steps, seed=0, groups=1):
    return np.random.default_rng(seed).lognormal(0.0, sigma, (steps, groups))


# --------------------------------------------------------------------------- autoclip


def autoclip_oracle(p, window):
    def update(norm, history):
        history = [*history, norm][-window:]
        limit = np.percentile(np.stack(history), p, axis=0)
        return np.minimum(norm, limit), limit, history

    return Oracle(lambda groups: [], update)


@GROUPS
@pytest.mark.parametrize(("p", "window"), [(10, 50), (0, 7), (37.5, 1), (100, 1000)])
def test_autoclip_is_the_percentile_of_the_window(p, window, groups):
    tx = clipfx.autoclip(p, window=window, groups=groups)
    assert_follows(tx, autoclip_oracle(p, window), groups == "leaf")


def test_autoclip_at_10_percent_clips_nine_steps_in_ten():
    values = lognormal(0.3, 5000)
    before, after, _, state = run(clipfx.autoclip(), values)
    rate = float(state.metrics.clipped[0]) / len(values)
    assert rate == pytest.approx(0.896, abs=0.01)
    assert after.mean() / before.mean() == pytest.approx(0.65, abs=0.015)


def test_autoclip_reads_the_ring_again_after_a_resume():
    tx = clipfx.autoclip(50.0, window=4)
    values = lognormal(0.5, 10)
    whole = run(tx, values)
    leaves, treedef = jax.tree.flatten(run(tx, values[:6])[3])
    state = treedef.unflatten([jnp.asarray(np.asarray(x)) for x in leaves])
    assert state.rule_state.rows.shape == (4, 1)
    tree = {"leaf0": jnp.ones(3)}
    update = jax.jit(tx.update)
    again, _ = update(tree, state)
    straight, _ = update(tree, run(tx, values[:6])[3])
    np.testing.assert_array_equal(again["leaf0"], straight["leaf0"])
    assert int(whole[3].rule_state.count) == 10


def test_the_ring_turns_over_without_overflow():
    from clipfx._core.running_stats import push

    window = clipfx.autoclip(window=5).init({"w": jnp.ones(2)}).rule_state
    top = np.iinfo(np.int32).max
    last = top // 5 * 5 - 1
    window = window._replace(count=jnp.int32(last), rows=window.rows.at[0, 0].set(1.0))
    after = push(window, jnp.array([7.0]))
    assert int(after.count) > 5
    assert int(after.count) % 5 == (last + 1) % 5
    assert float(after.rows[last % 5, 0]) == 7.0


# ---------------------------------------------------------------------- quantile_clip


def quantile_oracle(quantile, rate, min_norm):
    def update(norm, limit):
        limit = np.maximum(np.where(limit > 0, limit, norm), min_norm)
        inside = norm <= limit * (1 + 1e-9)
        after = np.maximum(limit * np.exp(-rate * (inside - quantile)), min_norm)
        return np.minimum(norm, limit), limit, after

    return Oracle(np.zeros, update)


@GROUPS
@pytest.mark.parametrize(
    ("quantile", "rate", "min_norm"), [(0.5, 0.2, 0.0), (0.9, 0.05, 0.3), (0.1, 1.0, 0)]
)
def test_quantile_clip_moves_the_logarithm(quantile, rate, min_norm, groups):
    tx = clipfx.quantile_clip(quantile, rate, min_norm=min_norm, groups=groups)
    oracle = quantile_oracle(quantile, rate, min_norm)
    assert_follows(tx, oracle, groups == "leaf", rtol=1e-4)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.9])
def test_quantile_clip_rests_at_its_quantile(quantile):
    values = lognormal(0.5, 5000)
    _, _, limits, _ = run(clipfx.quantile_clip(quantile, 0.05), values)
    inside = values[500:] <= limits[500:]
    assert inside.mean() == pytest.approx(quantile, abs=0.02)


def test_quantile_clip_finds_the_median_within_thirty_steps():
    far = [np.full((1, 1), 5.0), lognormal(0.1, 400)]
    _, _, limits, _ = run(clipfx.quantile_clip(), np.concatenate(far))
    assert abs(np.exp(np.log(limits[30:]).mean()) - 1) < 0.1


def test_quantile_clip_never_falls_below_its_bound_and_recovers_from_zero():
    zeros = np.zeros((50, 1))
    falling = np.concatenate([np.geomspace(1, 1e-6, 200)[:, None], zeros])
    _, _, limits, _ = run(clipfx.quantile_clip(0.9, 1.0, min_norm=0.01), falling)
    assert limits[1:].min() == pytest.approx(0.01)
    again = np.concatenate([zeros, np.full((50, 1), 2.0)])
    _, after, _, _ = run(clipfx.quantile_clip(), again)
    assert after[50] == pytest.approx(2.0)


def test_quantile_clip_stays_finite_at_any_rate():
    values = np.array([[0.0], [1e38], [0.0], [1e-30], [0.0], [1.0]])
    _, after, limits, state = run(clipfx.quantile_clip(step_size=1e6), values)
    assert np.isfinite([after, limits]).all()
    assert np.isfinite(state.rule_state).all()


# ------------------------------------------------------------------------------ zclip


def zclip_oracle(z=2.5, a=0.97, cap=np.inf, f=1.0, warm=25, target="reciprocal"):
    """The recursion of the paper's code, with a buffer for the warm-up."""

    def update(norm, state):
        seen, mean, var = state
        if len(seen) < warm:
            seen = [*seen, norm]
            mean, var = np.mean(seen, axis=0), np.var(seen, axis=0)
            limit = np.full_like(norm, min(cap, LARGEST))
            return np.minimum(norm, limit), limit, (seen, mean, var)
        std = np.maximum(np.sqrt(var), 1e-6 * mean)
        score = (norm - mean) / std
        spike = score > z
        after = {
            "reciprocal": (mean + z * std / np.where(spike, score / z, 1)) * f,
            "mean": mean,
            "edge": mean + z * std,
        }[target]
        limit = np.minimum(np.where(spike, after, mean + z * std), cap)
        x = np.where(spike, after, norm)
        new = a * mean + (1 - a) * x
        return (
            np.minimum(norm, limit),
            limit,
            (seen, new, a * var + (1 - a) * (x - new) ** 2),
        )

    return Oracle(lambda groups: ([], np.zeros(groups), np.zeros(groups)), update)


@GROUPS
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"clip_to": "mean", "decay": 0.9, "z_threshold": 2.0},
        {"clip_to": "edge", "max_norm": 2.0},
        {"clip_factor": 0.7, "warmup_steps": 3},
    ],
)
def test_zclip_follows_the_recursion(kwargs, groups):
    names = {"z_threshold": "z", "decay": "a", "max_norm": "cap", "clip_factor": "f",
             "warmup_steps": "warm", "clip_to": "target"}  # fmt: skip
    oracle = zclip_oracle(**{names[k]: v for k, v in kwargs.items()})
    tx = clipfx.zclip(groups=groups, **kwargs)
    # Sums of squares in float64 lose the deviation after a spike of 1e12; ours do not.
    values = [norms(seed) for seed in range(5)]
    for value in values:
        value[value > 1e6] = 1e4
    for value in values:
        before, after, limits, _ = run(tx, value)
        from sequences import expect

        want, want_limits, _ = expect(oracle, value, groups == "leaf")
        if groups == "global":
            after = np.linalg.norm(after, axis=1, keepdims=True)
        np.testing.assert_allclose(after, want, 1e-4, atol=1e-12)
        good = np.isfinite(before).all(axis=1)
        np.testing.assert_allclose(limits[good], want_limits[good], 1e-4)


def test_zclip_is_redescending():
    tx = clipfx.zclip()
    state = tx.init({"w": jnp.ones(1)})
    known = state.rule_state._replace(
        count=jnp.int32(25), mean=jnp.ones(1), std=jnp.full(1, 0.2)
    )
    state = state._replace(rule_state=known)
    norms_in = [1.4, 1.5, 2.0, 3.0, 10.0, 100.0]
    out = [float(tx.update({"w": jnp.array([n])}, state)[0]["w"][0]) for n in norms_in]
    want = [1.4, 1.5, 1.25, 1.125, 1.0278, 1.0025]
    np.testing.assert_allclose(out, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("draw", "rate"),
    [
        (lambda rng, n: 1 + 0.2 * rng.normal(size=(n, 1)), 0.010),
        (lambda rng, n: rng.lognormal(0, 0.5, (n, 1)), 0.057),
    ],
)
def test_zclip_false_alarms(draw, rate):
    values = np.abs(draw(np.random.default_rng(0), 20_000))
    _, _, limits, state = run(clipfx.zclip(), values)
    if rate < 0.02:  # what is learned is clipped: less than the true deviation, 0.2
        std = (np.median(limits[100:]) - 1) / 2.5
        assert 0.18 < std < 0.2
    assert float(state.metrics.clipped[0]) / len(values) == pytest.approx(
        rate, abs=3e-3
    )


def test_zclip_learns_nothing_at_a_spike_if_told_so():
    values = np.concatenate([lognormal(0.1, 60), [[50.0]]])
    before = run(clipfx.zclip(learn_spikes=False), values[:-1])[3].rule_state
    after = run(clipfx.zclip(learn_spikes=False), values)[3].rule_state
    np.testing.assert_array_equal(before.mean, after.mean)
    np.testing.assert_array_equal(before.std, after.std)
    assert int(after.count) == 61
    learned = run(clipfx.zclip(), values)[3].rule_state
    assert float(learned.mean[0]) != float(before.mean[0])


def test_zclip_survives_norms_whose_squares_overflow():
    values = np.concatenate([lognormal(0.1, 60), [[1e30]], lognormal(0.1, 60)])
    _, after, _, state = run(clipfx.zclip(), values)
    assert after[60] < 2
    assert np.isfinite(np.asarray(state.rule_state.std)).all()
    poisoned = np.concatenate([np.full((5, 1), 1e30), lognormal(0.1, 2000)])
    _, _, limits, _ = run(clipfx.zclip(warmup_steps=5, decay=0.9), poisoned)
    assert limits[-1] < 3  # forgotten, not infinite for good


def test_zclip_learns_nothing_at_a_spike_under_injection_too():
    values = np.concatenate([lognormal(0.1, 60), [[50.0]]])
    tx = optax.inject_hyperparams(clipfx.zclip)(learn_spikes=False)
    state = tx.init({"w": jnp.ones(1)})
    before = state
    for value in values:
        before, (_, state) = state, tx.update({"w": jnp.float32(value)}, state)
    old, new = before.inner_state.rule_state, state.inner_state.rule_state
    assert float(old.mean[0]) == float(new.mean[0])


def test_a_share_for_a_percentage_is_asked_about():
    with pytest.warns(UserWarning, match="percentile should be in percent"):
        clipfx.autoclip(0.9)
    for percent in (0, 0.0, 1, 1.0, 50):  # warnings are errors here
        clipfx.autoclip(percent)
