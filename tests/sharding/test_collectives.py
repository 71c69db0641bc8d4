"""What is compiled for a mesh: few reductions, no gathering, one program."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import NUMBER, OTHERS
from methods import BY_REDUCTIONS, FEWEST
from tiers import in_tiers
from xla import number_of

import clipfx

SPECS = {"bias": P("x"), "kernel": P("x", "y"), "gain": P(), "head": P(None, "y")}
SHAPES = {"bias": (8,), "kernel": (8, 4), "gain": (4,), "head": (3, 4)}


@functools.cache
def mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)


@functools.cache
def tree_of(leaves):
    """Layers of four leaves, each split another way."""
    make = lambda name, x: jax.device_put(x, NamedSharding(mesh(), SPECS[name]))
    layer = lambda i: {
        name: make(name, jnp.full(shape, 0.1 * (i + 1)))
        for name, shape in SHAPES.items()
    }
    return {f"layer_{i:03}": layer(i) for i in range(leaves // len(SHAPES))}


def method_of(name, tree):
    row = BY_REDUCTIONS[name]
    if isinstance(row.groups, dict):
        labels = {layer: "odd" if i % 2 else "even" for i, layer in enumerate(tree)}
        return clipfx.clip_by_norm(row.args["threshold"], groups=labels)
    return row.make(**row.args)


def lowered(name, leaves):
    tx, extra, grads = (
        method_of(name, tree_of(leaves)),
        BY_REDUCTIONS[name].extra,
        tree_of(leaves),
    )
    state = tx.init(grads)
    step = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    return step.lower(grads, state, grads), state


@pytest.mark.parametrize("name", in_tiers(list(BY_REDUCTIONS), FEWEST))
def test_one_program_with_few_reductions_serves_all_steps(name):
    grads = tree_of(12)
    with jax.set_mesh(mesh()):
        program, state = lowered(name, 12)
        compiled = program.compile()
        for _ in range(20):  # it refuses what is split another way
            updates, state = compiled(grads, state, grads)
    same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same, updates, grads))
    text = compiled.as_text()
    # Of units that are split XLA makes one for every set of axes.
    most = NUMBER.get(name, 1) + (2 if name == "agc" else 0)
    assert number_of("all-reduce", text) <= most
    assert [number_of(other, text) for other in OTHERS] == [0, 0, 0, 0]
    assert "callback" not in text
    assert " infeed" not in text and " outfeed" not in text


@pytest.mark.parametrize("name", in_tiers(list(BY_REDUCTIONS), FEWEST))
def test_reductions_do_not_grow_with_leaves(name):
    with jax.set_mesh(mesh()):
        text = lowered(name, 48)[0].as_text()
    # Third powers that leave the range take two more.
    most = 3 if name == "ord_3_per_layer" else NUMBER.get(name, 1)
    # What XLA itself makes of agc's units is not in there yet.
    assert text.count("stablehlo.all_reduce") == most


def test_leaves_split_in_several_ways_take_one_reduction_and_more_with_optax():
    grads = tree_of(48)
    numbers = []
    for tx in (clipfx.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)):
        update = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0])
        text = update.lower(grads).compile().as_text()
        numbers.append(number_of("all-reduce", text))
    assert numbers[0] == 1 < numbers[1]


@pytest.mark.full
def test_many_leaves_take_no_more_reductions_than_with_optax():
    """Of 256 results or less at a time, as XLA:CPU combines them."""
    auto = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    leaf = jax.ShapeDtypeStruct(
        (16, 4), "float32", sharding=NamedSharding(auto, P("x"))
    )
    grads = {f"{k:03}": {"kernel": leaf} for k in range(300)}

    def count(tx):
        update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
        return number_of("all-reduce", update.lower(grads).compile().as_text())

    assert count(clipfx.clip_by_global_norm(1.0)) == 2
    assert count(clipfx.clip_per_layer(1.0)) == 2
    assert count(optax.clip_by_global_norm(1.0)) == 2
