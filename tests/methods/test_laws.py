"""Every law on every row of the table, in every dtype, on one device.

Laws share the update of a row, compiled once; those that compile programs of their own,
or run op by op, leave to the full tier the rows that are another row's program.
"""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from methods import ELSEWHERE, FEW, FEWEST, METHODS, UNLIKE, Method
from tiers import in_tiers
from trees import DTYPES, assert_close, assert_same, enable_x64, mixed, norm, sample

import clipfx
from clipfx._core.groups import group_leaves


def rows(keep=lambda row: True, usual=UNLIKE):
    """Runs a law on the rows that it holds for, in the full tier where not usual."""
    kept = {name: row for name, row in METHODS.items() if keep(row)}
    return pytest.mark.parametrize("row", in_tiers(kept, usual))


ROWS = rows()
IN_FEW = rows(usual=FEW)
IN_FEWEST = rows(usual=FEWEST)
IN_TWO = rows(usual={"agc", "spamp"})
BY_NORM = rows(lambda row: row.groups is not None and row.by_norm)
MEASURED = rows(lambda row: row.groups is not None and not row.stateless)
MEASURED_BY_NORM = rows(
    lambda row: row.groups is not None and row.by_norm and not row.stateless
)
THRESHOLDS = rows(lambda row: row.threshold)
FEW_THRESHOLDS = rows(lambda row: row.threshold, FEW)
HARD = rows(lambda row: row.hard)
IN_DTYPES = pytest.mark.parametrize("dtype", in_tiers(DTYPES, {"float32", "bfloat16"}))


def plain(row: Method, **changed):
    """The row's transform, given what its update needs."""
    return given(row.make(**{**row.args, **changed}), row.extra)


def make(row: Method, **changed):
    """The same with its update compiled, once for all laws."""
    return compiled(row, **changed)[0]


def compiled(row: Method, **changed):
    """The transform, and a list that grows whenever its update is traced."""
    args, extra = {**row.args, **changed}, row.extra
    return _compiled(row.make, tuple(args.items()), tuple(extra.items()))


@functools.cache
def _compiled(make, args, extra):
    tx, traces = given(make(**dict(args)), dict(extra)), []

    def update(*args, **kwargs):
        traces.append(1)
        return tx.update(*args, **kwargs)

    return tx._replace(update=jax.jit(update)), traces


def given(tx, needed):
    if not needed:
        return tx

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, **needed, **extra)

    return tx._replace(update=update)


def closure(row: Method, *names: str):
    """What the row's transform has settled as the first of these names that it has."""
    update = row.make(**row.args).update
    settled = inspect.getclosurevars(update).nonlocals
    return next(settled[name] for name in names if name in settled)


def threshold(row: Method, value):
    """Another value for the first argument of the row's transform."""
    return {next(iter(row.args)): value}


def run(tx, *trees):
    """All outputs and the last state of steps."""
    state, outs = tx.init(trees[0]), []
    for tree in trees:
        out, state = tx.update(tree, state, tree)
        outs.append(out)
    return outs, state


def scaled(tree, factor):
    return jax.tree.map(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def after_a_small_one(tx, tree):
    """A step on the tree and the state after it, behind a step of a hundredth of it.

    On their first step most rules that adapt are the identity, and no law is tested.
    """
    outs, state = run(tx, scaled(tree, 0.01), tree)
    return outs[1], state


def assert_changed(out, tree):
    pairs = zip(*map(jax.tree.leaves, (out, tree)), strict=True)
    assert not all(np.array_equal(x, y) for x, y in pairs)


def members(row: Method, tree):
    """The leaves of each group, by name."""
    groups = group_leaves(row.groups or "leaf", tree)
    leaves = jax.tree.leaves(tree)
    return {
        name: [x for x, i in zip(leaves, groups.index, strict=True) if i == number]
        for number, name in enumerate(groups.names)
    }


# ------------------------------------------------------------- ways to run a method


def scanned(update, tree, state):
    def step(state, tree):
        out, state = update(tree, state, tree)
        return state, out

    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x[None], tree))
    return jax.tree.map(lambda x: x[0], out), state


def vmapped(update, tree, state):
    pair = lambda t: jax.tree.map(lambda x: jnp.stack([x * 0, x]), t)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    out = jax.vmap(update)(pair(tree), states, pair(tree))
    return jax.tree.map(lambda x: x[1], out)


