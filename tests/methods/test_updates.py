"""Steps against what made them: StableAdamW's ratio, and dual norms of momenta."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import in_tiers
from trees import assert_close, enable_x64, norm, sample

import clipfx

STANDARD = jax.numpy_dtype_promotion("standard")  # for Optax's own optimizers

# -------------------------------------------------------------------- clip_update_rms


def run(tx, grads, params=None):
    """All outputs of steps, and the factors and norms of each."""
    params = jax.tree.map(jnp.ones_like, grads[0]) if params is None else params
    state, update, rows = tx.init(params), jax.jit(tx.update), []
    for g in grads:
        out, state = update(g, state, params)
        m = next(x for x in clips(state))
        rows.append((out, np.asarray(m.metrics.norm), np.asarray(m.metrics.factor)))
    return [list(column) for column in zip(*rows, strict=True)], state


def clips(state):
    is_clip = lambda x: isinstance(x, clipfx.ClipState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_clip) if is_clip(x)]


def adam_of(b2=0.99, eps=1e-6, **kwargs):
    return clipfx.clip_update_rms(
        optax.scale_by_adam(0.9, b2, eps), b2=b2, eps=eps, **kwargs
    )


SPIKE = [{"w": jnp.array(g)} for g in ([0.1, -0.2], [0.1, -0.2], [10.0, 0.1])]


@STANDARD
def test_clip_update_rms_of_known_numbers():
    (outs, rms, factors), state = run(adam_of(), SPIKE)
    np.testing.assert_allclose(np.ravel(rms), [1, 1, 1.285296], rtol=1e-6)
    np.testing.assert_allclose(np.ravel(factors), [1, 1, 0.778031], rtol=1e-6)
    np.testing.assert_allclose(outs[2]["w"], [0.50319, -0.40180], rtol=1e-5)
    assert int(clips(state)[0].metrics.clipped[0]) == 1
    # The step itself is short: its own root mean square shows no spike.
    (plain, _, _), _ = run(adam_of(max_rms=jnp.inf), SPIKE)
    np.testing.assert_allclose(plain[2]["w"], [0.64675, -0.51643], rtol=1e-5)
    behind, _ = clipfx.tree_clip(plain[2], jnp.inf)
    assert norm(behind) / 2**0.5 == pytest.approx(0.585, abs=1e-3)


def stable_adam(grads, beta1, beta2, eps, together):
    """The paper's Algorithm 2 in float64, with betas that depend on the step."""
    m = v = [np.zeros(g.shape) for g in grads[0]]
    outs, sizes = [], []
    for t, g in enumerate(grads, 1):
        b1, b2 = ((b**t - b) / (b**t - 1) for b in (beta1, beta2))
        m = [b1 * a + (1 - b1) * x for a, x in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * x * x for a, x in zip(v, g, strict=True)]
        squares = [x * x / np.maximum(a, eps**2) for a, x in zip(v, g, strict=True)]
        if together:
            squares = [np.concatenate([x.ravel() for x in squares])] * len(g)
        rms = [np.sqrt(x.mean()) for x in squares]
        steps = [a / (np.sqrt(b) + eps) for a, b in zip(m, v, strict=True)]
        outs.append([s / max(1, r) for s, r in zip(steps, rms, strict=True)])
        sizes.append(rms[:1] if together else rms)
    return outs, sizes


@STANDARD
@pytest.mark.parametrize("groups", in_tiers(["leaf", "global"], {"leaf"}))
def test_clip_update_rms_is_stable_adamw(groups):
    rng = np.random.default_rng(0)
    grads = [
        [rng.normal(size=(3, 4)), 1e-3 * rng.normal(size=5)]
        for _ in range(20)
    ]  # fmt: skip
    grads[7][0] *= 50
    grads[12][1][2] = 3.0
    grads[15][1][:] = 0
    want, sizes = stable_adam(grads, 0.9, 0.95, 1e-6, groups == "global")
    trees = [[jnp.asarray(x, jnp.float32) for x in g] for g in grads]
    (outs, rms, factors), _ = run(adam_of(0.95, groups=groups), trees)
    np.testing.assert_allclose(rms, sizes, rtol=2e-6)
    assert (np.array(factors) < 1).sum() > 3
    for out, exact in zip(outs, want, strict=True):
        for x, y in zip(out, exact, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@STANDARD
def test_clip_update_rms_scales_the_decay_that_is_inside():
    around = clipfx.clip_update_rms(
        optax.adamw(0.1, b2=0.99, eps=1e-6, weight_decay=0.5), b2=0.99, eps=1e-6
    )
    behind = optax.chain(
        adam_of(), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.1)
    )
    weights = {"w": jnp.array([1.0, 2.0])}
    plain = optax.adamw(0.1, b2=0.99, eps=1e-6, weight_decay=0.5)
    state = plain.init(weights)
    for g in SPIKE:
        unclipped, state = plain.update(g, state, weights)
    (scaled, _, factors), _ = run(around, SPIKE, weights)
    (kept, _, _), _ = run(behind, SPIKE, weights)
    factor = float(factors[2][0])
    np.testing.assert_allclose(scaled[2]["w"], factor * unclipped["w"], rtol=1e-5)
    decay = -0.05 * weights["w"]
    step = factor * (unclipped["w"] - decay)
    np.testing.assert_allclose(kept[2]["w"], step + decay, rtol=1e-5)


