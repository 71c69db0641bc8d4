import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from examples import _run

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = _run.flag(3, "Training steps.", least=1)
    rates: tuple[float, ...] = _run.flag((0.1, 0.3), "Learning rates.", above=0)
    epsilons: tuple[float, ...] = _run.flag((1.0,), "Epsilons.", above=0, most=math.inf)
    share: float = _run.flag(0.5, "A share.", least=0.01, most=0.99)
    delta: float = _run.flag(1e-5, "Delta.", above=0, below=1)
    clip: tuple[str, ...] = _run.flag(("none",), "Methods.", among=("none", "global"))
    dtype: str = _run.flag("float32", "Compute dtype.", among=("float32", "bfloat16"))
    layers: tuple[int, ...] = _run.flag((), "Layers to freeze.", least=0)
    data: str | None = _run.flag(None, "A file.")
    rate: float | None = _run.flag(None, "First learning rate.", above=0)
    fast: bool = _run.flag(False, "Whether it is fast.")
    fixed: int = 7  # no flag


@dataclasses.dataclass(frozen=True)
class Resuming:
    width: int = _run.flag(8, "Model width.", least=1)
    steps: int = _run.flag(3, "Training steps.", least=1, resumes=True)


def run(settings, out):
    if settings.data == "missing":
        pathlib.Path("nowhere/at_all").read_text()
    if settings.data == "package":
        import there_is_no_such_package  # noqa: F401
    if settings.data == "bad":
        raise ValueError("the data is bad")
    rows = [{"step": k, "loss": math.nan} for k in range(settings.steps)]
    out.jsonl(rows)
    out.figure(Figure((1, 1)), "picture.png")
    out.path("more.txt").write_text("more")


def go_on(settings, out):
    with out.path("log").open("a") as file:
        file.write(f"{settings.steps}\n")


def launch(tmp_path, *given, run=run, kind=Settings):
    _run.launch(run, kind, [f"--out={tmp_path / 'out'}", *given])
    return json.loads((tmp_path / "out" / "settings.json").read_text())


def settings_of(*given):
    seen = []
    _run.launch(lambda settings, out: seen.append(settings), Settings, given)
    return seen[0]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_defaults_are_those_of_the_dataclass():
    assert settings_of() == Settings()
    assert pathlib.Path("out/test_run").is_dir()


def test_every_type_is_read():
    got = settings_of(
        "--steps=5", "--rates=1e-3,1,1", "--epsilons=1,inf", "--clip=global,none",
        "--layers=0,2", "--data=a b", "--rate=2", "--fast",
    )  # fmt: skip
    assert got == Settings(
        steps=5, rates=(1e-3, 1.0), epsilons=(1.0, math.inf), clip=("global", "none"),
        layers=(0, 2), data="a b", rate=2.0, fast=True,
    )  # fmt: skip
    assert isinstance(got.rates[1], float)
    assert not settings_of("--fast", "--nofast").fast
    assert settings_of("--layers=").layers == ()


BAD = {
    "--steps=0": "--steps must be a whole number of at least 1, got '0'.",
    "--steps=1.5": "--steps must be a whole number of at least 1, got '1.5'.",
    "--steps": "Missing value for flag --steps.",
    "--rates=x": "--rates must be one or more numbers greater than 0, got 'x'.",
    "--rates=1,0": "--rates must be one or more numbers greater than 0, got '1,0'.",
    "--rates=inf": "--rates must be one or more numbers greater than 0, got 'inf'.",
    "--rates=": "--rates must be one or more numbers greater than 0, got ''.",
    "--epsilons=nan": (
        "--epsilons must be one or more numbers greater than 0, or inf, got 'nan'."
    ),
    "--share=1": "--share must be a number from 0.01 to 0.99, got '1'.",
    "--delta=1": "--delta must be a number between 0 and 1, got '1'.",
    "--clip=sgd": "--clip must be one or more of none, global, got 'sgd'.",
    "--dtype=int8": "--dtype must be one of float32, bfloat16, got 'int8'.",
    "--layers=-1": "--layers must be one or more whole numbers of at least 0, got",
    "--fast=maybe": "--fast must be true or false, got 'maybe'.",
    "--step=3": "there is no flag --step: did you mean --steps?",
    "--fixed=3": "there is no flag --fixed: --help shows those there are.",
    "layer": "unexpected argument 'layer': flags begin with --.",
    "--data=bad": "the data is bad",
    "--data=missing": "cannot open 'nowhere/at_all': No such file or directory.",
    "--data=package": "No module named 'there_is_no_such_package': pip install -e",
}