def every_way(row: Method, tree, state):
    """Jitted by itself; scanned and mapped in one program, to compile once."""
    update = plain(row).update
    both = lambda *args: (scanned(update, *args), vmapped(update, *args))
    return make(row).update(tree, state, tree), *jax.jit(both)(tree, state)


# ----------------------------------------------------------------------------- laws


def halves(**kwargs):
    """The sample in bfloat16 and float16, half of the leaves each."""
    tree = sample(jnp.bfloat16, **kwargs)
    tree["encoder"]["kernel"] = sample(jnp.float16, **kwargs)["encoder"]["kernel"]
    return tree


@IN_TWO
def test_every_way_to_run_gives_the_same(row):
    assert_every_way_gives_the_same(row, sample())


@IN_TWO
def test_every_way_to_run_gives_the_same_in_half_precision(row):
    assert_every_way_gives_the_same(row, halves())


def assert_every_way_gives_the_same(row, tree):
    tx = plain(row)
    _, state = make(row).update(tree, tx.init(tree), tree)
    expected, expected_state = tx.update(tree, state, tree)  # op by op
    for out, new_state in every_way(row, tree, state):
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
            # One rounding of the dtype: sums in another order may cross it.
            ulp = 0 if x.dtype == jnp.float32 else 2.0 ** -jnp.finfo(x.dtype).nmant
            assert_close(x, y, rtol=1e-6 + ulp, atol=ulp * 1e-3)
        # A deviation from the mean is exact to the rounding of the mean.
        atol = 4e-6 if row.adaptive else 0
        assert_close(new_state, expected_state, rtol=2e-6, atol=atol)


def like(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@IN_DTYPES
@ROWS
def test_same_type_out_and_fixed_state(row, dtype):
    tree = sample(dtype)
    tx = make(row)
    state = tx.init(tree)
    out, new_state = jax.eval_shape(tx.update, tree, state, tree)
    assert like(out) == like(tree)
    assert like(new_state) == like(state)


def mixed_case(row, x64):
    """A transform that fits a tree of every kind of leaf, and the tree."""
    tree = {**mixed(), "f64": np.ones(3, np.float64)} if x64 else mixed()
    if row.groups is not None and not isinstance(row.groups, str):
        row = row._replace(make=METHODS["clip_per_leaf"].make)
        row = row._replace(args={"max_norm": 0.5})
    return plain(row), tree


def is_inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def assert_fixed(row, step, tree, state):
    """The state's types and the tree's; what is not inexact is the same object."""
    out, new_state = step(tree, state, tree)
    assert jax.tree.structure(out) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert is_inexact(y) or x is y
    assert like(new_state) == like(state)
    for leaf in [] if row.elements else jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)


@pytest.mark.parametrize("x64", in_tiers([False, True], {True}))
@ROWS
def test_fixed_state_and_type_out_of_mixed_trees(row, x64):
    with enable_x64(x64):
        tx, tree = mixed_case(row, x64)
        leaves, structure = jax.tree.flatten(tree)
        traced = [x if is_inexact(x) else None for x in leaves]

        def step(traced, state):
            pairs = zip(traced, leaves, strict=True)
            tree = structure.unflatten(y if x is None else x for x, y in pairs)
            assert_fixed(row, tx.update, tree, state)

        jax.eval_shape(step, traced, tx.init(tree))


@pytest.mark.parametrize("x64", [False, True])
@rows(usual=())
def test_fixed_state_and_type_out_of_mixed_trees_op_by_op(row, x64):
    with enable_x64(x64):
        tx, tree = mixed_case(row, x64)
        assert_fixed(row, tx.update, tree, tx.init(tree))


@ROWS
def test_init_needs_no_values(row):
    tree = sample(jnp.bfloat16)
    shapes = jax.eval_shape(lambda: tree)
    assert_same(make(row).init(shapes), make(row).init(tree))


def assert_finite(tree):
    for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert np.isfinite(x).all(), jax.tree_util.keystr(path)


