"""Diagnostics against what is known in closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from sentences import raises_one_sentence
from trees import assert_close, enable_x64, mixed, norm, sample

import clipfx
from clipfx import _compat, diagnose

# ----------------------------------------------------------------------- update_ratios


def test_gradients_of_a_deep_linear_net_are_powers_of_its_weight():
    """Of :math:`w_L ... w_1 x`, all of them alpha, each gradient is alpha^(L - 1)."""
    depth = 12
    net = lambda p, x: math.prod(v["w"] for v in p.values()) * x
    ratios = jax.jit(lambda p: diagnose.update_ratios(jax.grad(net)(p, 1.0), p))
    value = jax.jit(
        lambda p: diagnose.jacobian_norm(lambda x: net(p, x), jnp.ones(3)).value
    )
    for alpha in (0.5, -2.0):
        params = {f"layer_{k}": {"w": jnp.float32(alpha)} for k in range(depth)}
        found = ratios(params)
        np.testing.assert_allclose(found.update, abs(alpha) ** (depth - 1), rtol=1e-6)
        np.testing.assert_allclose(found.ratio, abs(alpha) ** (depth - 2), rtol=1e-6)
        # Back at the input it is |alpha|^L.
        assert float(value(params)) == pytest.approx(abs(alpha) ** depth, rel=1e-6)


def test_ratios_by_layer_under_jit_in_half_precision_and_far_from_one():
    updates, params = sample(seed=1), sample(seed=2)
    ratios = jax.jit(diagnose.update_ratios)
    found = ratios(updates, params)
    want = [norm(updates[k]) / norm(params[k]) for k in found.groups]
    np.testing.assert_allclose(found.ratio, want, rtol=1e-6)
    half = diagnose.update_ratios(sample(jnp.bfloat16, 1), params)
    np.testing.assert_allclose(half.ratio, want, rtol=1e-2)
    for u, w in [(1e30, 1e30), (1e-30, 1e-30), (1e30, 1.0), (1e-30, 1.0), (1.0, 1e-30)]:
        far = ratios(sample(seed=1, scale=u), sample(seed=2, scale=w))
        np.testing.assert_allclose(far.ratio, np.multiply(want, u / w), rtol=1e-5)
    zero = sample(scale=0.0)
    assert ratios(zero, zero).ratio.tolist() == [0, 0]
    assert ratios(updates, zero).ratio.tolist() == [math.inf] * 2
    bad = updates | {"decoder": {"kernel": jnp.full((8, 5), jnp.nan)}}
    assert np.isnan(ratios(bad, params).ratio).tolist() == [True, False]
    assert diagnose.update_ratios(mixed(), mixed(1), groups="global").ratio > 0


def test_names_stay_with_their_numbers_under_jit():
    params = {f"layer_{k}": jnp.full(4, k, jnp.float32) for k in range(12)}
    find = jax.jit(lambda p: diagnose.update_ratios(p, p, groups="leaf"))
    found = diagnose.by_group(find(params))
    assert [*found] == [*params]
    assert [found[k]["update"] for k in params] == [2.0 * k for k in range(12)]


# ------------------------------------------------------------------------- clip_effect


@pytest.mark.parametrize("size", [16, 4096])
def test_value_clip_turns_and_norm_clip_does_not(size):
    """One element of the root of d, all others 1/2, cut at 1/2: the cosine is known."""
    raw = {"w": jnp.full(size, 0.5).at[0].set(math.sqrt(size))}
    effect = jax.jit(diagnose.clip_effect)
    by_value = effect(raw, _clipped(clipfx.clip_by_value(0.5), raw))
    by_norm = effect(raw, _clipped(clipfx.clip_by_global_norm(0.5), raw))
    length = math.sqrt(size + (size - 1) / 4)
    want = (math.sqrt(size) + (size - 1) / 2) / (length * math.sqrt(size))
    assert float(by_value.cosine[0]) == pytest.approx(want, rel=1e-6)
    assert float(by_norm.cosine[0]) == pytest.approx(1, rel=1e-6)
    assert float(by_norm.ratio[0]) == pytest.approx(0.5 / length, rel=1e-6)
    if size == 4096:  # in many dimensions it tends to 1 / 5^(1/2)
        assert float(by_value.cosine[0]) == pytest.approx(5**-0.5, rel=0.04)


def _clipped(tx, tree):
    return jax.jit(tx.update)(tree, tx.init(tree))[0]


def test_value_clip_of_normal_noise_keeps_the_cosine_of_signs():
    raw = {"w": jax.random.normal(jax.random.key(0), (100_000,))}
    effect = diagnose.clip_effect(raw, _clipped(clipfx.clip_by_value(1e-4), raw))
    assert float(effect.cosine[0]) == pytest.approx(math.sqrt(2 / math.pi), rel=0.01)


def test_clip_effect_of_opposite_of_nothing_and_of_what_is_not_finite():
    raw = sample(scale=1e25)
    opposite = jax.tree.map(lambda x: -x / 2.0**80, raw)
    effect = jax.jit(diagnose.clip_effect)(raw, opposite)
    np.testing.assert_allclose(effect.cosine, [-1, -1], rtol=1e-6)
    np.testing.assert_allclose(effect.ratio, 2.0**-80, rtol=1e-6)
    nothing = diagnose.clip_effect(raw, sample(scale=0.0))
    assert nothing.cosine.tolist() == nothing.ratio.tolist() == [0, 0]
    bad = raw | {"decoder": {"kernel": jnp.full((8, 5), jnp.inf)}}
    effect = diagnose.clip_effect(bad, bad)
    assert np.isfinite(effect.cosine).tolist() == [False, True]
    assert np.isfinite(effect.raw).tolist() == [False, True]


@pytest.mark.parametrize(
    ("values", "chances", "before", "after"),
    [((10, -1), (0.1, 0.9), 0.1, -0.8), ((10, -10), (0.5, 0.5), 0, 0),
     ((10, 1, -1, -10), (0.1, 0.4, 0.4, 0.1), 0, 0)],
)  # fmt: skip
def test_clips_are_biased_for_skewed_noise_alone(values, chances, before, after):
    """The bias is the mean behind the clip less that before: -0.9 of docs/choose.md."""
    clip = clipfx.clip_by_global_norm(1.0)
    cut = [_clipped(clip, {"g": jnp.float32(x)})["g"].item() for x in values]
    assert np.dot(values, chances) == pytest.approx(before, abs=1e-12)
    assert np.dot(cut, chances) == pytest.approx(after, abs=1e-6)


# ---------------------------------------------------------- recurrent_flow, time_flow


def test_gradients_of_a_scalar_rnn_are_powers_of_its_weight():
    """Of the last of T states the gradient by the first is w^(T - 1)."""
    number = 20
    last, start, xs = (lambda h: h[-1]), jnp.float32(1), jnp.ones(20)
    flow = jax.jit(
        lambda w: diagnose.recurrent_flow(lambda h, x: w * h + x, last, start, xs)
    )
    for weight in (0.5, -0.9, 1.0, 1.5):
        found = flow(weight)
        want = [abs(weight) ** (number - 1 - t) for t in range(number)]
        np.testing.assert_allclose(found.norm, want, rtol=1e-5)
        np.testing.assert_allclose(found.log_norm, np.log(want), atol=1e-5)
        assert float(found.growth) == pytest.approx(math.log(abs(weight)), abs=1e-6)


def test_flow_through_a_tanh_network_is_the_product_of_its_jacobians():
    with enable_x64(True):
        rng = np.random.default_rng(0)
        w, xs = rng.normal(size=(3, 3)), rng.normal(size=(6, 3))
        hs, h = [], np.zeros(3)
        for x in xs:
            h = np.tanh(w @ h + x)
            hs.append(h)
        # A loss of all states: the sum of their squares over 2.
        want, back = [], np.zeros(3)
        for t in reversed(range(6)):
            if t < 5:
                back = w.T @ ((1 - hs[t + 1] ** 2) * back)
            back = back + hs[t]
            want.append(np.linalg.norm(back))
        step = lambda h, x: (jnp.tanh(w @ h[0] + x), h[1] + 1)
        loss = lambda states: jnp.sum(states[0] ** 2) / 2
        start = (jnp.zeros(3), jnp.int32(0))
        find = jax.jit(lambda xs: diagnose.recurrent_flow(step, loss, start, xs))
        found = find(jnp.asarray(xs))
        np.testing.assert_allclose(found.norm, want[::-1], rtol=1e-10)
        slope = np.polyfit(np.arange(6), np.log(want[::-1]), 1)[0]
        assert float(found.growth) == pytest.approx(-slope, rel=1e-8)


def test_growth_is_fitted_where_norms_are_no_numbers_of_ordinary_size():
    flow = jax.jit(diagnose.time_flow)
    half = flow({"h": jnp.array([[3, 4], [6, 8]], jnp.bfloat16)})
    assert half.norm.tolist() == [5, 10] and half.norm.dtype == jnp.float32
    t = np.arange(-36, 37, 4)[:, None] * np.ones(4)
    found = flow(jnp.asarray(10.0**t, jnp.float32))
    assert float(found.growth) == pytest.approx(-4 * math.log(10), rel=1e-5)
    assert np.isfinite(found.norm).all()
    # Steps that nothing reaches do not count; two that something reaches are needed.
    found = flow(jnp.array([0.0, 2.0, 1.0, 0.0]))
    assert float(found.growth) == pytest.approx(math.log(2), rel=1e-6)
    assert found.log_norm[0] == -math.inf
    for some in ([1.0, 0, 0, 0], [1, math.inf, 2, 1], [1, math.nan, 2, 1]):
        assert not np.isfinite(flow(jnp.array(some)).growth)


# ----------------------------------------------------------------------- jacobian_norm


def test_jacobian_norm_is_the_largest_singular_value():
    with enable_x64(True):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(4, 3)), rng.normal(size=(4, 5))
        x = {"a": jnp.ones(3), "b": jnp.ones(5), "n": jnp.int32(1)}
        fun = lambda x: {"y": a @ x["a"] + b @ x["b"], "n": x["n"], "z": x["a"]}
        whole = np.block([[a, b], [np.eye(3), np.zeros((3, 5))]])
        want = np.linalg.svd(whole)[1][0]
        found = jax.jit(lambda x: diagnose.jacobian_norm(fun, x, rounds=60))(x)
        assert float(found.value) == pytest.approx(want, rel=1e-10)
        assert float(found.residual) < 1e-4
        # Few rounds tell how near they are; from the last vector one is enough.
        once = jax.jit(lambda v: diagnose.jacobian_norm(fun, x, rounds=1, start=v))
        few = once([jnp.ones(3), jnp.ones(5)])
        gap = np.abs(np.linalg.svd(whole)[1] - few.value).min()
        assert few.value <= want and gap <= few.value * few.residual
        more = once(found.vector)
        assert float(more.value) == pytest.approx(want, rel=1e-10)


def test_jacobian_norm_of_complex_half_huge_none_and_not_finite():
    rng = np.random.default_rng(0)
    w = jnp.asarray(
        rng.normal(size=(3, 3)) + 1j * rng.normal(size=(3, 3)), jnp.complex64
    )
    of = jax.jit(lambda w, x: diagnose.jacobian_norm(lambda x: w @ x, x))
    found = of(w, w[0]).value
    assert float(found) == pytest.approx(np.linalg.norm(w, 2), rel=1e-4)
    d = jnp.diag(jnp.array([1.0, 3.0, 2.0]))
    low = d.astype(jnp.bfloat16)
    assert float(of(low, low[0]).value) == pytest.approx(3, rel=1e-2)
    for size in (1e-30, 1.0, 1e30):
        found = of(size * d, d[0])
        assert float(found.value) == pytest.approx(3 * size, rel=1e-5, abs=0)
        assert found.residual < 1e-3
    flat = of(0 * d, d[0])
    assert (float(flat.value), float(flat.residual)) == (0, 0)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(of(jnp.nan * d, d[0])))


def test_layer_norm_divides_gradients_by_the_deviation_of_its_input():
    """Its Jacobian is (I - 11'/d - yy'/d) / sigma, whose largest value is 1 / sigma."""

    def layer_norm(x):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))

    x = jnp.asarray(np.random.default_rng(0).normal(size=8), jnp.float32)
    batch_norm = lambda x: layer_norm(x.T).T
    rows = jnp.stack([x, 10 * x[::-1]], 1)  # [B, 2], the deviation of either feature
    for fun, at in [(layer_norm, x), (batch_norm, rows)]:
        value = jax.jit(lambda at, fun=fun: diagnose.jacobian_norm(fun, at).value)
        for scale in (0.01, 1.0, 100.0):
            want = 1 / (scale * float(jnp.std(x)))
            assert float(value(scale * at)) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("width", [4, 64])
def test_attention_needs_logits_over_the_root_of_the_width(width):
    """Logits of unit normals have variance d; gradients through softmax vanish."""
    q, k = jax.random.normal(jax.random.key(0), (2, 10_000, width))
    logits = jnp.sum(q * k, -1)
    assert float(jnp.var(logits)) == pytest.approx(width, rel=0.1)
    assert float(jnp.var(logits / math.sqrt(width))) == pytest.approx(1, rel=0.1)

    # Of two keys, k and 0, at q = k, |k|^2 = d: the weight of the second is
    # s(-d / divisor), of which the gradient by q is s(1 - s)|k| / divisor.
    key = k[0] * (math.sqrt(width) / jnp.linalg.norm(k[0]))
    weight = lambda q, divisor: jax.nn.sigmoid(-jnp.sum(q * key) / divisor)
    find = jax.jit(
        lambda d: diagnose.jacobian_norm(lambda q: weight(q, d), key, rounds=1).value
    )
    for divisor in (1.0, math.sqrt(width)):
        small = math.exp(-width / divisor)
        want = small / (1 + small) ** 2 * math.sqrt(width) / divisor
        assert float(find(divisor)) == pytest.approx(want, rel=1e-4, abs=0)


# ------------------------------------------------------------------- second_moment_lag


def test_lag_is_what_clip_update_rms_measures():
    raw = [sample(seed=k) for k in range(3)] + [sample(seed=3, scale=30.0)]
    clip = clipfx.clip_by_global_norm(1.0)
    cut = [_clipped(clip, tree) for tree in raw]
    adam = optax.adam(1e-3, b2=0.9)
    tx = clipfx.clip_update_rms(optax.scale_by_adam(b2=0.9), math.inf, b2=0.9)
    # Optax promotes dtypes.
    standard = jax.numpy_dtype_promotion("standard")
    step, update = (standard(jax.jit(t.update)) for t in (adam, tx))
    find = jax.jit(lambda *args: diagnose.second_moment_lag(*args, b2=0.9))
    for fed in (raw, cut):
        own, state = tx.init(raw[0]), adam.init(raw[0])
        for k, tree in enumerate(fed):
            found = find(raw[k], cut[k], state)
            _, own = update(tree, own)
            side = "raw" if fed is raw else "clipped"
            want = own.clip.metrics.norm
            np.testing.assert_allclose(getattr(found, side), want, rtol=1e-5)
            _, state = step(tree, state)
            nu = state[0].nu
            means = [
                jnp.sqrt(jnp.mean(x) / (1 - 0.9 ** (k + 1)))
                for x in jax.tree.leaves(nu)
            ]
            np.testing.assert_allclose(
                getattr(found, f"{side}_moment"), means, rtol=1e-5
            )


def test_a_spike_against_the_moment_in_closed_form():
    """Ones for ever, then s: R is s / (b2 + (1 - b2) s^2)^(1/2)."""
    state = optax.ScaleByRmsState(nu={"w": jnp.ones(3), "b": jnp.ones(2)})
    tree = lambda s, dtype=jnp.float32: {"w": jnp.full(3, s, dtype), "b": jnp.ones(2)}
    lag = lambda s, c, **kwargs: diagnose.second_moment_lag(
        tree(s, **kwargs), tree(c, **kwargs), state, b2=0.999
    )
    for dtype, rtol in [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)]:
        found = lag(100.0, 1.0, dtype=dtype)
        moment = math.sqrt(0.999 + 0.001 * 100.0**2)
        np.testing.assert_allclose(found.raw, [1, 100 / moment], rtol=rtol)
        np.testing.assert_allclose(found.raw_moment, [1, moment], rtol=rtol)
        for x in (found.clipped, found.clipped_moment):
            np.testing.assert_allclose(x, [1, 1], rtol=rtol)
    far = lag(1e30, 1.0)  # at most (1 - b2)^(-1/2), and no square overflows
    np.testing.assert_allclose(far.raw[1], 0.001**-0.5, rtol=1e-5)
    np.testing.assert_allclose(far.raw_moment[1], 1e30 * 0.001**0.5, rtol=1e-5)
    assert np.isfinite(lag(math.nan, 1.0).raw).tolist() == [True, False]
    # Leaves that are no numbers, or that another optimizer has, are not counted.
    labels = {"b": "sgd", "n": "sgd", "w": "adam"}
    parts = {"adam": optax.adam(1e-3), "sgd": optax.sgd(0.1)}
    params = tree(1.0) | {"n": jnp.int32(1)}
    state = optax.partition(parts, labels).init(params)
    found = diagnose.second_moment_lag(params, params, state, b2=0.999)
    assert [*found.groups] == ["w"]
    np.testing.assert_allclose(found.raw, [1], rtol=1e-4)


# ------------------------------------------------------------------------- noise_scale


def test_noise_scale_in_closed_form():
    with enable_x64(True):
        rng = np.random.default_rng(0)
        each = {"a": rng.normal(size=(12, 3)) + 1, "b": rng.normal(size=(12, 2)) + 2}
        norms = np.stack([np.linalg.norm(x, axis=1) for x in each.values()], 1)
        mean = {k: jnp.asarray(x.mean(0)) for k, x in each.items()}
        found = diagnose.noise_scale(jnp.asarray(norms), mean, groups="leaf")
        noise = np.array([np.var(x, axis=0, ddof=1).sum() for x in each.values()])
        signal = [np.sum(np.square(x)) for x in mean.values()] - noise / 12
        np.testing.assert_allclose(found.noise, noise, rtol=1e-10)
        np.testing.assert_allclose(found.signal, signal, rtol=1e-10)
        np.testing.assert_allclose(found.scale, noise / signal, rtol=1e-10)


@pytest.mark.full
def test_noise_scale_of_what_per_example_clipping_measures():
    loss = lambda w, x: jnp.vdot(w["a"], x) + jnp.vdot(w["b"], x[:2]) ** 2
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    xs = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)) + 1, jnp.float32)
    grad = clipfx.per_example.clipped_grad(loss, jnp.inf, reduce="mean", groups="leaf")
    mean, info = grad(params, xs)
    found = diagnose.noise_scale(info.norm, mean, groups="leaf")
    each = jax.vmap(jax.grad(loss), (None, 0))(params, xs)
    want = [np.var(x, axis=0, ddof=1).sum() for x in each.values()]
    np.testing.assert_allclose(found.noise, want, rtol=1e-4)


def test_noise_scale_has_no_bias():
    """Of (2, +-3) by chance the trace is 9, the mean's square 4, and the scale 9/4."""
    signs = jax.random.rademacher(jax.random.key(0), (4000, 5), jnp.float32)
    norms = jnp.full((5,), math.sqrt(13))
    find = lambda sign: diagnose.noise_scale(
        norms, [jnp.float32(2), 3 * jnp.mean(sign)]
    )
    found = jax.jit(jax.vmap(find))(signs)
    assert float(found.noise.mean()) == pytest.approx(9, rel=0.03)
    assert float(found.signal.mean()) == pytest.approx(4, rel=0.05)


