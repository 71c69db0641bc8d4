"""Every per-example function gives on a mesh what it gives on one device."""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXES, assert_all_alike, mesh_of
from per_example_oracle import cast
from per_example_pieces import PIECES, program, threes
from per_example_pieces import around as pieces_around
from per_example_pieces import draw as draw_piece
from tiers import in_tiers
from trees import enable_x64

import clipfx
from clipfx import per_example, privacy
from clipfx._core import reductions
from clipfx.per_example.engine import row_sums

B, K = 16, 2
COLUMNS_THEN_ROWS = {"bias": P("model"), "down": P("model"), "up": P(None, "model")}
PLACES = {
    "whole": {"bias": P(), "down": P(), "table": P(), "up": P()},
    "fsdp": {"bias": P("data"), "down": P("data"), "table": P("data"), "up": P("data")},
    "tensor": {**COLUMNS_THEN_ROWS, "table": P("model")},
}
# By hand, where a look-up in a part of a table would take some lines.
BY_HAND = {"whole": PLACES["whole"], "tensor": {**COLUMNS_THEN_ROWS, "table": P()}}


def loss(params, example, over=(), around=lambda f: f, **whole):
    """Looks up two tokens, then two layers, and no differences, which rounding spoils.

    Args:
      params: Of the table and the layers.
      example: The tokens, and the direction to push the output in.
      over: Mesh axes of `shard_map` that the layers are split over.
      around: What to wrap the layers in.
      **whole: `out_sharding` of what is added up over devices.
    """
    tokens, direction = example
    x = params["table"].at[tokens].get(**whole).sum(0)

    def layers(x):
        h = jnp.exp((x @ params["up"] + params["bias"]) / 4)
        out = jnp.dot(h, params["down"], **whole)
        return jax.lax.psum(out, over) if over else out

    return jnp.vdot(around(layers)(x), direction)


def draw():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"bias": normal(8), "down": normal(8, 4), "table": normal(12, 4),
              "up": normal(4, 8)}  # fmt: skip
    examples = jnp.asarray(rng.integers(0, 12, (B, 2))), normal(B, 4)
    group = jnp.where(jnp.arange(B) < 3, 1, 0)  # on one device
    stacked = {k: normal(B, *w.shape) for k, w in params.items()}
    return params, {"examples": examples, "group": group, "stacked": stacked}


PARAMS, BATCH = draw()


# ------------------------------------------- the functions, of parameters and a batch


def clipped_grad(loss, axis_name=None):
    grad = per_example.clipped_grad(loss, 2.0, groups="leaf", batch_axis_name=axis_name)
    return lambda params, batch: grad(params, batch["examples"])


def rematerialized(loss, axis_name=None):
    """The products; a table on an Explicit mesh is looked up outside of it."""
    return clipped_grad(functools.partial(loss, around=jax.checkpoint), axis_name)


def in_two_passes(loss, axis_name=None):
    """The same where the table shares a threshold with what is rematerialized."""
    one = functools.partial(loss, around=jax.checkpoint)
    grad = per_example.clipped_grad(one, 2.0, batch_axis_name=axis_name)
    return lambda params, batch: grad(params, batch["examples"])


def norms(loss):
    measure = per_example.norms(loss, groups="leaf")
    return lambda params, batch: measure(params, batch["examples"])


def population_grad(loss, axis_name=None):
    grad = per_example.population_grad(loss, K, batch_axis_name=axis_name)
    return lambda params, batch: grad(
        params, batch["examples"], population_ids=batch["group"]
    )


def fair_grad(loss, axis_name=None):
    grad = per_example.fair_grad(loss, K, 1.2, batch_axis_name=axis_name)
    return lambda params, batch: grad(
        params, batch["examples"], population_ids=batch["group"]
    )


def clip_fair_groups(loss, axis_name=None):
    tx = clipfx.clip_fair_groups(1.2, num_populations=K, batch_axis_name=axis_name)

    def run(params, batch):
        parts, _ = population_grad(loss)(params, batch)
        return tx.update(parts, tx.init(params))

    return run


def clip_per_example(loss, axis_name=None):
    tx = per_example.clip_per_example(
        2.0, groups="leaf", reduce="sum", batch_axis_name=axis_name
    )
    return lambda params, batch: tx.update(batch["stacked"], tx.init(params))


def dp_grad(loss, axis_name=None):
    grad = privacy.dp_grad(
        loss,
        max_norm=2.0,
        noise_multiplier=0.5,
        expected_batch_size=B,
        key=jax.random.key(3),
        batch_axis_name=axis_name,
    )
    return lambda params, batch: grad(
        grad.init(params), params, batch["examples"], where=None
    )


