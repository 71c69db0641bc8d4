"""Files of every kind give the norms that were written, and broken ones one sentence.

`run.wandb` holds the 40 rows that Weights & Biases 0.31 wrote of an offline run.
"""

import base64
import html
import importlib
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import clipfx
from clipfx.calibrate import records
from clipfx.calibrate.__main__ import main
from clipfx.calibrate.reading import UnreadableRun, read_run

WANDB = pathlib.Path(__file__).with_name("run.wandb")
NORMS = np.random.default_rng(0).lognormal(0, 0.3, 60)
COLUMNS = {"loss": np.linspace(5, 1, 60), "train/grad_norm": NORMS}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(**columns):
    return [
        {"step": t, **{name: float(x[t]) for name, x in columns.items()}}
        for t in range(60)
    ]


def write_jsonl(folder):
    jsonl(folder / "metrics.jsonl", rows(**COLUMNS))
    return folder


def write_trainer_state(folder):
    path = folder / "trainer_state.json"
    log = [{"step": t, "grad_norm": x} for t, x in enumerate(NORMS)]
    path.write_text(json.dumps({"epoch": 1, "log_history": [*log, {"eval_loss": 1}]}))
    return path


def write_csv(folder):
    lines = ["step;loss;train/grad_norm", *(f"{t};1;{x}" for t, x in enumerate(NORMS))]
    (folder / "log.csv").write_text("\n".join(lines))
    return folder


def write_bare_csv(folder):
    (folder / "log.csv").write_text("\n".join(map(str, NORMS)))
    return folder / "log.csv"


def write_npy(folder):
    np.save(folder / "norms.npy", NORMS)
    return folder


def write_npz(folder):
    np.savez(folder / "norms.npz", grad_norm=NORMS, loss=NORMS + 1)
    return folder / "norms.npz"


def write_events(folder):
    """In two files, of which the second begins again at a step of the first."""
    writer = pytest.importorskip("tensorboardX").SummaryWriter
    for number, steps in enumerate((range(40), range(30, 60))):
        with writer(folder / "tb", filename_suffix=f".{number}") as board:
            for t in steps:
                board.add_scalar(
                    "train/grad_norm", NORMS[t] + (number == 0 and t > 29), t
                )
                board.add_scalar("loss", 1.0, t)
    return folder


def write_checkpoint(folder):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    tx = optax.chain(clipfx.record_norms(60), optax.trace(0.9))
    step = lambda state, x: (tx.update({"w": x[None]}, state)[1], None)
    start = tx.init({"w": jnp.ones(1)})
    state = jax.jit(lambda xs: jax.lax.scan(step, start, xs)[0])
    with checkpoint.StandardCheckpointer() as saver:
        saved = {"opt_state": state(jnp.asarray(NORMS, jnp.float32))}
        saver.save(folder / "100" / "default", saved)
    return folder


@pytest.mark.parametrize(
    "write",
    [write_jsonl, write_trainer_state, write_csv, write_bare_csv, write_npy, write_npz,
     write_events, write_checkpoint],
)  # fmt: skip
def test_what_was_written_is_read(write, tmp_path):
    (norms,) = read_run(write(tmp_path)).norms.values()
    np.testing.assert_allclose(norms, NORMS, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("grad_norm", True), ("train/grad_norm", True), ("gradient norm", True),
     ("optimizer/global_norm", True), ("norm", True), ("loss/norm", True),
     ("max_grad_norm", False), ("train/param_norm", False), ("median norm", False),
     ("layer_norm", False), ("update/norm", False), ("peak norm", False),
     ("mean norm", False)],
)  # fmt: skip
def test_columns_that_look_like_norms_of_gradients(name, is_one, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({name: x}) + "\n" for x in NORMS.tolist()))
    if is_one:
        assert [*read_run(path).norms] == [name]
    else:
        with pytest.raises(UnreadableRun, match="no column that looks like"):
            read_run(path)
    assert [*read_run(path, name).norms] == [name]


def test_weights_and_biases():
    norms = read_run(WANDB).norms["grad_norm"]
    np.testing.assert_array_equal(norms, 1 + np.arange(40) / 10)
    np.testing.assert_array_equal(read_run(WANDB, "n.a").norms["n.a"], np.arange(40))


def test_records_over_the_blocks_of_a_log():
    """Framed as LevelDB says: blocks of 32 KiB, chunks of first, middle and last."""
    sizes = [1, 32_740, 5, 40_000, 100_000, 32_754, 7]
    out, wanted = bytearray(b":W&B\0\0\0"), []
    for number, size in enumerate(sizes):
        left = record = bytes([number]) * size
        wanted.append(record)
        while left:
            room = 32768 - len(out) % 32768
            if room < 7:
                out += bytes(room)
                continue
            chunk, left = left[: room - 7], left[room - 7 :]
            whole, first, last = (
                len(chunk) == size,
                len(left) + len(chunk) == size,
                not left,
            )
            kind = 1 if whole else 2 if first else 4 if last else 3
            out += struct.pack("<IHB", 0, len(chunk), kind) + chunk
    assert [*records._wandb_records(bytes(out))] == wanted


