"""Every per-example function gives on a mesh what it gives on one device."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_meshes import QUICK, assert_all_alike, mesh_of

import clipfx
from clipfx import per_example, privacy

B, K = 16, 2
PLACES = {
    "whole": {"bias": P(), "down": P(), "table": P(), "up": P()},
    "fsdp": {"bias": P("data"), "down": P("data"), "table": P("data"), "up": P("data")},
    "tensor": {
        "bias": P("model"),
        "down": P("model"),
        "table": P("model"),
        "up": P(None, "model"),
    },
}


def loss(params, example, **whole):
    """Looks up tokens, then two layers, the first split by columns, the other by rows.

    Args:
      params: Of an embedding and two layers.
      example: Two tokens and what is wanted of them.
      **whole: `out_sharding` of what is added up over devices.
    """
    tokens, y = example
    x = params["table"].at[tokens].get(**whole).sum(0)
    # No differences, whose rounding would be larger than they are.
    h = jnp.exp((x @ params["up"] + params["bias"]) / 4)
    return jnp.vdot(jnp.dot(h, params["down"], **whole), y)


def draw():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"bias": normal(8), "down": normal(8, 4), "table": normal(8, 4),
              "up": normal(4, 8)}  # fmt: skip
    stacked = {k: normal(B, *w.shape) for k, w in params.items()}
    examples = jnp.asarray(rng.integers(0, 8, (B, 2))), normal(B, 4)
    group = jnp.where(jnp.arange(B) < 3, 1, 0)  # on one device
    return params, {"examples": examples, "group": group, "stacked": stacked}


PARAMS, BATCH = draw()


# Every function of a loss, as a function of parameters and a batch.


def clipped_grad(loss, axis_name=None):
    grad = per_example.clipped_grad(loss, 2.0, groups="leaf", axis_name=axis_name)
    return lambda params, batch: grad(params, batch["examples"])


def norms(loss):
    measure = per_example.norms(loss, groups="leaf")
    return lambda params, batch: measure(params, batch["examples"])


def group_grad(loss, axis_name=None):
    grad = per_example.group_grad(loss, K, axis_name=axis_name)
    return lambda params, batch: grad(params, batch["examples"], batch["group"])


def fair_grad(loss, axis_name=None):
    grad = per_example.fair_grad(loss, K, 1.2, axis_name=axis_name)
    return lambda params, batch: grad(params, batch["examples"], batch["group"])


def clip_fair_groups(loss, axis_name=None):
    tx = clipfx.clip_fair_groups(1.2, num_groups=K, axis_name=axis_name)

    def run(params, batch):
        grad = per_example.group_grad(loss, K)
        parts, _ = grad(params, batch["examples"], batch["group"])
        return tx.update(parts, tx.init(params))

    return run


def clip_per_example(loss, axis_name=None):
    tx = per_example.clip_per_example(2.0, groups="leaf", reduce="sum")

    def run(params, batch):
        sums, state = tx.update(batch["stacked"], tx.init(params))
        # Of the examples of one device.
        return (jax.lax.psum(sums, axis_name),) if axis_name else (sums, state)

    return run


def dp_grad(loss, axis_name=None):
    grad = privacy.dp_grad(
        loss,
        max_norm=2.0,
        noise_multiplier=0.5,
        expected_batch_size=B,
        key=jax.random.key(3),
        axis_name=axis_name,
    )
    return lambda params, batch: grad(grad.init(params), params, batch["examples"])


FUNCTIONS = {
    make.__name__: make
    for make in (
        clipped_grad,
        norms,
        group_grad,
        fair_grad,
        clip_fair_groups,
        clip_per_example,
        dp_grad,
    )
}


def compiled(run, *args):
    return run.lower(*args).compile(QUICK)(*args)


@functools.cache
def alone(name):
    return compiled(jax.jit(FUNCTIONS[name](loss)), PARAMS, BATCH)


def specs_of(place):
    """Of parameters and batch; gradients of examples are split like parameters too."""
    params, twice = PLACES[place], place == "fsdp"
    stacked = {k: P("data", *(() if twice else spec)) for k, spec in params.items()}
    return params, {"examples": P("data"), "group": P("data"), "stacked": stacked}


# What gives sums like the parameters.
SUMS = ("clipped_grad", "fair_grad", "clip_fair_groups", "dp_grad")

# -------------------------------------------------------------------------- the ways


def on_mesh(kind, place, name):
    mesh, one = mesh_of(kind), loss
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs_of(place))
    if kind == AxisType.Explicit:
        one = functools.partial(loss, out_sharding=P())
    with jax.set_mesh(mesh):
        params, batch = jax.device_put((PARAMS, BATCH), shardings)
        out = compiled(jax.jit(FUNCTIONS[name](one)), params, batch)
    if kind == AxisType.Explicit and name in SUMS:
        for k, x in out[0].items():
            assert x.sharding.is_equivalent_to(params[k].sharding, x.ndim)
    return out


def in_shard_map(name, **options):
    by_itself = not options and name != "clip_per_example"
    run = FUNCTIONS[name](loss, **({} if by_itself else named(name, "data")))
    split = lambda y: P("data") if y.shape[:1] == (B,) else P()
    mapped = jax.shard_map(
        run,
        mesh=mesh_of(AxisType.Auto),
        in_specs=specs_of("whole"),
        out_specs=jax.tree.map(split, shown(name)),
        **options,
    )
    return compiled(jax.jit(mapped), PARAMS, BATCH)


def named(name, axis):
    takes = "axis_name" in inspect.signature(FUNCTIONS[name]).parameters
    return {"axis_name": axis} if takes else {}


def in_pmap(name):
    run = jax.pmap(FUNCTIONS[name](loss, **named(name, "i")), "i", in_axes=(None, 0))
    cut = lambda x: x.reshape(8, B // 8, *x.shape[1:])
    out = compiled(run, PARAMS, jax.tree.map(cut, BATCH))

    def joined(x, y):
        x = np.asarray(x)
        if x.size == y.size:
            return x.reshape(y.shape)
        assert_all_alike(x)
        return x[0]

    return jax.tree.map(joined, out, shown(name))


def shown(name):
    """Without what differs between devices."""
    return alone(name)[:1] if name == "clip_per_example" else alone(name)


WAYS = {
    f"{kind.name}-{place}": functools.partial(on_mesh, kind, place)
    for kind in (AxisType.Auto, AxisType.Explicit)
    for place in PLACES
}
WAYS["shard_map"] = in_shard_map
WAYS["shard_map-by_name"] = functools.partial(in_shard_map, check_vma=False)
WAYS["pmap"] = in_pmap


# --------------------------------------------------------------------------- the law


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_sharded_equals_whole(name, way):
    got, want = way(name), alone(name)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=False):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # Of the largest, because sums over examples may cancel.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max(initial=0))
