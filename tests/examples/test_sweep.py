import math
import time

import numpy as np
from matplotlib.figure import Figure

from examples import _sweep

ROWS = [
    {"method": method, "rate": rate, "seed": seed, "error": error}
    for method, rate, seed, error in [
        ("a", 1, 0, 0.0),
        ("a", 1, 1, 4.0),
        ("a", 2, 0, 1.0),
        ("a", 2, 1, 2.0),
        ("b", 1, 0, 3.0),
        ("b", 1, 1, math.nan),
        ("b", 2, 0, 9.0),
        ("b", 2, 1, 9.0),
    ]
]


def test_the_best_is_that_of_the_mean_and_finite():
    shown = [*_sweep.compared(ROWS, ("method",), ("rate",), "-error", ("error",))]
    assert shown == [
        {"method": "a", "rate": 2, "error": "1.5 +- 0.5"},
        {"method": "b", "rate": 2, "error": "9 +- 0"},
    ]
    largest = _sweep.best(ROWS[:4], ("rate",), "error")
    assert [row["rate"] for row in largest] == [1, 1]


def test_what_is_not_finite_is_told():
    assert _sweep.mean_and_deviation(ROWS[4:6], "error") == "1 of 2 finite"


def test_lines_go_through_means():
    axes = Figure().subplots()
    _sweep.draw_over(axes, ROWS, "rate", "error", {"a": "C0", "b": "C1"})
    a, b = (line.get_ydata() for line in axes.lines)
    np.testing.assert_array_equal(a, [2.0, 1.5])
    np.testing.assert_array_equal(b, [math.nan, 9.0])


def test_what_compiles_is_not_timed():
    calls, known = [], set()

    def train(x, *, kind):
        calls.append(len(calls))
        time.sleep(0.2 if len(calls) == 1 else 0.0)
        return len(calls)

    found, seconds = _sweep.timed(train, known, 1, kind="a")
    assert (found, calls, known) == (2, [0, 1], {(("kind", "a"),)})
    assert 0 <= seconds < 0.2
    assert _sweep.timed(train, known, 2, kind="a")[0] == 3
    assert _sweep.timed(train, known, 2, kind="b")[0] == 5


def test_norms_by_step_are_of_the_best_run_without_a_clip():
    rows = [row | {"method": {"a": "none"}.get(row["method"])} for row in ROWS]
    norms = [np.full(2, k, np.float32) / 3 for k in range(len(rows))]
    found = _sweep.norms_by_step(rows, norms, ("method",), "-error")
    run = {"method": "none", "rate": 2, "seed": 0}
    assert [*found] == [run | {"step": step, "norm": 0.666667} for step in (0, 1)]


def test_times_in_turns_are_the_least():
    waits = {"none": iter([0.1, 0.0, 0.1]), "clip": iter([0.0, 0.1, 0.1])}
    calls = {name: lambda x=x: time.sleep(next(x)) for name, x in waits.items()}
    times = _sweep.in_turns(calls, rounds=2)
    assert times["none"] < 100 <= times["clip"]
    told = _sweep.told({"none": 0.5, "clip": 0.6}, "round")
    assert told == "A round takes 0.5 ms without a clip, 1.20 times as long with clip."
