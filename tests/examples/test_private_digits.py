import contextlib
import dataclasses
import gzip
import io
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

pytest.importorskip("jax_privacy")
pytest.importorskip("dp_accounting")

from tiers import in_tiers

from clipfx import privacy
from clipfx.calibrate.reading import UnreadableRun, read_run
from examples import private_digits
from examples.private_digits import VARIANTS, Plan, Settings

SMALL = Settings(epsilons=(1.0,), rates=(0.1, 0.3), batch=512, steps=40, runs=2)
DATA = private_digits.load_data()
COUNT = len(DATA.labels)
FEW = {name: VARIANTS[name] for name in ("none", "hard", "linear none", "laplace")}


def launch(tmp_path, **given):
    small = dataclasses.asdict(SMALL) | {"out": tmp_path / "out"}
    return runs.launch(private_digits, small | given)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder, what was printed, and the rows of the file."""
    folder, printed = tmp_path_factory.mktemp("small"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_digits, "ROUNDS", 3)
        patch.setattr(private_digits, "VARIANTS", FEW)
        with contextlib.redirect_stdout(printed):
            rows = launch(folder)
    return folder, printed.getvalue(), rows


def plan_of(name, noise_multiplier=1.0, steps=3, rates=(0.1,)):
    variant = VARIANTS[name]
    return Plan(name, variant, 1.0, noise_multiplier, 64, steps, rates)


def start_and_step(plan):
    learner, key = private_digits.start(plan, DATA, 0)
    step = jax.jit(private_digits.make_step(plan))
    return lambda batch: step(learner, jnp.float32(0.1), key, batch)


def assert_close(one, other, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), one, other
    )


@pytest.mark.parametrize(
    "optimizer", in_tiers(list(private_digits.OPTIMIZERS), {"sgd"})
)
def test_optimizers_cost_alike_and_move(optimizer):
    settings = dataclasses.replace(SMALL, optimizer=optimizer, steps=3)
    plans = {p.name: p for p in private_digits.list_plans(settings, COUNT)}
    plan = plans["hard"]._replace(batch=64)
    usual = private_digits.list_plans(dataclasses.replace(SMALL, steps=3), COUNT)
    assert [p.noise_multiplier for p in plans.values()] == [
        p.noise_multiplier for p in usual
    ]
    batch = next(private_digits.draw_batches(DATA, plan, 0))
    with jax.numpy_dtype_promotion("standard"):  # for Optax
        params, _, private = start_and_step(plan)(batch)
    first, _ = private_digits.start(plan, DATA, 0)
    assert float(optax.tree.norm(optax.tree.sub(params, first[0]))) > 1e-3
    scaled = plan.scale is not None
    assert (
        scaled == (optimizer == "private_adam") == bool(jax.tree.leaves(private.scale))
    )
    limit = 10.0 if scaled else 1.0
    assert float(private.threshold[0]) == pytest.approx(limit, rel=1e-5)


@pytest.mark.full
def test_end_to_end(small):
    folder, printed, rows = small
    assert [(row["variant"], row["target"], row["seed"]) for row in rows] == [
        (name, target, seed)
        for name, variant in FEW.items()
        for target in (SMALL.epsilons if variant.response else [None])
        for seed in (0, 1)
    ]
    for row in rows:
        assert row["test"] == row["by_rate"][SMALL.rates.index(row["rate"])]
        assert 0 <= row["test"] <= 1 and row["steps"] == 40
    starts = [line.split("  ")[0] for line in printed.splitlines()]
    for name in FEW:  # accuracies, rates and times; noise and epsilon
        assert starts.count(name) == 5 if name in ("hard", "laplace") else 3
    with pytest.raises(UnreadableRun, match="of private training and has no norms"):
        read_run(folder / "out")
    picture = folder / "out" / "private_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_tables_are_of_the_file(small):
    _, printed, rows = small
    tests = [x["test"] for x in rows if (x["variant"], x["target"]) == ("hard", 1)]
    cell = f"{np.mean(tests):.3f} ({min(tests):.3f}-{max(tests):.3f})"
    lines = [x for x in printed.splitlines() if x.startswith("hard ")]
    assert re.split(r"\s{2,}", lines[2].strip())[1] == cell
    ratio = printed[printed.index("ratio") :].splitlines()
    assert [line.split()[-1] for line in ratio if "none" in line] == ["1", "1"]
    assert ratio[len(FEW) + 1].split()[0] == "noise"


@pytest.mark.full
def test_best_rate_is_that_of_the_mean(small):
    for one, two in zip(small[2][::2], small[2][1::2], strict=True):
        means = np.mean([one["by_rate"], two["by_rate"]], 0)
        assert one["rate"] == two["rate"] == SMALL.rates[means.argmax()]


@pytest.mark.full
def test_epsilon_is_that_of_the_event(small):
    for row in small[2]:
        variant = VARIANTS[row["variant"]]
        if variant.response is None:
            assert row["noise_multiplier"] == 0 and row["epsilon"] is None
            continue
        event = privacy.event(
            row["noise_multiplier"],
            row["steps"],
            sampling_probability=SMALL.batch / COUNT,
            mechanism="laplace" if row["variant"] == "laplace" else "gaussian",
        )
        assert row["epsilon"] == privacy.epsilon(event, SMALL.delta)
        assert 0.98 * row["target"] < row["epsilon"] <= row["target"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["quantile", "histogram", "laplace"])
def test_noise_is_what_is_accounted(name):
    """Laplace noise by its scale, Gaussian noise with counts as one release."""
    plan = plan_of(name, noise_multiplier=2.0)
    grad = plan.grad(jax.random.key(0))
    assert grad.noise_multiplier == 2.0 and grad.expected_batch_size == 64
    assert grad.clipped.ord == VARIANTS[name].ord
    images, labels, where = next(private_digits.draw_batches(DATA, plan, 0))
    (params, _, before), _ = private_digits.start(plan, DATA, 0)
    jitted = jax.jit(grad)
    _, state, _ = jitted(before, params, images, labels, where=where)
    if VARIANTS[name].adapts:
        counts = (grad.rule.reach(1) / grad.rule.count_stddev) ** 2
        own = (float(state.stddev[0]) / float(state.threshold[0])) ** -2
        np.testing.assert_allclose(counts + own, 2.0**-2, rtol=1e-5)
    else:
        np.testing.assert_allclose(state.stddev, 2.0 * state.threshold, rtol=1e-6)
    # What it is, drawn: a batch without examples has nothing else.
    nothing = np.zeros_like(where)
    mean, state, _ = jitted(before, params, images, labels, where=nothing)
    drawn = np.concatenate([np.ravel(x) for x in jax.tree.leaves(mean)]) * 64
    size = np.abs(drawn).mean() if name == "laplace" else drawn.std()
    np.testing.assert_allclose(size, state.stddev[0], rtol=0.1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["none", "quantile"])
def test_padding_changes_nothing(name):
    plan = plan_of(name)
    images, labels, where = next(private_digits.draw_batches(DATA, plan, 0))
    assert where.any() and not where.all()
    step = start_and_step(plan)
    params, _, private = step((images, labels, where))
    cut_params, _, cut = step((images[where], labels[where], where[where]))
    assert_close(params, cut_params)
    assert_close(private, cut)
    # Whatever padding is made of.
    other = np.where(where[:, None], images, 7.0), np.where(where, labels, 3), where
    assert_close(step(other)[0], params)


def test_batches_are_poisson_samples():
    plan = plan_of("hard", steps=200)
    batches = [*private_digits.draw_batches(DATA, plan, 0)]
    assert len(batches) == 200
    assert len({where.shape for _, _, where in batches}) == 1
    sizes = np.array([where.sum() for _, _, where in batches])
    np.testing.assert_allclose(sizes.mean(), 64, rtol=0.03)
    np.testing.assert_allclose(sizes.std(), (64 * (1 - 64 / COUNT)) ** 0.5, rtol=0.2)
    for images, labels, where in batches[:3]:
        assert len(images) == len(labels) == len(where)
        assert len(np.unique(images[where], axis=0)) == where.sum()
    again = next(private_digits.draw_batches(DATA, plan, 0))
    other = next(private_digits.draw_batches(DATA, plan, 1))
    np.testing.assert_array_equal(again[0], batches[0][0])
    assert not np.array_equal(other[2], again[2])


@pytest.mark.full
def test_same_seed_same_run():
    plan = plan_of("linear", noise_multiplier=0.3, steps=5, rates=(0.1, 0.3))
    step = jax.jit(jax.vmap(private_digits.make_step(plan), (0, 0, None, None)))
    one, same, other = (private_digits.train(plan, DATA, k, step) for k in (0, 0, 1))
    assert one == same != other


@pytest.mark.full
def test_noise_differs_between_steps_and_seeds():
    plan = plan_of("linear")
    learner, key = private_digits.start(plan, DATA, 0)
    _, other = private_digits.start(plan, DATA, 1)
    step = jax.jit(private_digits.make_step(plan))
    images, labels, where = next(private_digits.draw_batches(DATA, plan, 0))
    nothing = images, labels, np.zeros_like(where)
    params = lambda given, key: step(
        (*learner[:2], given), jnp.float32(1), key, nothing
    )
    first, _, state = params(learner[2], key)
    kernel = lambda params: np.asarray(params["params"]["Dense_0"]["kernel"])
    assert not np.allclose(kernel(first), kernel(params(state, key)[0]))
    assert not np.allclose(kernel(first), kernel(params(learner[2], other)[0]))


@pytest.mark.full
def test_learns():
    plan = plan_of("hard", noise_multiplier=1.0, steps=30, rates=(0.3,))
    settings = dataclasses.replace(SMALL, runs=1)
    (row,) = private_digits.repeat(plan._replace(batch=256), DATA, settings)
    assert row["epsilon"] < 8
    assert row["test"] > 0.7


@pytest.mark.full
def test_without_privacy_step_is_of_the_mean():
    plan = plan_of("linear none")
    batch = next(private_digits.draw_batches(DATA, plan, 0))
    params, _, _ = start_and_step(plan)(batch)
    before = private_digits.start(plan, DATA, 0)[0][0]
    each = [
        jax.grad(plan.variant.loss)(before, *example)
        for *example, real in zip(*batch, strict=True)
        if real
    ]
    expected = jax.tree.map(lambda x, *g: x - 0.1 * sum(g) / len(g), before, *each)
    assert_close(params, expected)


def test_data():
    assert (COUNT, len(DATA.test_labels)) == (1438, 359)
    assert DATA.images.dtype == np.float32 and DATA.labels.dtype == np.int32
    assert DATA.images.min() == -1 and DATA.images.max() == 1


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder, suffix="", size=28, labels=10):
    rng = np.random.default_rng(0)
    for kind, count in (("train", 40), ("t10k", 10)):
        images = rng.integers(0, 256, (count, size, size))
        write_idx(folder / f"{kind}-images-idx3-ubyte{suffix}", images)
        write_idx(
            folder / f"{kind}-labels-idx1-ubyte{suffix}", np.arange(count) % labels
        )


@pytest.mark.parametrize("name", ["some", "some.gz"])
def test_idx_round_trip(tmp_path, name):
    array = np.random.default_rng(0).integers(0, 256, (5, 3, 2))
    write_idx(tmp_path / name, array)
    read = private_digits.read_idx(str(tmp_path), "some", 3)
    np.testing.assert_array_equal(read, array)
    assert read.dtype == np.uint8


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_load_mnist(tmp_path, suffix):
    write_mnist(tmp_path, suffix)
    data = private_digits.load_mnist(str(tmp_path))
    assert data.images.shape == (40, 28, 28) and data.test_images.shape == (10, 28, 28)
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32
    assert 0 <= data.images.min() < 0.01 and 0.99 < data.images.max() <= 1
    np.testing.assert_array_equal(data.test_labels, np.arange(10))


@pytest.mark.full
def test_mnist_end_to_end(tmp_path, capsys, monkeypatch):
    write_mnist(tmp_path)
    few = {key: private_digits.RECIPES[key] for key in (0.97, 0.99)}
    monkeypatch.setattr(private_digits, "RECIPES", few)
    rows = launch(tmp_path, mnist=str(tmp_path), batch=8, steps=1, runs=1)
    assert [row["variant"] for row in rows] == ["0.97", "0.99"]
    assert [row["noise_multiplier"] for row in rows] == [0.7, 0.0]
    assert rows[-1]["epsilon"] is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[:2] == "0."] == [
        row["variant"] for row in rows
    ]


def test_recipes_are_the_published_ones():
    first, *_, last = private_digits.list_recipes(Settings(), 60000)
    assert (first.steps, last.steps) == (3516, 4688)
    assert first.grad(jax.random.key(0)).clipped.max_norm == 1.5
    np.testing.assert_allclose(first.rates, 0.25 * 1.5)  # in units of the threshold
    event = privacy.event(1.3, first.steps, sampling_probability=256 / 60000)
    # 1.16 to 1.19 by Rényi divergences; privacy loss distributions are tighter.
    assert 0.8 < privacy.epsilon(event, 1e-5) < 1.16
    params = first.variant.model.init(jax.random.key(0), jnp.zeros((28, 28)))
    assert sum(x.size for x in jax.tree.leaves(params)) == 26010


def spoil_header(path):
    path.write_bytes(b"\x00\x00\x0d" + path.read_bytes()[3:])


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-5])


def cut_gzip(path):
    path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes())[:99])
    path.unlink()


def no_gzip(path):
    path.rename(path.with_name(f"{path.name}.gz"))


def fewer(path):
    write_idx(path, np.zeros((39, 28, 28)))


BAD_FILES = {
    "missing": (lambda path: path.unlink(), "cannot read .*: No such file"),
    "header": (spoil_header, "is no whole IDX file of bytes in 3"),
    "empty": (lambda path: path.write_bytes(b""), "is no whole IDX file"),
    "short": (cut_short, "is no whole IDX file"),
    "short gzip": (cut_gzip, "cannot read .*ended"),
    "no gzip": (no_gzip, "cannot read .*[Nn]ot a gzipped file"),
    "fewer": (fewer, r"got \(39, 28, 28\) and 40 labels"),
}


@pytest.mark.parametrize("spoil, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, spoil, message):
    write_mnist(tmp_path)
    spoil(tmp_path / "train-images-idx3-ubyte")
    with pytest.raises(SystemExit, match=f"^private_digits: .*{message}.*\\.$"):
        launch(tmp_path, mnist=str(tmp_path))


@pytest.mark.parametrize("given", [{"size": 8}, {"labels": 11}])
def test_not_digits(tmp_path, given):
    write_mnist(tmp_path, **given)
    with pytest.raises(SystemExit, match="should have 28x28 train images and a label"):
        launch(tmp_path, mnist=str(tmp_path))


@pytest.mark.parametrize(
    "library, message, given",
    [
        ("sklearn.datasets", "the digits are missing: pip install scikit-learn", {}),
        ("dp_accounting", r".*clipfx-jax\[privacy\]", {}),
        ("jax_privacy", ".*jax_privacy", {"batch": 8}),
    ],
)
def test_without_library(tmp_path, monkeypatch, library, message, given):
    if given:  # the recipes know their noise, and need no search for it
        write_mnist(tmp_path)
        given = given | {"mnist": str(tmp_path)}
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SystemExit, match=f"^private_digits: {message}"):
        launch(tmp_path, **given)


BAD_VALUES = {
    "batch": ({"batch": 1439}, "--batch must be at most 1438"),
    "delta": ({"delta": 0.01}, "--delta less than 1/1438, got 512 and 0.01"),
    "both": ({"data": "a", "mnist": "b"}, "give one of --mnist and --data"),
    "epsilon": ({"epsilons": (1e-9,), "steps": 1000}, "epsilon must be within reach"),
}


@pytest.mark.parametrize("given, message", BAD_VALUES.values(), ids=BAD_VALUES)
def test_bad_value(tmp_path, given, message):
    with pytest.raises(SystemExit, match=f"^private_digits: .*{message}"):
        launch(tmp_path, **given)


NUMBERS = "must be one or more numbers greater than 0"
BAD_FLAGS = {
    "infinite": ({"epsilons": (math.inf,)}, f"--epsilons {NUMBERS}"),
    "rates": ({"rates": ("fast",)}, f"--rates {NUMBERS}"),
    "delta": ({"delta": 1.0}, "--delta must be a number between 0 and 1"),
    "steps": ({"steps": 0}, "--steps must be a whole number of at least 1"),
    "optimizer": ({"optimizer": "lion"}, "--optimizer must be one of sgd, adam, priv"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flag(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)
