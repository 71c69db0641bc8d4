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


@pytest.mark.parametrize(("l0", "l1"), [(1.0, 10.0), (0.3, 0.0), (0.0, 2.0)])
def test_smooth_norm_divides_by_the_smoothness(l0, l1):
    for scale in (1e-3, 1.0, 1e3, 1e30):
        tree = sample(scale=scale)
        tx = clipfx.smooth_norm(l0, l1)
        out, state = tx.update(tree, tx.init(tree))
        want = norm(tree) / (l0 + l1 * norm(tree))
        assert norm(out) == pytest.approx(want, rel=2e-6)
        limit = float(state.metrics.threshold[0])
        assert limit == pytest.approx(l0 / l1) if l1 else limit > 1e38
    if l0 and l1:
        soft, _ = clipfx.tree_clip(
            sample(), l0 / l1, response=clipfx.responses.softsign
        )
        out, _ = tx.update(sample(), tx.init(sample()))
        assert_close(out, jax.tree.map(lambda x: x / l0, soft), rtol=2e-6)


def test_smooth_norm_descends_where_plain_descent_explodes():
    """On x^4 curvature grows with the gradient; from 50 a fixed step flies away."""
    grad = lambda x: 4 * x**3
    plain = smooth = jnp.float32(50.0)
    tx = clipfx.smooth_norm(1.0, 1.0)
    state = tx.init(plain)
    for _ in range(5):
        plain = plain - 0.1 * grad(plain)
    for _ in range(300):
        step, state = tx.update(grad(smooth), state)
        smooth = smooth - 0.5 * step
    assert not abs(float(plain)) < 1e30
    assert abs(float(smooth)) < 0.2


def test_warm_up_of_the_rate_equals_a_schedule_of_the_threshold_where_it_binds():
    ramp = lambda count: (jnp.asarray(count, jnp.float32) + 1) / 10
    rng = np.random.default_rng(0)
    grads = [{"w": 5 + rng.normal(size=3).astype(np.float32)} for _ in range(10)]

    def walk(threshold, rate):
        tx = clipfx.clip_by_global_norm(threshold)
        state, w = tx.init(grads[0]), np.zeros(3)
        for count, g in enumerate(grads):
            out, state = tx.update(g, state)
            w = w - float(rate(count)) * np.asarray(out["w"])
        return w

    one = lambda count: 1.0
    np.testing.assert_allclose(walk(1.0, ramp), walk(ramp, one), rtol=1e-5)
    # And not where it does not bind.
    assert not np.allclose(walk(1e3, ramp), walk(lambda c: 1e3 * ramp(c), one))


def test_heavy_ball_behind_a_clip_falls_into_a_cycle_of_known_width():
    """Beyond its stability limit, with half the gap alpha c / (2 (1 + beta))."""
    rate, beta, curvature, c = 1.0, 0.5, 4.0, 5.0
    tx = optax.chain(clipfx.clip_by_global_norm(c), optax.trace(beta))
    x = jnp.float32(0.1)
    state, points = tx.init(x), []
    for _ in range(400):
        step, state = tx.update(curvature * x, state)
        x = x - rate * step
        points.append(float(x))
    half_gap = abs(points[-1] - points[-2]) / 2
    assert half_gap == pytest.approx(rate * c / (2 * (1 + beta)), rel=1e-5)
    assert half_gap == pytest.approx(1.6667, abs=1e-4)


def test_a_diffusion_step_of_flax_passes_the_ratio_on():
    from flax import nnx

    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    tx = optax.chain(clipfx.clip_by_snr(1.0), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2)))) * 100)(model)
    optimizer.update(model, grads, snr=jnp.float32(50.0))
    read = clipfx.metrics.read(optimizer.opt_state)
    assert float(read["clip0/threshold/global"]) == pytest.approx(0.1)
