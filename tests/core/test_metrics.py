"""Reading metrics."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import sample

import clipfx


def test_keys_and_values():
    tx = optax.chain(clipfx.clip_by_global_norm(1.0), clipfx.clip_per_layer(0.5))
    tree = sample()
    state = tx.init(tree)
    assert float(clipfx.metrics.read(state)["clip0/clip_rate/global"]) == 0.0
    for scale in (1.0, 1e-3):
        _, state = jax.jit(tx.update)(sample(scale=scale), state)
    read = clipfx.metrics.read(state)
    fields = (
        "norm",
        "threshold",
        "factor",
        "share",
        "steps",
        "clipped",
        "lifted",
        "nonfinite",
        "clip_rate",
        "target_norm",
    )
    expected = {f"clip0/{field}/global" for field in fields}
    expected |= {f"clip1/{f}/{g}" for f in fields for g in ("decoder", "encoder")}
    expected |= {"clip1/total_norm"}
    assert set(read) == expected
    assert all(np.shape(value) == () for value in read.values())
    assert float(read["clip0/clip_rate/global"]) == 0.5
    assert int(read["clip0/steps/global"]) == 2
    assert set(clipfx.metrics.read(state, "c")) == {"c" + key[4:] for key in expected}


def test_under_jit():
    tx = clipfx.clip_per_layer(0.5)
    state = tx.init(sample())

    @jax.jit
    def step(tree, state):
        _, state = tx.update(tree, state)
        return state, clipfx.metrics.read(state)

    state, inside = step(sample(), state)
    outside = clipfx.metrics.read(state)
    assert set(inside) == set(outside)
    for key, value in outside.items():
        assert float(inside[key]) == pytest.approx(float(value))


def step(tx, grads):
    return jax.jit(tx.update)(grads, tx.init(grads), grads)[1]


def test_keys_follow_names():
    grads = {"w": jnp.array([3.0, 4.0])}
    clip = clipfx.clip_by_global_norm(1.0)
    several = optax.chain(clip, clip)
    tx = optax.named_chain(("guard", clip), ("pair", several), ("sgd", optax.sgd(1.0)))
    read = clipfx.metrics.read(step(tx, grads))
    assert read["guard/norm/global"] == 5.0
    assert read["pair/clip0/norm/global"] == read["pair/clip1/norm/global"] == 1.0
    assert not any(key.startswith("clip") for key in read)
    # The name that is a field of states, too.
    alone = optax.named_chain(("clip", clip), ("sgd", optax.sgd(1.0)))
    assert clipfx.metrics.read(step(alone, grads))["clip/norm/global"] == 5.0
    skip = optax.named_chain(("skip", clipfx.skip_spikes(clip)))
    read = clipfx.metrics.read(skip.init(grads))
    assert {key.split("/")[1] for key in read} == {"clip0", "clip1"}
    # Keys of dicts and attributes, without the fields that hold any state.
    parts = optax.partition({"a": clip, "b": optax.sgd(1.0)}, {"w": "a", "v": "b"})
    read = clipfx.metrics.read(step(parts, {**grads, "v": jnp.ones(1)}))
    assert {key.split("/")[0] for key in read} == {"a"}
    state = types.SimpleNamespace(generator=step(clip, grads))
    assert "generator/norm/global" in clipfx.metrics.read(vars(state))
    multi = optax.MultiSteps(clip, 2)
    read = clipfx.metrics.read(multi.init(grads))
    assert "clip0/norm/global" in read


def test_numbers_are_fit_for_loggers():
    tx = optax.chain(clipfx.clip_per_layer(0.5), clipfx.zclip())
    for scale in (1.0, math.nan, 1e38):
        state = step(tx, {"a b": {"w": jnp.full(9, scale)}, "c": {"w": jnp.ones(2)}})
        read = clipfx.metrics.read(state)
        json.dumps(read, allow_nan=False)
        assert {type(value) for value in read.values()} == {float, int}
        assert all(re.fullmatch(r"[\w./-]+", key) for key in read)
        bare = clipfx.metrics.read(state, plain=False)
        assert {key: value.item() for key, value in bare.items()} == read


def test_norm_before_and_after_and_of_all_groups():
    grads = {"a": {"w": jnp.array([3.0, 4.0])}, "b": {"w": jnp.array([0.0, 12.0])}}
    read = clipfx.metrics.read(step(clipfx.clip_per_layer(6.0), grads))
    assert (read["clip0/norm/b"], read["clip0/target_norm/b"]) == (12.0, 6.0)
    assert (read["clip0/norm/a"], read["clip0/target_norm/a"]) == (5.0, 5.0)
    assert read["clip0/total_norm"] == 13.0
    for p, total in ((1, 19.0), (3, (7**3 + 12**3) ** (1 / 3)), (math.inf, 12.0)):
        read = clipfx.metrics.read(step(clipfx.clip_per_layer(6.0, ord=p), grads))
        if p != 3:
            assert read["clip0/total_norm"] == pytest.approx(total, rel=1e-6)
        else:
            norms = [91 ** (1 / 3), 12.0]
            total = sum(n**3 for n in norms) ** (1 / 3)
            assert read["clip0/total_norm"] == pytest.approx(total, rel=1e-6)
    large = {k: {"w": jnp.full(4, 3e38)} for k in "abcd"}
    read = clipfx.metrics.read(step(clipfx.clip_per_layer(1.0), large))
    assert read["clip0/total_norm"] == float(np.finfo(np.float32).max)


def test_lifted_steps_are_counted_beside_clipped_ones():
    tx, grads = clipfx.normalize_by_norm(10.0), {"w": jnp.array([3.0, 4.0])}
    state = tx.init(grads)
    for scale in (1.0, 4.0, 0.0, 2.0):
        scaled = jax.tree.map(lambda x, s=scale: s * x, grads)
        _, state = tx.update(scaled, state)
    read = clipfx.metrics.read(state)
    assert (read["clip0/lifted/global"], read["clip0/clipped/global"]) == (1, 1)
    assert read["clip0/target_norm/global"] == 10.0


def test_every_method_has_metrics():
    grads = {"a": {"w": jnp.array([[3.0, 4.0], [0.1, 0.1]])}}
    read = lambda tx: clipfx.metrics.read(step(tx, grads))
    value = read(clipfx.clip_by_value(3.5))
    assert value["clip0/share/global"] == 0.25
    assert value["clip0/norm/global"] == 4.0
    assert value["clip0/target_norm/global"] == 3.5
    assert value["clip0/clipped/global"] == 1
    # Units are columns, the weights are the gradient: every ratio is 1.
    ratio = read(clipfx.agc(0.25))
    assert ratio["clip0/share/global"] == ratio["clip0/norm/global"] == 1.0
    assert ratio["clip0/target_norm/global"] == 0.25
    assert read(clipfx.agc(2.0))["clip0/clipped/global"] == 0
    assert read(clipfx.grad_power(2.0))["clip0/target_norm/global"] == 16.0
    by_element = read(clipfx.clip_by_params(0.5, 0.0, per="element"))
    assert by_element["clip0/share/global"] == 1.0
    assert by_element["clip0/norm/global"] == 2.0
    tx = clipfx.spam_clip(4.0, warmup_steps=1)
    _, state = tx.update(grads, tx.init(grads))
    spike = {"a": {"w": grads["a"]["w"].at[0, 0].mul(9.0)}}
    _, state = tx.update(spike, state)
    seen = clipfx.metrics.read(state)
    assert seen["clip0/clipped/global"] == 1
    assert seen["clip0/target_norm/global"] == 1.0


def test_what_orbax_restores_without_a_target(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = optax.chain(clipfx.clip_per_layer(0.5), optax.trace(0.9))
    state = step(tx, sample())
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        bare = saver.restore(tmp_path / "state")
    try:
        read = clipfx.metrics.read(bare)
    except ValueError as error:
        assert "names of its groups" in str(error)
    else:
        assert read == clipfx.metrics.read(state)


@pytest.mark.parametrize("wrong", [optax.adam(1.0), 3, "state", jnp.ones(3), len])
def test_what_is_no_state_is_an_error(wrong):
    with pytest.raises(TypeError, match=r"opt_state must be the state of an optimizer"):
        clipfx.metrics.read(wrong)


def test_nothing_to_read():
    assert clipfx.metrics.read(optax.adam(1e-3).init(jnp.ones(3))) == {}
    assert clipfx.metrics.read(()) == {}
