"""Clips inside of a program: the gradient that flows back, and everything around it."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from per_example_oracle import agrees, methods
from trees import assert_same, enable_x64
from xla import number_of

from clipfx import clip_cotangent, per_example

RNG = np.random.default_rng(0)
G = RNG.normal(size=(4, 8, 6)).astype(np.float32)


def pulled(g, *args, **kwargs):
    """What becomes of a gradient `g`."""
    pull = lambda g: jax.vjp(lambda x: clip_cotangent(x, *args, **kwargs), g)[1](g)[0]
    return jax.jit(pull)(g)


def clipped(g, max_norm, axis):
    """In float64."""
    g = np.asarray(g, np.float64)
    norm = np.sqrt((g**2).sum(axis, keepdims=True))
    return g * np.minimum(1, max_norm / np.where(norm > 0, norm, 1))


# ----------------------------------------------------------------------- the rule


def test_golden():
    g = jnp.array([3.0, 4.0])
    np.testing.assert_allclose(pulled(g, 1.0, axis=None), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(pulled(g, max_abs=3.5), [3, 3.5])
    np.testing.assert_array_equal(pulled(-g, max_abs=0.0), [0, 0])
    np.testing.assert_array_equal(pulled(g, 0.0, axis=0), [0, 0])
    np.testing.assert_array_equal(pulled(g * 0, 0.0, axis=0), [0, 0])


@pytest.mark.parametrize("axis", [-1, (0, 2), None, ()])
def test_norms_run_over_axes(axis):
    found = pulled(G, 1.5, axis=axis)
    np.testing.assert_allclose(found, clipped(G, 1.5, axis), rtol=1e-6)
    if axis == -1:  # `vmap` makes of all axes those of an example
        each = jax.vmap(jax.vmap(lambda g: pulled(g, 1.5, axis=None)))(G)
        np.testing.assert_allclose(found, each, rtol=1e-6)


def test_bounds_that_broadcast():
    bound = np.linspace(0, 3, 8, dtype=np.float32)
    want = clipped(G, bound[:, None], -1)
    np.testing.assert_allclose(pulled(G, bound, axis=-1), want, rtol=1e-6, atol=1e-7)
    found = pulled(G, max_abs=bound[:6])
    np.testing.assert_array_equal(found, np.clip(G, -bound[:6], bound[:6]))


def test_leaves_share_a_norm():
    state = {"c": G, "h": G[..., :2] * 3}
    found = pulled(state, 1.5, axis=-1)
    want = clipped(np.concatenate([state["c"], state["h"]], -1), 1.5, -1)
    np.testing.assert_allclose(found["c"], want[..., :6], rtol=1e-6)
    np.testing.assert_allclose(found["h"], want[..., 6:], rtol=1e-6)


def test_value_is_the_same_and_other_leaves_pass():
    x = {"f": jnp.array([-0.0, jnp.nan, jnp.inf]), "i": jnp.arange(3), "none": None,
         "half": jnp.ones(2, jnp.bfloat16)}  # fmt: skip
    key = jax.random.key(0)
    y, same = jax.jit(lambda x: clip_cotangent(x, 1.0, axis=None))((x, key))
    assert_same(y, x)
    assert same == key
    pull = jax.vjp(lambda x: clip_cotangent(x, 1.0, axis=None), x["i"])[1]
    assert pull(np.zeros(3, jax.dtypes.float0))[0].dtype == jax.dtypes.float0
    assert clip_cotangent(2.0, 1.0, axis=None) == 2.0


# ------------------------------------------------------------ numbers, as stored


def size(g):
    """The norm in float64, of what float64 need not hold the square of."""
    wide = np.abs(np.asarray(g).astype(np.complex128)).ravel()
    peak = wide.max()
    return peak * np.sqrt(np.sum((wide / peak) ** 2)) if peak else 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_bound_holds_at_every_magnitude(dtype):
    # The largest gradients have norms that no float32 can hold.
    scales = [1e38, 1.0, 1e-18, 1e-30] if dtype != "float16" else [3e4, 1.0, 1e-3]
    g = np.random.default_rng(1).uniform(1, 2, (len(scales), 300))
    g = jnp.asarray(g * np.array(scales)[:, None], dtype)
    g = g * jnp.asarray(1j, dtype) if dtype == "complex64" else g
    bound = jnp.asarray(scales, jnp.float32) / 3
    norms, elements = pulled(g, bound, axis=1), pulled(g, max_abs=bound[:, None])
    assert norms.dtype == elements.dtype == g.dtype
    steps = {"bfloat16": 2.0**-7, "float16": 2.0**-9}
    for row, values, x, c in zip(norms, elements, g, np.asarray(bound), strict=True):
        slack = steps.get(dtype, 1e-6)
        assert (1 - slack) * c <= size(row) <= (1 + 1e-6) * float(c)
        most = np.abs(np.asarray(values).astype(np.complex128)).max()
        assert (1 - slack) * c <= most <= (1 + 1e-6) * float(c)
        ratio = np.asarray(row[:2]).astype(complex) / np.asarray(x[:2]).astype(complex)
        np.testing.assert_allclose(ratio[1], ratio[0], rtol=2 * slack)
    loose = [pulled(g, jnp.inf, axis=1), pulled(g, max_abs=jnp.inf)]
    # None of these rows is as long as 100 of its largest elements.
    below = pulled(g[1:], 100 * bound[1:] * 3, axis=1)
    for found, given in [*((x, g) for x in loose), (below, g[1:])]:
        assert_same(found, given)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_gradient_that_xla_knows(size):
    """It takes constants apart, and their squares leave the range."""
    loss = lambda x: jnp.float32(size) * jnp.sum(clip_cotangent(x, size / 2, axis=0))
    found = jax.jit(jax.grad(loss))(jnp.zeros(4))
    np.testing.assert_allclose(found, np.full(4, size / 4), rtol=1e-6)


def test_joint_norm_of_two_dtypes_is_taken_in_the_wider():
    with enable_x64(True):
        g = (jnp.full(3, 1e200), jnp.full(4, 300, jnp.float16), jnp.full(2, 1e200))
        found = pulled(g, 1.0, axis=None)
        assert [x.dtype for x in found] == [x.dtype for x in g]
        np.testing.assert_allclose(found[0], 5**-0.5, rtol=1e-12)


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_nonfinite(what):
    g = G[0].copy()
    g[3, 1] = what
    for name in ("propagate", "zero"):
        found = pulled(g, 1.5, axis=-1, nonfinite=name)
        want = clipped(G[0], 1.5, -1)
        want[3] = np.nan if name == "propagate" else 0
        np.testing.assert_allclose(found, want, rtol=1e-6)
        found = pulled(g, max_abs=0.5, nonfinite=name)
        want = np.clip(g, -0.5, 0.5) if name == "propagate" else np.clip(
            np.where(np.isfinite(g), g, 0), -0.5, 0.5)  # fmt: skip
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("kind", ["max_norm", "max_abs"])
def test_bounds_may_depend_on_what_is_traced_and_get_no_gradient(kind):
    """A bound that is no residual leaks its tracer."""
    g = jnp.array([3.0, 4.0])

    def loss(x, c):
        bound = jnp.sum(c) + 0 * jnp.sum(jnp.sin(x))
        return jnp.sum(g * clip_cotangent(x, axis=0, **{kind: bound}))

    grads = jax.jit(jax.grad(loss, (0, 1)))
    want = {"max_norm": [0.6, 0.8], "max_abs": [1, 1]}[kind]
    dx, dc = grads(g, jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(dx, want, rtol=1e-6)
    np.testing.assert_array_equal(dc, [0, 0])
    np.testing.assert_array_equal(grads(g, jnp.array([-1.0, -1.0]))[0], [0, 0])
    assert np.isnan(grads(g, jnp.array([jnp.nan, 0]))[0]).all()  # not unbounded


# ------------------------------------------------- loops, derivatives, compilers

CLIPS = {
    "norm": lambda h: clip_cotangent(h, 0.3, axis=-1),
    "abs": lambda h: clip_cotangent(h, max_abs=0.1),
}
SHAPES = {"in": (5, 6), "out": (6, 3), "rec": (6, 6)}
PARAMS = {k: RNG.normal(size=s).astype(np.float32) / 2 for k, s in SHAPES.items()}
BATCH = RNG.normal(size=(4, 7, 5)).astype(np.float32)


def recurrence(clip, remat=False, unroll=False):
    """The loss of one example, of a tanh recurrence whose state is clipped."""

    def loss(params, xs):
        def step(h, x):
            h = jnp.tanh(x @ params["in"] + 2 * clip(h) @ params["rec"])
            return h, h

        step = jax.checkpoint(step) if remat else step
        h, states = jnp.zeros(6), []
        if unroll:
            for x in xs:
                h, state = step(h, x)
                states.append(state)
        else:
            h, states = jax.lax.scan(step, h, xs)
        return jnp.sum((jnp.stack(list(states)) @ params["out"]) ** 2)

    return loss


def by_hand(name, params, xs):
    """Its gradient in float64, back through time."""
    w_in, w_out, w_rec = (np.asarray(params[k], np.float64) for k in sorted(params))
    states = [np.zeros(6)]
    for x in np.asarray(xs, np.float64):
        states.append(np.tanh(x @ w_in + 2 * states[-1] @ w_rec))
    grads, flowing = dict.fromkeys(params, 0.0), np.zeros(6)
    for t in reversed(range(len(xs))):
        h, before = states[t + 1], states[t]
        grads["out"] += np.outer(h, 2 * h @ w_out)
        inner = (flowing + 2 * w_out @ (h @ w_out)) * (1 - h**2)
        grads["in"] += np.outer(xs[t], inner)
        grads["rec"] += np.outer(2 * before, inner)
        flowing = 2 * w_rec @ inner
        flowing = (clipped(flowing, 0.3, -1) if name == "norm"
                   else np.clip(flowing, -0.1, 0.1))  # fmt: skip
    return grads


def assert_near(found, want, tolerance=2e-5):
    for key in want:
        scale = np.abs(want[key]).max()
        np.testing.assert_allclose(found[key], want[key], atol=tolerance * scale)


@pytest.mark.parametrize("name", CLIPS)
def test_in_loops_and_what_is_run_again(name):
    want = by_hand(name, PARAMS, BATCH[0])
    for options in ({}, {"remat": True}, {"unroll": True, "remat": True}):
        loss = recurrence(CLIPS[name], **options)
        assert_near(jax.jit(jax.grad(loss))(PARAMS, BATCH[0]), want)


def test_second_derivatives_are_those_of_the_clipped_gradient():
    matrix = jnp.asarray(G[0, :3, :3])
    loss = lambda x: 3 * jnp.sum(jnp.sin(matrix @ x))
    inside = jax.grad(lambda x: loss(clip_cotangent(x, 1.0, axis=None)))

    def explicit(x):
        g = jax.grad(loss)(x)
        return g * jnp.minimum(1, 1 / jnp.linalg.norm(g))

    x = jnp.array([0.1, 0.2, -0.3])
    want = jax.jit(jax.jacfwd(explicit))(x)
    for jacobian in (jax.jacfwd, jax.jacrev):
        np.testing.assert_allclose(jax.jit(jacobian(inside))(x), want, atol=2e-6)
    # Finite where the gradient is zero, and where its square leaves the range.
    square = lambda x, slope: slope * jnp.sum(clip_cotangent(x, 1.0, axis=0) ** 2)
    second = jax.jit(jax.jacrev(jax.grad(square)))
    for slope in (0.0, 1e25):
        assert np.isfinite(second(x, jnp.float32(slope))).all()


def test_forward_mode_is_refused():
    fun = lambda x: jnp.sum(clip_cotangent(x, 1.0, axis=None) ** 2)
    for derivative in (jax.jacfwd(fun), lambda x: jax.jvp(fun, (x,), (x,))):
        with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
            derivative(jnp.ones(2))


def program(fun, *args):
    """Compiled, without names of what it comes from."""
    text = jax.jit(fun).lower(*args).compile().as_text()
    return re.sub(r"metadata={[^}]*}|FileNames.*?\n\n\n", "", text, flags=re.S)


def test_costs_nothing_forward():
    plain, marked = (
        program(recurrence(clip), PARAMS, BATCH[0])
        for clip in (lambda h: h, CLIPS["norm"])
    )
    assert marked == plain
    # Nor is anything kept for the way back but the bound.
    kept = jax.tree.leaves(jax.vjp(CLIPS["norm"], G)[1])
    assert sum(np.size(x) for x in kept) <= 1


# ----------------------------------------------------------------- many devices

AXIS_NAMES = {-1: "model", 0: "data", None: ("data", "model")}


@pytest.mark.parametrize("axis", AXIS_NAMES)
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map(axis, check_vma):
    clip = functools.partial(
        pulled, max_norm=1.5, axis=axis, axis_name=AXIS_NAMES[axis]
    )
    spec, g = P("data", "model"), G[:, 0]
    mapped = jax.shard_map(
        clip, mesh=mesh_of(AxisType.Auto), in_specs=spec, out_specs=spec,
        check_vma=check_vma,
    )  # fmt: skip
    found = jax.jit(mapped)(g)
    np.testing.assert_allclose(found, clipped(g, 1.5, axis), rtol=1e-6)


def test_in_shard_map_a_copy_counts_once_and_splits_are_said():
    mesh, spec = mesh_of(AxisType.Auto), P(None, "model")
    run = lambda f, x, specs: jax.jit(
        jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=specs)
    )(x)
    clip = lambda g, name, axis=None: pulled(g, 1.5, axis=axis, axis_name=name)
    pair = (G[0], G[1])
    found = run(lambda g: clip(g, "model"), pair, (spec, P()))
    want = clipped(np.stack(pair), 1.5, None)
    np.testing.assert_allclose(np.stack(found), want, rtol=1e-6)
    alone = run(lambda g: clip(g, "model"), G[0], P())
    np.testing.assert_allclose(alone, clipped(G[0], 1.5, None), rtol=1e-6)
    rows = run(lambda g: clip(g, (), -1), G[0], P("data"))
    np.testing.assert_allclose(rows, clipped(G[0], 1.5, -1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"axis_name must say .*\['model'\]; .*none\."):
        run(lambda g: clip(g, None), G[0], spec)
    with pytest.raises(ValueError, match=r"x must have leaves that are split alike"):
        run(lambda g: clip(g, ()), pair, (spec, P()))


def test_in_pmap():
    clip = functools.partial(pulled, max_norm=1.5, axis=None, axis_name="i")
    found = jax.pmap(clip, axis_name="i")(G[0])
    np.testing.assert_allclose(found, clipped(G[0], 1.5, None), rtol=1e-6)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes(kind):
    sharding = NamedSharding(mesh_of(kind), P("data", None, "model"))
    g = jax.device_put(G, sharding)
    for axis, collectives in ((-1, 2), (1, 0)):
        clip = jax.jit(functools.partial(pulled, max_norm=1.5, axis=axis))
        clip = clip.lower(g).compile()
        found = clip(g)
        np.testing.assert_allclose(found, clipped(G, 1.5, axis), rtol=1e-6)
        assert found.sharding.is_equivalent_to(sharding, 3)
        text = clip.as_text()
        assert number_of("all-reduce", text) == collectives
        assert "all-gather" not in text
    for bound in ({"max_norm": 1.5, "axis": -1}, {"max_abs": 0.3}):
        found = jax.jit(jax.vmap(functools.partial(pulled, **bound)))(g)
        assert found.sharding.is_equivalent_to(sharding, 3)
        np.testing.assert_allclose(found, pulled(G, **bound), rtol=1e-6)


# ----------------------------------------------------- examples of a batch, modules


@pytest.mark.parametrize("name", CLIPS)
def test_per_example(name):
    """The gradient of an example is the clipped one, and found as without a clip."""
    loss = recurrence(CLIPS[name])
    found = agrees(loss, PARAMS, BATCH)
    assert found == methods(recurrence(lambda h: h), PARAMS, BATCH)
    assert "instantiated" not in found.values()
    norms = jax.jit(per_example.norms(loss))(PARAMS, BATCH).norm[:, 0]
    each = [by_hand(name, PARAMS, xs) for xs in BATCH]
    want = [size(np.concatenate([g.ravel() for g in x.values()])) for x in each]
    np.testing.assert_allclose(norms, want, rtol=1e-5)


def attention(params, xs):
    """A block that is run again, with a norm over positions."""

    def block(params, xs):
        h = clip_cotangent(jnp.tanh(xs @ params["in"]), 0.3, axis=0)
        return jax.nn.softmax(h @ h.T) @ h @ params["rec"]

    h = clip_cotangent(jax.checkpoint(block)(params, xs), 0.2, axis=None)
    return jnp.sum((h @ params["out"]) ** 2)


def test_per_example_in_a_region():
    found = agrees(attention, PARAMS, BATCH, microbatch_size=2)
    assert "instantiated" not in found.values()


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.cell = nnx.GRUCell(5, 6, rngs=rngs)

    def __call__(self, xs):
        def step(h, x):
            return self.cell(clip_cotangent(h, 0.01, axis=-1), x)

        h = jnp.zeros((len(xs), 6))
        return jax.lax.scan(step, h, xs.swapaxes(0, 1))[0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, xs):
        cell = nn.scan(
            lambda cell, state, x: cell(clip_cotangent(state, 0.01, axis=-1), x),
            variable_broadcast="params", split_rngs={"params": False},
        )  # fmt: skip
        inner = nn.OptimizedLSTMCell(6)
        state = inner.initialize_carry(jax.random.key(0), xs[:, 0].shape)
        return cell(inner, state, xs.swapaxes(0, 1))[1][-1]


def test_in_modules():
    """What flows back to any input but the last has passed a clip, and one cell."""
    loss = lambda model, xs: 1e3 * jnp.sum(model(xs) ** 2)
    with jax.numpy_rank_promotion("allow"):
        linen, variables = Linen(), jax.jit(Linen().init)(jax.random.key(0), BATCH)
        of_linen = lambda xs: loss(lambda xs: linen.apply(variables, xs), xs)
        found = [
            jax.jit(jax.grad(of_linen))(BATCH),
            nnx.jit(nnx.grad(loss, argnums=1))(Nnx(nnx.Rngs(0)), BATCH),
        ]
    for g in found:
        norms = np.sqrt(np.sum(np.square(g), -1))
        assert 0 < norms[:, :-1].max() < 0.05 < norms[:, -1].min()
