"""AdaGC, AGGC's band and Stable-SPAM's stabilizer against their papers."""

import jax.numpy as jnp
import numpy as np
import pytest
from sequences import LARGEST, Oracle, assert_follows, norms, run
from tiers import in_tiers

import clipfx


def adagc_oracle(ratio, decay, warm, cap):
    def update(norm, state):
        count, usual = state
        if count < warm:
            total = np.linalg.norm(norm[np.isfinite(norm)])
            limit = norm * cap / total if total > 0 else np.zeros_like(norm)
            became = np.minimum(norm, limit)
            learned = np.minimum(usual, became)
        else:
            limit = np.where(np.isinf(usual), LARGEST, ratio * usual)
            became = np.minimum(norm, limit)
            mean = decay * usual + (1 - decay) * became
            learned = np.where(np.isinf(usual), became, mean)
        return became, limit, (count + 1, np.where(norm > 0, learned, usual))

    return Oracle(lambda groups: (0, np.full(groups, np.inf)), update)


@pytest.mark.parametrize(
    ("ratio", "decay", "warm", "cap"),
    [(1.04, 0.99, 100, 1.0), (1.5, 0.9, 10, 0.3), (1.05, 0.98, 0, 1.0)],
)
def test_adagc_follows_the_recursion(ratio, decay, warm, cap):
    tx = clipfx.adagc(ratio, decay=decay, warmup_steps=warm, max_norm=cap)
    assert_follows(tx, adagc_oracle(ratio, decay, warm, cap), True)


def test_adagc_warm_up_of_its_port():
    values = np.array([[5.0, 12.0], *[[6.0, 8.0]] * 99])
    _, after, _, state = run(clipfx.adagc(max_norm=6.5), values)
    np.testing.assert_allclose(after[0], [2.5, 6.0], rtol=1e-6)
    np.testing.assert_allclose(state.rule_state.norm, [2.5, 5.2], rtol=1e-6)
    _, _, _, state = run(clipfx.adagc(max_norm=6.5), values * [1, 0])
    assert float(state.rule_state.norm[1]) == -1  # not seen yet, and no infinity


SIGMAS = [0.1, 0.3, 0.6, 1.0]
RATCHET = {  # (max_ratio, decay): clip rates, and norms after as a share of before
    (1.04, 0.99): ([0.49, 0.75, 0.84, 0.88], [0.96, 0.75, 0.44, 0.17]),
    (1.05, 0.98): ([0.42, 0.70, 0.81, 0.86], [0.97, 0.77, 0.47, 0.19]),
    (1.2, 0.98): ([0.03, 0.32, 0.52, 0.61], None),
    (1.5, 0.98): ([0.00, 0.07, 0.24, 0.37], None),
    (1.0, 0.98): (None, [0.78, 0.47, 0.21, 0.06]),
}

COLUMNS = {str(sigma): k for k, sigma in enumerate(SIGMAS)}


@pytest.mark.parametrize("column", in_tiers(COLUMNS, {"0.6"}))
@pytest.mark.parametrize("setting", RATCHET)
def test_adagc_ratchets_below_the_mean_norm(setting, column):
    values = np.random.default_rng(0).lognormal(0, SIGMAS[column], (30_000, 1))
    ratio, decay = setting
    tx = clipfx.adagc(ratio, decay=decay, warmup_steps=1, max_norm=np.inf)
    before, after, limits, _ = run(tx, values)
    late = slice(10_000, None)
    rates, shares = RATCHET[setting]
    if rates:
        rate = (before > limits)[late].mean()
        assert rate == pytest.approx(rates[column], abs=0.03)
    if shares:
        share = after[late].mean() / before[late].mean()
        if ratio == 1:  # a threshold that never rises falls for as long as one looks
            assert after[-10_000:].mean() < after[late].mean()
            assert share <= shares[column] + 0.01
        else:
            assert share == pytest.approx(shares[column], abs=0.04)


def test_adagc_creeps_upwards():
    values = np.concatenate([np.ones((100, 1)), np.full((3000, 1), 10.0)])
    _, after, _, _ = run(clipfx.adagc(max_norm=np.inf), values)
    steps = int(np.argmax(after[100:, 0] > 2.08))
    assert 1600 < steps < 1850


def test_adagc_lets_a_tensor_that_was_silent_begin():
    values = np.concatenate([np.zeros((150, 1)), np.full((5, 1), 3.0)])
    _, after, _, _ = run(clipfx.adagc(), values)
    np.testing.assert_allclose(after[150:, 0], 3.0, rtol=1e-6)


def band_oracle(low, high, decay, min_norm):
    def update(norm, state):
        count, mean = state
        at = lambda edge: edge(count) if callable(edge) else edge
        mean = np.where(mean > 0, decay * mean + (1 - decay) * norm, norm)
        upper = at(high) * mean
        lower = np.maximum(min_norm, at(low) * mean)
        became = np.where(norm > upper, upper, np.maximum(norm, lower))
        return np.where(norm > 0, became, 0), became, (count + 1, mean)

    return Oracle(lambda groups: (0, np.zeros(groups)), update)


