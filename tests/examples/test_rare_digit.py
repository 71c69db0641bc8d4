import contextlib
import dataclasses
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

pytest.importorskip("jax_privacy")

import clipfx
from clipfx import privacy
from clipfx.calibrate.reading import UnreadableRun, read_run
from examples import _common, rare_digit
from examples.rare_digit import VARIANTS, Result, Settings

SMALL = Settings(rates=(0.3, 1.0), steps=3, batch=64, runs=2)
FEW = ("none", "fixed", "dpsgd_f", "adapt")  # compiling takes seconds
KEYS = {
    "variant", "rate", "seed", "epsilon", "overall", "digit_2", "digit_8", "threshold",
    "noise_multiplier",
}  # fmt: skip


def launch(tmp_path, **given):
    small = dataclasses.asdict(SMALL) | {"out": tmp_path / "out"}
    return runs.launch(rare_digit, small | given)


def run_small(tmp_path_factory):
    """A folder, what was printed, and the rows of the file."""
    folder, printed = tmp_path_factory.mktemp("small"), io.StringIO()
    few = {name: VARIANTS[name] for name in FEW}
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rare_digit, "VARIANTS", few)
        rows = launch(folder)
    return folder, printed.getvalue(), rows


def assert_complete(small):
    folder, printed, rows = small
    assert [(row["variant"], row["rate"], row["seed"]) for row in rows] == [
        (variant, rate, seed)
        for variant in FEW
        for rate in (0.3, 1.0)
        for seed in (0, 1)
    ]
    for variant in FEW:
        assert any(line.split()[:1] == [variant] for line in printed.splitlines())
    assert "Trained on 822 digits, 8 of them 8." in printed
    assert "nan" not in printed
    with pytest.raises(UnreadableRun, match="of private training and has no norms"):
        read_run(folder / "out")
    picture = folder / "out" / "rare_digit.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def assert_numbers_are_in_their_ranges(small):
    _, _, rows = small
    for row in rows:
        assert set(row) == KEYS
        assert all(0 <= row[name] <= 1 for name in ("overall", "digit_2", "digit_8"))
        if row["variant"] == "none":
            assert row["epsilon"] is None and row["threshold"] is None
        else:
            assert row["threshold"] > 0


def assert_all_cost_the_same(small):
    _, _, rows = small
    run = privacy.event(1.0, SMALL.steps, sampling_probability=64 / 822)
    expected = privacy.epsilon(run, rare_digit.DELTA)
    assert {x["epsilon"] for x in rows if x["variant"] != "none"} == {expected}


def assert_table_is_of_the_file(small):
    _, printed, rows = small
    chosen = [x for x in rows if (x["variant"], x["rate"]) == ("fixed", 0.3)]
    values = np.array([row["overall"] for row in chosen])
    line = next(x for x in printed.splitlines() if x.startswith("0.3 "))
    assert f"  {values.mean():.3f} ({values.std():.3f})  " in line


@pytest.mark.full
def test_end_to_end(tmp_path_factory):
    """One run, of which several workers would each make their own."""
    small = run_small(tmp_path_factory)
    assert_complete(small)
    assert_numbers_are_in_their_ranges(small)
    assert_all_cost_the_same(small)
    assert_table_is_of_the_file(small)


def assert_close(one, other, **tolerances):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **tolerances), one, other
    )


@pytest.mark.full
def test_same_seed_same_run():
    data, batches = rare_digit.collect(SMALL)
    one, same = (rare_digit.train("fixed", SMALL, data, batches) for _ in range(2))
    np.testing.assert_array_equal(one.overall, same.overall)
    assert not np.array_equal(one.overall[:, 0], one.overall[:, 1])
    again, drawn = rare_digit.collect(SMALL)
    assert_close(data, again, rtol=0)
    np.testing.assert_array_equal(batches, drawn)