def test_noise_scale_with_padding_in_half_precision_and_far_from_one():
    g = jnp.array([[2.0, 1], [2, -1], [2, 1], [2, -1], [jnp.nan, 9]])
    where = jnp.arange(5) < 4
    find = jax.jit(diagnose.noise_scale)
    base = find(jnp.linalg.norm(g, axis=1), g[:4].mean(0), where=where)
    assert float(base.noise[0]) == pytest.approx(4 / 3, rel=1e-5)
    assert float(base.scale[0]) == pytest.approx(4 / 11, rel=1e-5)
    for size in (1e-30, 1e30):
        far = find(size * jnp.sqrt(5 * jnp.ones(4)), size * jnp.array([2.0, 0.0]))
        assert float(far.scale[0]) == pytest.approx(4 / 11, rel=1e-5)
    half = find(jnp.sqrt(5 * jnp.ones(4)), jnp.array([2.0, 0.0], jnp.bfloat16))
    assert float(half.scale[0]) == pytest.approx(4 / 11, rel=1e-5)
    noise = find(jnp.ones(4), jnp.zeros(2))
    assert float(noise.scale[0]) == math.inf and noise.signal[0] < 0
    for norms, keep in [(jnp.array([1.0, jnp.nan]), None), (jnp.ones(2), where[3:])]:
        assert not np.isfinite(find(norms, jnp.ones(1), where=keep).scale[0])


