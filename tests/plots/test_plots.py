"""What pictures promise: all there, all legible, nothing else touched."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from sentences import raises_one_sentence

import clipfx
from clipfx import plots
from clipfx.plots import drawing

SIXTEEN = [f"method_{i}" for i in range(16)]


def history(count, seed=0):
    return np.exp(0.3 * np.random.default_rng(seed).normal(size=count))


def many(count=101):
    return {name: history(count, seed) for seed, name in enumerate(SIXTEEN)}


def drawn(ax):
    """The data of all lines, in the coordinates of the data, without entries."""
    each = [line for line in ax.lines if line.get_transform() == ax.transData]
    return [line.get_xydata() for line in each if len(line.get_xdata())]


def named(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def assert_inside(ax):
    """Legend and labels are within the figure, once it is drawn."""
    figure = ax.figure
    figure.draw_without_rendering()
    whole = figure.bbox
    for part in [ax.get_legend(), *figure.axes]:
        if part is not None:
            box = part.get_tightbbox()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1
            assert whole.y0 <= box.y0 and box.y1 <= whole.y1


PICTURES = {
    "lines": lambda ax: plots.lines(many(), ylabel="loss", ax=ax),
    "norms": lambda ax: plots.norms(many(), dict.fromkeys(SIXTEEN, 2.0), ax=ax),
    "factor": lambda ax: plots.norms(history(9), 1.0, factor=np.full(9, 0.5), ax=ax),
    "compare": lambda ax: plots.compare(history(9), dict.fromkeys(SIXTEEN, 1.0), ax=ax),
    "heat_map": lambda ax: plots.heat_map(np.ones((9, 48)), ax=ax),
    "histogram": lambda ax: plots.histogram(many(), dict.fromkeys(SIXTEEN, 2.0), ax=ax),
    "responses": lambda ax: plots.response_curves(ax=ax),
}
EVERY = pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)


@EVERY
def test_everything_is_inside_the_figure_and_nothing_else_is_touched(draw, monkeypatch):
    before = dict(matplotlib.rcParams)
    monkeypatch.setattr(plt, "show", lambda: pytest.fail("a window"))
    assert_inside(draw(None))
    assert not plt.get_fignums()
    assert dict(matplotlib.rcParams) == before


@EVERY
def test_given_axes_are_drawn_on_and_returned(draw):
    ax = Figure(figsize=(8, 6)).subplots()
    assert draw(ax) is ax
    assert ax.lines or ax.collections
    if ax.get_legend() is not None:
        assert_inside(ax)


def test_sixteen_methods_differ_and_thresholds_have_their_colours():
    ax = plots.norms(many(100), {"method_3": 2.0, "method_11": 3.0}, clipped={})
    lines = {line.get_label(): line for line in ax.lines}
    looks = {(x.get_color(), x.get_linestyle(), x.get_marker())
             for x in map(lines.get, SIXTEEN)}  # fmt: skip
    assert len(looks) == 16
    assert named(ax) == [*SIXTEEN, "threshold"]
    levels = {line.get_ydata()[0]: line for line in ax.lines
              if len(line.get_ydata()) and np.ptp(line.get_ydata()) == 0}  # fmt: skip
    for level, name in ((2.0, "method_3"), (3.0, "method_11")):
        assert levels[level].get_color() == lines[name].get_color()


def test_thinning_keeps_every_extreme():
    x, y = np.arange(100_001.0), history(100_001)
    y[[0, 12_345, 100_000]] = 1e3, 1e5, 1e-4
    y[50_000:50_200] = np.nan
    kept, thin = drawing.thinned(x, y)
    assert len(kept) <= 4000
    assert (np.diff(kept) >= 0).all()
    assert np.isnan(thin).any()
    np.testing.assert_array_equal(thin, y[kept.astype(int)])
    for spike in (0, 12_345, 100_000):
        assert spike in kept
    # Column by column, against the plain way.
    for piece in np.split(y, np.arange(51, len(y), 51)):
        if np.isfinite(piece).any():
            assert {np.nanmin(piece), np.nanmax(piece)} <= {*thin}


def test_a_spike_of_100_000_steps_is_drawn_and_marked():
    y = history(100_000)
    y[77_777] = 1e4
    ax = plots.norms(y, 100.0)
    assert sum(len(points) for points in drawn(ax)) < 10_000
    dots = [points for points in drawn(ax) if points.tolist() == [[77_777, 1e4]]]
    assert len(dots) == 1
    assert max(np.nanmax(points[:, 1]) for points in drawn(ax)) == 1e4


@pytest.mark.parametrize(
    "values, scale",
    [([1.0, 99.0], "linear"), ([1.0, 101.0], "log"), ([0.0, 1.0, 101.0], "log"),
     ([-1.0, 1.0, 101.0], "linear"), ([0.0, 0.0], "linear"), ([7.0], "linear"),
     ([1.0, math.inf, 2.0], "linear"), ([1.0, 3.4028235e38], "linear")],
)  # fmt: skip
def test_scale_is_logarithmic_beyond_two_decades(values, scale):
    assert plots.lines(values).get_yscale() == scale


def test_what_is_not_finite_or_zero_is_marked():
    y = np.array([1.0, np.nan, 500.0, np.inf, 0.0, 2.0, 3.4028235e38, 3.0])
    ax = plots.norms(y, 400.0)
    assert named(ax) == ["norm", "threshold", "clipped", "zero", "not finite"]
    at = {line.get_marker(): line.get_xdata().tolist() for line in ax.lines
          if line.get_marker() in ("v", "x") and len(line.get_xdata())}  # fmt: skip
    assert at == {"x": [1, 3, 6], "v": [4]}
    # No line leads to the others.
    assert [0, 2, 5, 7] in [points[:, 0].tolist() for points in drawn(ax)]


def test_many_curves_are_pale_around_their_medians():
    steps = np.arange(1.0, 1001.0)
    ax = plots.lines({name: steps + i for i, name in enumerate(SIXTEEN)})
    for i, name in enumerate(SIXTEEN):
        (line,) = [x for x in ax.lines if x.get_label() == name]
        np.testing.assert_array_equal(line.get_ydata(), steps[4::10] + i)
    pale = [line for line in ax.lines if line.get_alpha()]
    assert [len(line.get_xdata()) for line in pale] == [1000] * 16


def test_zeros_hide_no_curve_on_a_logarithmic_axis():
    y = history(100_000)
    y[::10], y[55_555] = 0, 1e4
    ax = plots.lines(y)
    raw = max(drawn(ax), key=len)
    assert ax.get_yscale() == "log"
    assert np.isfinite(raw).all() and raw[:, 1].max() == 1e4 and raw[:, 1].min() > 0


def test_clipped_is_told_by_flags_or_by_the_count():
    flags = plots.norms([1.0, 2, 3], clipped=np.array([True, False, True]))
    count = plots.norms([1.0, 2, 3], clipped=[1, 1, 2])
    for ax in (flags, count):
        assert [[0, 1], [2, 3]] in [points.tolist() for points in drawn(ax)]


@pytest.mark.parametrize("draw", [plots.lines, plots.norms, plots.histogram,
                                  plots.heat_map])  # fmt: skip
@pytest.mark.parametrize(
    "values, text",
    [([], "There are no steps."), ({}, "There are no steps."),
     ([math.nan, math.inf], "No number is finite.")],
)  # fmt: skip
def test_nothing_to_draw_is_a_sentence(draw, values, text):
    ax = draw(values)
    assert [x.get_text() for x in ax.texts] == [text]


@pytest.mark.parametrize("draw", [plots.lines, plots.norms, plots.histogram,
                                  plots.heat_map])  # fmt: skip
@pytest.mark.parametrize("values", [[2.0], [0.0, 0.0], [1e-30, 1e30]])
def test_one_step_equal_zero_and_far_apart(draw, values):
    ax = draw(values)
    assert_inside(ax)
    if ax.lines and draw is not plots.histogram:
        assert sum(map(len, drawn(ax))) >= len(values)


def test_histogram_counts_all_and_says_what_it_does_not_show():
    y = np.array([0.0, np.nan, 1.0, 2.0, 1000.0, 5.0])
    ax = plots.histogram(y, 4.0)
    assert ax.get_xscale() == "log"
    assert ax.patches[0].get_data().values.sum() == 4
    assert ax.get_title(loc="left") == "Not shown: 1 not finite, 1 zero."
    assert named(ax) == ["norm", "threshold: 40% above"]


@pytest.mark.parametrize(
    ("threshold", "share"), [(0.5, "100%"), (5.0, "80%"), (24.5, "4%"), (99.0, "0%")]
)
def test_histogram_writes_the_share_above_out(threshold, share):
    ax = plots.histogram(np.arange(1.0, 26.0), threshold)
    told = [text.get_text() for text in ax.get_legend().get_texts()]
    assert told == ["norm", f"threshold: {share} above"]


def test_histogram_of_kinds_of_different_number():
    kinds = {"right": np.array([1.0, 2.0, 3.0]), "wrong": np.array([2.0, 5.0])}
    ax = plots.histogram(kinds, 2.5)
    assert [x.get_data().values.sum() for x in ax.patches] == [3, 2]
    assert named(ax) == ["right", "wrong", "threshold: 40% above"]
    ax = plots.histogram(kinds, {"right": [0.5, 1.5, 9.0], "wrong": 2.5})
    assert named(ax)[-2:] == [
        "right threshold: 67% above",
        "wrong threshold: 50% above",
    ]
    with pytest.raises(ValueError, match="each of 2 steps, got 3 for 'wrong'"):
        plots.histogram(kinds, {"wrong": [1.0, 2.0, 3.0]})


def test_histogram_of_many_has_a_row_each_with_its_threshold():
    table = many()
    ax = plots.histogram(table, {"method_3": 1.0, "method_9": 2.0}, bins=20)
    counts = ax.collections[0].get_array()
    assert counts.shape == (16, 20)
    assert counts.sum(axis=1).tolist() == [101] * 16
    strokes = [x.get_segments()[0].mean(axis=0).tolist() for x in ax.collections[1:]]
    assert strokes == [[1.0, 3.0], [2.0, 9.0]]
    share = 100 * (table["method_3"] > 1).mean()
    told = [x.get_text() for x in ax.get_yticklabels()]
    assert told[:4] == [*SIXTEEN[:3], f"method_3: {share:.2g}% above"]


@pytest.mark.parametrize("log", [True, False])
def test_scale_as_told(log):
    scale = "log" if log else "linear"
    for y in ([1.0, 2.0], [1.0, 1000.0], [0.0, 0.0]):
        wanted = "linear" if not any(y) else scale
        assert plots.lines(y, log=log).get_yscale() == wanted
        assert plots.norms(y, log=log).get_yscale() == wanted
        assert plots.compare(y, {"a": 2.0}, log=log).get_yscale() == scale
        assert plots.histogram(y, log=log).get_xscale() == wanted
    ticks = plots.lines([1.0, 30.0], log=True).get_yticklabels()
    assert {"1", "2", "5", "10", "20"} <= {x.get_text() for x in ticks}


def test_legend_without_a_layout_engine_covers_nothing():
    for draw in (plots.lines, plots.norms):
        ax = Figure(figsize=(6.4, 4.8)).subplots()
        draw(many(), ax=ax)
        ax.figure.draw_without_rendering()
        assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1
        assert_inside(ax)


def test_heat_map_keeps_spikes_and_marks():
    y = np.ones((100_000, 3))
    y[4321, 0], y[7, 1], y[:, 2] = 1e6, np.nan, 0
    ax = plots.heat_map(y, groups=["a", "b", "c"])
    shown = ax.collections[0].get_array()
    assert shown.shape == (3, 400)
    assert shown.max() == 6 and shown.mask.sum() == 1
    assert (shown[2] < ax.collections[0].get_clim()[0]).all()
    assert named(ax) == ["zero", "not finite"]
    assert [x.get_text() for x in ax.get_yticklabels()] == ["a", "b", "c"]


def test_long_names_keep_what_tells_them_apart():
    names = [f"decoder/layer_{i}/attention/query/kernel" for i in (1, 12)]
    assert drawing.labels_of(names) == [".../layer_1/...", ".../layer_12/..."]
    assert drawing.labels_of(["x" * 40, "y"]) == ["x" * 15 + "..." + "x" * 15, "y"]
    assert len({*drawing.labels_of(["a" * 40 + c + "a" * 40 for c in "bc"])}) == 2


def test_responses_are_all_there_and_right():
    ax = plots.response_curves(threshold=2.0)
    shown = {name.partition("(")[0] for name in named(ax)}
    assert shown == {*clipfx.responses.__all__} - {"Response"}
    hard = next(line for line in ax.lines if line.get_label() == "hard")
    np.testing.assert_array_equal(hard.get_ydata(), np.minimum(hard.get_xdata(), 2))


def test_compare_clips_where_nothing_is_given():
    ax = plots.compare([1.0, 9.0], {"a": 2.0, "b": [3.0, 4.0]}, {"b": [0.5, 0.5]})
    curves = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert curves["a"] == [1, 2] and curves["b"] == [0.5, 0.5]
    assert named(ax) == ["before", "a", "b", "threshold"]


def test_rows_of_metrics_are_arrays_by_clip():
    tx = clipfx.clip_per_layer(1.0)
    grads = {"norm": {"w": jnp.ones(4)}, "b": {"w": jnp.full(4, 5.0)}}
    state, rows = tx.init(grads), []
    for step in range(3):
        _, state = tx.update(grads, state)
        row = {"clip": "layer", "step": step, **clipfx.metrics.read(state)}
        rows.append(json.loads(json.dumps(row)))
    rows[1]["clip0/norm/b"] = None
    del rows[2]["clip0/norm/b"]
    clips = plots.by_clip(rows)
    assert {*clips} == {"clip0"}
    np.testing.assert_allclose(clips["clip0"]["norm"]["b"], [10, np.nan, np.nan])
    np.testing.assert_allclose(clips["clip0"]["norm"]["norm"], [2, 2, 2])
    np.testing.assert_allclose(clips["clip0"]["total_norm"]["all"], np.sqrt([104] * 3))
    assert clips["clip0"]["clipped"]["b"].tolist() == [1, 2, 3]
    # As they come they can be drawn.
    fields = clips["clip0"]
    ax = plots.norms(fields["norm"], fields["threshold"], factor=fields["factor"],
                     clipped=fields["clipped"])  # fmt: skip
    assert {"b", "norm", "threshold", "clipped"} <= {*named(ax)}


def test_rows_of_a_clip_with_the_name_of_a_field():
    row = {"guard/norm/norm/a": 2.0, "guard/norm/steps/a": 1, "x/total_norm/3": 5}
    clips = plots.by_clip([row])
    assert clips["guard/norm"]["norm"]["a"] == [2.0]
    assert clips["x"]["total_norm"]["3"] == [5.0]


ERRORS = [
    (lambda: plots.by_clip("metrics.jsonl"), TypeError, "got 'metrics.jsonl'"),
    (lambda: plots.by_clip({"clip0/norm/a": 1.0}), TypeError, "rows must be dicts"),
    (lambda: plots.norms(np.ones((2, 2, 2))), ValueError, r"shape \(2, 2, 2\)"),
    (lambda: plots.norms({"a": 1.0}), ValueError, "norm must be numbers"),
    (lambda: plots.norms(["a"]), ValueError, "norm must be numbers"),
    (lambda: plots.norms({"a": [1.0], "b": [1.0, 2]}), ValueError, "got 2 for 'b'"),
    (lambda: plots.norms({"a": [1.0]}, {"b": 1.0}), ValueError, "got 'b'"),
    (lambda: plots.norms([1.0, 2.0], [1.0]), ValueError, "each of 2 steps, got 1"),
    (lambda: plots.norms([1.0, 2.0], step=[1]), ValueError, "step must have one"),
    (lambda: plots.norms(np.ones((3, 2)), factor=[1.0] * 3), ValueError, "2 columns"),
    (lambda: plots.compare([1.0], 1.0), ValueError, "thresholds must be a dict"),
    (lambda: plots.heat_map([1.0], groups=["a", "b"]), ValueError, "got 2 names"),
    (lambda: plots.response_curves(threshold=math.inf), ValueError, "got inf"),
]


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_sentence(case):
    raises_one_sentence(case)


def test_matplotlib_that_is_missing_is_a_sentence(monkeypatch):
    for name in [x for x in sys.modules if x.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in PICTURES.values():
        raises_one_sentence(
            (lambda draw=draw: draw(None), ImportError, r"clipfx-jax\[plots\]")
        )
    assert plots.by_clip([]) == {}


ALONE = """
import sys, types
sys.modules["jax"] = sys.modules["optax"] = None
package = types.ModuleType("clipfx")
package.__path__ = [sys.argv[1]]
sys.modules["clipfx"] = package
from clipfx import plots
assert "matplotlib" not in sys.modules
plots.norms([1.0, 2.0], 1.5)
plots.heat_map([[1.0, 2.0]])
plots.histogram([1.0, 2.0])
assert "matplotlib.pyplot" not in sys.modules
"""


def test_no_jax_no_pyplot_and_matplotlib_only_when_it_draws():
    """With a package in place of clipfx, which itself imports JAX."""
    command = [sys.executable, "-c", ALONE, clipfx.__path__[0]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
