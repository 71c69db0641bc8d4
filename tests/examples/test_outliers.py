import contextlib
import dataclasses
import io
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import clipfx
from examples import outliers
from examples.outliers import VARIANTS, Batch, Settings

SMALL = Settings(steps=22, rates=(0.1, 0.03), runs=2)  # an epoch has 15 steps
PARAMS = outliers.MODEL.init(jax.random.key(0), jnp.zeros(64))

# Schedules divide a float by an integer count.
standard = jax.numpy_dtype_promotion("standard")


def launch(tmp_path, **given):
    small = dataclasses.asdict(SMALL) | {"out": tmp_path / "out"}
    with standard:
        return runs.launch(outliers, small | given)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder, what was printed, and the rows of the file."""
    folder, printed = tmp_path_factory.mktemp("small"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        launch(folder)
    return folder, printed.getvalue(), runs.without_norms(folder / "out")


def batch_of(count, seed=0):
    data = outliers.load_data(0.1, seed)
    images, labels = jnp.asarray(data.images[:count]), jnp.asarray(data.labels[:count])
    return Batch(images, labels, jnp.ones(count, bool))


def padded(batch, size):
    """The first `size` examples of the batch, the others masked."""
    return batch._replace(where=jnp.arange(len(batch.where)) < size)


def assert_close(one, other, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), one, other
    )


@pytest.mark.full
def test_end_to_end(small):
    folder, printed, rows = small
    assert [
        (row["variant"], row["rate"], row["seed"], row["step"]) for row in rows
    ] == [
        (variant, rate, seed, step)
        for variant in VARIANTS
        for rate in SMALL.rates
        for seed in (0, 1)
        for step in (15, 22)
    ]
    keys = {"variant", "rate", "seed", "step", "loss", "test", "repeated"}
    assert set(rows[0]) == keys
    for variant in VARIANTS:
        assert any(line.split()[:1] == [variant] for line in printed.splitlines())
    picture = folder / "out" / "outliers.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_numbers_are_finite(small):
    _, printed, rows = small
    lines = printed.splitlines()
    tables = [line for line in lines if line.split()[:1] in ([v] for v in VARIANTS)]
    tables += [line for line in lines if line[:2] == "0."]
    assert len(tables) == len(VARIANTS) + 2 * len(SMALL.rates)
    for line in tables:
        numbers = re.findall(r"(?<![\w.])[\d.]+(?:e[+-]\d+)?|nan|inf", line)
        assert len(numbers) in (9, 10)
        assert all(math.isfinite(float(number)) for number in numbers)
    for row in rows:
        assert row["loss"] > 0
        assert 0 <= row["test"] <= 1 and 0 <= row["repeated"] <= 1


@pytest.mark.full
def test_table_is_of_the_file(small):
    _, printed, rows = small
    line = next(line for line in printed.splitlines() if line.startswith("0.03 "))
    ends = [row["test"] for row in rows if row["step"] == 22 and row["rate"] == 0.03]
    cells = [
        f"{np.mean(x):.3f} ({min(x):.3f}-{max(x):.3f})"
        for x in np.reshape(ends, (len(VARIANTS), SMALL.runs))
    ]
    assert re.split(r"\s{2,}", line)[1:] == cells


@pytest.mark.full
def test_diverged_run(tmp_path, capsys):
    rows = launch(tmp_path, rates=(1e30,), runs=1)
    losses = [x["loss"] for x in rows if x["variant"] == "none" and "loss" in x]
    assert losses[-1] is None
    assert "nan" in capsys.readouterr().out


@pytest.mark.full
def test_same_seed_same_run():
    with standard:
        one, same, other = (
            outliers.train("per_example", 0.1, seed, SMALL) for seed in (0, 0, 1)
        )
    assert one.rows == same.rows
    np.testing.assert_array_equal(one.norms, same.norms)
    assert one.rows != other.rows
    assert not np.array_equal(one.wrong, other.wrong)


@pytest.mark.full
def test_variants_share_start_and_batches():
    settings = dataclasses.replace(SMALL, max_norm=1e6, steps=3)
    with standard:
        first, *others = (outliers.train(name, 0.1, 0, settings) for name in VARIANTS)
    for run in others:
        assert_close(run.losses, first.losses, rtol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.35])
def test_share_of_wrong_labels(share):
    data, clean = outliers.load_data(share, 0), outliers.load_data(0.0, 0)
    assert data.wrong.sum() == round(share * len(data.labels))
    np.testing.assert_array_equal(data.labels != clean.labels, data.wrong)
    assert not clean.wrong.any()
    assert data.labels.min() == 0 and data.labels.max() == 9
    np.testing.assert_array_equal(data.test_labels, clean.test_labels)


def test_wrong_labels_are_any_of_the_others():
    labels = np.zeros(9000, np.int32)
    noisy, wrong = outliers.spoil(labels, 1.0, np.random.default_rng(0))
    assert wrong.all()
    assert noisy.dtype == np.int32
    np.testing.assert_allclose(np.bincount(noisy), [0] + 9 * [1000], atol=150)


def test_data():
    data = outliers.load_data(0.1, 0)
    assert (len(data.images), len(data.test_images)) == (899, 898)
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32
    assert data.images.min() == -1 and data.images.max() == 1
    everything = np.concatenate([data.images, data.test_images])
    from sklearn.datasets import load_digits

    digits = np.asarray(load_digits(return_X_y=True)[0], np.float32) / 8 - 1
    order = lambda x: x[np.lexsort(x.T)]
    np.testing.assert_array_equal(order(everything), order(digits))


def test_an_epoch_has_every_example_once():
    data = outliers.load_data(0.1, 0)
    settings = dataclasses.replace(SMALL, steps=30)
    first, second = outliers.draw_batches(data, settings, 0)
    order = lambda x: x[np.lexsort(x.T)]
    for epoch in (first, second):
        assert epoch.images.shape == (15, 64, 64)
        assert epoch.where[:-1].all() and epoch.where[-1].sum() == 899 % 64
        np.testing.assert_array_equal(
            order(epoch.images[epoch.where]), order(data.images)
        )
    assert not np.array_equal(first.labels, second.labels)


def test_batches_of_all_steps():
    data = outliers.load_data(0.1, 0)
    draw = lambda steps: outliers.draw_batches(
        data, dataclasses.replace(SMALL, steps=steps), 0
    )
    assert [len(batches.where) for batches in draw(32)] == [15, 15, 2]
    assert [len(batches.where) for batches in draw(2)] == [2]


def sums(max_norm, batch):
    summed, _ = VARIANTS["per_example"](max_norm)
    return jax.jit(summed)(PARAMS, batch)


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_adds_nothing(variant):
    summed = jax.jit(VARIANTS[variant](0.5)[0])
    whole = batch_of(8)
    short, losses = summed(PARAMS, jax.tree.map(lambda x: x[:5], whole))
    long, padded_losses = summed(PARAMS, padded(whole, 5))
    assert_close(long, short)
    assert_close(padded_losses, jnp.pad(losses, (0, 3)))


def test_bounded_sum_is_of_bounded_gradients():
    batch = batch_of(6)
    grad = jax.jit(jax.grad(outliers.loss))
    each = [grad(PARAMS, *x) for x in zip(*batch[:2], strict=True)]
    norms = [clipfx.global_norm(grad) for grad in each]
    limit = float(np.median(norms))
    factors = [min(1.0, limit / float(norm)) for norm in norms]
    expected = jax.tree.map(
        lambda *grads: sum(f * g for f, g in zip(factors, grads, strict=True)), *each
    )
    assert_close(sums(limit, batch)[0], expected)
    plain, _ = jax.jit(outliers.plain_sum)(PARAMS, batch)
    assert_close(sums(math.inf, batch)[0], plain)


def test_measured_norms():
    batch = batch_of(3)
    seen = outliers.measure(PARAMS, batch.images, batch.labels)
    for k in range(3):
        grad = jax.grad(outliers.loss)(PARAMS, batch.images[k], batch.labels[k])
        np.testing.assert_allclose(seen.norm[k, 0], clipfx.global_norm(grad), rtol=1e-5)


def test_step_takes_the_mean_of_examples():
    with standard:
        tx, step = outliers.make_step("none", SMALL)
        step = jax.jit(step)
        learner = outliers.start(tx, 0.1, 0)
        whole = batch_of(8)
        short, _ = step(learner, jax.tree.map(lambda x: x[:5], whole))
        long, _ = step(learner, padded(whole, 5))
    assert_close(long.params, short.params)
    plain, _ = jax.jit(outliers.plain_sum)(PARAMS, padded(whole, 5))
    moved = jax.tree.map(lambda x, g: x - 0.1 * g / 5, learner.params, plain)
    assert_close(short.params, moved)


def run_of(variant, rate, test, seed=0):
    rows = [{"test": x, "repeated": 0.5, "step": k} for k, x in enumerate(test)]
    wrong = np.array([False, True, False, True])
    norms, losses = np.array([1.0, 3.0, 2.0, 4.0]), np.array([1.0, 2.0, 2.0, 3.0])
    return outliers.Run(variant, rate, seed, rows, test, norms, losses, wrong)


def test_summary():
    each = [
        run_of("none", 0.3, [0.5, 0.6]),
        run_of("none", 0.1, [0.9, 0.6]),
        run_of("none", 0.1, [0.7, 0.8], seed=1),
        run_of("batch", 0.3, [0.9, 0.9]),
    ]
    row = outliers.summarize(each, "none", 2.0)
    assert (row["rate"], row["ms/step"], row["repeated"]) == (0.1, 2.0, 0.5)
    assert row["held-out"] == pytest.approx(0.7)
    assert row["peak"] == pytest.approx(0.85)
    assert (row["right"], row["wrong"]) == (1.5, 3.5)
    assert (row["by norm"], row["by loss"]) == (1.0, 0.875)
    assert math.isnan(each[0].found(np.array([1.0, math.nan, 0.0, 0.0])))


@pytest.mark.full
def test_learns_and_finds_wrong_labels():
    with standard:
        settings = dataclasses.replace(SMALL, steps=150)
        run = outliers.train("per_example", 0.1, 0, settings)
    assert run.last("test") > 0.9
    assert run.last("repeated") < 0.1
    assert run.found(run.norms) > 0.97
    assert np.median(run.norms[run.wrong]) > 5 * np.median(run.norms[~run.wrong])


def test_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = r"^outliers: the digits are missing: pip install scikit-learn\.$"
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path)


BAD_FLAGS = {
    "steps": ({"steps": 0}, "--steps must be a whole number of at least 1"),
    "wrong": ({"wrong": 1.0}, "--wrong must be a number from 0.01 to 0.99"),
    "max_norm": ({"max_norm": math.nan}, "--max_norm must be a number greater than 0"),
    "rates": ({"rates": (0.1, -1)}, "--rates must be one or more numbers greater th"),
    "data": ({"data": __file__}, "is no .npz file with arrays named images and labels"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flag(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)


@pytest.mark.full
def test_takes_other_images(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=120)
    images = rng.normal(size=(120, 3, 4)) + labels[:, None, None]
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    given = {"data": tmp_path / "mine.npz", "rates": (0.1,), "runs": 1}
    rows = launch(tmp_path, **given)
    steps = sum("norm" in row for row in rows)
    assert len(rows) - steps == len(VARIANTS) * steps  # an epoch has one step
