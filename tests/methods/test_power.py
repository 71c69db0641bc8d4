"""SPAMP against its public description and the properties that follow; plain powers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequences import run
from tiers import in_tiers
from trees import DTYPES, assert_same, norm, once, sample

import clipfx


def spamp_oracle(
    values, beta=0.99, low=0.7, init="first", power_of="entry", curve=None
):
    """The recursion in float64 over gradients `[T, n]`; NaN for a norm not finite."""
    usual_curve = lambda r: low + (1 - low) / max(r, 1)
    h = curve or usual_curve
    tau, count, out = 0.0, 0, []
    for g in values.astype(np.float64):
        n = np.linalg.norm(g)
        if not np.isfinite(n):
            out.append(np.full_like(g, np.nan))
            continue
        count += 1
        tau = n if init == "first" and count == 1 else beta * tau + (1 - beta) * n
        limit = tau / (1 - beta**count) if init == "debias" else tau
        ratio = n / limit if limit > 0 else 1.0
        a = h(ratio if ratio > 1 + 1e-6 or ratio < 1 - 1e-6 else 1.0)
        if power_of == "norm":
            out.append(g * ratio ** (a - 1) if n > 0 else g)
            continue
        unit = limit / np.sqrt(g.size) if power_of == "rms" and limit > 0 else 1.0
        s = unit * np.sign(g) * np.abs(g / unit) ** a
        m = np.linalg.norm(s)
        out.append(s * min(1, limit / m) if m > 0 else s)
    return np.array(out)


def gradients(seed, steps=120, size=7):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, size)) * rng.lognormal(0, 0.7, (steps, 1))
    values[rng.integers(1, steps, 4)] *= 1e3
    values[rng.integers(1, steps, 3)] = 0.0
    values[rng.integers(1, steps, 2), 3] = np.nan
    values[rng.integers(1, steps), 0] = np.inf
    values[:, 5] *= rng.integers(0, 2, steps)
    return values.astype(np.float32)


def outputs(tx, values):
    def step(state, g):
        out, state = tx.update({"w": g}, state)
        return state, out["w"]

    state = tx.init({"w": values[0]})
    scan = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))
    state, out = scan(state, jnp.asarray(values))
    return np.asarray(out, np.float64), state


@pytest.mark.parametrize("power_of", ["entry", "rms", "norm"])
@pytest.mark.parametrize("init", in_tiers(["first", "zero", "debias"], {"debias"}))
def test_spamp_follows_the_recursion(init, power_of):
    for seed in range(3):
        values = gradients(seed)
        tx = clipfx.spamp(0.9, 0.6, init=init, power_of=power_of)
        out, _ = outputs(tx, values)
        want = spamp_oracle(values, 0.9, 0.6, init, power_of)
        np.testing.assert_allclose(out, want, rtol=5e-5, atol=1e-6)


def test_spamp_takes_any_curve():
    smooth = lambda r: 0.7 + 0.3 * jnp.exp(-(jnp.maximum(r - 1, 0) ** 2))
    numpy = lambda r: 0.7 + 0.3 * np.exp(-(max(r - 1, 0) ** 2))
    values = gradients(0)
    out, _ = outputs(clipfx.spamp(curve=smooth), values)
    np.testing.assert_allclose(out, spamp_oracle(values, curve=numpy), 5e-5, 1e-6)


def test_spamp_known_numbers():
    tx = clipfx.spamp(0.9)
    first, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init({"w": jnp.ones(2)}))
    np.testing.assert_array_equal(first["w"], np.array([3, 4], np.float32))
    second, state = tx.update({"w": jnp.array([6.0, 8.0])}, state)
    np.testing.assert_allclose(second["w"], [3.3819, 4.3374], atol=1e-3)
    assert float(state.metrics.threshold[0]) == pytest.approx(5.5)
    assert float(state.metrics.factor[0]) == pytest.approx(0.55)
    assert state.metrics.clipped.tolist() == [1]


@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_spamp_lets_a_spike_through_by_one_minus_beta(beta):
    tx = clipfx.spamp(beta, power_of="rms")
    values = np.array([[1.0, 0.0], [1e6, 0.0]], np.float32)
    out, state = outputs(tx, values)
    assert out[1, 0] == pytest.approx((1 - beta) * 1e6 + beta, rel=1e-3)
    assert float(state.metrics.threshold[0]) == pytest.approx(out[1, 0], rel=1e-3)


def test_spamp_raises_small_entries_and_lands_on_the_sphere():
    # Alone the power of 0.7 makes entries of 1e-4 fifteen times larger.
    raised = once(clipfx.grad_power(0.7), {"w": jnp.full(9, 1e-4)})
    assert norm(raised) / 3e-4 == pytest.approx(15.8, abs=0.1)
    rng = np.random.default_rng(0)
    small = (1e-4 * rng.normal(size=(2, 50)) * [[1.0], [4.0]]).astype(np.float32)
    out, state = outputs(clipfx.spamp(0.9), small)
    tau = float(state.metrics.threshold[0])
    assert np.linalg.norm(out[1]) == pytest.approx(tau, rel=2e-6)
    cosine = out[1] @ small[1] / np.linalg.norm(out[1]) / np.linalg.norm(small[1])
    assert 0.98 < cosine < 1 - 1e-6


def test_spamp_is_equivariant_only_in_units_of_rms_or_norm():
    values = gradients(1, steps=20)
    for power_of, same in (("entry", False), ("rms", True), ("norm", True)):
        tx = clipfx.spamp(0.9, power_of=power_of)
        scaled = outputs(tx, 100 * values)[0] / 100
        plain = outputs(tx, values)[0]
        assert np.allclose(scaled, plain, rtol=1e-4, atol=1e-5, equal_nan=True) == same


def test_spamp_in_units_of_rms_compresses():
    values = np.random.default_rng(0).normal(size=(2, 200)).astype(np.float32)
    values[1] *= 3
    out, state = outputs(clipfx.spamp(0.99, power_of="norm"), values)
    tau, n = float(state.metrics.threshold[0]), np.linalg.norm(values[1])
    power = 0.7 + 0.3 * tau / n
    assert np.linalg.norm(out[1]) == pytest.approx(tau * (n / tau) ** power, rel=1e-5)
    bounded, _ = outputs(clipfx.spamp(0.99, power_of="rms"), values)
    assert np.linalg.norm(bounded[1]) <= tau * (1 + 1e-6)


@pytest.mark.parametrize(
    ("sigma", "rate", "share"),
    [(0.3, 0.44, 0.88), (0.1, 0.48, 0.96), (1.0, 0.31, 0.61)],
)
def test_spamp_is_a_permanent_shaper(sigma, rate, share):
    values = np.random.default_rng(0).lognormal(0, sigma, (20_000, 1))
    before, after, limits, _ = run(clipfx.spamp(), values)
    late = slice(1000, None)
    assert (before > limits)[late].mean() == pytest.approx(rate, abs=0.015)
    assert after[late].mean() / before[late].mean() == pytest.approx(share, abs=0.015)


def test_spamp_from_zero_is_a_warm_up():
    values = np.full((300, 1), 5.0)
    _, after, _, _ = run(clipfx.spamp(0.99, init="zero"), values)
    ramp = 5 * (1 - 0.99 ** np.arange(1, 301))
    np.testing.assert_allclose(after[:, 0], ramp, rtol=1e-4)
    for init in ("first", "debias"):
        _, after, _, _ = run(clipfx.spamp(0.99, init=init), values)
        np.testing.assert_allclose(after, 5.0, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("power_of", ["entry", "rms"])
def test_spamp_bounds_what_is_stored_and_leaves_the_rest(power_of, dtype):
    tx = clipfx.spamp(0.9, power_of=power_of, groups="layer")
    small, large = sample(dtype, seed=1), sample(dtype, seed=2, scale=20.0)
    state = tx.init(small)
    out, state = tx.update(small, state)
    assert_same(out, small)
    out, state = tx.update(large, state)
    for k, layer in enumerate(("decoder", "encoder")):
        limit = float(state.metrics.threshold[k])
        assert 0.98 * limit < norm(out[layer]) <= limit * (1 + 1e-6)
    shorter, _ = tx.update(small, state)
    assert_same(shorter, small)


# ------------------------------------------------------------------------- grad_power


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.2, 3.0])
def test_grad_power_keeps_the_sign(power, dtype):
    tree = sample(dtype)
    out = once(clipfx.grad_power(power), tree)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(out), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        ulp = 2.0 ** -jnp.finfo(dtype).nmant
        np.testing.assert_allclose(y, np.sign(x) * np.abs(x) ** power, 2 * ulp, ulp / 8)
    if power == 1:
        assert_same(out, tree)


@pytest.mark.parametrize(
    ("power", "cosine"), [(0.0, 0.7979), (0.5, 0.9628), (0.7, 0.9879), (0.85, 0.9972),
                          (1.2, 0.9957)]
)  # fmt: skip
def test_powers_bend_a_gaussian_only_mildly(power, cosine):
    x = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    y = np.asarray(once(clipfx.grad_power(power), {"w": x})["w"])
    measured = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert measured == pytest.approx(cosine, abs=1e-3)


def test_grad_power_stays_in_range_and_keeps_zeros_and_the_argument():
    tx = clipfx.grad_power(1.2)
    x = jnp.array([3e38, -3e38, 0.0, 1e-38, jnp.inf, jnp.nan])
    y = once(tx, x)
    largest = float(jnp.finfo(jnp.float32).max)
    np.testing.assert_array_equal(y[:3], np.array([largest, -largest, 0], np.float32))
    assert np.isinf(y[4])
    assert np.isnan(y[5])
    half = once(tx, jnp.array([60000.0, -60000.0], jnp.float16))
    assert half.tolist() == [65504.0, -65504.0]
    z = once(tx, jnp.array([3 + 4j, 0j]))
    np.testing.assert_allclose(z, [(0.6 + 0.8j) * 5**1.2, 0], rtol=1e-6)
    assert_same(once(clipfx.grad_power(0.0), jnp.zeros(2)), jnp.zeros(2))
