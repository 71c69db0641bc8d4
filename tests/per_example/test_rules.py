"""Rules of users: as right and as fast as those that are built in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.core import primitives
from per_example_oracle import (
    LIMIT,
    SLACK,
    assert_near,
    cast,
    check,
    each_gradient,
    expected,
    forced,
)
from tiers import in_tiers

import clipfx
from clipfx import per_example
from clipfx.per_example import Rule, register_rule
from clipfx.per_example.engine.rules import registry

T, D, L = 5, 4, 3


def rows(x, delta, params):
    return x, delta


# A dense layer that knows its own derivative.
@jax.custom_vjp
def dense(x, w):
    return x @ w


dense.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, d: (d @ kept[1].T, kept[0].T @ d)
)
register_rule(dense, Rule(weight=1, data=0, factors=rows))


# The same as a kernel, with a kernel for the sum of weighted gradients.
def _kernel(x, w, out):
    out[...] = jnp.dot(x[...], w[...], preferred_element_type=out.dtype)


def matmul(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(_kernel, out_shape=shape, interpret=True)(x, w)


@jax.custom_vjp
def kernel(x, w):
    return matmul(x, w)


kernel.defvjp(
    lambda x, w: (matmul(x, w), (x, w)),
    lambda kept, d: (matmul(d, kept[1].T), matmul(kept[0].T, d)),
)


def sum_by_kernel(x, delta, params):
    flat = lambda y: y.reshape(-1, y.shape[-1])
    return matmul(flat(x).T, flat(delta))


register_rule(kernel, Rule(1, 0, rows, sum_by_kernel))


# Two weights, one of them stored transposed, and a number that JAX does not see.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def scaled(times, params, x):
    return times * (x @ params["w"].T + params["b"][None])


def _scaled_back(times, kept, d):
    w, x = kept
    return {"b": times * d.sum(0), "w": times * d.T @ x}, times * d @ w


scaled.defvjp(lambda times, p, x: (scaled(times, p, x), (p["w"], x)), _scaled_back)
ones = lambda _, d, params: (jnp.full((len(d), 1), 0.5, d.dtype), d)
register_rule(scaled, Rule(weight=0, data=None, factors=ones))
register_rule(scaled, Rule(weight=1, data=2, factors=lambda x, d, _: (0.5 * d, x)))


def plain(p, x):
    return jnp.sum(jnp.tanh(kernel(jnp.tanh(dense(x, p["w"])), p["v"])))


def one_position(p, x):
    return jnp.sum(jnp.tanh(dense(jnp.tanh(kernel(x[:1], p["w"])), p["v"])))


def several_weights(p, x):
    return jnp.sum(jnp.tanh(scaled(0.5, {"w": p["w"], "b": p["b"]}, jnp.tanh(x))))


def nested_jit(p, x):
    return jnp.sum(jnp.tanh(jax.jit(dense)(jax.jit(kernel)(x, p["w"]), p["v"])))


def remat(p, x):
    block = jax.checkpoint(lambda x: jnp.tanh(dense(kernel(x, p["w"]), p["v"])))
    return jnp.sum(block(x))


def remat_of_several(p, x):
    block = jax.checkpoint(lambda x: scaled(0.5, {"w": p["w"], "b": p["b"]}, x))
    return jnp.sum(jnp.tanh(block(x)))


def layers(p, x):
    step = lambda h, w: (jnp.tanh(kernel(h, w)), None)
    h = jax.lax.scan(step, x, p["layers"])[0]
    return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(dense(h, w)), None), h,
                                p["others"])[0])  # fmt: skip


def rnn(p, x):
    def step(h, row):
        h = jnp.tanh(dense(h, p["w"]) + kernel(row[None], p["v"]))
        return h, h

    return jnp.sum(jax.lax.scan(step, x[:1] * 0, x)[1])


def tied(p, x):
    """With a use that JAX knows itself, transposed."""
    return jnp.sum(jnp.tanh(jnp.tanh(dense(x, p["w"])) @ p["w"].T))


def viewed(p, x):
    w = p["layers"][1:2].reshape(p["w"].shape).T
    return jnp.sum(jnp.tanh(dense(x, w) + kernel(x, p["w"] + 0)))


SHAPES = {"w": (D, D), "v": (D, D), "b": (D,), "layers": (L, D, D), "others": (L, D, D)}
# What each must use, for each of the leaves that it uses.
LOSSES = {
    plain: {"w": ("Gram", "dense"), "v": ("Gram", "kernel")},
    one_position: {"w": ("outer product", "kernel"), "v": ("outer product", "dense")},
    several_weights: {"w": ("Gram", "scaled"), "b": ("Gram", "scaled")},
    nested_jit: {"w": ("Gram", "kernel"), "v": ("Gram", "dense")},
    remat: {"w": ("Gram", "kernel"), "v": ("Gram", "dense")},
    remat_of_several: {"w": ("Gram", "scaled"), "b": ("Gram", "scaled")},
    layers: {"layers": ("Gram", "kernel"), "others": ("Gram", "dense")},
    rnn: {"w": ("Gram", "dense"), "v": ("Gram", "kernel")},
    tied: {"w": ("Gram", "dense, dot_general")},
    viewed: {"layers": ("Gram", "dense")},
}
each_loss = pytest.mark.parametrize(
    "loss",
    in_tiers({loss.__name__: loss for loss in LOSSES}, {"several_weights", "layers"}),
)


def draw(loss, width=D):
    rng = np.random.default_rng(0)
    names = sorted({*LOSSES[loss], *({"w"} if loss is viewed else ())})
    shapes = {k: [width if n == D else n for n in SHAPES[k]] for k in names}
    params = {k: rng.normal(size=shapes[k]) / np.sqrt(width) for k in names}
    return params, rng.normal(size=(3, T, width))


def table(loss, params, example):
    """What `explain` tells, by leaf: the method, and where it is used."""
    head, *lines = str(per_example.explain(loss, params, example)).splitlines()
    method, used, flops = (head.index(x) for x in ("method", "used in", "FLOPs"))
    cells = {x.split()[0]: x for x in lines if not x.startswith("The program")}
    end = lambda x: x[used:flops].rsplit("  ", 1)[0].strip()
    return {k: (x[method:used].strip(), end(x)) for k, x in cells.items()}


@each_loss
def test_explain_names_the_rule(loss):
    """In sizes that make a rule worth it."""
    params, batch = cast(draw(loss, 64), "float32")
    seen = table(loss, params, batch[0])
    assert {k: seen[k] for k in LOSSES[loss]} == LOSSES[loss]


@each_loss
@pytest.mark.parametrize("dtype", in_tiers(["float32", "float64"], {"float64"}))
def test_sums_and_norms_are_those_of_every_gradient(loss, dtype):
    params, batch = draw(loss)
    for force in ("factored", "formed"):
        run = forced(loss, force, "leaf")
        check(run, loss, params, batch, dtype, groups="leaf")


@each_loss
def test_the_same_as_with_instantiated_gradients(loss):
    """As `clipped_grad` chooses, in microbatches, and with padding."""
    params, batch = draw(loss)
    grad = per_example.clipped_grad(loss, LIMIT, microbatch_size=2)
    where = np.array([True, False, True])
    run = lambda params, batch: grad(params, batch, where=where)
    check(run, loss, params, batch, "float64", where=where)


@pytest.mark.parametrize("size", in_tiers([1e-19, 1e-12, 1e10], {1e-19}))
@pytest.mark.parametrize(
    "loss", in_tiers([plain, layers, several_weights, remat], {remat})
)
def test_unusual_magnitudes(loss, size):
    """What float32 can hold and squares cannot: norms and sums relative to them."""
    params, batch = draw(loss)
    shrunk = lambda p, x: loss(p, x) * jnp.asarray(size, x.dtype)
    grads = each_gradient(shrunk, params, batch)
    params, batch = cast(params, "float32"), cast(batch, "float32")
    limit = LIMIT * size
    sums, info = jax.jit(per_example.clipped_grad(shrunk, limit))(params, batch)
    right, norm, _ = expected(grads, limit=limit, slack=SLACK["float32"])
    np.testing.assert_allclose(info.norm / size, norm / size, 1e-4)
    assert_near(jax.tree.map(lambda x: x / size, sums),
                jax.tree.map(lambda x: x / size, right), 1e-4)  # fmt: skip


@each_loss
def test_the_bound_holds(loss):
    """One example's contribution, in float64, never exceeds the threshold."""
    params, batch = (cast(x, "float32") for x in draw(loss))
    for scale in (1.0, 1e4):
        grad = jax.jit(per_example.clipped_grad(loss, LIMIT))
        for x in batch:
            sums, _ = grad(params, scale * x[None])
            leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(sums)]
            assert np.sqrt(sum((x**2).sum() for x in leaves)) <= LIMIT


