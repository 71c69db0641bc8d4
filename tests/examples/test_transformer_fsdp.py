"""The decoder on a mesh: killed and resumed, in two processes, from bad checkpoints."""

import dataclasses
import json
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil
import pytest
from runs import assert_same_numbers, environment, kill_when, numbers_of
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tiers import in_tiers

from examples import _checkpoints, _run, _training, transformer_fsdp
from examples._clippers import CLIPPERS
from examples._log import read_rows, resumes_of
from examples._training import Settings
from examples.transformer_fsdp import train

ROOT = pathlib.Path(__file__).parents[2]
TINY = {"width": 16, "layers": 1, "heads": 2, "length": 8, "batch": 8, "warmup": 2}
TEXT = "the quick brown fox jumps over the lazy dog; \n" * 20


def command(out, **given):
    given = {**TINY, "clip": "zclip", "out": out, **given}
    flags = [f"--{name}={value}" for name, value in given.items()]
    return [sys.executable, "-m", "examples.transformer_fsdp", *flags]


def run(cache, out, **given):
    done = subprocess.run(
        command(out, **given),
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def shown(out):
    """What TensorBoard shows, by name and step: a run replaces what it does again."""
    found = {}
    files = (out / "tensorboard").glob("events.*")
    for file in sorted(files, key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while len(data) > 8:  # length, its checksum, an event, its checksum
            end = 12 + int.from_bytes(data[:8], "little")
            if len(data) < end:
                break  # torn by a kill
            event, data = Event.FromString(data[12:end]), data[end + 4 :]
            if event.session_log.status == SessionLog.START:
                found = {key: x for key, x in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def assert_same_run(out, other, step):
    """The same metrics, byte for byte, and the same numbers, bit for bit."""
    assert rows_of(out) == rows_of(other)
    assert [json.loads(row)["step"] for row in rows_of(out)] == list(range(step))
    assert shown(out) == shown(other)
    assert_same_numbers(*(numbers_of(x / "checkpoints", step) for x in (out, other)))


@pytest.mark.full
def test_killed_five_times_equals_undisturbed(tmp_path):
    steps, cache = 60, tmp_path / "cache"
    flags = {"steps": steps, "save_every": 7, "cpu_devices": 4, "model": 2}
    run(cache, tmp_path / "whole", **flags)

    out = tmp_path / "killed"
    rows = lambda: len(rows_of(out)) if (out / "metrics.jsonl").exists() else 0
    writing = lambda: any((out / "checkpoints").glob("*tmp*"))
    after = lambda target: lambda: rows() > target
    in_a_save_after = lambda target: lambda: rows() > target and writing()
    draw = random.Random(time.time_ns())
    for moment in (after, in_a_save_after, after, in_a_save_after, after):
        process = subprocess.Popen(
            command(out, **flags),
            cwd=ROOT,
            env=environment(cache),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        kill_when(moment(rows() + draw.randint(1, 7)), process)
        assert rows() < steps
    said = run(cache, out, **flags)
    assert "Goes on after step" in said
    assert_same_run(out, tmp_path / "whole", steps)


# ----------------------------------------------------------------- in this process

SMALL = Settings(**TINY, dtype="float32")
HOW = {"clip": "zclip", "steps": 4, "save_every": 2, "data": 4, "model": 2}


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Adam's bias corrections and norms in half precision mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Four steps, with checkpoints after two and four."""
    out = tmp_path_factory.mktemp("whole")
    train(SMALL, TEXT, out, **HOW)
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy to go on from, or to damage."""
    return pathlib.Path(shutil.copytree(whole, tmp_path / "out"))


def test_nothing_is_left_to_do(out, capsys):
    before = rows_of(out)
    want = {
        (name, row["step"]): x
        for row in map(json.loads, before)
        for name, x in row.items()
        if name != "step" and x is not None
    }
    assert shown(out) == pytest.approx(want, rel=1e-6)
    assert train(SMALL, TEXT, out, **HOW) is None
    assert "has done 4 of --steps=4 already" in capsys.readouterr().out
    assert rows_of(out) == before


@pytest.mark.full
def test_on_another_mesh_it_goes_on_up_to_rounding(out, tmp_path):
    train(SMALL, TEXT, tmp_path / "straight", **{**HOW, "steps": 6})
    row = train(SMALL, TEXT, out, **{**HOW, "steps": 6, "data": 2, "model": 1})
    assert row["mesh"] == "2 x 1"
    want, got = (
        [json.loads(row) for row in rows_of(place)]
        for place in (tmp_path / "straight", out)
    )
    assert got[:4] == want[:4]
    assert_close_rows(got[4:], want[4:])


def assert_close_rows(got, want):
    """Metrics that are equal up to the order in which gradients are added up."""
    finite = lambda row: {k: v for k, v in row.items() if v is not None}
    for a, b in zip(got, want, strict=True):
        assert finite(a) == pytest.approx(finite(b), rel=1e-4)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(bytes(data))


def empty(file):
    file.write_bytes(b"")


DAMAGES = {"truncate": truncate, "flip": flip, "empty": empty}


def train_alone(out):
    """As `train` in a process of its own: its status, what it said, and its errors.

    Reads that Orbax gives up on end whenever they do, and fail the test that runs then.
    """
    code = f"from examples.transformer_fsdp import *; {SMALL=}; {TEXT=}; {HOW=}; "
    code += f"train(SMALL, TEXT, pathlib.Path({str(out)!r}), **HOW)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("damage", in_tiers(DAMAGES, {"flip"}))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, out, damage):
    # All of them: which ones the merged tree still refers to is a matter of timing.
    files = list((out / "checkpoints" / "4" / "model").rglob("d/*"))
    assert files
    for file in files:
        damage(file)
    status, said, errors = train_alone(out)
    assert not status, errors[-3000:]
    assert "Checkpoint 4 cannot be read and is put aside: " in said
    assert "Goes on after step 2" in said
    assert_same_run(out, whole, 4)
    assert resumes_of(whole) == [] and resumes_of(out) == [2]
    upper, lower = transformer_fsdp.plot(read_rows(out), resumes_of(out)).axes
    for ax in (upper, lower):
        (mark,) = [x for x in ax.lines if x.get_label() == "resumed"]
        assert [*mark.get_xdata()] == [1.5, 1.5]
    assert "threshold" in lower.get_legend_handles_labels()[1]


@pytest.mark.full
def test_numbers_that_orbax_takes_for_good_are_compared(whole, out, capsys):
    path = out / "checkpoints"
    with _checkpoints.manager(path) as manager:
        saved = numbers_of(out / "checkpoints", 4)
        items = {"model": {}, "clip": {}}
        for name, x in saved.items():
            items[name.split("/")[0]][name.split("/", 1)[1]] = x
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        about = manager.restore(4, args=args)["about"]
        shutil.rmtree(path / "4")
        name = "params.readout.kernel"
        items["model"][name] = items["model"][name].copy()
        items["model"][name][0, 0] += 1e-7
        manager.reload()
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(
            4, args=ocp.args.Composite(about=ocp.args.JsonSave(about), **trees)
        )
    train(SMALL, TEXT, out, **HOW)
    said = capsys.readouterr().out
    assert "the numbers of ['model'] are not those saved" in said
    assert_same_run(out, whole, 4)


def test_without_a_good_checkpoint_there_is_an_error(out):
    for step in ("2", "4"):
        for file in (out / "checkpoints" / step / "model").rglob("*"):
            if file.is_file():
                empty(file)
    *_, errors = train_alone(out)
    assert re.search(r"ValueError: none of the checkpoints .* \(steps \[2, 4\]", errors)


def test_a_foreign_checkpoint_is_an_error(tmp_path):
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        manager.save(3, args=ocp.args.StandardSave({"w": np.ones(3)}))
    with pytest.raises(
        ValueError, match=r"of another program \(step 3\); give another"
    ):
        train(SMALL, TEXT, tmp_path, **HOW)


CHANGES = {
    "clip": ({"clip": "global"}, r"with --clip=zclip, and this run has --clip=global"),
    "removed": ({"clip": "none"}, r"give the same clipper, or --reset_clip_state"),
    "threshold": ({"max_norm": 2.0}, r"--max_norm=1.0, and this run has --max_norm=2"),
}


@pytest.mark.parametrize("given, message", CHANGES.values(), ids=CHANGES)
def test_another_clipper_is_an_error(out, given, message):
    with pytest.raises(ValueError, match=message):
        train(SMALL, TEXT, out, **{**HOW, "steps": 5, **given})


@pytest.mark.full
def test_another_clipper_starts_afresh_if_told_to(out, capsys):
    given = {**HOW, "steps": 6, "clip": "layer", "reset_clip_state": True}
    before = numbers_of(out / "checkpoints", 4)
    train(SMALL, TEXT, out, **given)
    assert "Goes on after step 4" in (said := capsys.readouterr().out)
    assert "with a fresh clip state" in said
    rows = [json.loads(row) for row in rows_of(out)]
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[4]["clip0/steps/embed"] == 1  # the clip has seen one step
    after = numbers_of(out / "checkpoints", 6)
    count = next(name for name in after if "adamw" in name and name.endswith("count"))
    assert (before[count], after[count]) == (4, 6)  # AdamW has seen six
    # Told once more, the run has no other clipper any more, and keeps its state.
    train(SMALL, TEXT, out, **{**given, "steps": 7})
    assert json.loads(rows_of(out)[6])["clip0/steps/embed"] == 3


def test_other_settings_or_text_are_an_error(out):
    other = Settings(**{**TINY, "layers": 2, "dtype": "float32"})
    with pytest.raises(
        ValueError, match=r"with --layers=1, and this run has --layers=2"
    ):
        train(other, TEXT, out, **HOW)
    with pytest.raises(ValueError, match="the checkpoint was trained with --text="):
        train(SMALL, TEXT[1:], out, **HOW)


def test_metrics_that_are_missing_are_told_of(out, capsys):
    (out / "metrics.jsonl").unlink()
    train(SMALL, TEXT, out, **{**HOW, "steps": 5})
    assert "does not hold all of the first 4 steps" in capsys.readouterr().out
    assert [json.loads(row)["step"] for row in rows_of(out)] == [4]


@pytest.mark.full
def test_accumulated_gradients_are_those_of_the_batch():
    """The mean over parts, of the same passages, without dropout."""
    calm = dataclasses.replace(SMALL, dropout=0.0)
    mesh = transformer_fsdp.make_mesh(calm, 1, 1)
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    passages = transformer_fsdp.passages_at(ids, 0, calm, place)
    tx = _training.make_transform(calm, "none", 1.0)
    graph, init = _training.make_init(calm, tx)
    state, seen = jax.jit(init)(), []
    for parts in (1, 2):
        cut = dataclasses.replace(calm, accumulate=parts)
        numbers = jax.jit(_training.make_step(cut, graph, tx)[1])(state, passages)[1]
        seen.append({k: v.item() for k, v in numbers.items()})
    assert_close_rows(seen[1:], seen[:1])


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_are_float32_where_they_are_clipped(parts):
    half = dataclasses.replace(SMALL, dtype="bfloat16", accumulate=parts)
    tx, seen = _training.make_transform(half, "global", 1.0), []

    def update(updates, *args, **extra):
        seen.extend(x.dtype.name for x in jax.tree.leaves(updates))
        return tx.update(updates, *args, **extra)

    graph, init = _training.make_init(half, tx)
    step = _training.make_step(half, graph, tx._replace(update=update))[1]
    passages = jax.ShapeDtypeStruct((half.batch, half.length + 1), "int32")
    logits = "bf16[8,8,256]" if parts == 1 else "bf16[4,8,256]"
    assert logits in str(jax.make_jaxpr(step)(jax.eval_shape(init), passages))
    assert set(seen) == {"float32"}


BAD_MESHES = {
    "too many": ({}, {"data": 8, "model": 2}, "takes 16 devices, and there are 8"),
    "heads": (
        {"heads": 1},
        {"data": 2, "model": 2},
        "--heads is 1, which --model=2 do",
    ),
    "batch": (
        {"batch": 6},
        {"data": 4},
        "--batch over --accumulate is 6, which --data=4",
    ),
    "parts": (
        {"accumulate": 3},
        {"data": 2},
        "--batch is 8, which --accumulate=3 does",
    ),
    "width": ({"width": 18}, {"data": 4}, "--width is 18, which --data=4 does not div"),
    "split": ({"heads": 3}, {"data": 2}, "--width is 16, which --heads=3 does not div"),
    "bytes": ({"heads": 3, "width": 48}, {"data": 1, "model": 3}, "256 bytes is 256"),
}


@pytest.mark.parametrize("changed, mesh, message", BAD_MESHES.values(), ids=BAD_MESHES)
def test_a_mesh_that_cannot_be_is_an_error(tmp_path, changed, mesh, message):
    settings = Settings(**{**TINY, **changed})
    with pytest.raises(ValueError, match=message):
        train(settings, TEXT, tmp_path, **mesh)
    assert not list(tmp_path.iterdir())


def test_a_short_text_and_an_unknown_clipper_are_errors(tmp_path):
    with pytest.raises(ValueError, match="the text has 17 bytes, and at length 8 it"):
        train(SMALL, "x" * 17, tmp_path)
    with pytest.raises(ValueError, match="unknown clipper 'sgd': known are none, glo"):
        train(SMALL, TEXT, tmp_path, clip="sgd")


def test_parameters_and_moments_are_split_and_metrics_are_not():
    mesh = transformer_fsdp.make_mesh(SMALL, 4, 2)
    tx = _training.make_transform(SMALL, "spam", 1.0)
    _, init = _training.make_init(SMALL, tx)
    shapes = jax.eval_shape(init)
    places = _training.shardings_of(shapes, tx, mesh)
    split = {}
    for (path, place), x in zip(
        jax.tree_util.tree_flatten_with_path(places)[0],
        jax.tree.leaves(shapes),
        strict=True,
    ):
        size = int(np.prod(place.shard_shape(x.shape)))
        split[jax.tree_util.keystr(path, simple=True, separator=".")] = x.size // size
    kernels = {k: v for k, v in split.items() if k.endswith("query.kernel")}
    assert len(kernels) == 4  # parameters, two moments, and those of the clip
    assert set(kernels.values()) == {8}
    assert split["step"] == split["key"] == 1


@pytest.mark.parametrize("clip", in_tiers(CLIPPERS.keys(), {"zclip", "error_feedback"}))
def test_every_clipper_has_a_state_that_can_be_saved_apart(clip):
    tx = _training.make_transform(SMALL, clip, 1.0)
    _, init = _training.make_init(SMALL, tx)
    state = jax.eval_shape(init)
    items = _training.items_of(state)
    names = [name for item in items.values() for name in item]
    assert len(names) == len(jax.tree.leaves(state)) + 1  # the step is in both
    assert sum("adamw" in name for name in items["model"]) > 0
    assert not any("adamw" in name or "params" in name.split(".")[0]
                   for name in items["clip"])  # fmt: skip
    assert _training.from_items(state, items) == state
    fresh = {"model": items["model"]}
    assert _training.from_items(state, fresh) == state


# -------------------------------------------------------------------- processes


def workers_of(out):
    """Processes that were started for a run, wherever they are now."""
    lines = (
        process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])
    )
    return [line for line in lines if f"--out={out}" in line]


@pytest.mark.full
def test_two_processes_killed_and_resumed_equal_one(tmp_path):
    # Sums over two devices have one order, whoever adds up.
    flags = {"save_every": 3, "cpu_devices": 4, "model": 2, "dropout": 0.0}
    cache, out = tmp_path / "cache", tmp_path / "two"
    process = subprocess.Popen(
        command(out, processes=2, steps=10_000, **flags),
        cwd=ROOT,
        env=environment(cache),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    kill_when((out / "checkpoints" / "3").exists, process)
    deadline = time.monotonic() + 20
    while workers := workers_of(out):  # nobody goes on without the one that started it
        assert time.monotonic() < deadline, workers
        time.sleep(0.1)
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    steps = max(int(name) for name in saved if name.isdigit()) + 2
    said = run(cache, out, processes=2, steps=steps, **flags)
    assert "Goes on after step" in said
    assert "Gloo" not in said
    assert (out / "transformer_fsdp.png").read_bytes().startswith(b"\x89PNG")
    run(cache, tmp_path / "one", steps=steps, **flags)
    assert_same_run(out, tmp_path / "one", steps)


@pytest.mark.full
def test_an_error_of_all_processes_is_told_and_ends_them(tmp_path):
    given = {"processes": 2, "cpu_devices": 4, "data": 8}
    done = subprocess.run(
        command(tmp_path, **given),
        cwd=ROOT,
        env=environment(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "takes 8 devices, and there are 4." in done.stderr
    assert "Traceback" not in done.stderr


def test_devices_that_cannot_be_shared_out_are_an_error(tmp_path):
    given = [f"--out={tmp_path / 'out'}", "--processes=3"]
    with pytest.raises(SystemExit, match="cpu_devices=8 cannot be shared out evenly"):
        _run.launch(transformer_fsdp.run, transformer_fsdp.Flags, given)
