"""Sharded equals whole, on meshes of eight CPU devices: the hard cases."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import in_tiers
from trees import assert_close, norm
from xla import number_of

import clipfx

FALL = lambda count: 0.5 / (1.0 + jnp.asarray(count, jnp.float32))
METHODS = {
    "global": functools.partial(clipfx.clip_by_global_norm, 0.5),
    "ord_1": functools.partial(clipfx.clip_by_global_norm, 0.5, ord=1),
    "ord_inf": functools.partial(clipfx.clip_by_global_norm, 0.5, ord=math.inf),
    "ord_3": functools.partial(clipfx.clip_by_global_norm, 0.5, ord=3),
    "per_layer": functools.partial(clipfx.clip_per_layer, FALL),
    "block_rms": functools.partial(clipfx.clip_by_block_rms, 0.1),
    "normalize": functools.partial(clipfx.normalize_by_norm, 2.0),
    "value": functools.partial(clipfx.clip_by_value, 0.3),
}

MIXED = {
    "a": {"half": P("y"), "whole": P(), "y": P(None, "y")},
    "b": {"x": P("x"), "xy": P("x", "y")},
}
SHAPES = {
    "a": {"half": (8, 2), "whole": (5,), "y": (3, 4)},
    "b": {"x": (8, 3), "xy": (8, 4)},
}
is_shape = lambda x: isinstance(x, tuple)
EVEN = jax.tree.map(lambda shape: (8, *shape[1:]), SHAPES, is_leaf=is_shape)
SPLIT = jax.tree.map(lambda _: P(("x", "y")), SHAPES, is_leaf=is_shape)


def tree_of(shapes=SHAPES, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32)
    tree = jax.tree.map(draw, shapes, is_leaf=is_shape)
    tree["a"]["half"] = tree["a"]["half"].astype(jnp.bfloat16)
    return tree


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)


def place(tree, mesh, specs=MIXED):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.device_put(tree, shardings)


def assert_equal_to_1e_6(got, want):
    """In float64; bfloat16 may be rounded to a neighbour."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x, y, rtol=2.0**-7 if x.dtype == jnp.bfloat16 else 1e-6)


def assert_placed_like(updates, grads):
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)


def assert_replicated(state):
    for x in jax.tree.leaves(state):
        assert x.is_fully_replicated
        shards = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(shards) == 8
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])


# Every way to run, each compiled once per method: from gradients on one device to
# updates and a state.


@functools.cache
def whole(name):
    tx = METHODS[name]()
    update = jax.jit(tx.update)
    return lambda grads: update(grads, tx.init(grads))


@functools.cache
def on_mesh(kind, name):
    tx, mesh = METHODS[name](), mesh_of(kind)
    update = jax.jit(tx.update)

    def run(grads):
        grads = place(grads, mesh)
        updates, state = update(grads, tx.init(grads))
        assert_placed_like(updates, grads)
        assert_replicated(state)
        return updates, state

    return run


@functools.cache
def in_shard_map(name, specs="mixed", **kwargs):
    specs = MIXED if specs == "mixed" else SPLIT
    tx, mesh = METHODS[name](**kwargs), mesh_of(AxisType.Auto)
    spread = {"in_specs": (specs, P()), "out_specs": (specs, P())}
    update = jax.jit(jax.shard_map(tx.update, mesh=mesh, **spread))

    def run(grads):
        grads = place(grads, mesh, specs)
        updates, state = update(grads, tx.init(grads))
        assert_placed_like(updates, grads)
        assert_replicated(state)
        return updates, state

    return run


auto = functools.partial(on_mesh, AxisType.Auto)
explicit = functools.partial(on_mesh, AxisType.Explicit)
WAYS = {"auto": auto, "explicit": explicit, "shard_map": in_shard_map}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


# ------------------------------------------------------------------ ordinary numbers