def test_not_finite_examples_contribute_nothing():
    params, batch = (cast(x, "float32") for x in draw(plain))
    grad = jax.jit(per_example.clipped_grad(plain, LIMIT))
    sums, info = grad(params, batch.at[1, 2, 3].set(jnp.nan))
    right, _ = grad(params, batch[jnp.array([0, 2])])
    assert np.isnan(info.norm[1, 0]) and not info.factor[1, 0]
    assert_near(sums, jax.tree.map(np.asarray, right), 1e-6)


def test_half_precision():
    params, batch = (cast(x, "bfloat16") for x in draw(plain))
    sums, info = jax.jit(per_example.clipped_grad(plain, LIMIT))(params, batch)
    grads = jax.jit(jax.vmap(jax.grad(plain), (None, 0)))(params, batch)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), grads)
    right, norm, _ = expected(exact)
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(info.norm, norm, 2e-2)
    assert_near(sums, right, 2e-2)


@pytest.mark.parametrize(
    "loss", in_tiers([plain, several_weights, layers, tied], {tied})
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_split_over_devices(kind, loss):
    if kind == "Explicit" and loss in (plain, layers):
        pytest.skip("what interprets Pallas's kernels does not know such meshes")
    params, batch = (cast(x, "float32") for x in draw(loss))
    batch = jnp.concatenate([batch, batch[:1]])
    grad = jax.jit(per_example.clipped_grad(loss, LIMIT))
    right, info = grad(params, batch)
    mesh = jax.make_mesh((4,), ("x",), (getattr(jax.sharding.AxisType, kind),))
    rows = jax.NamedSharding(mesh, jax.P("x"))
    whole = jax.NamedSharding(mesh, jax.P())
    with jax.set_mesh(mesh):
        sums, split = grad(jax.device_put(params, whole), jax.device_put(batch, rows))
    assert_near(sums, jax.tree.map(np.asarray, right), 1e-6)
    np.testing.assert_allclose(split.norm, info.norm, 1e-6)


def test_sums_by_population():
    """Norms of what a population adds up to come from the same outer products."""
    params, batch = (cast(x, "float32") for x in draw(plain, 32))
    ids = jnp.array([0, 1, 0])
    grad = jax.jit(per_example.fair_grad(plain, 2, 1.0, floor=0.0))
    sums, info = grad(params, batch, population_ids=ids)
    grads = jax.jit(jax.vmap(jax.grad(plain), (None, 0)))(params, batch)
    grads = jax.tree.map(lambda g: np.stack([g[0] + g[2], g[1]]), grads)
    norm = expected(grads)[1]
    right, *_ = expected(grads, limit=norm.min())
    np.testing.assert_allclose(info.norm, norm[:, 0], 1e-5)
    assert_near(sums, right, 1e-4)


def test_without_a_rule_or_under_a_vmap_of_its_own():
    """Other shapes than the rule was written for: instantiated, and right."""
    bare = jax.custom_vjp(lambda x, w: x @ w)
    bare.defvjp(dense.fwd, lambda kept, d: dense.bwd(kept, d))
    row = jax.custom_vjp(lambda x, w: w.T @ x)
    row.defvjp(lambda x, w: (w.T @ x, (x, w)),
               lambda kept, d: (kept[1] @ d, kept[0][:, None] * d[None]))  # fmt: skip
    register_rule(row, Rule(1, 0, lambda x, d, _: (x[None], d[None])))

    def loss(p, x):
        h = jnp.tanh(jax.vmap(row, (0, None))(x, p["v"]))
        return jnp.sum(jnp.tanh(bare(h, p["w"])))

    params, batch = draw(plain)
    seen = table(loss, params, batch[0])
    assert seen == dict.fromkeys("vw", ("instantiated", "-"))
    run = per_example.clipped_grad(loss, LIMIT, groups="leaf")
    check(run, loss, params, batch, "float64", groups="leaf")
    alone = lambda p, x: jnp.sum(jnp.tanh(row(x[0], p["w"])))
    assert table(alone, {"w": np.ones((64, 64))}, np.ones((1, 64)))["w"] == (
        "outer product", "<lambda>")  # fmt: skip


def test_numbers_are_those_of_arguments():
    """What a function closes over comes before them in a program, and is not one."""

    def loss(p, x):
        twice = jnp.full(D, 2.0, x.dtype) * x.sum() ** 0

        @jax.custom_vjp
        def layer(x, w):
            return twice[None] * (x @ w)

        back = lambda kept, d: ((twice[None] * d) @ kept[1].T, kept[0].T @ (2 * d))
        layer.defvjp(lambda x, w: (layer(x, w), (x, w)), back)
        register_rule(layer, Rule(1, 0, lambda x, d, _: (x, 2 * d)))
        return jnp.sum(jnp.tanh(layer(x, p["w"])))

    run = forced(loss, "factored")
    check(run, loss, *draw(tied), "float64")


def test_a_primitive(monkeypatch):
    """A choice: u is 1, v is delta where it was chosen."""
    monkeypatch.setattr(registry, "_USERS", [])

    def chosen(which, d, params, case):
        v = jnp.where(which == case, d, 0).reshape(1, -1)
        return jnp.ones((1, 1), d.dtype), v

    select = primitives.select_n_p
    for case in (False, True):
        rule = Rule(1 + case, 0, functools.partial(chosen, case=case))
        assert register_rule(select, rule) is select

    def loss(p, x):
        h = jnp.where(x[:D] > 0, p["w"], 0) + jnp.where(x[:D] > 0.5, 0, p["v"])
        return jnp.sum(jnp.sin(h))

    params, batch = draw(plain)
    seen = table(loss, params, batch[0])
    assert seen == dict.fromkeys("vw", ("outer product", "select_n"))
    run = forced(loss, "factored", "leaf")
    check(run, loss, params, batch, "float64", groups="leaf")


def test_a_second_rule_replaces_the_first():
    layer = jax.custom_vjp(dense.fun)
    layer.defvjp(dense.fwd, lambda kept, d: dense.bwd(kept, d))
    loss = lambda w, x: jnp.sum(jnp.tanh(layer(x, w)))
    params, batch = draw(tied)
    params, batch = cast(params["w"], "float32"), cast(batch, "float32")
    register_rule(layer, Rule(1, 0, lambda x, d, _: (2 * x, d)))
    assert register_rule(layer, Rule(1, 0, rows)) is layer
    norm = jax.jit(per_example.norms(loss))(params, batch).norm
    grads = np.asarray(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch))
    np.testing.assert_allclose(norm[:, 0], np.sqrt((grads**2).sum((1, 2))), 1e-5)