@pytest.mark.parametrize(
    ("low", "high", "decay", "min_norm"),
    [
        (0.5, 2.0, 0.9, 0.0),
        (0.9, 1.1, 0.5, 0.2),
        (
            0.5,
            1.1,
            0.9,
            3.0,
        ),  # often above the band: what exceeds it is cut all the same
        (0.0, lambda count: 4.0 - 0.01 * count, 0.99, 0.0),
    ],
)
def test_band_follows_the_recursion(low, high, decay, min_norm):
    traced = high
    if callable(high):
        traced = lambda count: 4.0 - 0.01 * count.astype(jnp.float32)
    tx = clipfx.band_by_history(
        low, traced, decay=decay, min_norm=min_norm, groups="leaf"
    )
    assert_follows(tx, band_oracle(low, high, decay, min_norm), True)


def stabilizer_oracle(first, second):
    def update(norm, state):
        count, a, b = state
        count += 1
        a = first * a + (1 - first) * norm
        b = second * b + (1 - second) * norm**2
        became = a / (1 - first**count) / np.sqrt(b / (1 - second**count))
        became = np.where(b > 0, became, 0)
        return np.where(norm > 0, became, 0), became, (count, a, b)

    return Oracle(lambda groups: (0, np.zeros(groups), np.zeros(groups)), update)


@pytest.mark.parametrize(("first", "second"), [(0.7, 0.9), (0.0, 0.0), (0.99, 0.999)])
def test_norm_stabilizer_follows_the_recursion(first, second):
    tx = clipfx.norm_stabilizer(first, second)
    assert_follows(tx, stabilizer_oracle(first, second), True, rtol=1e-4)


def test_norm_stabilizer_does_not_see_the_scale():
    values = norms(0, bad=False)
    small, large = (run(clipfx.norm_stabilizer(), values * s)[1] for s in (1e-15, 1e15))
    np.testing.assert_allclose(small, large, rtol=1e-4)
    steady = run(clipfx.norm_stabilizer(), np.full((50, 1), 7.0))[1]
    np.testing.assert_allclose(steady, 1.0, rtol=1e-5)


def test_adagc_warms_up_unclipped_beside_a_silent_tensor():
    values = np.array([[2.0, 0.0], [3.0, 0.0]])
    _, after, _, state = run(clipfx.adagc(max_norm=np.inf), values)
    np.testing.assert_allclose(after, values, rtol=1e-6)
    np.testing.assert_allclose(state.rule_state.norm, [2, -1], rtol=1e-6)


def test_adagc_warms_up_at_every_magnitude():
    """The norm of all tensors together overflows; their shares of it do not."""
    values = np.full((1, 4), 3e38)
    _, after, _, _ = run(clipfx.adagc(max_norm=1.0), values)
    np.testing.assert_allclose(after, 0.5, rtol=1e-5)


def growth_oracle(ratio, least):
    def update(norm, before):
        rate = np.maximum(norm / (before + least), ratio) / ratio
        became = np.where(np.isinf(before), norm, norm / rate)
        limit = np.where(np.isinf(before), LARGEST, ratio * (before + least))
        return became, limit, became

    return Oracle(lambda groups: np.full(groups, np.inf), update)


@pytest.mark.parametrize(("ratio", "least"), [(1.01, 1e-8), (1.2, 0.1), (1.0, 1e-3)])
def test_limit_norm_growth_follows_the_recursion(ratio, least):
    tx = clipfx.limit_norm_growth(ratio, min_norm=least)
    assert_follows(tx, growth_oracle(ratio, least), True, rtol=1e-4)


def test_limit_norm_growth_of_known_numbers():
    """The direction (3, 4) with norms of 5, 10, 10, 0.5, 5."""
    tx = clipfx.limit_norm_growth(1.01)
    state, outs = tx.init({"w": jnp.zeros(2)}), []
    for size in (1, 2, 2, 0.1, 1):
        out, state = tx.update({"w": size * jnp.array([3.0, 4.0])}, state)
        outs.append(out["w"])
    want = [[3, 4], [3.03, 4.04], [3.0603, 4.0804], [0.3, 0.4], [0.303, 0.404]]
    np.testing.assert_allclose(outs, want, rtol=1e-6)


def steps_to(target, start, then, **kwargs):
    """How many steps of a constant norm it takes until it passes."""
    values = np.concatenate([start, np.full(1500, then)])[:, None]
    _, after, _, _ = run(clipfx.limit_norm_growth(**kwargs), values)
    return int(np.argmax(after[len(start) :, 0] >= target * (1 - 1e-5))) + 1


def test_limit_norm_growth_takes_long_to_come_back():
    assert steps_to(1.0, [1.0, 0.01], 1.0) == 463
    assert steps_to(2.0, [1.0], 2.0) == 70
    assert steps_to(1.0, [1.0, 0.0], 1.0) == 1388
    assert steps_to(1.0, [1.0, 0.0], 1.0, min_norm=0.01) == 70


@pytest.mark.parametrize("column", in_tiers(COLUMNS, {"0.6"}))
def test_limit_norm_growth_clips_nearly_every_step(column):
    values = np.random.default_rng(0).lognormal(0, SIGMAS[column], (30_000, 1))
    before, after, limits, _ = run(clipfx.limit_norm_growth(), values)
    late = slice(10_000, None)
    rate, share = (before > limits)[late].mean(), after[late].mean()
    share /= before[late].mean()
    assert rate == pytest.approx([0.83, 0.93, 0.96, 0.98][column], abs=0.01)
    assert share == pytest.approx([0.88, 0.58, 0.26, 0.08][column], abs=0.01)
