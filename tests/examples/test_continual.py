import math

import jax
import numpy as np
import pytest
import runs

from examples import _grid, _run, continual
from examples.continual import CHUNK, Settings


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it: biases are of lower rank."""
    with jax.numpy_rank_promotion("allow"):
        yield


def test_end_to_end(tmp_path, capsys):
    given = ["--hidden=4", "--batch=4", "--runs=1", f"--steps={CHUNK}"]
    given += ["--max_norm=0.1", "--share=0.1", f"--out={tmp_path / 'out'}"]
    _run.launch(continual.run, Settings, given)
    rows = runs.without_norms(tmp_path / "out")
    assert [(row["clip"], row["step"]) for row in rows] == [
        (clip, step) for clip in continual.CLIPS for step in (CHUNK, 2 * CHUNK)
    ]
    # All learn the first task alike, and the second each in its own way.
    assert len({row["loss"] for row in rows if row["step"] == CHUNK}) == 1
    assert len({row["loss"] for row in rows if row["step"] == 2 * CHUNK}) == 3
    picture = tmp_path / "out" / "continual.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\nglobal " in printed
    assert " times as long with global." in printed


def test_tasks():
    (one, test_one), (two, _) = continual.load_tasks("permuted")
    assert len(one.labels) + len(test_one.labels) == 1797
    np.testing.assert_array_equal(one.labels, two.labels)
    assert not np.array_equal(one.digits, two.digits)
    np.testing.assert_array_equal(np.sort(one.digits, 1), np.sort(two.digits, 1))
    halves = continual.load_tasks("classes")
    seen = [{*task.labels} for pair in halves for task in pair]
    assert seen == [{0, 1, 2, 3, 4}] * 2 + [{5, 6, 7, 8, 9}] * 2


def row(clip, second, first, seed=0):
    return {"clip": clip, "seed": seed, "first": first, "second": second}


def test_clip_against_a_smaller_rate_that_learns_as_much():
    rows = [row("none", 0.9, 0.5), row("slower", 0.7, 0.9)]
    rows += [row("slower", 0.85, 0.4), row("slower", 0.6, 0.95, seed=1)]
    beyond = lambda *args: continual.beyond_slower(row(*args), rows)
    # The third is worse than none in both, and no control.
    assert beyond("global", 0.85, 0.6) == pytest.approx(0.1)
    assert beyond("global", 0.7, 0.9) == pytest.approx(0)
    assert beyond("global", 0.95, 0.5) == pytest.approx(0)
    assert math.isnan(beyond("global", 0.5, 0.99))


@pytest.mark.full
def test_clip_keeps_more_of_the_first_task_and_learns_less_of_the_second():
    settings = Settings(steps=200, hidden=32, batch=32)
    bounds = {"none": [math.inf], "global": [0.1, 0.01], "slower": [0.1]}
    variants = _grid.variants(bounds, [settings.rate], range(3))
    histories = continual.train(variants, settings)
    mean = {}
    for name in ("first", "second"):
        values = [continual.scores(h, settings.steps)[name] for h in histories]
        mean[name] = np.reshape(values, (4, 3)).mean(1)
    none, some, much, slower = mean["first"]
    assert none + 0.05 < some < much
    assert none + 0.05 < slower
    assert mean["second"][0] > mean["second"][1] > mean["second"][2] + 0.2
