"""Three ways to take sums that may leave the range, by device."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiers import in_tiers
from trees import enable_x64, norm, trained
from xla import number_of

import clipfx
from clipfx._core import leaves, norms, reductions, safe_sums


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def way(request, monkeypatch):
    """Taken on this CPU as on one device of each kind."""
    monkeypatch.setattr(reductions, "forced_device", request.param)
    return request.param


MAGNITUDES = [0.0, 1e-44, 1e-38, 1e-30, 1e-19, 1e-3, 1.0, 1e10, 1e19, 1e30, 3e38]


@pytest.mark.parametrize("ord", in_tiers([1, 2, 3], {2}))
@pytest.mark.parametrize("dtype", in_tiers([jnp.float32, jnp.bfloat16], 1))
def test_every_magnitude(way, ord, dtype):
    """Alone, and beside another group and another leaf of a magnitude far from it."""
    # What is reduced together XLA:CPU adds up one after the other, unlike a GPU.
    close = functools.partial(pytest.approx, rel=1e-5 if way == "gpu" else 1e-6)
    length = jax.jit(lambda x: clipfx.global_norm(x, ord=ord))
    groups = jax.jit(lambda t: clipfx.tree_clip(t, 1.0, groups="leaf", ord=ord)[1].norm)
    for size in MAGNITUDES:
        x = jnp.full((3, 33), size, dtype)
        exact = norm(x, ord) if size > 1e-38 else 0.0  # XLA:CPU flushes subnormals
        exact = min(exact, 3.4028235e38)
        tree = {"a": x, "b": jnp.full(5, 1e-25, dtype), "c": jnp.full(5, 1e25, dtype)}
        assert float(length(x)) == close(exact, abs=0)
        assert groups(tree)[0] == close(exact, abs=0)
        exact = min(norm(tree, ord), 3.4028235e38)
        assert float(length(tree)) == close(exact, abs=0)


def test_what_is_not_finite_is_seen(way):
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for ord in (1, 2, 3):
            tree = {"a": jnp.array([1e-30, bad]), "b": jnp.full(3, 1e30)}
            assert not math.isfinite(clipfx.global_norm(tree, ord=ord))
            _, metrics = clipfx.tree_clip(tree, 1.0, groups="leaf", ord=ord)
            assert metrics.nonfinite.tolist() == [1, 0]


def test_trees_of_every_kind(way):
    """Empty leaves, scalars, complex numbers, float64 beside float32; under vmap."""
    tree = {"a": jnp.zeros((0, 3)), "b": jnp.float32(3), "c": jnp.full(2, 2 + 2j)}
    assert float(clipfx.global_norm(tree)) == pytest.approx(5.0, rel=1e-6, abs=0)
    assert float(clipfx.global_norm({"a": jnp.zeros(0)})) == 0
    with enable_x64(True):
        tree = {"a": jnp.full(4, 1e200), "b": jnp.ones(1, jnp.float32)}
        assert float(clipfx.global_norm(tree)) == pytest.approx(2e200, rel=1e-14, abs=0)
    rows = jnp.stack([jnp.full(9, x) for x in (1e-30, 1.0, 1e30)])
    for ord in (1, 2, 3):
        each = jax.vmap(lambda x, p=ord: clipfx.global_norm(x, ord=p))(rows)
        np.testing.assert_allclose(each, [norm(x, ord) for x in rows], rtol=1e-6)


@pytest.mark.parametrize("ord", in_tiers([2, 3], {2}))
def test_derivatives_of_every_order_in_a_scan(way, ord):
    plain = lambda x: jnp.sum(jnp.abs(x) ** ord) ** (1 / ord)
    ours = lambda x: clipfx.global_norm(x, ord=ord)
    twice = lambda f: jax.jit(jax.grad(jax.grad(lambda r: trained(r, f))))(0.05)
    assert float(twice(ours)) == pytest.approx(float(twice(plain)), rel=1e-4, abs=0)


def test_many_groups(way):
    """On one CPU their factors are picked by places that XLA does not know."""
    tree = {f"{k:02}": jnp.arange(1.0, 4.0) * 10.0 ** (k - 18) for k in range(37)}
    tree["05"] = tree["05"].at[0].set(jnp.nan)
    clip = lambda tree, limit=1.0: clipfx.tree_clip(
        tree, limit, groups="leaf", nonfinite="zero"
    )[0]
    one = lambda x: x / max(1, np.linalg.norm(x))
    right = {k: one(np.asarray(x, np.float64)) for k, x in tree.items()}
    right["05"] = np.zeros(3)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6)
    jax.tree.map(close, jax.jit(clip)(tree), right)
    rows = jax.tree.map(lambda x: jnp.stack([x, 0 * x]), tree)
    jax.tree.map(lambda x, y: close(x[0], y), jax.jit(jax.vmap(clip))(rows), right)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(clip, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    jax.tree.map(close, jax.jit(split)(tree), right)
    # The sum of what is clipped, of which the derivative by the threshold is known.
    total = lambda limit: sum(map(jnp.sum, jax.tree.leaves(clip(tree, limit))))
    at = 2.0**0.5
    long = [x for x in right.values() if norm(x) > 0.99]  # of norm 1, once clipped
    slope = float(sum(map(np.sum, long)))
    assert float(jax.jit(jax.grad(total))(at)) == pytest.approx(slope, rel=1e-5, abs=0)

    def turns(limit):  # hoisted out of a scan, rules of derivatives are lost
        def turn(sum, x):
            return sum + jax.grad(lambda y: y * total(limit) ** 2)(x), None

        return jax.lax.scan(turn, 0.0, jnp.ones(2))[0]

    again = 4 * float(jax.jit(total)(at)) * slope
    assert float(jax.jit(jax.grad(turns))(at)) == pytest.approx(again, rel=1e-5, abs=0)


@pytest.mark.parametrize("ord", in_tiers([1, 2], {2}))
@pytest.mark.parametrize("groups", ["global", "layer", "leaf"])
@pytest.mark.parametrize("device", ["cpu", "mesh"])
def test_many_leaves(groups, ord, device, monkeypatch):
    """In loops of few, whose sums may be at different scales."""
    monkeypatch.setattr(reductions, "forced_device", device)
    monkeypatch.setattr(safe_sums, "MANY", 5)
    clip = lambda tree: clipfx.tree_clip(tree, 1.0, groups=groups, ord=ord)[1]
    length = jax.jit(lambda tree: clip(tree).norm)
    sizes = [1.0, 1e-30, 1e30, 1.7e38 if ord == 1 else 1e19, 1e-19 / 3, 0.0]
    for first, second in itertools.product(sizes, sizes):
        rows = [jnp.full(33, x) for x in [first] * 13 + [second] * 4 + [first]]
        tree = {"c": {}, "b": {}, "a": {}, "d": {}}  # layers of 1, 3, 4 and 10 leaves
        for k, x in enumerate(rows):
            layer = "bacdadddddddadbdad"[k]
            tree[layer][f"{k:02}"] = x
        layers = [tree[key] for key in "abcd"]
        parts = {"global": [tree], "layer": layers, "leaf": jax.tree.leaves(tree)}
        exact = [min(norm(x, ord), 3.4028235e38) for x in parts[groups]]
        np.testing.assert_allclose(length(tree), exact, rtol=2e-6)
    tree["a"]["01"] = jnp.array([jnp.nan])
    tree["b"]["05"] = jnp.array([jnp.inf])
    assert clip(tree).nonfinite.sum() == {"global": 1}.get(groups, 2)


@pytest.mark.parametrize("device", ["cpu", "mesh"])
def test_the_time_to_compile_many_leaves_does_not_grow_with_their_square(
    device, monkeypatch
):
    """No loop and no kernel has all of them for operands."""
    monkeypatch.setattr(reductions, "forced_device", device)
    monkeypatch.setattr(safe_sums, "MANY", 10)
    monkeypatch.setattr(leaves, "MANY", 10)
    tree = {f"{k:03}": jnp.ones(40) for k in range(300)}
    for groups in ("global", "leaf"):
        tx = clipfx.clip_by_norm(1.0, groups=groups)
        text = jax.jit(tx.update).lower(tree, tx.init(tree)).compile().as_text()
        kernels = re.findall(r" fusion\((.*?)\)", text)
        assert max(x.count("%") for x in kernels) <= 2 * 30 + 10
        loops = re.findall(r"= \((.*?)\) while\(", text)
        assert max(x.count("[40]") for x in loops) == 10 * (device == "cpu")
        assert max(x.count("[") for x in loops) < 20


@pytest.mark.parametrize("make", [clipfx.clip_per_layer, clipfx.zclip])
def test_loops_over_leaves_are_alike_to_a_compiler(make, monkeypatch):
    """XLA:CPU compiles those once: no leaf has a place in an array for itself."""
    monkeypatch.setattr(reductions, "forced_device", "cpu")
    tx = make(groups="leaf") if make is clipfx.zclip else make(1.0, groups="leaf")
    tree = {str(k): jnp.ones(40) for k in range(30)}
    text = jax.jit(tx.update).lower(tree, tx.init(tree)).compile().as_text()
    assert text.count(" slice(") < 10
    assert text.count(" dynamic-slice(") >= 30


@pytest.mark.parametrize("kind", ["manual", "explicit", "auto"])
def test_split_over_devices(way, kind):
    """At every magnitude, by one all-reduce where the program is ours to write."""
    axis = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    specs = {"a": P("data"), "b": P("model", "data"), "c": P()}
    run = lambda tree: clipfx.tree_clip(tree, 1.0, groups="leaf")[1].norm
    if kind == "manual":
        run = jax.shard_map(run, mesh=mesh, in_specs=(specs,), out_specs=P())
    step = jax.jit(run)
    with jax.set_mesh(mesh):
        for size in (1e-30, 1.0, 1e30):
            whole = {"a": jnp.full(8, size), "b": jnp.ones((4, 8)), "c": jnp.ones(3)}
            tree = jax.tree.map(
                lambda x, s: jax.device_put(x, jax.NamedSharding(mesh, s)), whole, specs
            )
            exact = [norm(x) for x in whole.values()]
            np.testing.assert_allclose(step(tree), exact, rtol=1e-6)
        if kind != "auto":
            text = step.lower(tree).compile().as_text()
            assert number_of("all-reduce", text) == 1


PROGRAMS = {
    "global": lambda: clipfx.clip_by_global_norm(1.0),
    "ord 1": lambda: clipfx.clip_by_global_norm(1.0, ord=1),
    "ord 3": lambda: clipfx.clip_by_global_norm(1.0, ord=3),
    "layer": lambda: clipfx.clip_per_layer(1.0),
    "agc": lambda: clipfx.agc(0.01),
    "zclip": clipfx.zclip,
    "value": lambda: clipfx.clip_by_value(1.0),
}


@pytest.mark.parametrize("make", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("platform", in_tiers(["tpu", "cuda"], {"tpu"}))
def test_programs_for_accelerators_have_no_loop(make, platform, monkeypatch):
    """Lowered for one of them here; on a CPU there is the loop."""
    monkeypatch.setattr(reductions, "forced_device", "one")
    tx, tree = make(), {"a": {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}}

    def lowered(platform):
        step = jax.jit(lambda s, t: tx.update(t, s, t)).trace(tx.init(tree), tree)
        return step.lower(lowering_platforms=(platform,)).as_text()

    text = lowered(platform)
    assert "stablehlo.while" not in text and "callback" not in text
    assert "stablehlo.if" not in text
    if make is PROGRAMS["global"]:
        assert "stablehlo.while" in lowered("cpu")


def test_the_usual_case_reads_the_updates_once(monkeypatch):
    """On a CPU a second pass runs only where the first left the range."""
    monkeypatch.setattr(reductions, "forced_device", "cpu")
    passes = []

    def counted(tree):
        jax.debug.callback(lambda: passes.append(1))
        return tree

    original = safe_sums.abs_power
    for module in (norms, safe_sums):
        monkeypatch.setattr(
            module, "abs_power", lambda x, power: original(counted(x), power)
        )
    usual, lost = (1e-8, 1.0, 1e18), (1e-30, 1e30)
    runs = [(2, x, 1) for x in usual] + [(2, x, 2) for x in lost]
    usual, lost = (1e-6, 1.0, 1e12), (1e-12, 1e18)
    runs += [(3, x, 1) for x in usual] + [(3, x, 2) for x in lost]
    for ord, value, expected in runs:
        passes.clear()  # 37: a shape that nothing else has traced
        clipfx.global_norm(jnp.full(37, value), ord=ord).block_until_ready()
        jax.effects_barrier()
        assert len(passes) == expected, (ord, value)


def bare_multiply(max_norm):
    """The least that a clip can do."""

    def update(updates, state, params=None):
        square = sum(jnp.sum(x * x) for x in jax.tree.leaves(updates))
        factor = jnp.minimum(1.0, max_norm / jnp.sqrt(square))
        return jax.tree.map(lambda x: x * factor, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def traffic(clip, tree):
    """Bytes accessed and temporary bytes of a donating step of AdamW."""
    tx = optax.chain(clip, optax.adamw(3e-4))
    state = tx.init(tree)

    def step(params, state, grads):
        with jax.numpy_dtype_promotion("standard"):  # Optax needs it
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(tree, state, tree).compile()
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return np.array([cost["bytes accessed"], temporary])


def test_no_traffic_and_no_temporary_beyond_a_bare_multiply(monkeypatch):
    monkeypatch.setattr(reductions, "forced_device", "cpu")
    tree = {str(i): {"w": jnp.ones(2**17)} for i in range(4)}
    least = traffic(bare_multiply(1.0), tree)
    slack = 2**13  # bytes, for a tree of 2^21
    for clip in (clipfx.clip_by_global_norm(1.0), clipfx.clip_per_layer(1.0)):
        assert (traffic(clip, tree) <= least + slack).all()
