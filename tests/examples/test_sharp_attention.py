import dataclasses
import math

import jax
import numpy as np
import pytest
import runs

from examples import sharp_attention

SMALL = sharp_attention.Settings(
    steps=3, width=8, layers=1, heads=2, length=8, batch=2, tau=1e-3
)
TEXT = "the quick brown fox jumps over the lazy dog; \n" * 20


@pytest.fixture(autouse=True, scope="module")
def standard():
    """As users run it: Optax's Muon mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def launch(tmp_path, **given):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small = dataclasses.asdict(SMALL) | {"rates": 0.1, "text": text}
    return runs.launch(sharp_attention, small | {"out": tmp_path / "out"} | given)


def test_end_to_end(tmp_path, capsys):
    rows = launch(tmp_path)
    clips = SMALL.clip
    assert [(row["clip"], row["step"]) for row in rows] == [
        (clip, step) for clip in clips for step in range(3)
    ]
    first = [row for row in rows if row["step"] == 0]
    assert len({row["loss"] for row in first}) == 1  # the same start, the same batch
    by = {row["clip"]: row for row in rows if row["step"] == 2}
    assert by["none"]["logits/clipped/blocks/0/attention"] == 0
    assert by["qk_clip"]["logits/clipped/blocks/0/attention"] == 3
    threshold = by["qk_clip"]["logits/threshold/blocks/0/attention"]
    assert threshold == pytest.approx(1e-3, rel=1e-6, abs=0)
    # Logits of a head were bounded one step before they are seen.
    assert by["qk_clip"]["largest logit"] < 0.2 * by["none"]["largest logit"]
    out = capsys.readouterr().out
    assert all(f"Best of {clip}: " in out for clip in clips)
    picture = tmp_path / "out" / "sharp_attention.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_adamw_and_several_rates(tmp_path):
    rows = launch(tmp_path, optimizer="adamw", rates="0.1,0.01", clip="none")
    assert [row["rate"] for row in rows] == [0.1] * 3 + [0.01] * 3
    assert rows[0]["loss"] == rows[3]["loss"]
    assert rows[-1]["loss"] != rows[2]["loss"]


def test_best_is_that_of_the_held_out_text():
    make = lambda clip, held: sharp_attention.History(clip, 0.1, [], held)
    each = [make("a", 2.0), make("b", math.nan), make("a", 1.0), make("b", 3.0)]
    best = sharp_attention.best(each)
    assert {clip: run.held_out for clip, run in best.items()} == {"a": 1.0, "b": 3.0}


def test_text_is_cut_into_bytes():
    ids, held_out = sharp_attention.cut_text("ä" * 50, SMALL)
    assert held_out.shape == (1, 9)
    assert len(ids) == 90
    np.testing.assert_array_equal(ids[:2], [0xC3, 0xA4])


BAD = {
    "clip": ({"clip": "qk"}, "--clip must be one or more of none, global, qk_clip, bo"),
    "heads": ({"heads": 3}, "--width=8 must be a multiple of --heads=3"),
    "length": ({"length": 900}, "the text has 920 bytes, and at length 900 it takes"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_bad_arguments(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)
