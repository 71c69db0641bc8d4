import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import launch as run_command
from tiers import in_tiers

from clipfx.calibrate.reading import read_run
from examples import _common, char_rnn

SMALL = char_rnn.Settings(rates=(0.2,), steps=3, hidden=8, length=10, batch=2)
TEXT = "the quick brown fox jumps over the lazy dog; \n" * 20


def launch(tmp_path, **given):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small = dataclasses.asdict(SMALL) | {"text": text, "out": tmp_path / "out"}
    return run_command(char_rnn, small | given)


def test_char_rnn_end_to_end(tmp_path, capsys):
    rows = launch(tmp_path, rates=(0.2, 1e38))
    assert [(row["clip"], row["rate"], row["step"]) for row in rows] == [
        (clip, rate, step)
        for clip in SMALL.clip
        for rate in (0.2, 1e38)
        for step in range(3)
    ]
    assert {"loss", "norm"} < rows[0].keys()
    assert rows[0]["clip0/threshold/global"] > 3e38  # none
    assert rows[5]["loss"] is None  # none, at the larger rate
    assert rows[6]["clip0/threshold/global"] == 1.0
    assert "clip0/factor/recurrent" in rows[-1]
    out = capsys.readouterr().out
    table = [line.split() for line in out.splitlines()]
    for clip in SMALL.clip:
        assert f"--- {clip}, at rate 0.2, writes:" in out
        (row,) = [words for words in table if words[:1] == [clip]]
        assert row[3:5] == [row[1], "0.2"]  # the best, and its rate
        assert clip != "none" or not math.isfinite(float(row[2]))
    assert " times as long with layer." in out
    assert [*read_run(tmp_path / "out", number=3).norms] == ["global"]
    picture = tmp_path / "out" / "char_rnn.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_char_rnn_default_text(tmp_path):
    rows = launch(tmp_path, clip="global", steps=2, text=None)
    assert len(char_rnn.load_text()) > 400_000
    assert len(rows) == 2


@pytest.mark.full
def test_char_rnn_best_of_nothing_finite_is_told(tmp_path, capsys):
    rows = launch(tmp_path, rates=1e38, clip="none", steps=2)
    assert rows[-1]["loss"] is None
    assert "writes" not in capsys.readouterr().out


@functools.cache
def small_run(clip):
    return char_rnn.train(TEXT, clip, 0.2, SMALL)


@pytest.mark.parametrize("clip", ["global", "layer"])
def test_char_rnn_clipped_is_finite(clip):
    history = small_run(clip)
    assert np.isfinite(history.column("loss")).all()
    assert math.isfinite(history.held_out)


@pytest.mark.parametrize("cell", in_tiers(char_rnn.CELLS, {"lstm"}))
def test_char_rnn_bounds_what_flows_back_in_every_cell(cell):
    settings = dataclasses.replace(SMALL, cell=cell, steps=1)
    first, loose, tight = (
        char_rnn.train(TEXT, clip, 0.2, dataclasses.replace(settings, max_norm=limit))
        for clip, limit in [("none", 1.0), ("cotangent", 1e30), ("cotangent", 1e-3)]
    )
    assert loose.rows[0]["norm"] == pytest.approx(first.rows[0]["norm"], rel=1e-6)
    assert tight.rows[0]["loss"] == pytest.approx(first.rows[0]["loss"], rel=1e-6)
    assert tight.rows[0]["norm"] < 0.99 * first.rows[0]["norm"]
    assert len(char_rnn.sample(tight, 20)) == 20


@pytest.mark.full
def test_char_rnn_same_seed_same_result():
    a, b = small_run("layer"), char_rnn.train(TEXT, "layer", 0.2, SMALL)
    assert (a.held_out, a.rows) == (b.held_out, b.rows)
    assert char_rnn.sample(a, 20) == char_rnn.sample(b, 20)
    assert len(char_rnn.sample(a, 20)) == 20


def test_char_rnn_clippers_share_start_and_data():
    one, other = (small_run(clip).rows[0] for clip in ("global", "layer"))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["norm"] == pytest.approx(other["norm"], rel=1e-6)


def test_char_rnn_norm_is_of_the_whole_gradient():
    history = small_run("layer")
    groups = history.groups("norm")
    assert set(groups) == {"embed", "recurrent", "readout"}
    whole = np.sqrt(sum(norm**2 for norm in groups.values()))
    np.testing.assert_allclose(whole, history.column("norm"), rtol=1e-5)