FUNCTIONS = {
    make.__name__: make
    for make in (
        clipped_grad,
        rematerialized,
        in_two_passes,
        norms,
        population_grad,
        fair_grad,
        clip_fair_groups,
        clip_per_example,
        dp_grad,
    )
}
LIKE_PARAMETERS = (
    "clipped_grad",
    "rematerialized",
    "in_two_passes",
    "fair_grad",
    "clip_fair_groups",
    "dp_grad",
)


# -------------------------------------------------------------------------- the ways


@functools.cache
def alone(name):
    return jax.jit(FUNCTIONS[name](loss))(PARAMS, BATCH)


def specs_of(params):
    """Of parameters and batch; stacked gradients are split like both, if possible."""
    free = lambda spec: () if "data" in spec else spec
    stacked = {k: P("data", *free(spec)) for k, spec in params.items()}
    return params, {"examples": P("data"), "group": P("data"), "stacked": stacked}


def on_mesh(kind, place, name):
    mesh, one = mesh_of(kind), loss
    specs = specs_of(PLACES[place])
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    if kind == AxisType.Explicit:
        one = functools.partial(loss, out_sharding=P())
    with jax.set_mesh(mesh):
        params, batch = jax.device_put((PARAMS, BATCH), shardings)
        out = jax.jit(FUNCTIONS[name](one))(params, batch)
    if kind == AxisType.Explicit and name in LIKE_PARAMETERS:
        for k, x in out[0].items():
            assert x.sharding.is_equivalent_to(params[k].sharding, x.ndim)
    return out


def in_shard_map(place, name, **options):
    one = functools.partial(loss, over="model") if place == "tensor" else loss
    # Of gradients no type tells which axes are those of examples.
    names = named(name, "data") if options or name == "clip_per_example" else {}
    specs, batch = specs_of(BY_HAND[place])
    split = {PARAMS[k].shape: spec for k, spec in specs.items()}
    split |= {(K, *shape): P(None, *spec) for shape, spec in split.items()}

    def spec_of(y):
        return P("data") if y.shape[:1] == (B,) else split.get(y.shape, P())

    mapped = jax.shard_map(
        FUNCTIONS[name](one, **names),
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs, batch),
        out_specs=jax.tree.map(spec_of, alone(name)),
        **options,
    )
    return jax.jit(mapped)(PARAMS, BATCH)


def in_pmap(name):
    run = jax.pmap(FUNCTIONS[name](loss, **named(name, "i")), "i", in_axes=(None, 0))
    cut = lambda x: x.reshape(8, B // 8, *x.shape[1:])
    out = run(PARAMS, jax.tree.map(cut, BATCH))

    def joined(x, y):
        if x.size == y.size:
            return x.reshape(y.shape)
        assert_all_alike(x)
        return x[0]

    return jax.tree.map(joined, jax.device_get(out), alone(name))


def named(name, axis):
    takes = "axis_name" in inspect.signature(FUNCTIONS[name]).parameters
    return {"axis_name": axis} if takes else {}


KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
WAYS = {
    f"{kind}-{place}": functools.partial(on_mesh, KINDS[kind], place)
    for kind in KINDS
    for place in PLACES
} | {
    "shard_map-whole": functools.partial(in_shard_map, "whole"),
    "shard_map-tensor": functools.partial(in_shard_map, "tensor"),
    "shard_map-by_name": functools.partial(in_shard_map, "whole", check_vma=False),
    "pmap": in_pmap,
}


# --------------------------------------------------------------------------- the law

CASES = {
    f"{name}-{way}": (name, way)
    for name in FUNCTIONS
    for way in WAYS
    # Noise of what is split by hand depends on the mesh.
    if (name, way) != ("dp_grad", "shard_map-tensor")
}


FEW_CASES = {
    "clipped_grad-shard_map-tensor",
    "rematerialized-shard_map-tensor",
    "rematerialized-explicit-tensor",
    "population_grad-auto-fsdp",
    "population_grad-shard_map-by_name",
    "clip_fair_groups-pmap",
    "dp_grad-explicit-whole",
}


@pytest.mark.parametrize("case", in_tiers(CASES, FEW_CASES))
@pytest.mark.filterwarnings("ignore:.*pmap:DeprecationWarning")
def test_sharded_equals_whole(case):
    name, way = case
    got = WAYS[way](name)
    want = alone(name)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        if way != "pmap" and x.is_fully_replicated:
            assert_all_alike([shard.data for shard in x.addressable_shards])
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        # Of the largest, because sums over examples may cancel.
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max(initial=0))


# --------------------------------------------------------- programs of every kind

# What JAX itself cannot map over examples that Explicit axes split.
REFUSED = {
    "conv1", "conv2", "conv3", "embed", "experts_by_group", "experts_by_id",
    "experts_elsewhere", "experts_in_loops", "indexed", "look_ups", "masked",
    "permuted_and_padded", "scaled", "scaled_and_tied", "scaled_experts",
    "several_experts", "tied", "tied_pairs",
}  # fmt: skip
MAPPED = threes(name for name in PIECES if name not in REFUSED)


