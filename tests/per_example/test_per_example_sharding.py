"""Per-example clipping on meshes: equal to one device, and what is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import in_tiers
from xla import number_of

from clipfx import per_example

B, T, WIDTH, HIDDEN = 8, 6, 8, 16
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def loss(params, example, explicit=False, loop=True):
    """Dense layers, one of them split by columns, one by rows, and a scan."""
    x, y = example
    h = jnp.tanh(x @ params["w1"] + params["b1"][None]) * params["s"][None]
    whole = {"out_sharding": P()} if explicit else {}
    h = jnp.tanh(jnp.dot(h, params["w2"], **whole))

    def step(carry, row):
        carry = jnp.tanh(carry @ params["r"] + row)
        return carry, carry

    rows = jax.lax.scan(step, 0 * h[0], h)[1] if loop else jnp.tanh(h @ params["r"])
    return ((rows - y) ** 2).mean()


def draw():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {
        "w1": normal(WIDTH, HIDDEN),
        "b1": normal(HIDDEN),
        "s": normal(HIDDEN),
        "w2": normal(HIDDEN, HIDDEN),
        "r": normal(HIDDEN, HIDDEN),
    }
    return params, (normal(B, T, WIDTH), normal(B, T, HIDDEN))


PARAMS, BATCH = draw()
SPLIT = {"w1": P(None, "model"), "b1": P("model"), "s": P("model"),
         "w2": P("model", None), "r": P()}  # fmt: skip
GRAD = per_example.clipped_grad(loss, 0.5, groups="leaf")


@pytest.fixture(scope="module")
def alone():
    return jax.jit(GRAD)(PARAMS, BATCH)


def assert_same(got, want):
    """To 2e-5 of the largest entry of a leaf: a mesh rounds in another order."""

    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * np.abs(y).max(initial=0))

    jax.tree.map(one, got, want)


def collectives(compiled):
    count = lambda kind: number_of(kind, compiled.as_text())
    return count("all-reduce"), count("all-gather") + count("all-to-all")


def vmap_of_loops_works(mesh, params, batch):
    """Not on Explicit meshes in the oldest JAX: there even its own gradient fails."""
    fun = lambda p, e: loss(p, e, explicit=True)
    try:
        jax.jit(jax.vmap(jax.grad(fun), (None, 0))).lower(params, batch)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("kind", in_tiers(KINDS.keys(), {"explicit"}))
@pytest.mark.parametrize("model", in_tiers([1, 2], {2}))
def test_batch_and_parameters_on_a_mesh(kind, model):
    mesh = jax.make_mesh(
        (8 // model, model), ("data", "model"), axis_types=(KINDS[kind],) * 2
    )
    with jax.set_mesh(mesh):
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        params = jax.tree.map(place, PARAMS, SPLIT)
        batch = jax.tree.map(lambda x: place(x, P("data")), BATCH)
        explicit = kind == "explicit"
        loop = not explicit or vmap_of_loops_works(mesh, params, batch)
        fun = lambda p, e: loss(p, e, explicit=explicit, loop=loop)
        grad = jax.jit(per_example.clipped_grad(fun, 0.5, groups="leaf"))
        compiled = grad.lower(params, batch).compile()
        sums, info = compiled(params, batch)
        total = lambda p, b: jax.vmap(fun, (None, 0))(p, b).sum()
        ordinary = jax.jit(jax.grad(total)).lower(params, batch).compile()
    whole = per_example.clipped_grad(
        lambda p, e: loss(p, e, loop=loop), 0.5, groups="leaf"
    )
    assert_same(jax.device_get((sums, info)), jax.jit(whole)(PARAMS, BATCH))
    if kind == "explicit":
        assert jax.tree.all(
            jax.tree.map(
                lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim),
                sums,
                params,
            )
        )
    # Of parameters that are split the sizes and then the norms; the sum's own stands
    # twice, for the loop that drops bad examples, and rarely runs, holds it too.
    reduces, others = collectives(compiled)
    more = 3 if model > 1 else 1
    assert reduces <= collectives(ordinary)[0] + more
    assert others <= collectives(ordinary)[1] + (1 if kind == "explicit" else 0)


@pytest.mark.parametrize("check", in_tiers([True, False], {False}))
def test_shard_map_with_a_local_batch(alone, check):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    grad = per_example.clipped_grad(
        loss, 0.5, groups="leaf", batch_axis_name=None if check else "data"
    )
    run = jax.shard_map(
        grad,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), P("data")),
        check_vma=check,
    )
    assert_same(jax.jit(run)(PARAMS, BATCH), alone)
    x, y = BATCH
    bad = (x.at[0, 0, 0].set(jnp.nan), y)  # on one device
    sums, info = jax.jit(run)(PARAMS, bad)
    keep = jnp.arange(B) > 0
    assert_same(sums, jax.jit(GRAD)(PARAMS, BATCH, where=keep)[0])
    assert (info.factor[0] == 0).all()


def test_shard_map_with_parameters_split_too(alone):
    """Columns of the first layer, rows of the second, as in manual tensor parallel."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def local(params, example):
        x, y = example
        h = jnp.tanh(x @ params["w1"] + params["b1"][None]) * params["s"][None]
        h = jnp.tanh(jax.lax.psum(h @ params["w2"], "model"))

        def step(carry, row):
            carry = jnp.tanh(carry @ params["r"] + row)
            return carry, carry

        _, rows = jax.lax.scan(step, 0 * h[0], h)
        return ((rows - y) ** 2).mean()

    grad = per_example.clipped_grad(local, 0.5, groups="leaf")
    run = jax.shard_map(
        grad, mesh=mesh, in_specs=(SPLIT, P("data")), out_specs=(SPLIT, P("data"))
    )
    assert_same(jax.jit(run)(PARAMS, BATCH), alone)


def test_no_array_of_all_gradients():
    """Nothing as large as examples times a weight, in the compiled program."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    wide = {"w1": jnp.ones((300, 301)), "w2": jnp.ones((301, 10))}
    fun = lambda p, x: (jnp.tanh(x @ p["w1"]) @ p["w2"]).sum()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((16, 300)), NamedSharding(mesh, P("data")))
        text = jax.jit(per_example.clipped_grad(fun, 1.0)).lower(wide, x).compile()
    for shape in re.findall(r"f32\[([\d,]+)\]", text.as_text()):
        assert np.prod([int(n) for n in shape.split(",")]) <= 300 * 301