@ROWS
def test_second_step_is_not_traced_again_and_states_stay_finite(row):
    (tx, traces), tree = compiled(row), sample()
    step = tx.update

    def hurt(bad):
        kernel = tree["decoder"]["kernel"].at[3, 2].set(bad)
        return {**tree, "decoder": {"kernel": kernel}}

    fresh = tx.init(tree)
    assert_finite(fresh)
    step(tree, fresh, tree)
    known = len(traces)
    huge = jax.tree.map(lambda x: jnp.clip(3 * x, -3.2e38, 3.2e38), sample(scale=1e38))
    zeros, bad = scaled(tree, 0), (hurt(jnp.nan), hurt(jnp.inf))
    for steps in ((tree, *bad, huge, huge, zeros, tree), (*bad, huge, huge)):
        state = fresh
        for x in steps:
            _, state = step(x, state, x)
            assert_finite(state)
    # `optax.contrib.sam` chooses between states by arithmetic.
    _, state = step(tree, fresh, tree)
    for c in (0.0, 0.3, 1.0):
        blend = lambda a, b, c=c: (c * np.float64(a) + (1 - c) * np.float64(b)).astype(
            a.dtype
        )
        between = jax.tree.map(blend, state, fresh)
        out, after = step(tree, between, tree)
        assert_finite((out, after))
        if c in (0, 1):
            assert_same((out, after), step(tree, (fresh, state)[int(c)], tree))
    assert len(traces) == known


@IN_FEW
def test_leaves_that_are_not_counted_may_come_and_go(row):
    """Parameters have integers where gradients have None or `float0`."""
    tree, tx = sample(), plain(row)
    params = {"count": jnp.arange(3), **tree}  # before all others
    state = tx.init(params)

    @jax.jit
    def both(tree, state, params):
        outs = []
        for instead in (None, np.zeros(3, jax.dtypes.float0)):
            out, after = tx.update({"count": instead, **tree}, state, params)
            assert jax.tree.structure(after) == jax.tree.structure(state)
            assert out.pop("count") is instead
            outs.append(out)
        return outs

    expected = run(make(row), tree)[0][0]
    for out in both(tree, state, params):
        assert_same(out, expected)


@rows(lambda row: not row.heads, FEWEST)
def test_trees_without_a_counted_leaf_pass(row):
    for tree in ({}, {"a": None}, {"i": jnp.arange(3)}):
        tx = make(row)
        state = tx.init(tree)
        out, after = tx.update(tree, state, tree)
        assert_same(out, tree)
        assert like(after) == like(state)


@ROWS
def test_explicit_meshes_need_no_set_mesh(row):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    encoder = {"bias": P(), "kernel": P(None, ("x", "y"))}
    spec = {"decoder": {"kernel": P("x")}, "encoder": encoder}
    places = jax.tree.map(lambda s: NamedSharding(mesh, s), spec)
    tree = jax.device_put(sample(), places)
    tx = make(row)
    state = tx.init(tree)
    for _ in range(2):  # types tell of the mesh
        out, state = jax.eval_shape(tx.update, tree, state, tree)
    for x, y in zip(*map(jax.tree.leaves, (out, tree)), strict=True):
        assert x.sharding.spec == jax.typeof(y).sharding.spec


@rows(lambda row: not row.heads)
def test_shapes_may_be_symbolic(row):
    n, m = export.symbolic_shape("n, m")
    shapes = {
        "decoder": {"kernel": (n, 5)},
        "encoder": {"bias": (m,), "kernel": (3, n)},
    }
    is_shape = lambda x: isinstance(x, tuple)
    like = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    tree = jax.tree.map(like, shapes, is_leaf=is_shape)
    tx = make(row)
    step = lambda u, p: tx.update(u, tx.init(p), p)[0]
    out = jax.eval_shape(step, tree, tree)
    assert jax.tree.map(lambda x: x.shape, out) == shapes


@ROWS
def test_states_can_be_exported(row):
    pytest.importorskip("flatbuffers")
    state = make(row).init(sample())
    written = export.export(jax.jit(lambda state: state))(state).serialize()
    assert_same(export.deserialize(written).call(state), state)


@IN_TWO
def test_fresh_state_can_be_donated(row):
    tx, tree = make(row), sample()
    step = jax.jit(lambda s, t: tx.update(t, s, t)[1], donate_argnums=0)
    expected = run(tx, tree, tree)[1]
    assert_close(step(step(tx.init(tree), tree), tree), expected)


