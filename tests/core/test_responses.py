"""Responses against float64, over the whole range of float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_tiers

from clipfx import responses

PI = math.pi
ORACLES = {
    "hard": lambda n, c: min(n, c),
    "tanh": lambda n, c: c * math.tanh(n / c),
    "softsign": lambda n, c: c * n / (c + n),
    "pseudo_huber": lambda n, c: n / math.hypot(1, n / c),
    "arctan": lambda n, c: 2 * c / PI * math.atan(PI * n / (2 * c)),
    "log": lambda n, c: c * math.log1p(n / c),
    "power": lambda n, c: c * (n / c) ** 0.5,
    "normalize": lambda n, c: c,
    "reject": lambda n, c: n if n <= c else 0.0,
    "band": lambda n, c: min(max(n, 0.5 * c), c),
    "auto_s": lambda n, c: c * (n / (n + 0.01)),
    "psac": lambda n, c: c * (n / (n + 0.1 / (n + 0.1))),
}
MADE = {"power": responses.power(0.5), "band": responses.band(0.5),
        "auto_s": responses.auto_s(0.01), "psac": responses.psac(0.1)}  # fmt: skip
ROWS = {name: MADE.get(name) or getattr(responses, name) for name in ORACLES}
BOUNDED = set(ORACLES) - {"log", "power"}
SMOOTH = {"tanh", "softsign", "pseudo_huber", "arctan", "log"}
each = pytest.mark.parametrize("name", ROWS)
SIZES = [1e-37, 1e-30, 1e-15, 1e-3, 0.5, 1.0, 2.0, 1e3, 1e15, 1e30, 3e38]


def test_the_table_holds_every_response():
    made = set(responses.__all__) - {"Response"}
    assert made == set(ORACLES)


@each
def test_equals_float64_at_every_magnitude(name):
    n, c = (x.ravel().astype(np.float32) for x in np.meshgrid(SIZES, SIZES))
    got = np.asarray(jax.jit(ROWS[name])(n, c), np.float64)
    exact = [ORACLES[name](float(a), float(b)) for a, b in zip(n, c, strict=True)]
    # The logarithms of `power` are rounded at up to 88, so its result to 1e-5.
    rtol = 3e-5 if name == "power" else 1e-6
    np.testing.assert_allclose(got, exact, rtol=rtol, atol=1.2e-38)


@each
def test_edges(name):
    respond = lambda n, c: float(ROWS[name](jnp.float32(n), jnp.float32(c)))
    for n in (0.0, 1e-20, 1.0, 1e38):
        assert respond(n, math.inf) == pytest.approx(n, rel=1e-6, abs=0)
        assert respond(n, 0.0) == 0
        assert respond(0.0, n) == 0
    assert math.isnan(respond(math.nan, 1.0)) or name == "normalize"
    if name in BOUNDED - {"reject"}:
        assert respond(math.inf, 2.0) == pytest.approx(2.0)


@each
def test_properties(name):
    n = jnp.asarray(np.geomspace(1e-6, 1e6, 400), jnp.float32)
    out = np.asarray(ROWS[name](n, jnp.ones_like(n)), np.float64)
    n = np.asarray(n, np.float64)
    if name in BOUNDED:
        assert (out <= 1).all()
    if name != "reject":
        assert (np.diff(out) >= -1e-7 * out[1:]).all()
    if name in SMOOTH | {"hard"}:
        assert (out <= n * (1 + 1e-6)).all()
        np.testing.assert_allclose(out[:50], n[:50], rtol=1e-4)


@pytest.mark.parametrize(
    "name", in_tiers(ROWS.keys(), {"hard", "tanh", "band", "psac"})
)
def test_derivatives(name):
    slope = jax.grad(lambda n, c: ROWS[name](n, c), argnums=(0, 1))
    for n in (0.0, 1e-30, 0.3, 1.7, 1e30):
        for c in (0.0, 1e-3, 1.0, 1e10, math.inf):
            assert np.isfinite(slope(jnp.float32(n), jnp.float32(c))).all(), (n, c)
    for n in (0.3, 1.7):
        step = 1e-6
        exact = ORACLES[name](n + step, 1.1) - ORACLES[name](n - step, 1.1)
        got = slope(jnp.float32(n), jnp.float32(1.1))[0]
        assert float(got) == pytest.approx(exact / (2 * step), rel=1e-4, abs=1e-6)
    if name in SMOOTH | {"hard"}:
        assert float(slope(jnp.float32(0), jnp.float32(1))[0]) == pytest.approx(1)


def test_errors_of_the_makers():
    for bad in (-0.5, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"exponent must be .* got"):
            responses.power(bad)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"low must be .* got"):
            responses.band(bad)