# ------------------------------------------------------------------------------ meshes


def _everything(g, xs):
    """Every diagnostic that measures norms, of a gradient and a recurrence."""
    cut = jnp.clip(g, -0.5, 0.5)
    moment = optax.ScaleByRmsState(nu=cut**2)
    flow = diagnose.recurrent_flow(
        lambda h, x: jnp.tanh(h + x), lambda h: _sum(h[-1]), xs[0], xs
    )
    return (
        diagnose.update_ratios(cut, g, groups="global"),
        diagnose.clip_effect(g, cut, groups="global"),
        diagnose.second_moment_lag(g, cut, moment, b2=0.9, groups="global"),
        diagnose.noise_scale(jnp.arange(5.0, 9.0), g),
        diagnose.time_flow(xs),
        flow,
        diagnose.jacobian_norm(lambda x: g * x, g)[:2],
    )


def _sum(x):
    axes = tuple(_compat.varying_axes(x))
    return jax.lax.psum(jnp.sum(x), axes) if axes else jnp.sum(x)


@pytest.mark.full
@pytest.mark.parametrize("way", ["shard_map", "explicit"])
def test_over_a_mesh_they_measure_the_whole(way):
    rng = np.random.default_rng(0)
    g, xs = (jnp.asarray(rng.normal(size=(8, 4)), jnp.float32) for _ in range(2))
    want = jax.jit(_everything)(g, xs)
    specs = P("data", "model"), P(None, "model")
    if way == "shard_map":
        find = jax.shard_map(
            _everything, mesh=mesh_of(AxisType.Auto), in_specs=specs, out_specs=P()
        )
        found = jax.jit(find)(g, xs)
    else:
        mesh = mesh_of(AxisType.Explicit)
        parts = [NamedSharding(mesh, spec) for spec in specs]
        with jax.set_mesh(mesh):
            found = jax.jit(_everything)(*map(jax.device_put, (g, xs), parts))
            split = jax.device_put(xs, NamedSharding(mesh, P("data")))
            assert_close(diagnose.time_flow(split), want[4], rtol=1e-5)
    assert_close(found, want, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------ errors

_STEP, _LOSS = (lambda h, x: h), (lambda h: h[-1])
_INTS, _RMS = {"n": jnp.arange(3)}, optax.scale_by_rms().init({"w": jnp.ones(2)})
_ONE = {"w": jnp.ones(2)}
ERRORS = [
    (lambda: diagnose.update_ratios(_INTS, _INTS), ValueError, "updates must have a"),
    (lambda: diagnose.update_ratios(_ONE, {}), ValueError, "params must have a leaf"),
    (
        lambda: diagnose.update_ratios(_INTS, _INTS, groups="global"),
        ValueError,
        "got none; pass gradients",
    ),
    (lambda: diagnose.by_group({"w": 1.0}), TypeError, "found must be .*got a dict"),
    (lambda: diagnose.clip_effect({}, {}), ValueError, "raw must have a leaf"),
    (
        lambda: diagnose.clip_effect(_ONE, {"w": jnp.ones(3)}),
        ValueError,
        r"clipped must have a leaf .* shape \(2,\) at 'w'",
    ),
    (lambda: diagnose.time_flow(_INTS), ValueError, "grads must have a leaf"),
    (lambda: diagnose.time_flow(jnp.ones((1, 3))), ValueError, "one T >= 2, got"),
    (lambda: diagnose.time_flow(jnp.float32(1)), ValueError, "one T >= 2, got"),
    (
        lambda: diagnose.time_flow([jnp.ones(3), jnp.ones(2)]),
        ValueError,
        r"one T >= 2, got shapes \[\(3,\), \(2,\)\]",
    ),
    (
        lambda: diagnose.recurrent_flow(1.0, _LOSS, jnp.ones(2), jnp.ones(3)),
        TypeError,
        "step must be a function, got a float",
    ),
    (
        lambda: diagnose.recurrent_flow(_STEP, None, jnp.ones(2), jnp.ones(3)),
        TypeError,
        "loss must be a function",
    ),
    (
        lambda: diagnose.recurrent_flow(_STEP, _LOSS, jnp.ones(2), jnp.ones(3)),
        ValueError,
        r"loss must be a scalar, got shape \(2,\)",
    ),
    (
        lambda: diagnose.recurrent_flow(_STEP, _LOSS, 1, jnp.ones(3)),
        ValueError,
        "state must have a leaf",
    ),
    (
        lambda: diagnose.recurrent_flow(_STEP, _LOSS, 1.0, jnp.ones(1)),
        ValueError,
        "xs must have leaves .*one T >= 2",
    ),
    (lambda: diagnose.jacobian_norm(_ONE, _ONE), TypeError, "fun must be a function"),
    (
        lambda: diagnose.jacobian_norm(jnp.sin, jnp.ones(2), rounds=0),
        ValueError,
        "rounds must be an int >= 1",
    ),
    (lambda: diagnose.jacobian_norm(abs, 1), ValueError, "x must have a leaf"),
    (
        lambda: diagnose.jacobian_norm(lambda x: 1, 1.0),
        ValueError,
        "fun must have a leaf",
    ),
    (
        lambda: diagnose.jacobian_norm(jnp.sin, jnp.ones(2), start=[jnp.ones(3)]),
        ValueError,
        r"start must have shapes \[\(2,\)\], got \[\(3,\)\]",
    ),
    (
        lambda: diagnose.second_moment_lag(_ONE, _ONE, _RMS, b2=1.0),
        ValueError,
        "b2 must be",
    ),
    (
        lambda: diagnose.second_moment_lag(_ONE, _ONE, _RMS, b2=0.9, eps=0),
        ValueError,
        "eps must be",
    ),
    (
        lambda: diagnose.second_moment_lag(_ONE, _ONE, (), b2=0.9),
        TypeError,
        "opt_state must keep Adam's second moment as nu",
    ),
    (
        lambda: diagnose.second_moment_lag(_ONE, _ONE, (_RMS, _RMS), b2=0.9),
        ValueError,
        "opt_state must keep one second moment of each leaf, got two of 'w'",
    ),
    (
        lambda: diagnose.second_moment_lag({"v": jnp.ones(1)}, {}, _RMS, b2=0.9),
        ValueError,
        "raw must have a leaf",
    ),
    (
        lambda: diagnose.second_moment_lag(_ONE, {}, _RMS, b2=0.9),
        ValueError,
        "clipped must have a leaf",
    ),
    (
        lambda: diagnose.noise_scale(jnp.ones(1), _ONE),
        ValueError,
        r"norms must have shape \[B, 1\] with B >= 2, got \(1,\)",
    ),
    (
        lambda: diagnose.noise_scale(jnp.ones((4, 2)), _ONE),
        ValueError,
        r"norms must have shape \[B, 1\]",
    ),
    (
        lambda: diagnose.noise_scale(jnp.ones(4), _ONE, where=jnp.ones(3, bool)),
        ValueError,
        r"where must have shape \(4,\), got \(3,\)",
    ),
    (
        lambda: diagnose.noise_scale(jnp.ones(4), _INTS),
        ValueError,
        "mean must have a leaf",
    ),
]


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
