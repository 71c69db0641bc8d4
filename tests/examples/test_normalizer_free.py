import math

import jax
import numpy as np
import pytest
import runs

import clipfx
from examples import _grid, _run, normalizer_free
from examples.normalizer_free import CHUNK, Numbers, Settings


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it: biases are of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.full
def test_end_to_end(tmp_path, capsys):
    given = ["--blocks=2", "--width=8", "--batch=4", "--runs=1", f"--steps={CHUNK}"]
    given += ["--rates=0.1,3", "--max_norm=1", "--max_ratio=0.01"]
    given += [f"--out={tmp_path / 'out'}"]
    _run.launch(normalizer_free.run, Settings, given)
    rows = runs.without_norms(tmp_path / "out")
    assert [(row["clip"], row["rate"]) for row in rows] == [
        (clip, rate) for clip in normalizer_free.CLIPS for rate in (0.1, 3.0)
    ]
    at = {row["clip"]: row["loss"] for row in rows if row["rate"] == 0.1}
    assert len({*at.values()}) == 3  # each clip does something
    picture = tmp_path / "out" / "normalizer_free.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\nagc " in printed
    assert " times as long with agc." in printed


def test_units_are_of_one_block_and_the_head_is_free():
    params = normalizer_free.make_network(jax.random.key(0), 3, 4)
    grads = jax.tree.map(lambda x: 1e3 * (1 + abs(x)), params)
    tx = normalizer_free.make_transform(Numbers(0, 1.0, math.inf, 0.01))
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    norm = lambda x: np.linalg.norm(x, axis=-2)
    for name in ("enter", "first", "second"):
        moved, weights = (norm(tree[name]["kernel"]) for tree in (updates, params))
        # Nesterov's first step is 1 + 0.9 gradients long.
        np.testing.assert_allclose(moved, 1.9 * 0.01 * weights, rtol=1e-4)
        bias = np.linalg.norm(updates[name]["bias"], axis=-1)
        np.testing.assert_allclose(bias, 1.9 * 0.01 * 1e-3, rtol=1e-4)
    head = clipfx.global_norm(updates["head"])
    np.testing.assert_allclose(head, 1.9 * clipfx.global_norm(grads["head"]), rtol=1e-5)


def rows_of(clip, *accuracies):
    rates = (0.1, 0.2, 0.4, 0.8)
    for rate, accuracy in zip(rates, accuracies, strict=True):
        yield {"clip": clip, "bound": 1.0, "rate": rate, "accuracy": accuracy}


def test_usable_rates_have_no_gaps():
    rows = [*rows_of("a", 0.97, 0.1, 0.97, 0.98), *rows_of("b", 0.96, 0.97, 0.1, 0.96)]
    rows += rows_of("c", 0.1, 0.2, 0.3, math.nan)
    table = {row["clip"]: row for row in normalizer_free.compare(rows, 0.03)}
    ends = {clip: (row["smallest"], row["largest"]) for clip, row in table.items()}
    assert (ends["a"], ends["b"]) == ((0.4, 0.8), (0.1, 0.2))
    assert all(map(math.isnan, ends["c"]))
    assert table["a"]["largest/smallest"] == 2
    assert table["c"]["rate"] == 0.4


@pytest.mark.full
def test_agc_trains_at_a_rate_that_is_too_large_without_a_clip():
    settings = Settings(steps=150, blocks=6, width=16, batch=32)
    bounds = {"none": [math.inf], "agc": [0.01], "global": [0.1]}
    variants = _grid.variants(bounds, [0.03, 1.0], range(2))
    histories = normalizer_free.train(variants, settings)
    accuracy = {h.variant: h.rows[-1]["accuracy"] for h in histories}
    at = lambda clip, rate: [
        x for v, x in accuracy.items() if (v.clip, v.rate) == (clip, rate)
    ]
    assert min(at("none", 0.03)) > 0.85
    assert max(at("none", 1.0)) < 0.5
    assert min(at("agc", 1.0)) > 0.7
    assert min(at("global", 1.0)) > 0.85