@IN_DTYPES
@rows(lambda row: row.hard and row.threshold)
def test_identity_below_threshold(row, dtype):
    tree = sample(dtype)
    outs, state = run(make(row, **threshold(row, 1e3)), tree)
    assert_same(outs[0], tree)
    if row.groups is not None and not row.stateless:
        np.testing.assert_array_equal(state.metrics.factor, 1.0)


@IN_DTYPES
@HARD
def test_bound_of_what_is_stored(row, dtype):
    tree = sample(dtype, scale=3.0)
    out, state = after_a_small_one(make(row), tree)
    assert_changed(out, tree)
    before = list(members(row, tree).values())
    for number, leaves in enumerate(members(row, out).values()):
        if row.groups is None:
            bound, ord = row.args["max_abs"], np.inf
        elif row.stateless:
            bound, ord = row.args["max_norm"], row.ord
        else:
            bound, ord = float(state.metrics.threshold[number]), row.ord
        measured = norm(leaves, ord)
        assert measured <= bound * (1 + 1e-6)
        if norm(before[number], ord) > bound:
            assert measured == 0 if row.drops else measured >= bound * 0.99


@IN_DTYPES
@HARD
def test_clipping_twice_equals_clipping_once(row, dtype):
    at = lambda limit: clipfx.clip_by_norm(limit, groups=row.groups, ord=row.ord)
    clip_at = jax.jit(lambda limit, tree: run(at(limit), tree)[0][0])
    for seed in range(5):
        tree = sample(dtype, seed=seed, scale=3.0**seed)
        once, state = after_a_small_one(make(row), tree)
        if row.adaptive:  # which has another threshold for the next
            again = clip_at(state.metrics.threshold, once)
        else:
            again = run(make(row), once)[0][0]
        assert_same(again, once)
    assert_changed(once, tree)


@IN_DTYPES
@BY_NORM
def test_direction_is_kept(row, dtype):
    tree = sample(dtype)
    out = after_a_small_one(make(row), tree)[0]
    assert_changed(out, tree)
    before, after = members(row, tree), members(row, out)
    for name, leaves in before.items():
        flat = lambda xs: np.concatenate(
            [np.asarray(x, np.float64).ravel() for x in xs]
        )
        x, y = flat(leaves), flat(after[name])
        if y.any():
            cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            assert cosine > 1 - 4 * float(jnp.finfo(dtype).eps) ** 2 - 1e-12


@pytest.mark.parametrize("size", [1e38, 1e20, 1e-20, 1e-30])
@MEASURED_BY_NORM
def test_extreme_magnitudes(row, size):
    tree = sample(scale=size)
    tree = jax.tree.map(lambda x: jnp.clip(x, -3.2e38, 3.2e38), tree)
    out, state = after_a_small_one(make(row), tree)
    if size > 1:
        assert_changed(out, tree)
    before, after = members(row, tree), members(row, out)
    response = closure(row, "shape", "response")
    for number, name in enumerate(before):
        limit = np.float64(state.metrics.threshold[number])
        measured = norm(before[name], row.ord)
        reported = np.float64(state.metrics.norm[number])
        seen = min(measured, 3.4028235e38)  # what the response is told
        assert reported == pytest.approx(seen, rel=2e-6, abs=0)
        with enable_x64(True):
            target = float(response(jnp.float64(seen), jnp.float64(limit)))
        if limit >= 3.4028234e38 and target == seen:
            target = measured
        assert norm(after[name], row.ord) == pytest.approx(target, rel=3e-6, abs=0)


@ROWS
def test_zero_in_zero_out(row):
    tree = jax.tree.map(jnp.zeros_like, sample())
    outs, state = run(make(row), tree, tree, sample(), tree)
    assert_same(outs[1], tree)
    assert_finite(state)


@IN_TWO
def test_of_finite_updates_nothing_is_nan_or_infinite_in_between(row):
    tree = jax.tree.map(jnp.zeros_like, sample())
    with jax.debug_nans(True), jax.debug_infs(True):
        run(plain(row), tree, tree, sample(), tree)


@FEW_THRESHOLDS
def test_zero_threshold_gives_zeros(row):
    tx = make(row, **threshold(row, 0.0))
    for tree in (sample(), sample(scale=0.0), sample(jnp.float16), sample(scale=1e37)):
        out = run(tx, tree)[0][0]
        assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(out))