def test_scalars_that_are_tensors():
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    data = b""
    for step, (kind, fields) in enumerate(
        [(1, {"float_val": [2.5]}), (2, {"tensor_content": struct.pack("<d", 3.5)})]
    ):
        event = events.Event(step=step)
        event.summary.value.add(tag="norm", tensor={"dtype": kind, **fields})
        event.summary.value.add(
            tag="text", tensor={"dtype": 7, "string_val": [b"abcd"]}
        )
        message = event.SerializeToString()
        data += struct.pack("<QI", len(message), 0) + message + bytes(4)
    seen = [*records.tensorboard_scalars(data + data[:20])]  # the last one torn
    assert seen == [("norm", 0, 2.5), ("norm", 1, 3.5)]


def test_our_own_metrics_are_read_by_group_and_of_one_run(tmp_path):
    names = ("clip0/norm/dec", "clip0/norm/enc", "clip1/norm/global", "norm")
    first = rows(**dict.fromkeys(names, NORMS))
    for row in first:
        row |= {"clip": "layer", "clip0/clip_rate/dec": row["step"] / 100}
    other = [{**row, "clip": "none"} for row in rows(norm=NORMS + 1)]
    run = read_run(jsonl(tmp_path / "metrics.jsonl", [*first, {"note": 1}, *other]))
    assert [*run.norms] == ["dec", "enc"]
    np.testing.assert_allclose(run.norms["enc"], NORMS)
    assert [note.split(";")[0] for note in run.notes] == [
        "It holds 2 runs",
        "These are of clip0/norm",
        "This run was clipped in 59% of its steps",
    ]
    assert [*read_run(tmp_path, "clip1/norm").norms] == ["global"]
    second = read_run(tmp_path, number=2)
    np.testing.assert_allclose(second.norms["norm"], NORMS + 1)
    assert "number 2 (none)" in second.notes[0]
    with pytest.raises(UnreadableRun, match="holds 2 runs, got number 3"):
        read_run(tmp_path, number=3)


def test_runs_that_have_norms_are_those_counted(tmp_path):
    scores = [{"method": name, "step": 60, "median norm": 1.0} for name in "abc"]
    own = [row | {"method": "none"} for row in rows(norm=NORMS)]
    path = jsonl(tmp_path / "metrics.jsonl", [*scores, *own])
    run = read_run(path)
    assert not run.notes
    np.testing.assert_allclose(run.norms["norm"], NORMS)
    run = read_run(jsonl(path, [*scores, *own, *scores, *own]))
    assert "holds 2 runs; these are the norms of number 1 (none)" in run.notes[0]
    np.testing.assert_allclose(run.norms["norm"], NORMS)