@pytest.mark.parametrize("names", in_tiers(MAPPED, {"experts+batched+mapped"}))
def test_programs_on_a_mesh_with_explicit_axes(names):
    """That of the arrays alone; none is set around."""
    steps = pieces_around(*names)
    grad = per_example.clipped_grad(program(steps), 0.5, groups="leaf")
    mesh = mesh_of(AxisType.Explicit)
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, P(*axes)))
    with enable_x64(True):
        params, batch = (cast(x, "float64") for x in draw_piece(steps))
        batch = jax.tree.map(lambda x: jnp.concatenate([x] * 8)[:8], batch)
        got, _ = jax.jit(grad)(place(params), place(batch, "data"))
        want, _ = jax.jit(grad)(params, batch)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * np.abs(y).max(initial=0))


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("kind", list(AxisType)[:2])
def test_one_cpu_may_be_a_mesh(kind, around, monkeypatch):
    """Where nothing is split, and axes are in the types all the same."""
    monkeypatch.setattr(reductions, "forced_device", "one")
    monkeypatch.setattr(row_sums, "_SMALL", 0)
    mesh = jax.make_mesh(
        (1, 1), AXES, axis_types=(kind,) * 2, devices=jax.devices()[:1]
    )
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, P(*axes)))

    def gated(params, x):  # what is formed
        return jnp.tanh(x @ (params["w"] * jnp.tanh(params["gate"]))).sum()

    rng = np.random.default_rng(0)
    params, x = ({"w": rng.normal(size=(8, 4)), "gate": rng.normal(size=(8, 4))},
                 rng.normal(size=(6, 3, 8)))  # fmt: skip
    params, x = cast((params, x), "float32")
    rows = jax.jit(jax.vmap(jax.grad(gated), (None, 0)))(params, x)
    tx = per_example.clip_per_example(0.5, reduce="sum")
    grad = per_example.clipped_grad(gated, 0.5)
    step = jax.jit(lambda rows: tx.update(rows, tx.init(params))[0])
    want = jax.jit(grad)(params, x)[0], step(rows)
    with jax.set_mesh(mesh) if around else contextlib.nullcontext():
        got = (jax.jit(grad)(place(params, None, "model"), place(x, "data"))[0],
               step(place(rows, "data", None, "model")))  # fmt: skip
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_experts_on_a_mesh_with_explicit_axes():
    """Where look-ups say how they are split, as JAX asks there."""

    def loss(params, example, **how):
        x, ids = example
        x = jnp.tanh(jnp.einsum("td,tdf->tf", x, params["up"].at[ids].get(**how)))
        return jnp.einsum("tf,tfd->td", x, params["down"].at[ids].get(**how)).sum()

    rng = np.random.default_rng(0)
    params = {"up": rng.normal(size=(4, 8, 6)), "down": rng.normal(size=(4, 6, 8))}
    params = cast(params, "float32")
    ids = rng.integers(0, 4, (8, 5), np.int32)
    batch = rng.normal(size=(8, 5, 8)).astype(np.float32), ids
    want, _ = jax.jit(per_example.clipped_grad(loss, 0.7))(params, batch)
    split = functools.partial(loss, out_sharding=P(None, None, None))
    mesh = mesh_of(AxisType.Explicit)
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, P(*axes)))
    with jax.set_mesh(mesh):
        grad = jax.jit(per_example.clipped_grad(split, 0.7))
        got, _ = grad(place(params), place(batch, "data"))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.abs(y).max())


# ------------------------------------------------- gradients that are stacked already


def stacked_in_shard_map(axis_name, stacked):
    """The mean, and the state, of gradients that "model" splits too."""
    tx = per_example.clip_per_example(2.0, batch_axis_name=axis_name)
    specs, batch = specs_of(PLACES["tensor"])
    update = jax.shard_map(
        tx.update,
        mesh=mesh_of(AxisType.Auto),
        in_specs=(batch["stacked"], P()),
        out_specs=(specs, P()),
    )
    return jax.jit(update)(stacked, tx.init(PARAMS))


def test_one_bad_part_drops_the_whole_example():
    stacked = BATCH["stacked"]
    bad = stacked | {"up": stacked["up"].at[5, 0, 7].set(jnp.inf)}  # on one device
    tx = per_example.clip_per_example(2.0)
    want = jax.jit(tx.update)(bad, tx.init(PARAMS))
    got = stacked_in_shard_map("data", bad)
    assert got[1].metrics.nonfinite == 1 and got[1].metrics.steps == B
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def test_axes_of_examples_are_asked_for():
    with pytest.raises(ValueError, match=r"batch_axis_name must say .*'data', 'model'"):
        stacked_in_shard_map(None, BATCH["stacked"])