@FEW_THRESHOLDS
def test_infinite_threshold_gives_the_identity(row):
    tx = make(row, **threshold(row, jnp.inf))
    for tree in (sample(), sample(scale=0.0), sample(scale=1e37), sample(scale=1e-35)):
        assert_same(run(tx, tree)[0][0], tree)
    total = lambda t: sum(jnp.sum(x) for x in jax.tree.leaves(run(tx, t)[0][0]))
    ones = jax.tree.map(jnp.ones_like, sample())
    grad = jax.jit(jax.grad(total))
    assert_same(grad(sample()), ones)
    assert_same(grad(sample(scale=0.0)), ones)


@THRESHOLDS
def test_thresholds_may_be_traced_and_not_be_negative(row):
    for bad in (-1.0, float("nan"), np.float32(-1), jnp.float32(-1)):
        with pytest.raises(ValueError, match=r">= 0|\[0, inf"):
            run(plain(row, **threshold(row, bad)), sample())
    clip = lambda c, tree: run(plain(row, **threshold(row, c)), tree)[0][0]
    clip = jax.jit(clip)
    for c in (-1.0, 0.0):
        out = clip(c, sample())
        assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(out))
    assert_same(clip(np.inf, sample()), sample())


def summed_grad(tx):
    """Of the sum over what the transform gives."""

    @jax.jit
    @jax.grad
    def grad(t, state):
        return sum(jnp.sum(x) for x in jax.tree.leaves(tx.update(t, state, t)[0]))

    return grad


@IN_FEWEST
def test_derivative_at_zero_is_finite(row):
    tx = make(row)
    grad = summed_grad(tx)
    zeros, small = scaled(sample(), 0), sample(scale=0.01)
    states = tx.init(zeros), run(tx, small)[1]
    for tree in (zeros, {**zeros, "decoder": sample()["decoder"]}, sample()):
        for state in states:
            for leaf in jax.tree.leaves(grad(tree, state)):
                assert np.isfinite(leaf).all()


@IN_TWO
def test_derivative_below_the_threshold_is_finite_in_half_precision(row):
    tx = make(row)
    half = sample(jnp.bfloat16, scale=1e-3)  # the derivative is 1
    state = run(tx, scaled(half, 100))[1]
    for leaf in jax.tree.leaves(summed_grad(tx)(half, state)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
        assert not row.hard or (np.asarray(leaf, np.float32) == 1).all()


@rows(lambda row: row.groups is not None and row.by_norm, FEWEST)
def test_derivative_equals_finite_differences(row):
    tx = plain(row)
    tree, direction = sample(), sample(seed=1)

    def along(step):
        moved = jax.tree.map(lambda x, d: x + step * d, tree, direction)
        _, state = tx.update(small, tx.init(small), small)
        out, _ = tx.update(moved, state, moved)
        return sum(jnp.sum(x * x * x) for x in jax.tree.leaves(out))

    with enable_x64(True):
        tree, direction = jax.tree.map(
            lambda x: np.asarray(x, np.float64), (tree, direction)
        )
        small = jax.tree.map(lambda x: x * 0.01, tree)
        # Thresholds are float32 beside the path of derivatives.
        step = 1e-3 if row.adaptive else 1e-4
        ahead, behind, exact, backward = jax.jit(
            lambda step, zero, one: (
                along(step),
                along(-step),
                jax.jvp(along, (zero,), (one,))[1],
                jax.grad(along)(zero),
            )
        )(step, 0.0, 1.0)
        slope = (ahead - behind) / (2 * step)
    np.testing.assert_allclose(exact, slope, rtol=2 * step, atol=1e-6)
    np.testing.assert_allclose(exact, backward, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@MEASURED
def test_nothing_is_learned_from_a_nonfinite_norm(row, bad):
    tree = sample()
    hurt = jax.tree.map(lambda x: x, tree)
    hurt["decoder"]["kernel"] = tree["decoder"]["kernel"].at[3, 2].set(bad)
    tx = make(row)
    clean_outs, clean = run(tx, tree, sample(seed=1))
    outs, state = run(tx, tree, hurt, sample(seed=1))
    assert_same(outs[-1], clean_outs[-1])
    assert_same(state.rule_state, clean.rule_state)
    for field in ("norm", "threshold", "factor"):
        assert_same(getattr(state.metrics, field), getattr(clean.metrics, field))
    assert int(state.metrics.nonfinite.max()) == 1
    assert int(state.metrics.steps.max()) == 3
    # The whole group is lost, and no other.
    dropped = closure(row, "nonfinite") == "zero"
    for name, leaves in members(row, outs[1]).items():
        whole = np.concatenate([np.ravel(x) for x in leaves])
        hit = name in members(row, {"decoder": hurt["decoder"]})
        hit = hit or row.groups == "global"
        if isinstance(row.groups, dict):
            hit = name == "second"
        if hit:
            assert (whole == 0).all() if dropped else np.isnan(whole).all()
        else:
            assert np.isfinite(whole).all()


@ROWS
def test_unknown_extra_args_are_ignored(row):
    tx, tree = plain(row), sample()
    state = tx.init(tree)

    def program(**extra):
        step = lambda tree, state: tx.update(tree, state, tree, **extra)
        return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(step)(tree, state)))

    # Also those by which a method hands on to its rule what it has measured.
    names = dict.fromkeys(("groups", "kept", "rows", "secant", "total"))
    assert program(scale=1.0, loss=2.0, key=None, **names) == program()


