"""What single named methods promise beyond the laws."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_close, assert_same, norm, sample

import clipfx


def test_block_rms_bounds_the_root_mean_square_of_each_group():
    tree = sample(scale=5.0)
    tx = clipfx.clip_by_block_rms({"decoder": 0.1, "encoder": 0.2}, groups="layer")
    out, state = tx.update(tree, tx.init(tree))
    for name, rms, size in (("decoder", 0.1, 40), ("encoder", 0.2, 28)):
        assert norm(out[name]) / math.sqrt(size) == pytest.approx(rms, rel=1e-6)
    np.testing.assert_allclose(
        state.metrics.threshold, [0.1 * 40**0.5, 0.2 * 28**0.5], rtol=1e-6
    )


def test_normalizing_lengthens_and_shortens():
    for scale in (1e-20, 1.0, 1e20):
        tx = clipfx.normalize_by_norm(2.0)
        tree = sample(scale=scale)
        out, _ = tx.update(tree, tx.init(tree))
        assert norm(out) == pytest.approx(2.0, rel=1e-6)


def test_a_stack_of_layers_in_a_larger_model():
    params = {"embed": jnp.ones((4, 4)), "layers": {"w": jnp.ones((3, 4, 4))}}
    stacked = {"embed": False, "layers": True}
    tx = optax.chain(
        optax.masked(clipfx.per_stacked_layer(clipfx.clip_by_global_norm(1.0)), stacked)
    )
    out, state = jax.jit(tx.update)(params, tx.init(params))
    assert_same(out["embed"], params["embed"])
    for layer in out["layers"]["w"]:
        assert norm([layer]) == pytest.approx(1.0, rel=1e-6)
    read = clipfx.metrics.read(state)
    assert float(read["clip0/norm/global/2"]) == 4.0
    assert len([key for key in read if "/norm/" in key]) == 3


def test_stacked_layers_of_any_transform():
    stacked = {"w": jnp.arange(6.0).reshape(3, 2)}
    tx, plain = clipfx.per_stacked_layer(optax.trace(0.9)), optax.trace(0.9)
    state, expected = tx.init(stacked), plain.init(stacked)
    for _ in range(2):
        out, state = tx.update(stacked, state)
        want, expected = plain.update(stacked, expected)
    assert_close(out, want)
    assert_close(tx.init(jax.eval_shape(lambda: stacked)), tx.init(stacked))
