"""What docs/logging.md shows runs as pasted, and is what it is said to be.

Snippets of libraries that are not in the extra test: tests/zoo/test_loops.py.
"""

import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import snippets

import clipfx
from clipfx.calibrate.reading import read_run

GRADS = {"a": {"w": jnp.array([3.0, 4.0])}, "b": {"w": jnp.array([12.0])}}


@pytest.fixture(autouse=True)
def as_users(tmp_path, monkeypatch):
    """In a folder of their own, without the strictest rules that JAX has."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """What the first block of the page leaves."""
    before = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("first"))
    try:
        with jax.numpy_dtype_promotion("standard"):
            yield {**snippets.run("logging", "Logging"), "folder": os.getcwd()}
    finally:
        os.chdir(before)


def read(tx, grads=GRADS):
    step = jax.jit(lambda g: tx.update(g, tx.init(g), g)[1])
    return clipfx.metrics.read(step(grads))


# ------------------------------------------------------------------- loggers


def test_json_lines(first):
    with open(f"{first['folder']}/metrics.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert [row["step"] for row in rows] == [0, 5, 10, 15]
    assert [row["clip0/steps/encoder"] for row in rows] == [1, 6, 11, 16]
    for row in rows:
        assert row["clip0/norm/decoder"] > row["clip0/threshold/decoder"] == 1
        assert row["clip0/target_norm/decoder"] == pytest.approx(1, rel=1e-5)


def test_rows_of_a_scan(first):
    names = snippets.run("logging", "In the compiled step", names=first)
    steps = np.asarray(names["rows"]["clip0/steps/encoder"])
    np.testing.assert_array_equal(steps, np.arange(21, 31))
    assert names["norms"].shape == (10,) and (names["norms"] > 0).all()


def test_tensorboard_has_what_calibrate_reads(first):
    snippets.run("logging", "TensorBoard", names=first)
    norms = read_run("runs/clip").norms
    last = clipfx.metrics.read(first["opt_state"])
    assert norms["encoder"] == pytest.approx([last["clip0/norm/encoder"]])


def test_orbax(first):
    names = snippets.run("logging", "Orbax", names=first)
    assert clipfx.metrics.read(names["opt_state"])["clip0/steps/encoder"] == 20


# ------------------------------------------------------------ training loops


def test_flax_nnx():
    row = snippets.run("logging", "Flax NNX")["row"]
    assert row["clip0/norm/loss"] > 0
    assert row["clip1/target_norm/global"] == pytest.approx(1, rel=1e-5)


def test_flax_linen_passes_value_and_params():
    names = snippets.run("logging", "Flax Linen")
    assert names["row"]["clip0/norm/loss"] > 0
    assert names["row"]["clip1/target_norm/global"] == pytest.approx(0.01, rel=1e-5)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    without = clipfx.metrics.read(step(names["state"], names["params"]))
    assert without["clip0/norm/loss"] == 0  # the trap
    assert without["clip1/clipped/global"] == 1  # agc has its params


def test_equinox():
    row = snippets.run("logging", "Equinox")["row"]
    assert row["clip0/norm/layers/0"] > 0 and row["clip0/steps/layers/0"] == 1


def test_two_optimizers():
    row = snippets.run("logging", "A GAN, or any two optimizers")["row"]
    assert row["generator/target_norm/global"] == pytest.approx(1, rel=1e-5)
    assert row["critic/norm/global"] > 0 and row["critic/steps/global"] == 1


# ------------------------------------------------------------------- meaning


def test_the_table_has_every_number():
    below = snippets.text_of("logging").split("| number | meaning |")[1]
    shown = re.findall(r"^\| `(\w+)`", below, re.M)
    found = {key.split("/")[1] for key in read(clipfx.clip_per_layer(1.0))}
    assert set(shown) == found and len(shown) == len(found)


def test_names_of_clips():
    tx = optax.named_chain(("guard", clipfx.clip_by_global_norm(1.0)))
    assert read(tx)["guard/norm/global"] == 13


def test_what_has_no_number_is_the_largest():
    row = read(clipfx.zclip(), {"w": jnp.array([jnp.inf])})
    assert row["clip0/norm/global"] == row["clip0/threshold/global"] > 3.4e38
    assert row["clip0/nonfinite/global"] == row["clip0/steps/global"] == 1
    assert row["clip0/clipped/global"] == row["clip0/factor/global"] == 0


def test_norm_is_what_the_method_measures():
    weights = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    norm = lambda tx: [v for k, v in read(tx, weights).items() if "/norm/" in k]
    assert norm(clipfx.clip_by_value(1.0)) == [4]
    assert norm(clipfx.clip_spectrum(1.0)) == pytest.approx([5], rel=1e-5)


@pytest.mark.parametrize("name", ["log", "power"])
def test_responses_without_a_bound_exceed_the_threshold(name):
    response = getattr(clipfx.responses, name)
    response = response(0.5) if name == "power" else response
    row = read(clipfx.clip_by_norm(1.0, response=response))
    assert row["clip0/target_norm/global"] > 1.5


def test_layers_together_exceed_the_threshold_of_one():
    tx = clipfx.clip_per_layer(1.0)
    out = jax.jit(lambda g: tx.update(g, tx.init(g))[0])(GRADS)
    assert float(clipfx.global_norm(out)) == pytest.approx(math.sqrt(2), rel=1e-5)


def test_a_callback_sees_every_step():
    rows = []
    watch = snippets.run("logging", "Loops that hide the state")["watch"]
    tx = watch(
        optax.chain(clipfx.clip_by_global_norm(1.0), optax.sgd(0.1)), rows.append
    )
    step = lambda state, size: tx.update({"w": size}, state)[::-1]
    state, out = jax.lax.scan(step, tx.init({"w": jnp.zeros(2)}), jnp.ones((3, 2)))
    jax.effects_barrier()
    rows.sort(key=lambda row: row["clip0/steps/global"])
    assert [row["clip0/steps/global"] for row in rows] == [1, 2, 3]
    assert json.dumps(rows) and rows[-1] == clipfx.metrics.read(state)
    np.testing.assert_allclose(jnp.linalg.norm(out["w"], axis=1), 0.1, rtol=1e-5)
