import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import clipfx
from examples import _grid, _run, gan_digits
from examples._grid import History, Variant
from examples.gan_digits import CHUNK, Numbers, Settings

SMALL = Settings(hidden=8, batch=4)
PLAIN = Numbers(0, 0.1, 1.0, math.inf, math.inf)


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it: biases are of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


def launch(tmp_path, *given):
    arguments = ["--hidden=4", "--batch=2", f"--out={tmp_path / 'out'}", *given]
    _run.launch(gan_digits.run, Settings, arguments)
    return runs.without_norms(tmp_path / "out")


@pytest.mark.full
def test_end_to_end(tmp_path, capsys):
    given = ("--runs=1", f"--steps={2 * CHUNK}", "--rates=0.01")
    rows = launch(tmp_path, *given, "--max_norm=0.5", "--share=0.5")
    assert [(row["clip"], row["step"]) for row in rows] == [
        (clip, step) for clip in gan_digits.CLIPS for step in (CHUNK, 2 * CHUNK)
    ]
    norms = {row["mean norm"] for row in rows}
    assert len(norms) == len(rows)  # each clip does something
    picture = tmp_path / "out" / "gan_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\ngenerator " in printed
    assert " times as long with samples." in printed


def step(numbers, **given):
    """What the generator's weights changed by in a step of SGD."""
    settings = Settings(**{"optimizer": "sgd", "hidden": 8, "batch": 4} | given)
    digits = gan_digits.load_data()[0]
    before = gan_digits.make_learner(settings, numbers)
    update = jax.jit(gan_digits.update, static_argnums=0)
    after, seen = update(settings, numbers, digits, before, jnp.int32(0))
    moved = jax.tree.map(jnp.subtract, after.generator, before.generator)
    return moved, after.critic, seen


def test_what_is_clipped():
    plain, critic, seen = step(PLAIN)
    norm = clipfx.global_norm(plain)
    np.testing.assert_allclose(norm, 0.1 * seen["norm"], rtol=1e-5)
    for numbers, change in (
        (PLAIN._replace(max_norm=0.5 * seen["norm"]), 0.5),
        (PLAIN._replace(share=0.25), 0.25),
    ):
        moved, same, _ = step(numbers)
        expected = jax.tree.map(lambda x, c=change: c * x, plain)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            (moved, same),
            (expected, critic),
        )
    moved, _, fewer = step(PLAIN._replace(max_cotangent=1e-6))
    assert 0 < fewer["norm"] < 1e-3 * seen["norm"]


def test_bound_on_samples_is_of_their_sum():
    numbers = gan_digits.numbers_of(Variant("samples", 0.5, 0.01, 3), batch=10)
    assert numbers == (3, 0.01, 1.0, math.inf, 0.05)


def test_judge_knows_digits_from_noise():
    digits, judge, right = gan_digits.load_data()
    assert right > 0.95
    shares = judge.shares(digits[:200])
    assert shares.sum() == pytest.approx(1)
    assert gan_digits.look(shares)["classes"] == 10
    assert gan_digits.look(shares)["entropy"] > 3.2
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 64)).astype(np.float32)
    assert judge.shares(noise).sum() == 0
    one = np.repeat(digits[:1], 200, axis=0)
    assert gan_digits.look(judge.shares(one)) == {
        "classes": 1,
        "entropy": 0.0,
        "realistic": 1.0,
    }
    assert judge.shares(np.full((5, 64), np.nan, np.float32)).sum() == 0


def test_scores_are_of_the_last_quarter():
    row = dict.fromkeys(gan_digits.SHOWN, 0.0)
    rows = [row] * 3 + [row | {"classes": 4, "realistic": 0.5}]
    variant = Variant("none", math.inf, 0.1, 0)
    found = gan_digits.scores(History(variant, rows, np.ones(4)))
    assert (found["classes"], found["score"], found["rate"]) == (4, 4.5, 0.1)


def test_every_bound_of_what_is_asked_for():
    settings = Settings(clip=("none", "slower"), rates=(0.1, 0.2), runs=2)
    variants = gan_digits.variants_of(settings)
    assert len(variants) == len({*variants}) == (1 + 3) * 2 * 2
    assert {v.bound for v in variants if v.clip == "slower"} == {*settings.share}


@pytest.mark.full
def test_clip_keeps_classes_that_momentum_loses():
    settings = Settings(steps=1200, batch=16, hidden=32)
    bounds = {"none": [math.inf], "generator": [0.3]}
    variants = _grid.variants(bounds, [0.01], range(2))
    rows = [*map(gan_digits.scores, gan_digits.train(variants, settings))]
    assert max(row["classes"] for row in rows[:2]) < 1
    assert min(row["classes"] for row in rows[2:]) > 2