@pytest.mark.parametrize("given", BAD)
def test_what_is_wrong_is_one_sentence(given):
    with pytest.raises(SystemExit) as error:
        _run.launch(run, Settings, [given])
    said = str(error.value.code)  # a text, which Python prints; the status is 1
    assert said.startswith(f"test_run: {BAD[given]}")
    assert "\n" not in said


def test_results(tmp_path, capsys):
    record = launch(tmp_path, "--steps=2", "--epsilons=1,inf")
    assert record["example"] == "test_run"
    assert record["steps"] == 2 and record["fixed"] == 7
    assert record["epsilons"] == [1.0, "inf"]
    assert record["data"] is None
    rows = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert rows == [f'{{"step": {k}, "loss": null}}' for k in range(2)]
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
    names = "metrics.jsonl, picture.png and more.txt"
    told = f"Wrote {names} to {tmp_path / 'out'}."
    assert capsys.readouterr().out.splitlines()[-1] == told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("settings.json", "metrics.jsonl", "picture.png", "more.txt")
    }


def test_results_of_other_settings_stay_unless_told(tmp_path):
    launch(tmp_path, "--steps=2")
    launch(tmp_path, "--steps=2")
    told = "holds a run with --steps=2 --rates=0.1,0.3, this has --steps=3 --rates=0.5"
    with pytest.raises(SystemExit, match=f"{told}: give another --out, or --overwrite"):
        launch(tmp_path, "--rates=0.5")
    assert launch(tmp_path, "--rates=0.5", "--overwrite")["rates"] == [0.5]


def test_results_of_others_stay_unless_told(tmp_path):
    launch(tmp_path)
    file = tmp_path / "out" / "settings.json"
    file.write_text(json.dumps({"example": "outliers"}))
    with pytest.raises(SystemExit, match="out holds a run of outliers: give another"):
        launch(tmp_path)
    file.unlink()
    with pytest.raises(SystemExit, match="out holds a run: give another --out, or --o"):
        launch(tmp_path)
    launch(tmp_path, "--overwrite")


def test_a_failed_run_leaves_no_settings(tmp_path):
    with pytest.raises(SystemExit, match="the data is bad"):
        launch(tmp_path, "--data=bad")
    launch(tmp_path)


def test_a_run_that_resumes(tmp_path):
    again = lambda *given: launch(tmp_path, *given, run=go_on, kind=Resuming)
    assert again("--steps=3")["steps"] == 3
    assert again("--steps=4")["steps"] == 4
    assert (tmp_path / "out" / "log").read_text() == "3\n4\n"
    told = "holds a run with --width=8, this has --width=9: give another --out, or del"
    with pytest.raises(SystemExit, match=told):
        again("--width=9")
    with pytest.raises(SystemExit, match="there is no flag --overwrite"):
        again("--overwrite")


def test_a_directory_that_cannot_be(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit, match=r"cannot write to '.*out': File exists\."):
        launch(tmp_path)


def test_help_has_the_docstring_and_these_flags(capsys, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "What it shows.")
    with pytest.raises(SystemExit) as error:
        _run.launch(run, Settings, ["--help"])
    assert error.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "What it shows."
    of = {line.split()[0].split("=")[0]: line for line in lines[4:]}
    names = {f"--{f.name}" for f in dataclasses.fields(Settings)} - {"--fixed"}
    assert set(of) == names | {"--out", "--overwrite", "--help"}
    assert of["--clip"] == f"  {'--clip=none':26}  Methods: none, global."
    assert of["--delta"].split()[0] == "--delta=1e-05"
    assert max(map(len, lines)) <= 88


def test_a_command_is_quiet_and_fails_with_status_1():
    command = [sys.executable, "-m", "examples.sharp_attention", "--rates=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "sharp_attention: --rates must be one or more numbers greater than 0, got '0'."
    ]
