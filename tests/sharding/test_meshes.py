"""Every method gives on a mesh what it gives on one device, step after step.

On one tree that is split in every way there is: over the batch axis as in FSDP, by
columns and rows as in tensor parallelism, over both axes at once, unevenly, and not at
all.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXES, NUMBER, OTHERS, assert_all_alike, mesh_of
from methods import BY_REDUCTIONS, FEWEST, METHODS, Method
from tiers import in_tiers
from xla import number_of

import clipfx

SPLIT = {
    "decoder": {
        "column": P(None, "model"),
        "fsdp": P("data"),
        "row": P("model"),
        "uneven": P(),
        "whole": P(),
    },
    "encoder": {"bias": P(AXES), "kernel": P("data", "model")},
}
ALONG = jax.tree.map(lambda _: P(AXES), SPLIT)
PLACES = {"split": SPLIT, "along": ALONG}
SHAPES = {
    "decoder": {
        "column": (8, 4, jnp.bfloat16),
        "fsdp": (8, 7, jnp.float16),
        "row": (8, 3, jnp.float32),
        "uneven": (8, 5, jnp.float32),
        "whole": (8, jnp.float32),
    },
    "encoder": {"bias": (16, jnp.float32), "kernel": (8, 6, jnp.float32)},
}
UNEVEN = P(None, "model")


def balance(weight_decay, learning_rate, axis_name=None):
    """The diagnostic as a transform that changes nothing, with its answer as state."""

    def ask(updates, params, **kwargs):
        # Of inner products that do not cancel.
        updates, params = jax.tree.map(jnp.abs, (updates, params))
        return clipfx.weight_decay_balance(
            updates,
            params,
            weight_decay=weight_decay,
            learning_rate=learning_rate,
            **kwargs,
        )

    def init(params):
        zeros = lambda x: jnp.zeros(x.shape, x.dtype)
        return jax.tree.map(zeros, jax.eval_shape(ask, params, params))

    update = lambda u, state, params: (u, ask(u, params, axis_name=axis_name))
    return optax.GradientTransformation(init, update)


DIAGNOSTIC = Method(balance, {"weight_decay": 0.1, "learning_rate": 0.01})
ROWS = {**BY_REDUCTIONS, "weight_decay_balance": DIAGNOSTIC}


def draw(seed, size=1.0):
    rng = np.random.default_rng(seed)
    one = lambda kind: jnp.asarray(size * rng.normal(size=kind[:-1]), kind[-1])
    return jax.tree.map(one, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# Gradients and parameters of four steps, one of them a spike. Of norms next to each
# other the deviation would be as exact as they are, not as itself.
BATCHES = [
    (draw(2 * step, size), wide(draw(2 * step + 1)))
    for step, size in enumerate([1.0, 3.0, 30.0, 0.5])
]


@functools.cache
def placed(kind, place):
    mesh = mesh_of(kind)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), PLACES[place])
    return [jax.device_put(pair, (shardings, shardings)) for pair in BATCHES]


def by_itself(name, **kwargs):
    """`init` and a step of a method; what goes in and comes out has names."""
    row = ROWS[name]
    tx = row.make(**row.args, **kwargs)

    def step(grads, state, params):
        clipped, state = tx.update(grads, state["clip"], params, **row.extra)
        return {"clipped": clipped}, {"clip": state}

    return lambda params: {"clip": tx.init(params)}, step


def before_adam(name):
    """The same in front of Adam, as `optax.chain` has them."""
    first, clip = by_itself(name)
    adam = optax.adam(1e-3)

    def step(grads, state, params):
        out, after = clip(grads, state, params)
        with jax.numpy_dtype_promotion("standard"):  # for Optax
            updates, moments = adam.update(wide(out["clipped"]), state["adam"], params)
        return {**out, "updates": updates}, {**after, "adam": moments}

    return lambda params: {**first(params), "adam": adam.init(params)}, step


def take_steps(step, state, batches, check=lambda *_: None):
    """Compiles once and takes all steps, each from the state that the last one gave."""
    compiled = step.lower(batches[0][0], state, batches[0][1]).compile()
    outs = []
    for grads, params in batches:
        out, after = compiled(grads, state, params)
        check(grads, state, out, after)
        outs.append({**out, **after})
        state = after
    return outs, compiled


@functools.cache
def alone(name):
    init, step = before_adam(name)
    return take_steps(jax.jit(step), init(BATCHES[0][1]), BATCHES)[0]


def fresh(init, kind, params):
    """A state as `init` makes it; what knows no mesh is put on every device."""
    state, split = init(params), {x.shape: x.sharding for x in jax.tree.leaves(params)}
    for x in jax.tree.leaves(state):
        if x.shape in split:
            assert x.sharding.is_equivalent_to(split[x.shape], x.ndim)
    whole = NamedSharding(mesh_of(kind), P())
    return jax.device_put(
        state, jax.tree.map(lambda x: split.get(x.shape, whole), state)
    )


def assert_placed(grads, before, out, after):
    for updates in out.values():
        jax.tree.map(assert_placed_like, updates, grads)
    jax.tree.map(assert_placed_like, after, before)
    for x in jax.tree.leaves(after):
        if x.is_fully_replicated:
            assert_all_alike([shard.data for shard in x.addressable_shards])


def assert_placed_like(x, y):
    assert x.shape == y.shape
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


# -------------------------------------------------------------------------- the ways


def on_auto_mesh(name):
    batches = placed(AxisType.Auto, "split")
    init, step = by_itself(name)
    half = NamedSharding(mesh_of(AxisType.Auto), UNEVEN)

    def split(tree):
        leaf = jax.lax.with_sharding_constraint(tree["decoder"]["uneven"], half)
        return {**tree, "decoder": {**tree["decoder"], "uneven": leaf}}

    update = jax.jit(lambda g, s, p: step(split(g), s, split(p)))
    state = fresh(init, AxisType.Auto, batches[0][1])
    outs, compiled = take_steps(update, state, batches, assert_placed)
    assert "f32[8,3]" in compiled.as_text()  # half of five columns, padded
    return outs


def on_explicit_mesh(name):
    init, step = by_itself(name)
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        batches = placed(AxisType.Explicit, "split")
        state = fresh(init, AxisType.Explicit, batches[0][1])
        return take_steps(jax.jit(step), state, batches, assert_placed)[0]


def in_shard_map(name):
    axis, units = ROWS[name].unit_axis, {}
    if axis is not None:
        over = lambda spec: (*spec, None)[axis] or ()
        units = {"axis": axis, "axis_name": jax.tree.map(over, SPLIT)}
    return mapped("split", *by_itself(name, **units))


def in_shard_map_by_name(name):
    return mapped("along", *by_itself(name, **by_name(name, AXES)), check_vma=False)


def mapped(place, init, step, **options):
    batches, specs = placed(AxisType.Auto, place), PLACES[place]
    state = fresh(init, AxisType.Auto, batches[0][1])
    kept = jax.tree.map(lambda x: x.sharding.spec, state)
    step = jax.shard_map(
        step,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs, kept, specs),
        out_specs=({"clipped": specs}, kept),
        **options,
    )
    return take_steps(jax.jit(step), state, batches, assert_placed)[0]


def by_name(name, axes):
    """The arguments that say over which axes all leaves are split."""
    row = ROWS[name]
    takes = "axis_name" in inspect.signature(row.make).parameters
    units = {} if row.unit_axis is None else {"axis": row.unit_axis}
    return {"axis_name": axes, **units} if takes else {}


def in_pmap(name):
    init, step = by_itself(name, **by_name(name, "devices"))
    cut = lambda x: x.reshape(8, x.shape[0] // 8, *x.shape[1:])
    batches = jax.tree.map(cut, BATCHES)
    state = jax.vmap(init)(batches[0][1])
    outs, _ = take_steps(jax.pmap(step, axis_name="devices"), state, batches)

    def joined(x, y):
        if x.size == y.size:
            return x.reshape(y.shape)
        assert_all_alike(x)
        return x[0]

    outs = jax.tree.map(np.asarray, outs)
    return [
        {key: jax.tree.map(joined, got[key], want[key]) for key in got}
        for got, want in zip(outs, alone(name), strict=True)
    ]


WAYS = {
    way.__name__: way
    for way in (
        on_auto_mesh,
        on_explicit_mesh,
        in_shard_map,
        in_shard_map_by_name,
        in_pmap,
    )
}


# --------------------------------------------------------------------------- the law


CASES = {f"{name}-{way}": (name, WAYS[way]) for name in ROWS for way in WAYS}
FEW_CASES = {f"agc-{way}" for way in WAYS} | {
    "ord_3_per_layer-on_explicit_mesh",
    "spamp-on_auto_mesh",
    "error_feedback-in_shard_map",
    "autoclip-in_shard_map_by_name",
    "weight_decay_balance-in_pmap",
}


@pytest.mark.parametrize("case", in_tiers(CASES, FEW_CASES))
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_sharded_equals_whole(case):
    name, way = case
    assert_equal_to_1e_6(way(name), alone(name))


def assert_equal_to_1e_6(got, want):
    """Half precision to one rounding."""
    for out, whole in zip(got, want, strict=True):
        for key in out:
            # Adam's averages may cancel.
            of_largest = key in ("adam", "updates")
            assert_trees_are_equal(out[key], whole[key], of_largest)


def assert_trees_are_equal(got, want, of_largest):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        close = float(jnp.finfo(y.dtype).eps) if y.dtype.itemsize == 2 else 1e-6
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        atol = close * np.abs(y).max(initial=0) if of_largest else 0
        np.testing.assert_allclose(x, y, rtol=close, atol=atol)


# ------------------------------------------------------------------- fully sharded


@pytest.mark.parametrize("name", in_tiers(list(BY_REDUCTIONS), FEWEST))
def test_fully_sharded_steps_equal_whole_ones_and_gather_nothing(name):
    batches = placed(AxisType.Auto, "along")
    init, step = before_adam(name)
    state = fresh(init, AxisType.Auto, batches[0][1])
    outs, compiled = take_steps(jax.jit(step), state, batches, assert_placed)
    assert_equal_to_1e_6(outs, alone(name))
    given, clipped = [grads for grads, _ in batches], [out["clipped"] for out in outs]
    assert not jax.tree.all(jax.tree.map(np.array_equal, clipped, given))
    text = compiled.as_text()
    assert [number_of(other, text) for other in OTHERS] == [0, 0, 0, 0]
    if name == "agc":  # one per leaf whose units are split, combined by XLA
        assert 1 <= number_of("all-reduce", text) <= 2
    else:
        assert number_of("all-reduce", text) == NUMBER.get(name, 1)


@pytest.mark.parametrize("name", [k for k, row in METHODS.items() if row.elements])
def test_jitted_init_splits_state_like_parameters_on_explicit_meshes(name):
    _, params = placed(AxisType.Explicit, "split")[0]
    with jax.set_mesh(mesh_of(AxisType.Explicit)):
        fresh(jax.jit(before_adam(name)[0]), AxisType.Explicit, params)
