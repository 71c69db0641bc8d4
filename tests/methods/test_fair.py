"""Sums in which no population outweighs the others."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sentences import raises_one_sentence
from tiers import in_tiers
from trees import enable_x64

import clipfx
from clipfx import per_example
from clipfx._core import populations as bounds_of
from clipfx._core.clip_factors import factors as scales
from clipfx._core.clip_factors import finite_norms
from clipfx.per_example.engine import population_norms, populations, trace


def drawn(seed, sizes=(9.0, 3.0, 1.1, 0.5, 2.0)):
    """Contributions of five populations, and their norms, in float64."""
    rng = np.random.default_rng(seed)
    tree = {"w": rng.normal(size=(5, 4, 3)), "b": rng.normal(size=(5, 3))}
    sizes = np.array(sizes)
    scale = sizes / np.sqrt(sum((x.reshape(5, -1) ** 2).sum(1) for x in tree.values()))
    tree = {k: x * scale.reshape((5,) + (1,) * (x.ndim - 1)) for k, x in tree.items()}
    return tree, sizes


def bounded(tree, norm, ratio, floor=0.0, usual=None, here=None):
    """The definition, in float64."""
    here = norm > 0 if here is None else here
    whole = np.sqrt(sum((x.sum(0) ** 2).sum() for x in tree.values()))
    usual = norm[here].min() if usual is None else usual
    usual = max(usual, floor * whole)
    factor = np.minimum(1, ratio * usual / np.where(norm > 0, norm, 1))
    return {k: np.tensordot(factor, x, 1) for k, x in tree.items()}, factor


def clip(tree, ratio, count=5, state=None, present=None, **settings):
    tx = clipfx.clip_fair_groups(ratio, num_populations=count, **settings)
    tree = jax.tree.map(jnp.float32, tree)
    state = tx.init(jax.tree.map(lambda x: x[0], tree)) if state is None else state
    extra = {} if present is None else {"present": present}
    return jax.jit(tx.update)(tree, state, **extra)


def near(found, right, tolerance=3e-6):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        assert x.shape == y.shape
        assert np.abs(np.asarray(x, np.float64) - y).max() <= tolerance * (
            np.abs(y).max() + 1e-30
        )


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("ratio", in_tiers([1.0, 2.0, 7.5, math.inf], {2.0, math.inf}))
def test_equals_the_definition(ratio, floor):
    tree, norm = drawn(0)
    sums, state = clip(tree, ratio, floor=floor)
    right, factor = bounded(tree, norm, ratio, floor)
    near(sums, right)
    near(state.metrics.factor, factor)
    near(state.metrics.norm, norm)
    assert state.metrics.clipped.tolist() == (factor < 1 - 1e-6).astype(int).tolist()


@pytest.mark.parametrize("count", [2, 5])
def test_largest_is_at_most_max_ratio_times_smallest(count):
    """Of what is added up, measured in float64: exactly."""

    @jax.jit
    def terms(tree, ratio):
        rows = [[x[k] for x in tree.values()] for k in range(count)]
        bounds = bounds_of.Bounds(ratio, "min", 0.0)
        norms = bounds_of.measure(rows)
        limit, _ = bounds_of.bound(norms, bounds)
        norms = bounds_of.each(norms)
        norm, factors = finite_norms(norms), scales(norms, limit, jnp.minimum, "zero")
        alone = lambda k: [row if j == k else [jnp.zeros_like(x) for x in row]
                           for j, row in enumerate(rows)]  # fmt: skip
        return [bounds_of.combine(alone(k), factors, norm) for k in range(count)]

    for seed in range(100):
        rng = np.random.default_rng(seed)
        tree, _ = drawn(seed, 10 ** rng.uniform(-6, 6, 5))
        tree = {k: jnp.float32(x[:count]) for k, x in tree.items()}
        ratio = float(np.float32(rng.uniform(1.01, 4)))
        kept = [math.sqrt(sum((np.float64(x) ** 2).sum() for x in term))
                for term in terms(tree, ratio)]  # fmt: skip
        assert max(kept) <= ratio * min(kept)
        assert max(kept) >= min(ratio * min(kept), np.inf) * (1 - 2e-6) or (
            max(kept) == pytest.approx(max_before(tree), rel=1e-6)
        )


def max_before(tree):
    leaves = [np.float64(x).reshape(len(x), -1) for x in tree.values()]
    return np.sqrt(sum((x**2).sum(1) for x in leaves)).max()


def test_balanced_contributions_are_added_up_unchanged():
    tree, _ = drawn(1, np.full(5, 2.0))
    tree = {k: jnp.float32(x) for k, x in tree.items()}
    sums, state = clip(tree, 1.01)
    for k, x in tree.items():
        np.testing.assert_array_equal(sums[k], jax.jit(sum)(list(x)))
    assert state.metrics.factor.tolist() == [1.0] * 5


def test_order_of_populations_does_not_matter():
    tree, _ = drawn(2)
    order = np.array([3, 1, 4, 0, 2])
    first, one = clip(tree, 2.0)
    second, other = clip({k: x[order] for k, x in tree.items()}, 2.0)
    near(first, jax.tree.map(np.float64, second))
    near(one.metrics.factor[order], np.float64(other.metrics.factor))


def test_absent_populations_have_no_say():
    tree, norm = drawn(3)
    for x in tree.values():
        x[1] = 0
    norm = np.where(np.arange(5) == 1, 0, norm)
    near(clip(tree, 2.0, floor=0.0)[0], bounded(tree, norm, 2.0)[0])
    here = np.array([True, True, True, False, True])
    tree, norm = drawn(3)
    sums, _ = clip(tree, 2.0, floor=0.0, present=jnp.asarray(here))
    near(sums, bounded(tree, norm, 2.0, here=here)[0])
    nothing = jax.tree.map(np.zeros_like, tree)
    sums, state = clip(nothing, 2.0)
    assert all((x == 0).all() for x in jax.tree.leaves(sums))
    assert np.isfinite(state.metrics.factor).all()


def test_average_speaks_for_the_absent():
    tree, norm = drawn(4)
    _, state = clip(tree, 2.0, floor=0.0, reference="ema")
    np.testing.assert_allclose(state.rule_state.averages, norm, rtol=1e-6)
    for x in tree.values():
        x[3] = 0  # the smallest is absent now
    sums, state = clip(tree, 2.0, floor=0.0, reference="ema", state=state)
    now = np.where(np.arange(5) == 3, 0, norm)
    near(sums, bounded(tree, now, 2.0, usual=0.5)[0])
    tree = {k: 3 * x for k, x in tree.items()}
    _, state = clip(tree, 2.0, floor=0.0, reference="ema", state=state)
    right = np.where(np.arange(5) == 3, 0.5, norm * (0.9 + 0.1 * 3))
    np.testing.assert_allclose(state.rule_state.averages, right, rtol=1e-6)


def test_named_population_measures_if_it_is_present():
    tree, norm = drawn(5)
    sums, state = clip(tree, 2.0, reference=1, floor=0.0)
    near(sums, bounded(tree, norm, 2.0, usual=3.0)[0])
    assert state.metrics.factor[1] == 1
    for x in tree.values():
        x[1] = 0
    norm = np.where(np.arange(5) == 1, 0, norm)
    sums, _ = clip(tree, 2.0, reference=1, floor=0.0)
    near(sums, bounded(tree, norm, 2.0)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_contribution_that_is_not_finite_is_left_out(bad):
    tree, norm = drawn(6)
    tree["w"][2, 0, 0] = bad
    sums, state = clip(tree, 2.0, floor=0.0, reference="ema")
    for x in tree.values():
        x[2] = 0
    norm = np.where(np.arange(5) == 2, 0, norm)
    near(sums, bounded(tree, norm, 2.0)[0])
    assert state.metrics.nonfinite.tolist() == [0, 0, 1, 0, 0]
    # Nothing is learned from such a step.
    assert state.rule_state.averages.tolist() == [0.0] * 5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_extreme_magnitudes():
    tree, norm = drawn(7)
    for scale in (1e-25, 1e25, 1e37):
        large = {k: x * scale for k, x in tree.items()}
        sums, _ = clip(large, 2.0, floor=0.0)
        near(sums, bounded(large, norm * scale, 2.0)[0])


def test_chain_scan_dtypes_and_metrics():
    params = {"w": jnp.zeros((4, 3), jnp.bfloat16)}
    tx = optax.chain(clipfx.clip_fair_groups(2.0), optax.sgd(0.1))
    updates = {"w": jnp.ones((2, 4, 3), jnp.bfloat16).at[0].mul(8)}

    def step(state, _):
        found, state = tx.update(updates, state, params)
        return state, found

    state, found = jax.lax.scan(step, tx.init(params), None, length=3)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found["w"]), -0.3, rtol=0.01)
    read = clipfx.metrics.read(state)
    assert read["clip0/norm/population_0"] == 8 * read["clip0/norm/population_1"]
    assert read["clip0/clip_rate/population_0"] == 1
    assert read["clip0/steps/population_1"] == 3


def test_updates_that_are_not_stacked_are_refused_though_sizes_agree():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(2)}
    tx = clipfx.clip_fair_groups(2.0)
    for given in (params, None):
        for update in (tx.update, jax.jit(tx.update)):
            with pytest.raises(ValueError, match=r"axis of populations before .*'b'"):
                update(params, tx.init(params), given)
            stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
            update(stacked, tx.init(params), given)
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 2\) for a parameter"):
        tx.update({"w": jnp.ones((2, 3, 2))}, tx.init(params), params)
    stand_in = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    assert jax.tree.structure(stand_in) == jax.tree.structure(tx.init(params))


def test_many_populations_are_shown_by_their_number():
    tree = {"w": np.arange(1.0, 13.0).reshape(12, 1)}
    _, state = clip(tree, math.inf, 12)
    for k in range(12):
        read = clipfx.metrics.read(state)
        assert float(read[f"clip0/norm/population_{k}"]) == k + 1


def test_ratio_and_floor_in_float64():
    with enable_x64(True):
        tree = {"w": jnp.array([[9.0, 0.0], [0.0, 1.0]])}
        for reference in ("min", 1, np.int64(1)):
            tx = clipfx.clip_fair_groups(
                1.1, reference=reference, num_populations=np.int64(2)
            )
            out, state = jax.jit(tx.update)(tree, tx.init({"w": tree["w"][0]}))
            np.testing.assert_allclose(out["w"], [1.1, 1.0], rtol=1e-14)
            assert all(x.dtype.itemsize <= 4 for x in jax.tree.leaves(state))


def test_hyperparameters_are_injected():
    tx = optax.inject_hyperparams(clipfx.clip_fair_groups)(max_ratio=2.0)
    tree = {"w": jnp.array([[9.0, 0.0], [0.0, 1.0]])}
    out, _ = jax.jit(tx.update)(tree, tx.init({"w": tree["w"][0]}))
    np.testing.assert_allclose(out["w"], [2.0, 1.0], rtol=2e-6)
    tx = optax.inject_hyperparams(clipfx.clip_fair_groups)(
        max_ratio=2.0, num_populations=2
    )
    with pytest.raises(TypeError, match='static_args="num_populations"'):
        tx.init({"w": tree["w"][0]})


# ------------------------------------------------------------------- from a loss

SIZES = (6, 40, 40, 3)


def model(seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    layers = [
        {"w": jax.random.normal(k, (a, b)) / math.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, SIZES, SIZES[1:], strict=False)
    ]
    return {"layers": layers, "table": jax.random.normal(keys[4], (300, 6))}


def loss(params, example):
    ids, label = example
    x = params["table"][ids].sum(0)
    for layer in params["layers"][:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    last = params["layers"][-1]
    return -jax.nn.log_softmax(x @ last["w"] + last["b"])[label]


def batch_of(size=10, seed=0):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(0, 300, (size, 2)))
    return (ids.at[0, 0].set(ids[1, 1]), jnp.asarray(rng.integers(0, 3, size)))


def contributions(params, batch, group, count):
    """Stacked, and their norms, by `jax.grad`."""
    each = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(params, batch)
    tree = jax.tree.map(
        lambda x: np.stack([np.float64(x)[group == k].sum(0) for k in range(count)]),
        each,
    )
    leaves = [x.reshape(count, -1) for x in jax.tree.leaves(tree)]
    return tree, np.sqrt(sum((x**2).sum(1) for x in leaves))


GROUP = np.array([0, 0, 1, 0, 0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize("count", in_tiers([2, 5], {5}))
def test_fair_grad_equals_the_transform_and_the_definition(count):
    params, batch = model(), batch_of()
    group = GROUP if count == 2 else np.arange(10) % 4  # the fifth is absent
    tree, norm = contributions(params, batch, group, count)
    here = norm > 0
    factor = np.where(here, np.minimum(1, 1.3 * norm[here].min() / np.where(
        here, norm, 1)), 1)  # fmt: skip
    right = jax.tree.map(lambda x: np.tensordot(factor, x, 1), tree)
    grad = per_example.fair_grad(loss, count, 1.3, floor=0.0)
    sums, info = jax.jit(grad)(params, batch, population_ids=jnp.asarray(group))
    near(sums, right, 2e-5)
    near(info.norm, norm, 1e-5)
    near(info.factor, factor, 1e-5)
    assert info.count.tolist() == np.bincount(group, minlength=count).tolist()
    stack = jax.jit(per_example.population_grad(loss, count))
    stacked, _ = stack(params, batch, population_ids=jnp.asarray(group))
    tx = clipfx.clip_fair_groups(1.3, num_populations=count, floor=0.0)
    near(jax.jit(tx.update)(stacked, tx.init(params))[0], right, 2e-5)


def ways(params, batch, count, loss=loss):
    seen = []

    def look(params, batch):
        signature = populations.Signature(loss, 0, 1, False)
        args, ids = (params, batch), jnp.zeros(len(batch[1]), jnp.int32)
        *_, member = populations.by_population(signature, args, None, ids, count)
        call = trace.prepare(signature, args, {}, norms=False)
        seen.append(population_norms.choose(populations.one_pass(call, member)))
        return 0

    jax.eval_shape(look, params, batch)
    names = [jax.tree_util.keystr(path, simple=True, separator="/")
             for path, _ in jax.tree_util.tree_leaves_with_path(params)]  # fmt: skip
    return {names[k]: how for k, how in seen[0].items()}


def test_norms_that_are_cheaper_are_not_of_formed_contributions():
    params, batch = model(), batch_of()
    assert ways(params, batch, 2) == {"table": "rows", "layers/1/w": "products"}
    assert ways(params, batch, 1) == {}  # one population: nothing to save
    assert "table" not in ways(params, batch_of(200), 2)
    grad = jax.jit(per_example.fair_grad(loss, 2))
    text = (
        grad.lower(params, batch, population_ids=jnp.asarray(GROUP)).compile().as_text()
    )
    assert "f32[2,300,6]" not in text


def test_floor_of_a_table_whose_contributions_cancel():
    """The floor is a share of the norm of the sum, not of what is added up."""
    ids = jnp.array([[2, 7], [7, 9], [2, 7], [7, 9]])
    rows = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 4)), jnp.float32)
    rows = jnp.concatenate([rows, -0.9 * rows])  # of the other population
    group = jnp.array([0, 0, 1, 1])
    table = jnp.zeros((90, 4))
    one = lambda table, e: (table[e[0]] * e[1]).sum()
    assert ways(table, (ids, rows), 2, one) == {"": "rows"}
    for floor in (0.0, 9.5, 12.0):
        grad = per_example.fair_grad(one, 2, 1.0, floor=floor)
        _, info = jax.jit(grad)(table, (ids, rows), population_ids=group)
        stack = jax.jit(per_example.population_grad(one, 2))
        parts, _ = stack(table, (ids, rows), population_ids=group)
        tx = clipfx.clip_fair_groups(1.0, floor=floor)
        _, state = jax.jit(tx.update)(parts, tx.init(table))
        near(info.factor, state.metrics.factor, 1e-5)


def test_neighbours_of_a_table_that_look_up_the_same_row():
    """Sorted by population and row, the last of one may be the first of the next."""
    ids = np.array([[2, 7], [7, 9], [9, 11], [0, 7], [7, 7], [12, 9]])
    group = np.array([0, 1, 2, 0, 1, 2])
    rows = np.random.default_rng(0).normal(size=(6, 2, 4))
    batch, table = (jnp.asarray(ids), jnp.float32(rows)), jnp.zeros((90, 4))
    one = lambda table, e: (table[e[0]] * e[1]).sum()
    assert ways(table, batch, 3, one) == {"": "rows"}
    sums, info = jax.jit(per_example.fair_grad(one, 3, 1.2, floor=0.0))(
        table, batch, population_ids=jnp.asarray(group)
    )
    tree = np.zeros((3, 90, 4))
    np.add.at(tree, (np.repeat(group, 2), ids.ravel()), rows.reshape(-1, 4))
    norm = np.linalg.norm(tree, axis=(1, 2))
    right, factor = bounded({"": tree}, norm, 1.2)
    np.testing.assert_allclose(info.norm, norm, rtol=1e-6)
    np.testing.assert_allclose(info.factor, factor, rtol=1e-6)
    near(sums, right)


@pytest.mark.parametrize("others", [-1.0, 1.0])
def test_gradients_that_cancel_are_formed_after_all(others):
    """Pairs of examples that differ in sign, in one population or in both.

    Products would leave only rounding.
    """
    one = lambda w, e: e[1] * jnp.tanh(e[0] @ w).sum()
    w = jax.random.normal(jax.random.key(0), (40, 50))
    x = jax.random.normal(jax.random.key(1), (4, 40))
    noise = 1e-4 * jax.random.normal(jax.random.key(2), (4, 40))
    signs = jnp.array([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, others, others])
    batch = (jnp.concatenate([x, x + noise]), signs)
    group = jnp.array([0, 0, 1, 1, 0, 0, 1, 1])
    each = jax.vmap(jax.grad(one), (None, 0))
    with enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), (w, batch))
        rows = np.asarray(each(*wide))
    right = [np.linalg.norm(rows[np.asarray(group) == k].sum(0)) for k in (0, 1)]
    size = np.sqrt((rows**2).sum())
    assert (np.array(right) < size / 1000).tolist() == [True, others < 0]
    _, info = jax.jit(per_example.fair_grad(one, 2))(w, batch, population_ids=group)
    np.testing.assert_allclose(info.norm, right, rtol=1e-3)


def test_padding_and_bad_examples_are_counted_nowhere():
    params, (ids, labels) = model(), batch_of()
    where = jnp.arange(10) < 7
    grad = jax.jit(per_example.fair_grad(loss, 2, 1.3, floor=0.0))
    sums, info = grad(
        params, (ids, labels), population_ids=jnp.asarray(GROUP), where=where
    )
    few = jax.tree.map(lambda x: x[:7], (ids, labels))
    right, other = grad(params, few, population_ids=jnp.asarray(GROUP[:7]))
    near(sums, jax.tree.map(np.float64, right), 1e-5)
    assert info.count.tolist() == other.count.tolist()
    scaled = lambda p, e: e[0] * loss(p, e[1])
    weight = jnp.ones(10).at[jnp.array([2, 8])].set(jnp.nan)
    grad = jax.jit(per_example.fair_grad(scaled, 2, 1.3, floor=0.0))
    sums, info = grad(
        params, (weight, (ids, labels)), population_ids=jnp.asarray(GROUP)
    )
    assert info.count.tolist() == [7, 1]
    good = np.isfinite(weight)
    _, norm = contributions(
        params, jax.tree.map(lambda x: x[good], (ids, labels)), GROUP[good], 2
    )
    near(info.norm, norm, 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(sums))


ONE = jnp.ones((2, 3))
ERRORS = [
    (lambda: clipfx.clip_fair_groups(0.5), ValueError, "max_ratio"),
    (lambda: clipfx.clip_fair_groups("2"), TypeError, "max_ratio"),
    (lambda: clipfx.clip_fair_groups(floor=-1.0), ValueError, "floor"),
    (lambda: clipfx.clip_fair_groups(reference="max"), ValueError, "reference"),
    (lambda: clipfx.clip_fair_groups(reference=2), ValueError, "one of 2"),
    (lambda: clipfx.clip_fair_groups(num_populations=0), ValueError, "num_populations"),
    (
        lambda: clipfx.clip_fair_groups(num_populations=2.0),
        TypeError,
        "an int >= 1, got 2.0",
    ),
    (lambda: clipfx.clip_fair_groups(reference=True), ValueError, "got True"),
    (lambda: clipfx.clip_fair_groups().update({}, None), TypeError, "tree_clip"),
    (lambda: clip({"w": ONE}, 2.0, 3), ValueError, "axis of num_populations=3"),
    (lambda: clip({"w": ONE}, 2.0, 2, present=np.ones(3, bool)), ValueError, "bool"),
    (lambda: eager(present=np.zeros(2, bool)), ValueError, "all absent"),
    (lambda: per_example.fair_grad(loss, 2, 0.0), ValueError, "max_ratio"),
    (lambda: per_example.fair_grad(loss, 2, reference="ema"), ValueError, "state"),
    (lambda: fair(np.array([0, 2])), ValueError, "0 to 2"),
    (lambda: fair(np.array([0, -1])), ValueError, "-1 to 0"),
    (lambda: fair(np.array([0.0, 1.0])), TypeError, "integers"),
    (lambda: fair(np.array([0, 1, 1])), ValueError, "one entry for each"),
    (lambda: fair(np.zeros(0, np.int32), 0), ValueError, "all populations are absent"),
]


def eager(**extra):
    tx = clipfx.clip_fair_groups(2.0)
    return tx.update({"w": ONE}, tx.init({"w": ONE[0]}), **extra)


def fair(group, size=2):
    batch = jax.tree.map(lambda x: x[:size], batch_of())
    return per_example.fair_grad(loss, 2)(model(), batch, population_ids=group)


@pytest.mark.parametrize("case", ERRORS, ids=[case[2] for case in ERRORS])
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