@STANDARD
def test_clip_update_rms_finds_the_decay_of_injected_hyperparameters():
    """And takes no parameter for it that is called like one."""
    grads = [{"b2": x["w"], "nu": 2 * x["w"]} for x in SPIKE]
    adam = optax.inject_hyperparams(optax.scale_by_adam)(b2=0.99, eps=1e-6)
    (outs, rms, _), state = run(clipfx.clip_update_rms(adam, eps=1e-6), grads)
    (want, exact, _), _ = run(adam_of(), grads)
    assert list(clips(state)[0].metrics.groups) == ["b2", "nu"]
    np.testing.assert_allclose(rms, exact, rtol=1e-6)
    assert_close(outs, want, rtol=1e-5)


@STANDARD
def test_clip_update_rms_leaves_alone_what_has_no_moment():
    params = {"head": jnp.ones(2), "body": jnp.ones((2, 2)), "tail": jnp.ones(2)}
    grads = [{**params, "head": g["w"], "tail": 3 * g["w"]} for g in SPIKE]
    adam = lambda rate: optax.adam(rate, b2=0.99, eps=1e-6)
    labels = {"head": "a", "body": "b", "tail": "c"}
    parts = {"a": adam(0.1), "b": optax.sgd(0.5), "c": adam(0.2)}
    tx = clipfx.clip_update_rms(optax.partition(parts, labels), b2=0.99, eps=1e-6)
    (outs, rms, factors), state = run(tx, grads, params)
    assert list(clips(state)[0].metrics.groups) == ["head", "tail"]
    np.testing.assert_allclose(rms[2], [1.285296] * 2, rtol=1e-6)
    assert_close(outs[2]["body"], -0.5 * params["body"])
    np.testing.assert_allclose(outs[2]["head"], [-0.050319, 0.040180], rtol=1e-4)
    assert_close(outs[2]["tail"], 2 * outs[2]["head"], rtol=1e-5)
    # With one label for all that have a moment there is one ratio for both.
    tx = clipfx.clip_update_rms(
        optax.masked(adam(0.1), {**labels, "head": True, "body": False, "tail": True}),
        {"all": 1.2}, b2=0.99, eps=1e-6, groups=lambda path: "all",
    )  # fmt: skip
    (_, rms, factors), _ = run(tx, grads, params)
    np.testing.assert_allclose(rms[2], [1.285296], rtol=1e-6)
    np.testing.assert_allclose(factors[2], [1.2 / 1.285296], rtol=1e-6)


@STANDARD
def test_clip_update_rms_inside_multi_steps_sees_the_mean():
    halves = [{"w": x["w"] + sign} for x in SPIKE for sign in (1, -1)]
    tx = optax.MultiSteps(adam_of(), 2)
    (outs, rms, _), _ = run(tx.gradient_transformation(), halves)
    (want, exact, _), _ = run(adam_of(), SPIKE)
    np.testing.assert_allclose(rms[1::2], exact, rtol=1e-5)
    assert_close(outs[1::2], want, rtol=1e-4)


@STANDARD
def test_clip_update_rms_of_half_precision_and_of_moments_as_they_are():
    half = clipfx.clip_update_rms(
        optax.scale_by_adam(0.9, 0.99, 1e-6, mu_dtype=jnp.bfloat16), b2=0.99, eps=1e-6
    )
    (_, rms, _), _ = run(half, SPIKE)
    np.testing.assert_allclose(rms[2], 1.285296, rtol=1e-6)  # nu is float32
    # Without a correction the moment is small at first, and the ratio 1 / (1 - b2).
    plain = clipfx.clip_update_rms(optax.scale_by_rms(0.75, eps=1e-6))
    (_, rms, _), _ = run(plain, SPIKE[:1])
    np.testing.assert_allclose(rms[0], 2.0, rtol=1e-5)