# ----------------------------------------------------------------------------- errors


def bad_function(x):
    return x


def without_derivative():
    return jax.custom_vjp(bad_function)


WRONG = {
    "no function": (
        3,
        Rule(1, 0, rows),
        "function must be a jax.custom_vjp function or",
    ),
    "another": (bad_function, Rule(1, 0, rows), "function must be a jax.custom_vjp"),
    "compiled": (jax.jit(dense), Rule(1, 0, rows), "before jax.jit or jax.vmap"),
    "early": (without_derivative(), Rule(1, 0, rows), "call its defvjp first"),
    "built in": (primitives.dot_general_p, Rule(1, 0, rows), "which has one"),
    "a loop": (primitives.scan_p, Rule(1, 0, rows), "got scan, which has one"),
    "no rule": (dense, (1, 0, rows), r"rule must be a Rule, got \(1, 0"),
    "weight": (dense, Rule(-1, 0, rows), "weight of a rule must be .*, got -1"),
    "named": (dense, Rule("w", 0, rows), "weight of a rule must be .*, got 'w'"),
    "data": (dense, Rule(1, 0.5, rows), "data of a rule must be .*, got 0.5"),
    "same": (dense, Rule(1, 1, rows), "data of a rule must differ from its weight"),
    "factors": (dense, Rule(1, 0, None), "factors of a rule must be a function"),
    "gradient": (dense, Rule(1, 0, rows, 3), "weight_gradient of a rule must be a"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rules_that_cannot_be(name):
    function, rule, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        register_rule(function, rule)


PAIR = r"factors of the rule for layer must return "
LATE = {
    "data": (Rule(1, 7, rows), "rule must name arguments of layer, which has 2"),
    "one": (Rule(1, 0, lambda x, d, _: x), PAIR + "two matrices"),
    "rank": (Rule(1, 0, lambda x, d, _: (x[0], d)), PAIR + r"matrices \[T, K\]"),
    "length": (Rule(1, 0, lambda x, d, _: (x[1:], d)), PAIR + "matrices"),
    "size": (Rule(1, 0, lambda x, d, _: (x, d[:, 1:])), r"K N = 16 for a weight \(4"),
    "sum": (Rule(1, 0, rows, lambda x, d, _: x.sum()), r"shape of the weight, \(4, 4"),
}


@pytest.mark.parametrize("name", LATE)
def test_rules_that_do_not_fit(name):
    rule, message = LATE[name]

    @jax.custom_vjp
    def layer(x, w):
        return x @ w

    layer.defvjp(dense.fwd, lambda kept, d: dense.bwd(kept, d))
    register_rule(layer, rule)
    loss = lambda p, x: jnp.sum(jnp.tanh(layer(x, p["w"])))
    params, batch = (cast(x, "float32") for x in draw(tied))
    with pytest.raises((TypeError, ValueError), match=message):
        jax.eval_shape(forced(loss, "factored"), params, batch)


def test_exported():
    assert {"Rule", "register_rule"} <= set(clipfx.per_example.__all__)
