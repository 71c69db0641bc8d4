"""Noise schedules, rules of the ratio, and clipping by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_close, assert_same, norm, sample

import clipfx
from clipfx import snr

AT = [0, 1, 9, 99, 249, 499, 749, 999]
SCHEDULES = {
    snr.ddpm_linear: [
        9999.0, 4546.36, 526.762, 8.71045, 1.10122, 0.0852899, 0.00336182, 4.03599e-5
    ],
    snr.cosine: [
        24221.3, 11437.5, 1583.08, 34.8330, 5.53647, 0.975674, 0.168596, 2.4288e-9
    ],
}  # fmt: skip
ALPHA_BAR = {
    snr.ddpm_linear: [
        0.9999, 0.9997801, 0.9981052, 0.8970181, 0.5240854, 0.0785872, 0.00335055,
        4.03583e-5,
    ],
    snr.cosine: [
        0.9999587, 0.9999126, 0.9993687, 0.9720927, 0.8470122, 0.4938436, 0.1442721,
        2.4288e-9,
    ],
}  # fmt: skip
SUMMARY = {  # step of SNR 1, step of SNR 5, share above 5, geometric mean
    snr.ddpm_linear: (258, 130, 0.130, 0.06715),
    snr.cosine: (495, 261, 0.261, 0.91157),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


@schedules
def test_schedules_reproduce_the_table(schedule):
    ratios = np.asarray(schedule(), np.float64)
    assert ratios.shape == (1000,)
    np.testing.assert_allclose(ratios[AT], SCHEDULES[schedule], rtol=3e-5)
    share = ratios / (1 + ratios)
    np.testing.assert_allclose(share[AT], ALPHA_BAR[schedule], rtol=3e-5)
    one, five, above, mean = SUMMARY[schedule]
    assert abs(int(np.argmin(np.abs(np.log(ratios)))) - one) <= 1
    assert abs(int(np.argmin(np.abs(np.log(ratios / 5)))) - five) <= 1
    assert (ratios > 5).mean() == pytest.approx(above, abs=5e-4)
    assert np.exp(np.log(ratios).mean()) == pytest.approx(mean, rel=1e-4)


@schedules
def test_schedules_of_other_lengths_end_alike(schedule):
    for steps in (50, 250, 4000):
        ratios = np.asarray(schedule(steps))
        assert ratios.shape == (steps,)
        assert (np.diff(ratios) < 0).all()
        assert 0 < ratios[-1] < 1e-3


def test_betas_and_alpha_bar_agree_in_float32_and_traced():
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    want = alpha_bar / (1 - alpha_bar)
    np.testing.assert_allclose(snr.from_betas(betas), want, rtol=1e-6)
    np.testing.assert_allclose(snr.from_alpha_bar(alpha_bar), want, rtol=1e-6)
    traced = jax.jit(snr.from_betas)(jnp.asarray(betas, jnp.float32))
    np.testing.assert_allclose(traced, want, rtol=2e-5)
    zero_terminal = snr.from_alpha_bar([1.0, 0.5, 0.0])
    assert zero_terminal.tolist() == [np.inf, 1.0, 0.0]


def test_rules_are_multiples():
    ratio = jnp.array([0.0, 0.5, 5.0, 50.0, jnp.inf])
    np.testing.assert_allclose(snr.inverse(ratio), [np.inf, 2, 0.2, 0.02, 0])
    np.testing.assert_allclose(snr.min_snr(ratio), [1, 1, 1, 0.1, 0])
    np.testing.assert_allclose(snr.min_snr(ratio, 1.0), [1, 1, 0.2, 0.02, 0])
    root = np.sqrt(0.02)
    np.testing.assert_allclose(
        snr.inverse_sqrt(ratio), [np.inf, np.sqrt(2), np.sqrt(0.2), root, 0], rtol=1e-6
    )
    schedule = snr.cosine()
    reference = jnp.exp(jnp.log(schedule).mean())
    multiples = snr.power(schedule, 0.7, reference)
    assert float(jnp.log(multiples).mean()) == pytest.approx(0, abs=1e-4)


def clip(tree, max_norm, ratio, **kwargs):
    tx = clipfx.clip_by_snr(max_norm, **kwargs)
    return tx.update(tree, tx.init(tree), snr=ratio)


@pytest.mark.parametrize("ratio", [1e-2, 1.0, 7.0, 300.0])
def test_inverse_on_the_unweighted_gradient_bounds_the_weighted_one(ratio):
    """SNR * clip(h; c / SNR) = clip(SNR * h; c)."""
    h = sample()
    clipped, _ = clip(h, 0.5, ratio, weight=snr.inverse)
    weighted = jax.tree.map(lambda x: ratio * x, h)
    expected, _ = clipfx.tree_clip(weighted, 0.5)
    assert_close(jax.tree.map(lambda x: ratio * x, clipped), expected, rtol=2e-6)


def test_min_snr_equals_the_weighting_where_gradients_are_alike():
    """With unweighted norms of G for all t, clip(SNR h; gamma G) weighs min(SNR, 5)."""
    h = sample()
    length = norm(h)
    for ratio in (0.1, 3.0, 5.0, 40.0, 900.0):
        clipped, _ = clip(h, length, ratio)
        weight = ratio * norm(clipped) / length
        assert weight == pytest.approx(min(ratio, 5.0), rel=1e-5)


def test_the_ends_of_the_schedule_are_clamped():
    tree = sample(scale=1e6)
    for rule in (snr.inverse, snr.inverse_sqrt, snr.power):
        _, state = clip(tree, 2.0, 0.0, weight=rule)
        assert state.metrics.threshold[0] == pytest.approx(2e3)
        _, state = clip(tree, 2.0, jnp.inf, weight=rule)
        assert state.metrics.threshold[0] == pytest.approx(2e-3)
    _, state = clip(tree, 2.0, 0.0, low=0.5, high=2.0, weight=snr.inverse)
    assert state.metrics.threshold[0] == pytest.approx(4.0)
    _, state = clip(tree, 2.0, 0.0)
    assert state.metrics.threshold[0] == pytest.approx(2.0)


def test_thresholds_may_be_schedules_and_dicts_by_group():
    tree = sample()
    limits = {"decoder": 0.1, "encoder": 1.0}
    _, state = clip(tree, limits, 10.0, groups="layer")
    np.testing.assert_allclose(state.metrics.threshold, [0.05, 0.5], rtol=1e-6)
    tx = clipfx.clip_by_snr(lambda count: 1.0 + count.astype(jnp.float32), gamma=1.0)
    state = tx.init(tree)
    _, state = tx.update(tree, state, snr=2.0)
    _, state = tx.update(tree, state, snr=2.0)
    assert float(state.metrics.threshold[0]) == 1.0


def test_the_ratio_may_be_traced_and_comes_from_a_table():
    ratios, tree = snr.cosine(), sample()
    step = jax.jit(lambda t: clip(tree, 1.0, ratios[t])[0])
    for t in (0, 500):
        assert_close(step(t), clip(tree, 1.0, float(ratios[t]))[0])
    partial = functools.partial(snr.power, exponent=1.0, reference=2.0)
    assert_same(
        clip(tree, 1.0, 4.0, weight=partial), clip(tree, 0.5, 4.0, weight=lambda s: 1.0)
    )
    bf16, _ = clip(tree, 1.0, jnp.bfloat16(4.0))
    assert_same(bf16, clip(tree, 1.0, 4)[0])