@pytest.mark.parametrize("kept, count", [(0.09, 8), (0.5, 44), (1.0, 87), (0.0, 1)])
def test_rare_digit_is_rare_in_training_only(kept, count):
    data = rare_digit.split_digits(kept, 0)
    whole = np.bincount(_common.load_digits()[1])
    held = np.bincount(data.test_labels)
    np.testing.assert_array_equal(held, whole // 2)
    trained = np.bincount(data.labels)
    assert trained[8] == count
    others = np.arange(10) != 8
    np.testing.assert_array_equal((trained + held)[others], whole[others])
    assert data.images.dtype == np.float32 and data.labels.dtype == np.int32
    both = {x.tobytes() for x in data.images} & {x.tobytes() for x in data.test_images}
    assert not both


def test_batches_are_poisson():
    settings = dataclasses.replace(SMALL, steps=400, batch=100)
    index = rare_digit.draw_batches(500, settings, 0)
    assert len(index) == 400 and index.shape[1] % rare_digit.MULTIPLE == 0
    assert index.min() == -1 and index.max() < 500
    sizes = (index >= 0).sum(1)
    assert sizes.mean() == pytest.approx(100, abs=2)
    assert sizes.std() == pytest.approx(math.sqrt(500 * 0.2 * 0.8), rel=0.15)
    for row in index[:10]:
        chosen = row[row >= 0]
        assert len(np.unique(chosen)) == len(chosen)


def batch_of(size, data, padding=0):
    """Places of examples of all digits, some of them padding."""
    every = np.random.default_rng(0).permutation(len(data.labels))[:size]
    return jnp.asarray(np.append(every, [-1] * padding), jnp.int32)


def step_of(variant, settings):
    """A start, digits, and a step from places and digits."""
    data = jax.tree.map(jnp.asarray, rare_digit.split_digits(0.09, 0))
    params = jax.tree.map(lambda x: x[0], rare_digit.init(jnp.zeros(1, jnp.uint32)))
    grad, learner = rare_digit.start(variant, settings, params, 0)
    step = jax.jit(lambda i, data: rare_digit.advance(grad, learner, data, i, 1.0))
    return learner, data, step


def gradients(params, data, index):
    one = jax.jit(jax.grad(rare_digit.loss))
    return [one(params, (data.images[i], data.labels[i])) for i in index]


@pytest.mark.full
@pytest.mark.parametrize("variant", ["none", "fixed"])
def test_step_without_noise(variant):
    settings = dataclasses.replace(SMALL, noise_multiplier=0.0, batch=8)
    learner, data, step = step_of(variant, settings)
    index = batch_of(6, data, padding=2)
    after = step(index, data)
    each = gradients(learner.params, data, index[:6])
    norms = [float(clipfx.global_norm(x)) for x in each]
    assert min(norms) > 1
    factors = [1.0 if variant == "none" else 1 / n for n in norms]
    mean = jax.tree.map(
        lambda *x: sum(np.float32(f) * y for f, y in zip(factors, x, strict=True)) / 8,
        *each,
    )
    expected = jax.tree.map(lambda x, g: x - g, learner.params, mean)
    assert_close(after.params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_padding_is_not_counted():
    _, data, step = step_of("dpsgd_f", SMALL)
    index = batch_of(20, data, padding=12)
    index = jnp.where(index == len(data.labels) - 1, 0, index)
    after = step(index, data)
    # The last digit is where padding points to.
    other = data._replace(
        images=data.images.at[-1].set(1e3), labels=data.labels.at[-1].set(8)
    )
    assert_close(step(index, other), after, rtol=0)


def test_drops_above_the_upper_threshold():
    settings = dataclasses.replace(SMALL, noise_multiplier=0.0, upper=1e-3)
    learner, data, step = step_of("global", settings)
    assert_close(step(batch_of(8, data), data).params, learner.params, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_multiplier_is_joint(variant):
    grad = rare_digit.make_grad(variant, SMALL, jax.random.key(0))
    z, counted = grad.gradient_noise_multiplier(), grad.rule.count_stddev
    if variant == "none":
        assert z == 0
        return
    count = grad.rule.reach(1) / counted if counted else 0
    assert (z**-2 + count**2) ** -0.5 == pytest.approx(SMALL.noise_multiplier)


def test_limits():
    settings = dataclasses.replace(SMALL, noise_multiplier=0.0)
    none = jnp.full(4, -1, jnp.int32)
    _, data, step = step_of("adapt", settings)
    # None exceeds the upper threshold, which shrinks by the step size.
    limit = rare_digit.limit_of(step(none, data).state)
    assert limit == pytest.approx(settings.upper * math.exp(-0.1))
    for variant, expected in {"quantile": math.exp(-0.1), "bounded": 1.0}.items():
        grad = rare_digit.make_grad(variant, settings, jax.random.key(0))
        state = grad.rule.init(jnp.ones(1))
        every = jnp.full(1, SMALL.batch / 2)  # all below the threshold
        limit = grad.rule.update(state, every, float(SMALL.batch), jnp.zeros(1))
        assert limit[0] == pytest.approx(expected)


def test_score():
    labels = np.array([[8, 2, 2, 1], [8, 8, 2, 0]])
    said = np.array([[[8, 2, 1, 1], [1, 8, 2, 1]], [[1, 1, 1, 1], [8, 8, 2, 0]]])
    np.testing.assert_allclose(
        rare_digit.score(said, labels), [[3 / 4, 2 / 4], [1 / 4, 1]]
    )
    np.testing.assert_allclose(rare_digit.score(said, labels, 8), [[1, 0.5], [0, 1]])
    np.testing.assert_allclose(rare_digit.score(said, labels, 2), [[0.5, 1], [0, 1]])


def test_summary():
    numbers = np.array([[0.5, 0.6], [0.9, 0.7]])
    limits = np.array([[[1.0, 2.0]] * 2, [[1.0, 3.0], [1.0, 5.0]]])
    result = Result((0.1, 1.0), numbers, 1 - numbers, numbers / 2, limits, 3.0)
    (row,) = rare_digit.summarize({"fixed": result})
    assert row == {
        "variant": "fixed", "epsilon": 3.0, "rate": 1.0, "overall": "0.800 (0.100)",
        "digit 2": "0.200 (0.100)", "digit 8": "0.400 (0.050)", "threshold": 4.0,
    }  # fmt: skip
    rows = rare_digit.tabulate({"fixed": result}, "rare")
    assert rows[0] == {"rate": 0.1, "fixed": "0.275 (0.025)"}


@pytest.mark.full
def test_learns():
    settings = dataclasses.replace(SMALL, rates=(1.0,), steps=60)
    result = rare_digit.train("none", settings, *rare_digit.collect(settings))
    assert result.overall.mean() > 0.7
    assert result.rare.mean() < 0.3 < result.usual.mean()


@pytest.mark.full
def test_diverged_run():
    data, batches = rare_digit.collect(SMALL)
    seeds = jnp.arange(2, dtype=jnp.uint32)
    run = rare_digit.make_run("none", SMALL)
    said, _ = run(jnp.full(2, 1e30), seeds, rare_digit.init(seeds), data, batches)
    assert (rare_digit.score(np.asarray(said), data.test_labels) <= 0.2).all()


@pytest.mark.parametrize(
    "name, message",
    [
        ("sklearn.datasets", r"the digits are missing: pip install scikit-learn\."),
        ("jax_privacy", r"batches need jax_privacy: pip install jax-privacy\."),
    ],
)
def test_without_a_package(tmp_path, monkeypatch, name, message):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"^rare_digit: {message}$"):
        launch(tmp_path)


def test_large_batch(tmp_path):
    message = r"^rare_digit: --batch must be at most 822, all there is to train on\.$"
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, batch=823)


def test_counts_use_up_the_noise(tmp_path):
    with pytest.raises(SystemExit, match=r"^rare_digit: count_stddev must be above 1 "):
        launch(tmp_path, count_stddev=0.9)


BAD_FLAGS = {
    "steps": ({"steps": 0}, "--steps must be a whole number of at least 1"),
    "kept": ({"kept": 1.5}, "--kept must be a number from 0 to 1"),
    "upper": ({"upper": math.inf}, "--upper must be a number greater than 0"),
    "noise": ({"noise_multiplier": -1}, "--noise_multiplier must be a number of at le"),
    "rates": ({"rates": ("fast",)}, "--rates must be one or more numbers greater tha"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flag(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)


def test_images_that_lack_a_digit(tmp_path):
    labels = np.arange(100) % 9
    np.savez(tmp_path / "nine.npz", images=np.eye(100), labels=labels)
    with pytest.raises(SystemExit, match="must have two images or more of each label"):
        launch(tmp_path, data=tmp_path / "nine.npz")
