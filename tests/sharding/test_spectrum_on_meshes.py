"""`clip_spectrum` of split matrices: as of whole ones, and little is gathered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import AXES, OTHERS, mesh_of
from spectra64 import TARGETS, drawn, oracle, worst
from tiers import in_tiers
from xla import number_of

import clipfx
from clipfx._core import spectra

SPECS = {
    "columns": ((8, 16), P(None, "data")),
    "rows": ((8, 16), P("data")),
    "both": ((8, 16), P("data", "model")),
    "one side twice": ((16, 8), P(AXES)),
    "stack": ((4, 6, 8), P("data", None, "model")),
    "rows of few columns": ((8, 11), P("model")),
}


def matrices():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32)
            for name, (shape, _) in SPECS.items()}  # fmt: skip


def over(kind):
    tree = {k: NamedSharding(mesh_of(kind), spec) for k, (_, spec) in SPECS.items()}
    return tree, jax.device_put(matrices(), tree)


@functools.cache
def alone(response):
    tx = clipfx.clip_spectrum(0.9, response=response)
    state, step = tx.init(matrices()), jax.jit(tx.update)
    for _ in range(2):
        out, state = step(matrices(), state)
    if response != "rescale":
        for name, x in matrices().items():
            np.testing.assert_allclose(out[name], oracle(x, 0.9, response), atol=1e-5)
    return out, state


def by_jit(kind, tx):
    places, tree = over(kind)
    state = tx.init(tree)
    step = jax.jit(tx.update)
    out, state = step(tree, state)
    assert out["both"].sharding.is_equivalent_to(places["both"], 2)
    step = step.lower(tree, state).compile()
    out, state = step(tree, state)  # with the state as a step leaves it
    return out, state.metrics, step.as_text()


def by_hand(tx, check_vma):
    _, tree = over(AxisType.Auto)
    specs = {name: spec for name, (_, spec) in SPECS.items()}
    state = jax.tree.map(lambda _: P(), tx.init(matrices()))
    vectors = state.rule_state.vectors | {"stack": P("data")}
    split = state._replace(rule_state=state.rule_state._replace(vectors=vectors))
    step = jax.jit(
        jax.shard_map(
            tx.update,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(specs, split),
            out_specs=(specs, split),
            check_vma=check_vma,
        )
    )
    place = lambda spec: NamedSharding(mesh_of(AxisType.Auto), spec)
    state = jax.device_put(tx.init(matrices()), jax.tree.map(place, split))
    step = step.lower(tree, state).compile()
    for _ in range(2):
        out, state = step(tree, state)
    return out, state.metrics, step.as_text()


WAYS = {
    "auto": lambda tx, _: by_jit(AxisType.Auto, tx()),
    "told": lambda tx, specs: by_jit(AxisType.Auto, tx(axis_name=specs)),
    "explicit": lambda tx, _: by_jit(AxisType.Explicit, tx()),
    "shard_map": lambda tx, specs: by_hand(tx(axis_name=specs), True),
    "shard_map by name": lambda tx, specs: by_hand(tx(axis_name=specs), False),
}


CASES = {f"{name}-{response}": (way, response)
         for name, way in WAYS.items() for response in TARGETS
         if name != "told" or response == "soft"}  # fmt: skip


@pytest.mark.parametrize(
    "case", in_tiers(CASES, {"explicit-rescale", "shard_map-rescale"})
)
def test_sharded_equals_whole(case):
    way, response = case
    specs = {name: spec for name, (_, spec) in SPECS.items()}
    make = functools.partial(clipfx.clip_spectrum, 0.9, response=response)
    out, metrics, text = way(make, specs)
    wanted, state = alone(response)
    for name in SPECS:
        np.testing.assert_allclose(out[name], wanted[name], rtol=0, atol=2e-5)
    np.testing.assert_allclose(metrics.norm, state.metrics.norm, rtol=1e-4)
    if way is WAYS["shard_map"] and response != "rescale":
        # Rows are exchanged for columns, there and back; that needs eight columns each.
        # The cosines of the other five are gathered once, for the minimum.
        found = {other: number_of(other, text) for other in OTHERS}
        assert found["all-gather"] == 1 + 5 * (response == "hard"), found


@pytest.mark.parametrize("spec", in_tiers([P("data"), P(None, "data")], {P("data")}))
def test_what_is_told_of_auto_axes_is_not_gathered(spec):
    """XLA by itself gathers rows in every step."""
    place = NamedSharding(mesh_of(AxisType.Auto), spec)
    tx = clipfx.clip_spectrum(1.0, axis_name=spec)
    near = matrices()["rows"]
    far = drawn((8, 16), [1e4, *[0.1] * 7]).astype(np.float32)
    grads, others = ({"w": jax.device_put(x, place)} for x in (near, far))
    state = tx.init(grads)
    step = jax.jit(tx.update).lower(grads, state).compile()
    out, state = step(grads, state)
    np.testing.assert_allclose(out["w"], oracle(near, 1.0, "soft"), atol=1e-5)
    assert out["w"].sharding.is_equivalent_to(place, 2)
    assert worst(step(others, state)[0]["w"], far, "soft") < 1e-2
    text, rows = step.as_text(), spec[0] is not None
    assert [number_of(other, text) for other in OTHERS] == [0, 2 * rows, 0, 0]
    # One for each step, and six to measure and to scale.
    assert number_of("all-reduce", text) <= len(spectra.STEPS) + 6


@pytest.mark.parametrize("spec", [P("pod"), P(("data", "model"), None), P()])
def test_what_is_told_and_cannot_be_is_left_to_xla(spec):
    """An axis that the mesh lacks, as another mesh has; a size it does not divide."""
    mesh = mesh_of(AxisType.Auto)
    w = jax.device_put(jnp.ones((6, 4)), NamedSharding(mesh, P(None, "data")))
    plain, told = (clipfx.clip_spectrum(0.9, axis_name=x) for x in (None, spec))
    programs = [jax.make_jaxpr(tx.update)({"w": w}, tx.init({"w": w}))
                for tx in (plain, told)]  # fmt: skip
    plain, told = (re.sub("0x[0-9a-f]+", "", str(x)) for x in programs)
    assert plain == told
    assert "shard_map" not in plain


def test_split_matrices_are_asked_about():
    _, tree = over(AxisType.Auto)
    specs = {name: spec for name, (_, spec) in SPECS.items()}
    tx = clipfx.clip_spectrum(0.9)
    step = jax.shard_map(
        lambda x: tx.update(x, tx.init(x))[0],
        mesh=mesh_of(AxisType.Auto),
        in_specs=(specs,),
        out_specs=specs,
    )
    with pytest.raises(ValueError, match=r"axis_name must say how .*PartitionSpec"):
        step(tree)
