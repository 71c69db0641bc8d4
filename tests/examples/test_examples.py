import dataclasses
import functools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from flax import nnx
from tiers import in_tiers

from examples import _common, char_rnn

SMALL = char_rnn.Settings(steps=3, hidden=8, length=10, batch=2)
TEXT = "the quick brown fox jumps over the lazy dog; \n" * 20


@pytest.fixture(autouse=True)
def parsed():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def run_main(tmp_path, **given):
    small = {f.name: getattr(SMALL, f.name) for f in dataclasses.fields(SMALL)}
    small["out"] = str(tmp_path / "out")
    with flagsaver.flagsaver(**(small | given)):
        char_rnn.main(["char_rnn"])
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def test_char_rnn_end_to_end(tmp_path, text_file, capsys):
    rows = run_main(tmp_path, text=text_file)
    assert [(row["clip"], row["step"]) for row in rows] == [
        (clip, step) for clip in char_rnn.DEFAULT for step in range(3)
    ]
    assert {"loss", "norm", "ms"} < rows[0].keys()
    assert rows[0]["clip0/threshold/global"] > 3e38  # none
    assert rows[3]["clip0/threshold/global"] == 1.0
    assert "clip0/factor/recurrent" in rows[-1]
    table = capsys.readouterr().out.splitlines()
    for clip in char_rnn.DEFAULT:
        assert any(line.split()[:1] == [clip] for line in table)
        assert f"--- {clip} writes:" in table
    picture = tmp_path / "out" / "char_rnn.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()

    rows = run_main(tmp_path, text=text_file, steps=2, clip=["none", "none"])
    assert [row["clip"] for row in rows] == ["none", "none"]
    assert picture.exists()


@pytest.mark.full
def test_char_rnn_default_text(tmp_path):
    rows = run_main(tmp_path, clip=["global"], steps=2)
    assert len(char_rnn.load_text()) > 400_000
    assert len(rows) == 2


@pytest.mark.full
def test_char_rnn_few_characters(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("a\U0001f40d" * 30, encoding="utf-8")
    rows = run_main(tmp_path, text=str(path), steps=1, clip=["global"])
    assert all(row["loss"] is not None for row in rows)


@pytest.mark.full
def test_char_rnn_nonfinite_run(tmp_path, text_file, capsys):
    rows = run_main(tmp_path, text=text_file, learning_rate=1e38, clip=["none"])
    assert rows[-1]["loss"] is None
    out = capsys.readouterr().out
    assert "none writes" not in out
    row = next(line for line in out.splitlines() if line.startswith("none"))
    assert int(row.split()[-2]) > 0  # the column of non-finite steps


@functools.cache
def small_run(clip):
    return char_rnn.train(TEXT, clip, SMALL)


@pytest.mark.parametrize("clip", ["global", "layer"])
def test_char_rnn_clipped_is_finite(clip):
    history = small_run(clip)
    assert np.isfinite(history.column("loss")).all()
    assert math.isfinite(history.held_out)


@pytest.mark.parametrize("cell", in_tiers(char_rnn.CELLS, {"lstm"}))
def test_char_rnn_bounds_what_flows_back_in_every_cell(cell):
    settings = dataclasses.replace(SMALL, cell=cell, steps=1)
    first, loose, tight = (
        char_rnn.train(TEXT, clip, dataclasses.replace(settings, max_norm=limit))
        for clip, limit in [("none", 1.0), ("cotangent", 1e30), ("cotangent", 1e-3)]
    )
    assert loose.rows[0]["norm"] == pytest.approx(first.rows[0]["norm"], rel=1e-6)
    assert tight.rows[0]["loss"] == pytest.approx(first.rows[0]["loss"], rel=1e-6)
    assert tight.rows[0]["norm"] < 0.99 * first.rows[0]["norm"]
    assert len(char_rnn.sample(tight, 20)) == 20


@pytest.mark.full
def test_char_rnn_same_seed_same_result():
    a, b = small_run("layer"), char_rnn.train(TEXT, "layer", SMALL)
    assert a.held_out == b.held_out
    without_time = lambda row: {k: v for k, v in row.items() if k != "ms"}
    assert list(map(without_time, a.rows)) == list(map(without_time, b.rows))
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
    history = char_rnn.train(TEXT, "global", settings)
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


BAD_TEXTS = {
    "missing": (None, "cannot read .*No such file"),
    "empty": (b"", "the text has 0 characters, and at length 10 it takes 22"),
    "short": (b"x" * 21, "the text has 21 characters"),
    "one character": (b"x" * 50, "the text is nothing but 'x'"),
    "undecodable": (b"abc\xff" * 20, "not UTF-8 text: byte 3 cannot be decoded"),
}


@pytest.mark.parametrize("content, message", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_char_rnn_bad_text(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        run_main(tmp_path, text=str(path))


def test_char_rnn_bad_out(tmp_path, text_file):
    with pytest.raises(SystemExit, match=r"cannot write to .*text\.txt"):
        run_main(tmp_path, text=text_file, out=text_file)


BAD_CLIPS = {
    "unknown": (["none", "sgd"], "unknown clipper 'sgd': known are none, global, "),
    "nothing": ([], "no clipper given: known are none, global, layer, "),
}


@pytest.mark.parametrize("clip, message", BAD_CLIPS.values(), ids=BAD_CLIPS)
def test_char_rnn_bad_clip(tmp_path, clip, message):
    with pytest.raises(SystemExit, match=message):
        run_main(tmp_path, clip=clip)


def test_char_rnn_stray_argument():
    with pytest.raises(SystemExit, match="unexpected argument 'layer'"):
        char_rnn.main(["char_rnn", "layer"])


BAD_FLAGS = {
    "steps": ({"steps": 0}, "positive"),
    "max_norm": ({"max_norm": -1.0}, "must be greater than 0"),
    "nan": ({"learning_rate": math.nan}, "must be greater than 0"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_char_rnn_bad_flag(given, message):
    with (
        pytest.raises(flags.IllegalFlagValueError, match=message),
        flagsaver.flagsaver(**given),
    ):
        pass


def test_char_rnn_bad_clip_from_a_notebook():
    with pytest.raises(ValueError, match="unknown clipper 'sgd': known are none, glob"):
        char_rnn.train(TEXT, "sgd", SMALL)


def test_format_table_aligns():
    rows = [{"clip": "none", "loss": 12.34567}, {"clip": "layer", "loss": math.nan}]
    assert _common.format_table(rows).splitlines() == [
        "clip    loss",
        "none   12.35",
        "layer    nan",
    ]


@pytest.mark.full
def test_char_rnn_takes_every_method():
    clips = [clip for clip in char_rnn.CLIPPERS if clip not in char_rnn.DEFAULT]
    assert len(clips) == 20
    for clip in clips:
        history = char_rnn.train(TEXT, clip, dataclasses.replace(SMALL, steps=2))
        assert np.isfinite(history.column("loss")).all()
        assert char_rnn.summarize(history)["clip"] == clip
        if clip == "skip_spikes":
            loss = history.column("clip0/norm/loss")
            np.testing.assert_allclose(loss, history.column("loss"), rtol=1e-6)
