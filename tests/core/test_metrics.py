"""Reading metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import sample

import clipfx


def test_keys_and_values():
    tx = optax.chain(clipfx.clip_by_global_norm(1.0), clipfx.clip_per_layer(0.5))
    tree = sample()
    state = tx.init(tree)
    assert float(clipfx.metrics.read(state)["clip0/clip_rate/global"]) == 0.0
    for scale in (1.0, 1e-3):
        _, state = tx.update(sample(scale=scale), state)
    read = clipfx.metrics.read(state)
    fields = (
        "norm",
        "threshold",
        "factor",
        "steps",
        "clipped",
        "nonfinite",
        "clip_rate",
    )
    expected = {f"clip0/{field}/global" for field in fields}
    expected |= {f"clip1/{f}/{g}" for f in fields for g in ("decoder", "encoder")}
    assert set(read) == expected
    assert all(np.shape(value) == () for value in read.values())
    assert float(read["clip0/clip_rate/global"]) == 0.5
    assert int(read["clip0/steps/global"]) == 2
    assert set(clipfx.metrics.read(state, "c")) == {"c" + key[4:] for key in expected}


def test_under_jit():
    tx = clipfx.clip_per_layer(0.5)
    state = tx.init(sample())

    @jax.jit
    def step(tree, state):
        _, state = tx.update(tree, state)
        return state, clipfx.metrics.read(state)

    state, inside = step(sample(), state)
    outside = clipfx.metrics.read(state)
    assert set(inside) == set(outside)
    for key, value in outside.items():
        assert float(inside[key]) == pytest.approx(float(value))


def test_nothing_to_read():
    assert clipfx.metrics.read(optax.adam(1e-3).init(jnp.ones(3))) == {}
    assert clipfx.metrics.read(()) == {}