def test_norms_on_meshes_of_which_types_tell_only_a_part():
    grads = {"b": jnp.ones(4), "w": jnp.linspace(-1, 2, 48).reshape(8, 6)}
    want = float(clipfx.global_norm(grads))
    measure = jax.jit(clipfx.global_norm)
    kinds = {"axis_types": (AxisType.Explicit, AxisType.Auto)}
    half = jax.make_mesh((4, 2), ("x", "y"), **kinds)
    explicit = mesh_of(AxisType.Explicit)
    split = {"b": P("y"), "w": P("x", "y")}
    shards = {"in_specs": ({"b": P(), "w": P("x")},), "out_specs": P()}
    inside = jax.shard_map(
        clipfx.global_norm, mesh=explicit, axis_names={"x"}, **shards
    )
    with jax.set_mesh(explicit):
        norms = [jax.jit(inside)(place(grads, explicit, split))]
    one = place({"w": grads["w"]}, explicit, {"w": P("x", "y")})
    norms += [
        measure(place(grads, half, split)),
        measure({**grads, **one}),  # one leaf is on no mesh
    ]
    np.testing.assert_allclose(norms, want, rtol=1e-6)


@pytest.mark.parametrize("kind", in_tiers([AxisType.Auto, AxisType.Explicit], ()))
def test_sharded_equals_whole_without_jit(kind):
    grads, tx = tree_of(), METHODS["per_layer"]()
    placed = place(grads, mesh_of(kind))
    updates, state = tx.update(placed, tx.init(placed))
    assert_placed_like(updates, placed)
    assert_replicated(state.metrics.norm)
    assert_equal_to_1e_6((updates, state), whole("per_layer")(grads))


@pytest.mark.parametrize("way", in_tiers(WAYS.keys(), {"explicit", "shard_map"}))
def test_derivative_of_sharded_equals_whole(way):
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)

    def clip(grads, threshold):
        tx = clipfx.clip_per_layer(threshold)
        return tx.update(grads, tx.init(grads))[0]

    def loss(clip, grads, threshold, along):
        dot = lambda x, y: jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32))
        clipped = clip(grads, threshold)
        return sum(jax.tree.leaves(jax.tree.map(dot, clipped, along)))

    slope = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    placed = clip
    if way == "shard_map":
        spread = {"in_specs": (MIXED, P()), "out_specs": MIXED}
        placed = jax.shard_map(clip, mesh=mesh, **spread)
    grads, along, threshold = tree_of(), tree_of(seed=1), jnp.float32(0.5)
    got = slope(placed, place(grads, mesh), threshold, place(along, mesh))
    want = slope(clip, grads, threshold, along)
    assert float(jnp.abs(want[1])) > 0.1
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close = 2.0**-7 if x.dtype == jnp.bfloat16 else 1e-5
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=close * np.abs(y).max())


@pytest.mark.parametrize("spec", [P(None, "x"), P("x")], ids=["within", "across"])
def test_stacked_layers_may_be_split_within_or_across(spec):
    grads = {"w": jnp.linspace(-1, 1, 64).reshape(4, 16)}
    tx = clipfx.per_stacked_layer(clipfx.clip_by_global_norm(0.5))
    update = jax.jit(tx.update)
    placed = place(grads, mesh_of(AxisType.Auto), {"w": spec})
    got = update(placed, tx.init(placed))
    assert_placed_like(got[0], placed)
    assert_equal_to_1e_6(got, update(grads, tx.init(grads)))


STACKS = {
    "across": (P("x"), "x"),
    "within": (P(None, "y"), ()),
    "both": (P("x", "y"), ("x",)),
}
CLIPS = {
    "global": clipfx.clip_by_global_norm(0.5),
    "spamp": clipfx.spamp(),
    "block_rms": clipfx.clip_by_block_rms(0.1),
    "skip_spikes": clipfx.skip_spikes(clipfx.clip_by_global_norm(0.5)),
}
STACKED = {f"{a}-{b}": (x, *STACKS[b]) for a, x in CLIPS.items() for b in STACKS}
FEW_STACKED = {"global-across", "global-within", "spamp-both"}