@IN_FEWEST
def test_injected_equals_plain(row):
    assert_injected_equals_plain(row, sample())


@IN_TWO
def test_injected_equals_plain_in_half_precision(row):
    assert_injected_equals_plain(row, halves())


def jitted(tx):
    return tx._replace(update=jax.jit(tx.update))


def assert_injected_equals_plain(row, tree):
    inject = optax.inject_hyperparams(
        row.make, static_args=row.static, hyperparam_dtype=jnp.float32
    )
    tx = jitted(given(inject(**row.args), row.extra))
    out = after_a_small_one(tx, tree)[0]
    expected = after_a_small_one(make(row), tree)[0]
    assert_changed(out, tree)
    assert_close_to_an_ulp(out, expected)
    later = lambda v: lambda count: jnp.where(count < 2, v, 0.5 * v)
    tx = inject(**{name: later(v) for name, v in row.args.items()})
    tx = jitted(given(tx, row.extra))
    assert_close_to_an_ulp(after_a_small_one(tx, tree)[0], expected)


def assert_close_to_an_ulp(a, b):
    """Of each leaf, if it is in half precision."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        info = jnp.finfo(x.dtype)
        assert_close(x, y, rtol=1e-6 + (0 if info.bits == 32 else 2.0**-info.nmant))


@MEASURED_BY_NORM
def test_metrics_agree_with_recomputation(row):
    tree = sample(scale=3.0)
    _, before_it = run(make(row), sample(scale=1e-3))
    (_, out), state = run(make(row), sample(scale=1e-3), tree)
    before, after = members(row, tree), members(row, out)
    m = state.metrics
    assert tuple(m.groups) == tuple(before)
    for i, name in enumerate(before):
        assert float(m.norm[i]) == pytest.approx(norm(before[name], row.ord), rel=1e-6)
        became = norm(after[name], row.ord)
        assert float(m.norm[i] * m.factor[i]) == pytest.approx(became, rel=1e-6)
        assert int(m.steps[i]) == 2
        exceeded = [
            float(x.norm[i]) > float(x.threshold[i]) * (1 + 1e-6)
            for x in (before_it.metrics, m)
        ]
        assert int(m.clipped[i]) == sum(exceeded)
        assert exceeded[1] or row.adaptive
        assert int(m.nonfinite[i]) == 0


@IN_TWO
def test_per_stacked_layer_equals_a_loop(row):
    trees = [sample(seed=i, scale=3.0**i) for i in range(3)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *trees)
    tx = jitted(clipfx.per_stacked_layer(plain(row)))
    out, _ = after_a_small_one(tx, stacked)
    assert_changed(out, stacked)
    for i, tree in enumerate(trees):
        slice_ = jax.tree.map(lambda x, i=i: x[i], out)
        assert_close(slice_, after_a_small_one(make(row), tree)[0], rtol=2e-6)


def test_every_public_transform_is_a_row():
    made = {
        name for name in clipfx.__all__ if inspect.isfunction(getattr(clipfx, name))
    }
    rows = {row.make.__name__ for row in METHODS.values()}
    assert made - rows == ELSEWHERE
