"""Statistics at the ends of the range."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from trees import once

import clipfx
from clipfx._core.running_stats import LARGEST, average, multiple


def test_a_multiple_stays_in_range():
    x = jnp.array([0.0, 1e-30, 1.0, LARGEST])
    for ratio in (0.0, 0.5, 2.0, 1e30):
        want = np.minimum(np.float64(x) * ratio, LARGEST)
        np.testing.assert_allclose(multiple(ratio, x), want, rtol=1e-6)
    # Also infinity times 0: a bound that is to bound nothing.
    np.testing.assert_array_equal(
        multiple(math.inf, x), np.full(4, np.float32(LARGEST))
    )
    weights = {"w": jnp.zeros(3)}
    updates = {"w": jnp.array([1.0, -2.0, 0.0])}
    tx = clipfx.clip_by_params(math.inf, 0.0)
    kept, _ = tx.update(updates, tx.init(weights), weights)
    np.testing.assert_array_equal(kept["w"], updates["w"])


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.3, 0.6180339, 0.97])
def test_an_average_of_the_largest_is_finite(weight):
    largest = jnp.array(LARGEST)
    mean = average(jnp.float32(weight), largest, largest)
    assert float(mean) == pytest.approx(LARGEST, rel=1e-6)


def test_an_average_of_the_largest_where_weights_add_up_to_more_than_one():
    """float32 of 1 - 0.3 and 0.3: their sum rounds to 1 and may exceed it before."""
    for weight in np.linspace(0, 1, 997, dtype=np.float32):
        mean = average(jnp.float32(weight), jnp.array(LARGEST), jnp.array(LARGEST))
        assert math.isfinite(float(mean))


def test_steps_after_one_of_the_largest_norm_are_finite():
    tx = clipfx.band_by_history(0.5, 2.0, groups="global")
    assert np.isfinite(once(tx, jnp.full(4, 3e38))).all()
