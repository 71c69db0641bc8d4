"""What is compiled for a mesh: few reductions, no gathering, one program."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from methods import METHODS
from test_meshes import NUMBER

import clipfx

SPECS = {"bias": P("x"), "kernel": P("x", "y"), "gain": P(), "head": P(None, "y")}
SHAPES = {"bias": (8,), "kernel": (8, 4), "gain": (4,), "head": (3, 4)}
OTHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")

NAMES = [k for k, row in METHODS.items() if not isinstance(row.groups, dict)]
# One of each kind: tracing 400 leaves takes some methods ten seconds.
KINDS = ["clip_by_global_norm", "clip_per_layer", "clip_by_value", "ord_3_per_layer",
         "zclip", "skip_spikes"]  # fmt: skip


def tree_of(leaves, mesh):
    """Layers of four leaves, each split another way."""
    make = lambda name, x: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
    layer = lambda i: {
        name: make(name, jnp.full(shape, 0.1 * (i + 1)))
        for name, shape in SHAPES.items()
    }
    return {f"layer_{i:03}": layer(i) for i in range(leaves // len(SHAPES))}


def mesh_of(kind=AxisType.Explicit):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def number_of(collective, text):
    return len(re.findall(rf" {collective}(?:-start)?\(", text))


@functools.cache
def pieces(name, leaves):
    row, mesh = METHODS[name], mesh_of()
    tx = row.make(**row.args)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **row.extra))
    with jax.set_mesh(mesh):
        grads = tree_of(leaves, mesh)
        return update, grads, tx.init(grads), mesh


@pytest.mark.parametrize("name", NAMES)
def test_one_program_with_few_reductions_serves_all_steps(name):
    update, grads, state, mesh = pieces(name, 48)
    with jax.set_mesh(mesh):
        compiled = update.lower(grads, state, grads).compile()
        for _ in range(20):  # it refuses what is split another way
            updates, state = compiled(grads, state, grads)
    same = lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim)
    assert jax.tree.all(jax.tree.map(same, updates, grads))
    text = compiled.as_text()
    # Of units that are split XLA makes one for every set of axes.
    most = 2 if name == "agc" else NUMBER.get(name, 1)
    assert number_of("all-reduce", text) <= most
    assert [number_of(other, text) for other in OTHERS] == [0, 0, 0, 0]
    assert "callback" not in text
    assert " infeed" not in text and " outfeed" not in text


@pytest.mark.parametrize("name", KINDS)
def test_reductions_do_not_grow_with_leaves(name):
    update, grads, state, mesh = pieces(name, 400)
    with jax.set_mesh(mesh):
        text = update.lower(grads, state, grads).as_text()
    assert text.count("stablehlo.all_reduce") == NUMBER.get(name, 1)


def test_leaves_split_in_several_ways_take_one_reduction_and_more_with_optax():
    mesh = mesh_of()
    grads = tree_of(48, mesh)
    numbers = []
    for tx in (clipfx.clip_by_global_norm(1.0), optax.clip_by_global_norm(1.0)):
        update = jax.jit(lambda g, tx=tx: tx.update(g, tx.init(g))[0])
        text = update.lower(grads).compile().as_text()
        numbers.append(number_of("all-reduce", text))
    assert numbers[0] == 1 < numbers[1]