@pytest.mark.full
def test_char_rnn_learns():
    settings = char_rnn.Settings(steps=60, hidden=32, length=10, batch=8)
    history = char_rnn.train(TEXT, "global", 0.2, settings)
    first, last = history.rows[0]["loss"], history.held_out
    assert last < 0.8 * first


def test_char_rnn_encode():
    characters, ids = char_rnn.encode("b\u2019a\U0001f40db")
    assert characters == "ab\u2019\U0001f40d"
    assert "".join(characters[i] for i in ids) == "b\u2019a\U0001f40db"


def test_char_rnn_bits_of_a_uniform_guess():
    model = char_rnn.CharRNN(7, hidden=4, init_scale=1.0, rngs=nnx.Rngs(0))
    model.readout.kernel[...] = jnp.zeros((4, 7))
    bits = char_rnn.evaluate(model, jnp.zeros((2, 5), int))
    np.testing.assert_allclose(bits, math.log2(7), rtol=1e-6)


BAD = {
    "short": (
        {"length": 500},
        "the text has 920 characters, and at length 500 it take",
    ),
    "clip": (
        {"clip": "none,sgd"},
        "--clip must be one or more of none, global, layer,",
    ),
    "max_norm": ({"max_norm": -1.0}, "--max_norm must be a number greater than 0"),
    "rates": ({"rates": "nan"}, "--rates must be one or more numbers greater than 0"),
    "missing": ({"text": "no.txt"}, "cannot read 'no.txt': No such file"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_char_rnn_bad_arguments(tmp_path, given, message):
    with pytest.raises(SystemExit, match=f"^char_rnn: .*{message}"):
        launch(tmp_path, **given)


BAD_TEXTS = {
    "empty": (b"", "the text has 0 characters, and at length 10 it takes 22"),
    "one character": (b"x" * 50, "the text is nothing but 'x'"),
    "undecodable": (b"abc\xff" * 20, "not UTF-8 text: byte 3 cannot be decoded"),
}


@pytest.mark.parametrize("content, message", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_char_rnn_bad_text(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, text=path)


def test_char_rnn_bad_clip_from_a_notebook():
    with pytest.raises(ValueError, match="unknown clipper 'sgd': known are none, glob"):
        char_rnn.train(TEXT, "sgd", 0.2, SMALL)


def test_format_table_aligns():
    rows = [{"clip": "none", "loss": 12.34567}, {"clip": "layer", "loss": math.nan}]
    assert _common.format_table(rows).splitlines() == [
        "clip    loss",
        "none   12.35",
        "layer    nan",
    ]


def test_char_rnn_picture_names_every_method(tmp_path):
    small = small_run("layer")
    runs = [
        dataclasses.replace(small, clip=clip, rate=rate, held_out=rate + number)
        for number, clip in enumerate(char_rnn.CLIPS)
        for rate in (0.1, 0.2)
    ]
    figure = char_rnn.plot(runs)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert set(names) >= {f"{clip}, rate 0.1" for clip in char_rnn.CLIPS}
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1
    assert page.y0 <= box.y0 and box.y1 <= page.y1


@pytest.mark.full
def test_char_rnn_explodes_at_a_rate_that_a_clip_trains_at():
    settings = char_rnn.Settings(steps=40)
    none, clipped = (
        char_rnn.train(char_rnn.load_text(), clip, 0.2, settings)
        for clip in ("none", "global")
    )
    first = none.rows[0]["loss"]
    assert none.column("loss").max() > 1.5 * first
    assert clipped.column("loss").max() < 1.1 * first
    assert clipped.held_out < 0.8 * first


@pytest.mark.full
def test_char_rnn_takes_every_method():
    clips = [clip for clip in char_rnn.CLIPPERS if clip not in SMALL.clip]
    assert len(clips) == 20
    settings = dataclasses.replace(SMALL, steps=2)
    for clip in clips:
        run = char_rnn.train(TEXT, clip, 0.2, settings)
        assert np.isfinite(run.column("loss")).all()
        assert char_rnn.summarize([run])["clip"] == clip
        if clip == "skip_spikes":
            loss = run.column("clip0/norm/loss")
            np.testing.assert_allclose(loss, run.column("loss"), rtol=1e-6)
