"""Transforms of single elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import in_tiers

import clipfx
from clipfx import responses


def clip(x, max_abs, **kwargs):
    tx = clipfx.clip_by_value(max_abs, **kwargs)
    return jax.jit(tx.update)(x, tx.init(x))[0]


def test_nonfinite_elements():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 3.0, -0.0])
    np.testing.assert_array_equal(clip(x, 2.0), [np.nan, 2, -2, 2, -0.0])
    assert np.signbit(clip(x, 2.0)[4])
    np.testing.assert_array_equal(clip(x, jnp.inf), x)
    np.testing.assert_allclose(clip(x[1:3], 2.0, response=responses.softsign), [2, -2])


def test_complex_elements_keep_their_argument():
    z = jnp.array([3 + 4j, 0, 0.3j], jnp.complex64)
    np.testing.assert_allclose(clip(z, 1.0), [0.6 + 0.8j, 0, 0.3j], rtol=1e-6)


SMOOTH = ["tanh", "softsign", "pseudo_huber", "arctan", "log"]


@pytest.mark.parametrize("name", in_tiers(SMOOTH, {"tanh", "pseudo_huber"}))
def test_smooth_shaping_is_odd_with_slope_one_at_zero(name):
    response = getattr(responses, name)
    x = jnp.array([-3.0, -0.2, 0.2, 3.0])
    out = clip(x, 0.5, response=response)
    np.testing.assert_array_equal(out, -clip(-x, 0.5, response=response))
    np.testing.assert_allclose(out[2:], response(x[2:], jnp.float32(0.5)), rtol=1e-6)
    slope = jax.jit(jax.vmap(jax.grad(lambda x: clip(x, 0.5, response=response))))
    assert float(slope(jnp.zeros(1))[0]) == 1.0
    assert (np.asarray(slope(x)) > 0).all()
