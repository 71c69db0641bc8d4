"""Curvature along steps, and where a step cancels weight decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import assert_close, assert_same, enable_x64, norm, sample

import clipfx

# ------------------------------------------------------------------ clip_by_curvature


def descend(tx, grad, w, steps, learning_rate):
    """The points of plain gradient descent behind `tx`."""
    state, points = tx.init(w), [w]
    for _ in range(steps):
        out, state = tx.update(grad(w), state, w)
        w = jax.tree.map(lambda w, u: w - learning_rate * u, w, out)
        points.append(w)
    return points, state


def test_curvature_follows_the_secant():
    rng = np.random.default_rng(0)
    grads = [{"w": rng.normal(size=5).astype(np.float32)} for _ in range(8)]
    points = [{"w": rng.normal(size=5).astype(np.float32)} for _ in range(8)]
    tx = clipfx.clip_by_curvature(0.1, max_product=0.4, max_factor=3.0, decay=0.6)
    state = tx.init(points[0])
    mean, count = 0.0, 0
    for k, (g, w) in enumerate(zip(grads, points, strict=True)):
        out, state = tx.update(g, state, w)
        factor = 1.0
        if k:
            turned = np.linalg.norm(g["w"] - grads[k - 1]["w"])
            moved = np.linalg.norm(w["w"] - points[k - 1]["w"])
            count += 1
            mean = 0.6 * mean + 0.4 * turned / moved
            factor = min(3.0, 0.4 / (0.1 * mean / (1 - 0.6**count)))
        np.testing.assert_allclose(out["w"], factor * g["w"], rtol=1e-5)


def test_curvature_keeps_descent_stable_on_a_quadratic():
    curvature = 100.0
    grad = lambda w: {"w": curvature * w["w"]}
    start = {"w": jnp.ones(3)}
    wild, _ = descend(optax.identity(), grad, start, 10, 0.1)
    assert norm(wild[-1]) > 1e6
    tx = clipfx.clip_by_curvature(0.1, max_product=0.5, decay=0.0)
    calm, _ = descend(tx, grad, start, 10, 0.1)
    # The first step is blind; from the second on each one halves the distance.
    lengths = [norm(w) for w in calm]
    np.testing.assert_allclose(lengths[1], 9 * lengths[0], rtol=1e-5)
    np.testing.assert_allclose(np.divide(lengths[2:], lengths[1:-1]), 0.5, rtol=1e-3)


def test_curvature_lengthens_steps_on_a_plateau():
    grad = lambda w: {"w": jnp.full(3, 0.01)}
    start = {"w": jnp.zeros(3)}
    for bound in (1.0, 4.0):
        tx = clipfx.clip_by_curvature(0.1, max_factor=bound)
        points, state = descend(tx, grad, start, 4, 0.1)
        step = norm({"w": points[-1]["w"] - points[-2]["w"]})
        assert step == pytest.approx(bound * 0.1 * 0.01 * 3**0.5, rel=1e-5)
        assert float(state.metrics.factor[0]) == pytest.approx(bound)


def test_curvature_learns_nothing_where_nothing_moved_or_is_bad():
    tx = clipfx.clip_by_curvature(1.0, groups="leaf")
    w = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = tx.init(w)
    _, state = tx.update(w, state, w)
    moved = {"a": w["a"] + 1, "b": w["b"]}
    turned = {"a": w["a"] + 5, "b": w["b"] + 7}
    _, state = tx.update(turned, state, moved)
    np.testing.assert_allclose(state.rule_state.curvature, [5.0, 0.0], rtol=1e-6)
    assert state.rule_state.secants.tolist() == [1, 0]
    bad = {"a": jnp.array([jnp.nan, 1.0]), "b": w["b"]}
    _, after = tx.update(bad, state, w)
    assert_same(after.rule_state, state.rule_state)


def test_curvature_counts_the_secants_of_each_group():
    """A group that begins to move late learns as one that has just begun."""
    tx = clipfx.clip_by_curvature(1.0, groups="leaf", decay=0.9)
    at = lambda a, b: {"a": jnp.full(2, a), "b": jnp.full(2, b)}
    state = tx.init(at(0.0, 0.0))
    for k in range(4):  # curvature 3 along a, 5 along b, which moves but once
        late = float(k == 3)
        _, state = tx.update(at(3.0 * k, 5 * late), state, at(1.0 * k, late))
    assert state.rule_state.secants.tolist() == [3, 1]
    np.testing.assert_allclose(state.rule_state.curvature, [3.0, 5.0], rtol=1e-5)


def test_curvature_remembers_what_half_precision_cannot_hold():
    tx = clipfx.clip_by_curvature(1.0)
    params, grads = {"w": jnp.ones(3, jnp.float16)}, {"w": jnp.full(3, 1e6)}
    _, state = tx.update(grads, tx.init(params), params)
    assert_same(state.rule_state.updates["w"], jnp.full(3, 65504, jnp.float16))
    bad = {"w": jnp.array([jnp.inf, 1, 1], jnp.float16)}
    _, after = tx.update(grads, state, bad)
    assert_same(after.rule_state, state.rule_state)


# --------------------------------------------------------------- weight_decay_balance


def balance(u, w, eta, decay, **kwargs):
    return clipfx.weight_decay_balance(
        {"w": u}, {"w": w}, weight_decay=decay, learning_rate=eta, **kwargs
    )


def stepped(u, w, c, eta, decay, scaled=True):
    share = eta * decay if scaled else decay
    return (1 - share) * w - eta * c * u / np.linalg.norm(u)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("eta", [0.1, 1e-3])
def test_exact_threshold_preserves_the_norm(eta, scaled):
    with enable_x64(True):
        for seed in range(20):
            rng = np.random.default_rng(seed)
            u, w = rng.normal(size=(2, 50))
            u -= rng.normal() * w  # towards and away from the origin
            found = balance(u, w, eta, 0.01, scaled=scaled)
            assert found.exact.dtype == jnp.float64
            after = stepped(u, w, float(found.exact[0]), eta, 0.01, scaled)
            assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(w), rel=1e-10)
            reached = np.linalg.norm(u) >= float(found.exact[0])
            assert bool(found.reached[0]) == reached


@pytest.mark.parametrize("scaled", [True, False])
def test_radial_threshold_cancels_along_the_weights(scaled):
    with enable_x64(True):
        rng = np.random.default_rng(0)
        w = rng.normal(size=50)
        u = rng.normal(size=50) - w
        found = balance(u, w, 0.1, 0.01, scaled=scaled)
        moved = stepped(u, w, float(found.radial[0]), 0.1, 0.01, scaled) - w
        assert abs(moved @ w) < 1e-10 * (w @ w)
        cosine = -(u @ w) / np.linalg.norm(u) / np.linalg.norm(w)
        assert float(found.cosine[0]) == pytest.approx(cosine, rel=1e-10)
        assert np.isinf(balance(w, w, 0.1, 0.01).radial[0])


def test_opposed_threshold_undoes_a_step_altogether():
    with enable_x64(True):
        w = np.random.default_rng(0).normal(size=50)
        found = balance(-3 * w, w, 0.1, 0.01)
        after = stepped(-w, w, float(found.opposed[0]), 0.1, 0.01)
        np.testing.assert_allclose(after, w, rtol=1e-12)
        for c in (found.radial, found.exact):
            assert float(c[0]) == pytest.approx(float(found.opposed[0]), rel=1e-3)


def test_rotational_equilibrium_of_orthogonal_steps():
    with enable_x64(True):
        w, u = np.array([3.0, 0.0]), np.array([0.0, 1.0])
        found = balance(u, w, 0.1, 0.01)
        want = 3 * np.sqrt(2 * 0.01 / 0.1 - 0.01**2)
        assert float(found.exact[0]) == pytest.approx(want, rel=1e-12)


def test_balance_of_nothing():
    found = clipfx.weight_decay_balance({}, {}, weight_decay=0.1, learning_rate=0.1)
    assert all(x.shape == (0,) for x in jax.tree.leaves(found))


def test_balance_per_layer_in_float32_bf16_and_under_jit():
    updates, params = sample(seed=1), sample(seed=2)
    find = lambda u, w: clipfx.weight_decay_balance(
        u, w, weight_decay=0.1, learning_rate=1e-3
    )
    found = find(updates, params)
    assert tuple(found.groups) == ("decoder", "encoder")
    assert_close(jax.jit(find)(updates, params), found, rtol=1e-5)
    for k, layer in enumerate(found.groups):
        assert float(found.weight[k]) == pytest.approx(norm(params[layer]), rel=1e-6)
        assert float(found.update[k]) == pytest.approx(norm(updates[layer]), rel=1e-6)
    half = find(sample(jnp.bfloat16, 1), params)
    np.testing.assert_allclose(half.exact, found.exact, rtol=2e-2)
    huge = find(sample(seed=1, scale=1e30), params)
    np.testing.assert_allclose(huge.cosine, found.cosine, rtol=1e-5)
    still = find(sample(scale=0.0), params)
    assert still.cosine.tolist() == [0.0, 0.0]