@pytest.mark.parametrize("case", in_tiers(STACKED, FEW_STACKED))
def test_stacked_layers_in_shard_map_have_a_norm_each(case):
    clip, spec, axis_name = case
    grads = {"w": jnp.linspace(-1, 2, 48).reshape(8, 6)}
    whole = clipfx.per_stacked_layer(clip)
    want = jax.jit(whole.update)(grads, whole.init(grads))
    tx, layers = clipfx.per_stacked_layer(clip, layer_axis_name=axis_name), P(*spec[:1])
    spread = {"in_specs": (spec, layers), "out_specs": (spec, layers)}
    update = jax.shard_map(tx.update, mesh=mesh_of(AxisType.Auto), **spread)
    assert_equal_to_1e_6(jax.jit(update)(grads, tx.init(grads)), want)


def test_stacked_layers_in_shard_map_are_asked_about():
    grads = {"w": jnp.ones((8, 6))}
    tx = clipfx.per_stacked_layer(clipfx.clip_by_global_norm(0.5))
    spread = {"in_specs": (P("x"), P("x")), "out_specs": (P("x"), P("x"))}
    update = jax.shard_map(tx.update, mesh=mesh_of(AxisType.Auto), **spread)
    with pytest.raises(ValueError, match=r"axis_name must say .* the layers .*'x'"):
        update(grads, tx.init(grads))


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_a_jitted_update_is_told_where_it_is(first):
    """What is traced in one place is not taken for the other."""
    mesh = mesh_of(AxisType.Auto)
    clip = clipfx.clip_by_global_norm(1.0)
    clip = clip._replace(update=jax.jit(clip.update))
    layers = jnp.array([[3.0, 4, 0], [0.3, 0.4, 0], [30, 40, 0], [3, 0, 0]])
    tx = clipfx.per_stacked_layer(clip, layer_axis_name="x")
    spread = {"mesh": mesh, "in_specs": P("x"), "out_specs": P("x")}

    def inside():
        run = lambda u: tx.update({"w": u}, tx.init({"w": u}))[0]["w"]
        got = jax.jit(jax.shard_map(run, **spread))(layers)
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), [1, 0.5, 1, 1], 1e-6)

    def outside():
        vary = lambda x: clipfx._compat.vary(x, frozenset({"x"}))
        run = lambda u: clip.update({"w": u}, jax.tree.map(vary, clip.init({"w": u})))
        one = lambda u: run(u[0])[0]["w"][None]
        got = jax.jit(jax.shard_map(one, **spread))(layers)
        assert np.linalg.norm(got) == pytest.approx(1, rel=1e-6)

    order = [inside, outside] if first == "inside" else [outside, inside]
    for run in (*order, *order):
        run()


def test_stacks_of_stacks_are_split_over_two_axes():
    layers = jnp.linspace(-1, 2, 4 * 2 * 6).reshape(4, 2, 6)
    each = clipfx.per_stacked_layer(
        clipfx.clip_by_global_norm(0.5), layer_axis_name="y"
    )
    tx = clipfx.per_stacked_layer(each, layer_axis_name="x")
    run = lambda u: tx.update(u, tx.init(u))[0]
    spread = {"in_specs": P("x", "y"), "out_specs": P("x", "y")}
    mapped = jax.shard_map(run, mesh=mesh_of(AxisType.Auto), **spread)
    got = jax.jit(mapped)(layers)
    size = np.linalg.norm(layers, axis=-1, keepdims=True)
    np.testing.assert_allclose(got, layers * np.minimum(1, 0.5 / size), rtol=1e-6)


# --------------------------------------------------------------------- axes by name


@pytest.mark.parametrize("name", ["per_layer", "block_rms"])
def test_axis_name_besides_types_counts_nothing_twice(name):
    grads = tree_of(EVEN)
    run = in_shard_map(name, "split", axis_name="x")
    assert_equal_to_1e_6(run(grads), whole(name)(grads))


# ---------------------------------------------------------- extreme and bad elements


ORDS = {"global": 2, "ord_1": 1, "ord_3": 3, "ord_inf": math.inf}