def test_the_program_prints_what_suggest_says(tmp_path, capsys):
    path = write_jsonl(tmp_path)
    assert main([str(path)]) == 0
    found = clipfx.calibrate.suggest({"train/grad_norm": NORMS})
    text = capsys.readouterr().out
    assert str(found) in text
    assert str(path / "metrics.jsonl") in text
    assert main([str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rates = [s.clip_rate for s in found.settings]
    assert [s["clip_rate"] for s in told["settings"]] == rates
    assert told["advice"] == found.advice


def test_the_page_has_pictures_for_a_window_and_a_telephone(tmp_path, capsys):
    norms = np.where(np.arange(60) == 7, np.inf, NORMS)
    path = jsonl(tmp_path / "metrics.jsonl", rows(**{"norm/<b>": norms}))
    assert main([str(path), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert not re.search(r"(src|href)=.?http", text)  # nothing to load
    data = re.findall(r'src(?:set)?="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(data) == 6
    widths = set()
    for picture in data:
        root = ElementTree.fromstring(base64.b64decode(picture))
        assert root.tag.endswith("svg")
        widths.add(round(float(root.get("width").removesuffix("pt")) / 72, 1))
    assert widths == {4.6, 9.6}
    found = clipfx.calibrate.suggest({"<b>": norms})
    for said in (found.begin, *found.warnings, *(s.warning for s in found.settings)):
        assert html.escape(said) in text
    assert main([str(path), "--html", str(tmp_path)]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_page_without_matplotlib_says_so(tmp_path, monkeypatch):
    for name in [x for x in sys.modules if x.startswith("matplotlib")]:
        monkeypatch.setitem(sys.modules, name, None)
    path = jsonl(tmp_path / "metrics.jsonl", rows(norm=NORMS))
    assert main([str(path), "--html", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    assert "<img" not in text
    assert "No pictures: clipfx.plots must have Matplotlib" in text
    assert "Methods on these norms" in text


def test_python_m_clipfx_says_which_programs_there_are(capsys):
    importlib.import_module("clipfx.__main__").main()
    assert "python -m clipfx.calibrate RUN" in capsys.readouterr().out


@pytest.mark.full
def test_programs_end_as_programs_do(tmp_path):
    def run(*words, **kwargs):
        done = subprocess.run([sys.executable, "-m", *words], text=True,
                              stderr=subprocess.PIPE, **kwargs)  # fmt: skip
        return done.returncode, done.stderr

    assert run("clipfx", stdout=subprocess.DEVNULL) == (0, "")
    status, text = run("clipfx.calibrate", str(tmp_path / "none"))
    assert (status, text.count("\n")) == (1, 1)
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    path = str(write_jsonl(tmp_path))
    assert run("clipfx.calibrate", path, stdout=writer) == (0, "")
    os.close(writer)


def few(path):
    return jsonl(path / "metrics.jsonl", rows(norm=NORMS)[:9])


def no_norm(path):
    return jsonl(path / "metrics.jsonl", rows(loss=NORMS))


def private(path):
    return jsonl(path / "metrics.jsonl", rows(noise_multiplier=NORMS, accuracy=NORMS))


def zeros(path):
    return jsonl(path / "metrics.jsonl", rows(norm=0 * NORMS))


def not_numbers(path):
    return jsonl(path / "metrics.jsonl", rows(norm=np.nan * NORMS))


def negative(path):
    return jsonl(path / "metrics.jsonl", rows(norm=-NORMS))


def empty(path):
    (path / "norms.npy").touch()
    return path / "norms.npy"


def unknown(path):
    (path / "model.pt").touch()
    return path / "model.pt"


def old_checkpoint(path):
    (path / "_METADATA").touch()
    return path


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path / "none", "does not exist; expected metrics.jsonl"),
        (lambda path: path, "holds no file that is known"),
        (unknown, "is of no kind that is known"),
        (empty, "holds no array of numbers; write it with np.save"),
        (few, "at least 20 finite steps that are not 0, got 9 of 9"),
        (zeros, "at least 20 finite steps that are not 0, got 0 of 60"),
        (not_numbers, "at least 20 finite steps that are not 0, got 0 of 60"),
        (negative, "norms must be >= 0"),
        (no_norm, "no column that looks like a gradient norm, but step, loss"),
        (private, "is of private training and has no norms, which would tell of"),
        (old_checkpoint, "cannot be restored by Orbax"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(make, sentence, tmp_path, capsys):
    assert main([str(make(tmp_path))]) == 1
    out, err = capsys.readouterr()
    assert sentence in err
    assert not out
    assert err.count("\n") == 1
    assert err.endswith(".\n")


def test_a_reader_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(UnreadableRun, match="pip install orbax-checkpoint"):
        read_run(old_checkpoint(tmp_path))


ALONE = """
import sys, types
sys.modules["jax"] = sys.modules["optax"] = None
for name, path in (("clipfx", sys.argv[1]), ("clipfx.calibrate", sys.argv[2])):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [path]
from clipfx.calibrate.reading import read_run
for path in sys.argv[3:]:
    (norms,) = read_run(path).norms.values()
    print(norms.sum())
"""


def test_files_are_read_without_jax(tmp_path):
    """With packages in place of clipfx, which itself imports JAX, and of calibrate."""
    writers = (write_jsonl, write_csv, write_npy)
    folders = [tmp_path / write.__name__ for write in writers]
    for write, folder in zip(writers, folders, strict=True):
        folder.mkdir()
        write(folder)
    package = clipfx.__path__[0]
    places = [package, f"{package}/calibrate", *map(str, folders), str(WANDB)]
    command = [sys.executable, "-c", ALONE, *places]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    totals = [float(line) for line in done.stdout.split()]
    np.testing.assert_allclose(totals, [NORMS.sum()] * 3 + [118.0])


def test_wrong_arguments_say_what_is_right(tmp_path, capsys):
    path = str(write_jsonl(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        main([path, "--rates", "5"])
    assert stopped.value.code == 2
    assert "for five percent write 0.05" in capsys.readouterr().err
    assert main([path, "--key", "grad_norm"]) == 1
    assert "has no 'grad_norm'; it has train/grad_norm" in capsys.readouterr().err


SUFFIXES = st.sampled_from([".jsonl", ".json", ".csv", ".npy", ".npz", ".wandb",
                            ".tfevents"])  # fmt: skip


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(SUFFIXES, st.binary(max_size=200), st.integers(0, 5000), st.booleans())
@example(".json", b"[" * 100_000, 0, False)
@example(".jsonl", b'{"norm": 1' + b"0" * 5000 + b"}", 0, False)
@example(".csv", b'norm\n"1', 0, False)
@example(".npz", b"PK\x05\x06" + bytes(18), 0, False)
def test_malformed_files_are_read_or_refused(tmp_path, suffix, data, at, inside):
    """Whatever bytes they hold, also within a file that was whole."""
    whole = WANDB.read_bytes() if inside else b""
    path = tmp_path / f"run{suffix}"
    path.write_bytes(whole[:at] + data + whole[at + len(data) :])
    try:
        run = read_run(path)
    except UnreadableRun as refused:
        assert "\n" not in str(refused)
    else:
        assert len({len(x) for x in run.norms.values()}) == 1