@STANDARD
def test_clip_update_rms_is_never_far_from_one():
    """A spike of any size is bounded by the weight of the newest square."""
    grads = [{"w": jnp.ones(3)}] * 50 + [{"w": jnp.full(3, 1e6)}]
    (_, rms, _), _ = run(adam_of(0.999), grads)
    beta = 1 - 0.001 / (1 - 0.999**51)
    assert float(rms[-1][0]) == pytest.approx((1 - beta) ** -0.5, rel=1e-4)
    later = optax.ScaleByAdamState(
        jnp.int32(10**6), {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    )
    tx = adam_of(0.999)
    state = tx.init(grads[0])._replace(inner=later)
    _, state = tx.update(grads[-1], state)
    assert float(state.clip.metrics.factor[0]) == pytest.approx(0.0316, abs=1e-4)


@STANDARD
def test_clip_update_rms_drops_what_is_not_finite():
    bad = {"w": jnp.array([jnp.nan, 1.0]), "v": jnp.ones(2)}
    tx = adam_of(nonfinite="zero")
    out, state = tx.update(bad, tx.init(bad))
    assert out["w"].tolist() == [0, 0]
    assert (np.asarray(out["v"]) != 0).all()
    assert state.clip.metrics.nonfinite.tolist() == [0, 1]


# --------------------------------------------------------------------- dual_norm_gate


def spectral():
    """The exact steepest direction in the spectral norm."""

    def direction(updates, params):
        u, _, v = jnp.linalg.svd(updates["m"], full_matrices=False)
        return {**updates, "m": u @ v, "v": jnp.sign(updates["v"])}

    return optax.stateless(direction)


TWO = {"m": jnp.array([[3.0, 1.0], [1.0, 3.0]]), "v": jnp.array([1.0, -2.0])}


@pytest.mark.parametrize(("rho", "factor"), [(12.0, 0.75), (9.0, 1), (6.0, 1)])
def test_dual_norm_gate_of_known_numbers(rho, factor):
    """A nuclear norm of 6 and a sum of magnitudes of 3."""
    (outs, dual, factors), _ = run(clipfx.dual_norm_gate(spectral(), rho), [TWO])
    assert float(dual[0][0]) == pytest.approx(9, rel=1e-6)
    assert float(factors[0][0]) == pytest.approx(factor, rel=1e-6)
    np.testing.assert_allclose(outs[0]["m"], factor * np.eye(2), atol=1e-6)
    np.testing.assert_allclose(outs[0]["v"], [factor, -factor], rtol=1e-6)


def test_dual_norm_gate_lets_signs_come_to_rest():
    """Signs alone circle a minimum at the distance of their step."""

    def last(direction):
        tx = optax.chain(direction, optax.scale_by_learning_rate(0.3))

        def step(carry, _):
            x, state = carry
            out, state = tx.update(x, state)  # the gradient of |x|² / 2
            return (x + out, state), None

        x = jnp.array([1.0, -0.4, 0.25])
        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), None, length=200)
        return float(jnp.abs(x).max())

    assert last(optax.scale_by_sign()) > 0.1
    assert last(clipfx.dual_norm_gate(optax.scale_by_sign(), 1.0)) < 1e-5


@STANDARD
def test_dual_norm_gate_around_muon():
    matrix = {"w": sample()["decoder"]["kernel"]}
    inner = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers()},
    )
    (outs, dual, _), _ = run(clipfx.dual_norm_gate(inner, 1e3), [matrix])
    nuclear = np.linalg.norm(np.asarray(matrix["w"], np.float64), "nuc")
    assert 0.7 < float(dual[0][0]) / nuclear < 1.2  # of five Newton-Schulz steps
    direction, _ = inner.update(matrix, inner.init(matrix))
    assert_close(outs[0]["w"], direction["w"] * dual[0][0] / 1e3, rtol=1e-4)


# ------------------------------------------------------------------------------ meshes


WRAPPERS = {
    "clip_update_rms": lambda axis: clipfx.clip_update_rms(
        optax.scale_by_adam(b2=0.9), 0.3, b2=0.9, axis_name=axis
    ),
    "dual_norm_gate": lambda axis: clipfx.dual_norm_gate(
        optax.scale_by_sign(), 1e3, axis_name=axis
    ),
}


@STANDARD
@pytest.mark.parametrize("make", in_tiers(WRAPPERS, {"clip_update_rms"}))
def test_ratios_of_parts_are_those_of_the_whole(make):
    mesh = jax.make_mesh((8,), ("x",))
    specs = {"decoder": {"kernel": P("x")}, "encoder": {"bias": P(), "kernel": P()}}
    tree = sample()
    want, after = jax.jit(make(None).update)(tree, make(None).init(tree))
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    placed = jax.device_put(tree, places)
    got, _ = jax.jit(make(None).update)(placed, make(None).init(placed))
    assert_close(got, want, rtol=2e-6)

    def step(tree):
        tx = make(None)
        out, state = tx.update(tree, tx.init(tree))
        return out, state.clip.metrics

    in_parts = jax.shard_map(step, mesh=mesh, in_specs=(specs,), out_specs=(specs, P()))
    got, metrics = jax.jit(in_parts)(placed)
    assert_close(got, want, rtol=2e-6)
    np.testing.assert_allclose(metrics.factor, after.clip.metrics.factor, rtol=2e-6)
    assert (np.asarray(metrics.factor) < 1).any()


@STANDARD
def test_ratios_in_float64():
    with enable_x64(True):
        grads = [jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), g) for g in SPIKE]
        (outs, rms, _), _ = run(adam_of(), grads)
        assert outs[2]["w"].dtype == jnp.float64
        assert float(rms[2][0]) == pytest.approx(1.285296, rel=1e-6)
        (_, dual, _), _ = run(clipfx.dual_norm_gate(optax.scale_by_sign(), 1.0), grads)
        assert float(dual[2][0]) == pytest.approx(10.1, rel=1e-6)