@ways
@pytest.mark.parametrize("size", [1e38, 1e-30])
@pytest.mark.parametrize("name", in_tiers(ORDS.keys(), {"ord_1", "ord_3"}))
def test_sharded_norms_neither_overflow_nor_vanish(way, name, size):
    grads = tree_of(size=size)
    if size < 1:  # lengthen the others, so that these are clipped too
        grads["a"]["whole"] = grads["a"]["whole"].at[0].set(jnp.float32(1))
    updates, state = way(name)(grads)
    exact = norm(grads, ORDS[name])
    reported = min(exact, float(jnp.finfo(jnp.float32).max))
    np.testing.assert_allclose(state.metrics.norm, [reported], rtol=1e-6)
    for x, y in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64) * (0.5 / exact)
        bfloat16 = y.shape == SHAPES["a"]["half"]
        np.testing.assert_allclose(x, y, rtol=2.0**-7 if bfloat16 else 2e-6)


@ways
def test_sharded_tiny_updates_are_lengthened(way):
    grads = tree_of(size=1e-30)
    updates, state = way("normalize")(grads)
    assert math.isclose(norm(updates), 2.0, rel_tol=2.0**-8)
    np.testing.assert_allclose(state.metrics.norm, [norm(grads)], rtol=1e-6)


BAD = {"nan": jnp.nan, "inf": -jnp.inf}


@ways
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize(
    "name", in_tiers(["per_layer", "ord_inf", "ord_3"], {"per_layer", "ord_3"})
)
def test_one_bad_element_on_one_shard_is_seen_by_all(way, bad, name):
    grads = tree_of()
    grads["b"]["xy"] = grads["b"]["xy"].at[5, 3].set(bad)
    updates, state = way(name)(grads)
    lost = {"b"} if name == "per_layer" else {"a", "b"}
    for key in lost:
        for x in jax.tree.leaves(updates[key]):
            assert jnp.isnan(x).all()
    if name == "per_layer":  # the other layer does not notice
        np.testing.assert_array_equal(state.metrics.nonfinite, [0, 1])
        assert_equal_to_1e_6(updates["a"], whole(name)(tree_of())[0]["a"])
        assert int(state.rule_state) == 0  # nothing was learned
    else:
        np.testing.assert_array_equal(state.metrics.nonfinite, [1])


# -------------------------------------------------------------------- communication

LAYERS = {f"layer_{i:02}": {"bias": (8,), "kernel": (8, 4)} for i in range(6)}


@functools.cache
def program(way, name, bias, kernel):
    """A clip of 12 leaves, ready to be compiled."""
    grads = jax.tree.map(lambda shape: jnp.ones(shape), LAYERS, is_leaf=is_shape)
    specs = {layer: {"bias": bias, "kernel": kernel} for layer in LAYERS}
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    tx = METHODS[name]()
    update = tx.update
    if way == "shard_map":
        spread = {"in_specs": (specs, P()), "out_specs": (specs, P())}
        update = jax.shard_map(update, mesh=mesh, **spread)
    return jax.jit(update).lower(place(grads, mesh, specs), tx.init(grads))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", in_tiers(["global", "per_layer", "ord_3", "value"], {"ord_3", "value"})
)
def test_one_all_reduce_however_many_leaves_and_groups(way, name):
    text = program(way, name, P("x"), P("x")).compile().as_text()
    assert number_of("all-reduce", text) == (2 if name == "value" else 1)
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert number_of(other, text) == 0


@pytest.mark.parametrize(
    ("name", "number"),
    # Two more where sums of third powers leave the range.
    {"global": 1, "per_layer": 1, "ord_3": 3, "value": 2}.items(),
)
def test_shard_map_needs_no_combining_of_all_reduces_by_xla(name, number):
    text = program("shard_map", name, P("x"), P("x")).as_text()
    assert text.count("stablehlo.all_reduce") == number


@pytest.mark.parametrize("way", WAYS)
def test_leaves_split_over_different_axes_take_few_all_reduces(way):
    # Under jit XLA reduces a leaf split over x and y over one axis after the other.
    text = program(way, "per_layer", P("x"), P("x", "y")).compile().as_text()
    assert 1 <= number_of("all-reduce", text) <= (1 if way == "shard_map" else 2)
    assert number_of("all-gather", text) == 0
