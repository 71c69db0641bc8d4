"""The page of claims is what its script finds."""

import re
from pathlib import Path

import jax
import pytest

from examples import _run, evidence
from examples._evidence import page
from examples._evidence.claims import AGREES, FALSE, LIMITS, at_most, judge, near

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
VERDICTS = page.verdicts(PAGE)
# One compiled program serves several of them, or they need none.
QUICK = (
    "depth", "recurrence", "singular_values", "conditioning", "euler", "symmetric_mean",
    "symmetric_direction", "symmetric_sign", "centred", "floor", "units", "separable",
    "attention_scale", "flow", "layer_norm", "layer_norm_small", "spiral",
    "feedback", "heavy_ball", "steep_walls", "sensitive", "early_layers", "expands",
    "leverage", "powers", "adam_steps", "penalty", "easy_fakes",
)  # fmt: skip
TRAINED = {name for names in page.TRAINED for name in names}
REST = [name for name in page.CLAIMS if name not in {*QUICK, *TRAINED}]


@pytest.fixture(autouse=True)
def usual_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def measured(*names):
    return {name: page.CLAIMS[name]().verdict for name in names}


def on_page(*names):
    return {name: VERDICTS[name] for name in names}


def test_rows_are_those_of_the_script():
    assert [*VERDICTS] == [*page.CLAIMS]
    found = [*VERDICTS.values()]
    counts = [found.count(verdict) for verdict in (AGREES, LIMITS, FALSE)]
    summary = re.search(r"\*\*(\d+) claims: (\d+) agree, (\d+) hold .* (\d+) are", PAGE)
    assert [int(x) for x in summary.groups()] == [len(found), *counts]
    assert all(f"](img/{name}.png)" in PAGE for name, *_ in page.PICTURES.values())
    assert set(re.findall(r"^## (.*)$", PAGE, re.M)) == {t.TITLE for t in page.THEMES}


def test_quick_claims_are_as_on_the_page():
    assert measured(*QUICK) == on_page(*QUICK)


@pytest.mark.full
def test_other_claims_are_as_on_the_page():
    assert measured(*REST) == on_page(*REST)


@pytest.mark.full
@pytest.mark.parametrize("names", page.TRAINED, ids="-".join)
def test_training_is_as_on_the_page(names):
    if names[0] in ("private", "least_threshold"):
        pytest.importorskip("jax_privacy")
        pytest.importorskip("dp_accounting")
    assert measured(*names) == on_page(*names)


right, wrong = near(1.0, 1.0), at_most([0.0, 2.0], 1.0)


@pytest.mark.parametrize(
    ("claimed", "beyond", "verdict"),
    [([right], [], AGREES), ([right], [right], AGREES), ([right], [wrong], LIMITS),
     ([right, wrong], [], FALSE), ([wrong], [right], FALSE)],
)  # fmt: skip
def test_verdict_follows_from_the_numbers(claimed, beyond, verdict):
    row = judge("A claim.", "An experiment.", claimed, beyond)
    assert row.verdict == verdict
    texts = dict(zip(row.measured, row.spread, strict=True))
    assert texts.get("**1**", "0 to 2, 2 seeds") == "0 to 2, 2 seeds"
    assert ("**1**" in texts) == (verdict != AGREES)


def test_single_claims_are_printed_and_the_page_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--only=symmetric_mean", "--out=out"]
    _run.launch(evidence.run, evidence.Settings, flags)
    out = capsys.readouterr().out
    assert "symmetric_mean: false as stated" in out and "**0.25** (expected 0.5)" in out
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    with pytest.raises(SystemExit, match="evidence: there is no directory 'docs'"):
        _run.launch(evidence.run, evidence.Settings, ["--out=other"])
    with pytest.raises(SystemExit, match="--only must be one or more of depth, "):
        _run.launch(evidence.run, evidence.Settings, ["--only=everything"])
