"""Private gradients: what one example can change, and what noise is added."""

import copy
import dataclasses
import functools
import inspect
import math
import pickle
import pprint

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sentences import raises_one_sentence
from tiers import in_tiers
from trees import enable_x64

import clipfx
from clipfx import per_example, privacy, responses

KEY = jax.random.key(3)
SIZE = 6


def loss(params, example):
    x, y = example
    hidden = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"])
    # Half precision stays what it is under strict promotion.
    return jnp.square(hidden @ params["c"]["w"] - y)


def params_of(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {"w": jax.random.normal(keys[0], (5, 7), dtype), "b": jnp.zeros(7, dtype)},
        "c": {"w": jax.random.normal(keys[1], (7,), dtype)},
    }


def batch_of(size=SIZE, dtype="float32", seed=1):
    """Populations differ: half of the first has small gradients."""
    rng = np.random.default_rng(seed)
    small = np.where(np.arange(size) == 0, 0.002, 1)
    return (jnp.asarray(2 * small[:, None] * rng.normal(size=(size, 5)), dtype),
            jnp.asarray(3 * small * rng.normal(size=size), dtype))  # fmt: skip


POPULATION = jnp.array([0, 1, 0, 1, 1, 1])
RULES = {
    "fixed": lambda: 0.7,
    "quantile": lambda: privacy.quantile(0.7, count_stddev=3.0),
    "dpsgd_f": lambda: privacy.dpsgd_f(0.7, 2, count_stddev=3.0),
    "dpsgd_global": lambda: privacy.dpsgd_global(0.7, 5.0),
    "dpsgd_global_adapt": lambda: privacy.dpsgd_global_adapt(
        0.7, 5.0, count_stddev=3.0
    ),
    "histogram_threshold": lambda: privacy.histogram_threshold(
        0.7, edges=(0.1, 0.3, 1.0, 3.0, 10.0), count_stddev=3.0
    ),
}


def dp(noise=1.1, max_norm=0.7, **settings):
    return privacy.dp_grad(
        loss, max_norm=max_norm, noise_multiplier=noise, expected_batch_size=SIZE,
        key=KEY, **settings,
    )  # fmt: skip


def once(grad, params=None, batch=None, state=None, **extra):
    params = params_of() if params is None else params
    batch = batch_of() if batch is None else batch
    state = grad.init(params) if state is None else state
    extra.setdefault("where", None)
    if grad.rule.num_populations is not None:
        extra.setdefault("population_ids", POPULATION[: len(batch[1])])
    return jax.jit(grad)(state, params, batch, **extra)


def flat(tree):
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


# --------------------------------------------------------------- sensitivity: replay

NEIGHBOURS = {
    "removed": (None, "add_or_remove_one"),
    "zero": (0.0, "replace_one"),
    "large": (1e3, "replace_one"),
    "huge": (1e38, "replace_one"),
    "inf": (math.inf, "replace_one"),
    "nan": (math.nan, "replace_one"),
}


WITHOUT_COUNTS = ("fixed", "dpsgd_global")  # others are refused with the 1-norm
WITH_COUNTS = tuple(rule for rule in RULES if rule not in WITHOUT_COUNTS)


ORDS = [*((2, rule) for rule in RULES), *((1, rule) for rule in WITHOUT_COUNTS)]
STEPS = {
    f"{ord}-{rule}-{dtype}": (ord, rule, dtype)
    for ord, rule in ORDS
    for dtype in ("float32", "bfloat16", "float16")
}
USUAL_STEPS = {"2-dpsgd_f-bfloat16", "1-fixed-float16"}


@pytest.mark.parametrize("step", in_tiers(STEPS, USUAL_STEPS))
def test_neighbours_are_within_sensitivity(step):
    """Recorded on a batch, replayed on its neighbours, released counts held fast."""
    ord, rule, dtype = step
    grad = dp(0.0, RULES[rule](), ord=ord)
    params, (x, y) = params_of(dtype), batch_of(dtype=dtype)
    state = grad.init(params)
    _, after, _ = once(grad, params, (x, y), state)
    recorded = grad.rule.limit(jnp.array([0.7]), state.rule, after.counts)
    table = recorded[POPULATION] if rule == "dpsgd_f" else recorded
    assert (rule == "dpsgd_f") == (len(np.unique(table)) > 1)
    if grad.rule.response is None:
        response = responses.hard
    else:
        response = grad.rule.response(state.rule)
    clipped = jax.jit(per_example.clipped_grad(loss, 1.0, response=response, ord=ord))
    limit = jnp.broadcast_to(table, (SIZE, 1))
    sums, _ = clipped(params, (x, y), max_norm=limit)
    for which, (value, relation) in NEIGHBOURS.items():
        if value is None:
            where = jnp.arange(SIZE) != 2
            other, _ = clipped(params, (x, y), max_norm=limit, where=where)
        else:
            if math.isfinite(value):
                value = min(value, float(jnp.finfo(x.dtype).max))
            moved = x.at[2].set(jnp.asarray(value, x.dtype))
            other, _ = clipped(params, (moved, y), max_norm=limit)
        moved = np.linalg.norm(flat(sums) - flat(other), ord)
        assert moved <= grad.sensitivity(after, relation), which
        if which in ("inf", "nan"):  # contributes nothing
            assert moved <= grad.sensitivity(after, "replace_special")
    # And the counts that were released.
    if grad.rule.count_stddev:
        norms = np.array([0.0, 0.1, 0.69, 0.71, 4.0, 9.0])[:, None]
        member = jnp.asarray(np.eye(2)[np.arange(6) % 2], jnp.float32)
        answers = grad.rule.ask(state.rule, jnp.float32(norms), member)
        assert np.linalg.norm(answers, axis=1).max() <= grad.rule.reach(1)


def test_whole_step_is_within_sensitivity():
    """The same draw on both sides, so that only the difference of sums is left."""
    grad = dp(1.1, groups="layer", allocation="equal_budget")
    params, (x, y) = params_of(), batch_of()
    first, state, _ = once(grad, params, (x, y))
    moved = x.at[0].set(jnp.nan)
    second, _, _ = once(grad, params, (moved, y))
    limits = np.float32([0.7, 0.7])
    assert grad.sensitivity(state) == pytest.approx(np.linalg.norm(limits))
    for layer in ("a", "c"):
        off = SIZE * np.linalg.norm(flat(first[layer]) - flat(second[layer]))
        assert off <= 0.7 + 1e-6  # and what adding noise rounds


# ---------------------------------------------------------------------- the noise


def test_every_slice_of_a_stack_may_have_its_own_noise():
    """Of layers stacked for `scan`, each bounded by a threshold of its own."""

    def loss(p, x):
        turn = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(turn, x, p["w"])[0].sum()

    limits = np.float32([0.1, 1.0, 10.0])
    grad = privacy.dp_grad(
        loss, max_norm=limits, groups={"w": "w/*"}, noise_multiplier=1.0,
        expected_batch_size=1, key=KEY, allocation="equal_budget",
    )  # fmt: skip
    params = {"w": jnp.zeros((3, 50, 50))}
    step = jax.jit(grad)
    nobody = jnp.zeros(1, bool)  # noise alone
    noise, state, _ = step(
        grad.init(params), params, jnp.ones((1, 4, 50)), where=nobody
    )
    np.testing.assert_allclose(state.stddev, 3**0.5 * limits, rtol=1e-6)
    spread = np.asarray(noise["w"], np.float64).std((1, 2))
    np.testing.assert_allclose(spread, 3**0.5 * limits, rtol=0.05)


def test_is_clipped_sum_and_noise_over_the_expected_size():
    params, batch = params_of(), batch_of()
    for ord, add in ((2, privacy.add_gaussian_noise), (1, privacy.add_laplace_noise)):
        grad = dp(1.1, ord=ord)
        found, _, _ = once(grad, params, batch)
        tx = optax.chain(add(1.1 * 0.7, KEY), optax.scale(1 / SIZE))
        sums, _ = jax.jit(per_example.clipped_grad(loss, 0.7, ord=ord))(params, batch)
        right, _ = tx.update(sums, tx.init(params))
        chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)


FEW = in_tiers(RULES.keys(), {"dpsgd_f"})


@pytest.mark.parametrize("rule", FEW)
def test_microbatches_padding_and_mask_change_nothing(rule):
    params, (x, y) = params_of(), batch_of()
    right, after, info = once(dp(max_norm=RULES[rule]()), params, (x, y))
    for step in (1, 4):
        grad = dp(max_norm=RULES[rule](), microbatch_size=step)
        found, state, other = once(grad, params, (x, y))
        chex.assert_trees_all_close(found, right, rtol=1e-4, atol=1e-6)
        chex.assert_trees_all_close(state, after, rtol=1e-5)
        chex.assert_trees_all_close(other, info, rtol=1e-5)
    padded = (jnp.concatenate([x, x[:3] * 1e9]), jnp.concatenate([y, y[:3]]))
    where = jnp.arange(9) < 6
    extra = {}
    if rule == "dpsgd_f":
        extra = {"population_ids": jnp.concatenate([POPULATION, POPULATION[:3]])}
    grad = dp(max_norm=RULES[rule](), microbatch_size=4)
    found, state, _ = once(grad, params, padded, where=where, **extra)
    chex.assert_trees_all_close(found, right, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(state, after, rtol=1e-5)


@pytest.mark.parametrize("rule", FEW)
def test_batch_without_examples_is_a_step_of_noise(rule):
    params, (x, y) = params_of(), batch_of()
    grad = dp(max_norm=RULES[rule]())
    empty, state, info = once(grad, params, (x[:0], y[:0]))
    masked, after, _ = once(grad, params, (x, y), where=jnp.zeros(SIZE, bool))
    chex.assert_trees_all_close(empty, masked, rtol=1e-6)
    chex.assert_trees_all_close(state, after, rtol=1e-6)
    assert info.norm.shape == (0, 1)
    level = float(state.stddev[0]) / SIZE
    assert np.std(flat(empty)) == pytest.approx(level, rel=0.4)
    assert after.step == 1


def test_no_noise_is_no_noise():
    found, state, _ = once(dp(0.0))
    sums, _ = jax.jit(per_example.clipped_grad(loss, 0.7))(params_of(), batch_of())
    mean = jax.tree.map(lambda x: x / SIZE, sums)
    chex.assert_trees_all_close(found, mean, rtol=1e-5, atol=1e-7)
    assert state.stddev.tolist() == [0.0]
    found, _, _ = once(dp(0.0, math.inf))
    assert np.isfinite(flat(found)).all()


@pytest.mark.parametrize("rule", in_tiers(["fixed", "quantile"], {"quantile"}))
def test_noise_multiplier_may_be_traced(rule):
    params, batch = params_of(), batch_of()

    @jax.jit
    def step(z):
        grad = dp(z, RULES[rule]())
        return grad(grad.init(params), params, batch, where=None)[:2]

    for z in (0.5, 1.1):
        found, state = step(z)
        right, after, _ = once(dp(z, RULES[rule]()))
        chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(state, after, rtol=1e-5)
    assert step._cache_size() == 1


@pytest.mark.parametrize("ord", in_tiers([1, 2], {2}))
def test_allocations_cost_the_same(ord):
    """Blocks of noise b_k with thresholds C_k release sum (C_k / b_k)^p = z^-p."""
    limits = {"a": 2.0, "c": 0.5}
    for allocation in ("global", "equal_budget"):
        grad = dp(1.3, limits, ord=ord, groups="layer", allocation=allocation)
        _, state, _ = once(grad)
        cost = sum((np.array([2.0, 0.5]) / np.float64(state.stddev)) ** ord)
        assert cost ** (1 / ord) == pytest.approx(1 / 1.3, rel=1e-6)
        same = state.stddev[0] == state.stddev[1]
        assert same == (allocation == "global")


def test_dtypes_steps_and_scan():
    params = params_of("bfloat16")
    grad = dp(max_norm=privacy.quantile(0.7, count_stddev=3.0))
    found, _, _ = once(grad, params, batch_of(dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}

    def step(carry, batch):
        params, state = carry
        grads, state, _ = grad(state, params, batch, where=None)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state), grads

    params = params_of()
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch_of())
    (_, state), _ = jax.lax.scan(step, (params, grad.init(params)), batches)
    assert state.step == 3
    with enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), params_of())
        batch = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), batch_of())
        found, _, _ = once(dp(), params, batch)
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float64")}


BY_NUMPY = {  # numbers as configurations hold them
    "quantile": lambda: privacy.quantile(
        np.float64(0.7), count_stddev=np.int64(3), quantile=np.float32(0.5),
        step_size=np.float64(0.2), min_norm=np.float64(0.1),
    ),
    "dpsgd_f": lambda: privacy.dpsgd_f(
        np.float64(0.7), np.int64(2), count_stddev=np.float32(3)
    ),
    "dpsgd_global": lambda: privacy.dpsgd_global(np.float32(0.7), np.float64(5)),
    "dpsgd_global_adapt": lambda: privacy.dpsgd_global_adapt(
        np.float64(0.7), np.float64(5), count_stddev=np.int32(3),
        step_size=np.float64(0.1), tolerance=np.float64(0.7),
    ),
    "histogram_threshold": lambda: privacy.histogram_threshold(
        np.float64(0.7), edges=np.geomspace(0.1, 10, 5), count_stddev=np.int64(3),
        quantile=np.float64(0.5), decay=np.float64(0.9),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "dtype", in_tiers(["float32", "bfloat16", "float64"], {"float64"})
)
@pytest.mark.parametrize("x64", in_tiers([False, True], {True}))
def test_states_keep_shapes_and_dtypes(x64, dtype):
    """Weak types too, so that loops over steps can carry them; nothing is compiled."""
    if dtype == "float64" and not x64:
        dtype = "float16"
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
    for makers in (RULES, BY_NUMPY):
        for rule, make in makers.items():
            with enable_x64(x64):
                params, batch = params_of(dtype), batch_of(dtype=dtype)
                grad = privacy.dp_grad(
                    loss, max_norm=make(), noise_multiplier=np.float64(1.1), key=KEY,
                    expected_batch_size=np.int64(SIZE), allocation="equal_budget",
                )  # fmt: skip
                extra = {"population_ids": POPULATION} if rule == "dpsgd_f" else {}
                state = jax.eval_shape(grad.init, params)
                step = functools.partial(grad, where=None, **extra)
                found, after, _ = jax.eval_shape(step, state, params, batch)
            assert types(after) == types(state), (rule, makers is BY_NUMPY)
            assert not any(x.weak_type for x in jax.tree.leaves(state))
            assert {x.dtype for x in jax.tree.leaves(state)} <= {
                jnp.dtype("int32"), jnp.dtype("float32")}  # fmt: skip
            assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "rule", in_tiers(["quantile", "histogram_threshold"], {"quantile"})
)
def test_step_can_be_exported(rule):
    """With a state that adapts, written and read again."""
    pytest.importorskip("flatbuffers")
    grad = privacy.dp_grad(
        lambda w, x: jnp.vdot(w, x), max_norm=RULES[rule](),
        noise_multiplier=1.1, expected_batch_size=2, key=KEY,
    )  # fmt: skip
    params, batch = jnp.zeros(2), jnp.ones((2, 2))

    def step(state, params, batch):
        return grad(state, params, batch, where=None)[:2]

    state = grad.init(params)
    written = jax.export.export(jax.jit(step))(state, params, batch).serialize()
    found, after = jax.export.deserialize(written).call(state, params, batch)
    assert type(after) is privacy.DPState
    assert after.step == 1
    assert found.shape == (2,)


def test_every_public_rule_is_a_row():
    """Of which the laws above and below hold, and those of whole steps."""
    public = {name: getattr(privacy, name) for name in privacy.__all__}
    functions = {name: x for name, x in public.items() if inspect.isfunction(x)}
    returned = lambda x: inspect.signature(x).return_annotation
    made = {k for k, x in functions.items() if returned(x) is privacy.PrivateThreshold}
    assert made == RULES.keys() - {"fixed"}


@pytest.mark.parametrize("rule", [x for x in RULES if x != "fixed"])
def test_laws_of_a_rule_by_itself(rule):
    """One example moves answers by its reach; any counts leave a finite state."""
    rule, start = RULES[rule](), jnp.full(1, 0.7)
    state = rule.init(start)
    norm = jnp.float32([0, 1e-38, 0.3, 0.7, 5, 3.4e38])[:, None]
    member = jax.nn.one_hot(POPULATION, rule.num_populations or 1)
    answers = rule.ask(state, norm, member)
    assert np.linalg.norm(answers, axis=1).max() <= rule.reach(1)

    def step(state, count):
        counts = jnp.full(answers.shape[1], count)
        after = rule.update(state, counts, 6.0, jnp.ones(1))
        return after, (state, rule.limit(start, after, counts))

    counts = jnp.float32([0, 1e9, -1e9, 3e38, -3e38, 5])
    last, (states, limits) = jax.jit(lambda: jax.lax.scan(step, state, counts))()
    chex.assert_tree_all_finite((last, states, limits))
    assert (np.asarray(limits) > 0).all()
    _, (_, mapped) = jax.jit(jax.vmap(step))(states, counts)
    np.testing.assert_allclose(mapped, limits, rtol=1e-6)
    before = jax.tree.map(lambda x: x[-1], states)
    after, (_, limit) = step(before, counts[-1])  # op by op
    np.testing.assert_allclose(limit, limits[-1], rtol=1e-6)
    chex.assert_trees_all_close(after, last, rtol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("rule", ["quantile", "dpsgd_f", "histogram_threshold"])
def test_meshes_give_the_same(rule):
    params, batch = params_of(), batch_of(8)
    grad = dp(max_norm=RULES[rule]())
    state = grad.init(params)
    group = jnp.arange(8) % 2
    extra = {"population_ids": group} if rule == "dpsgd_f" else {}
    grad = functools.partial(grad, where=None)
    right, after, _ = jax.jit(grad)(state, params, batch, **extra)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
        with jax.set_mesh(mesh):
            whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
            args = state, jax.device_put(params, whole), jax.device_put(batch, split)
            found, other, _ = jax.jit(grad)(*args, **jax.device_put(extra, split))
        chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(other, after, rtol=1e-5, atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def local(state, params, batch, extra):
        return grad(state, params, batch, **extra)[:2]

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P()
    )
    found, other = jax.jit(mapped)(state, params, batch, extra)
    chex.assert_trees_all_close(found, right, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(other, after, rtol=1e-5, atol=1e-6)
    named = dp(max_norm=RULES[rule](), batch_axis_name="i")
    cut = lambda x: x.reshape(4, 2, *x.shape[1:])
    local = lambda batch, extra: named(state, params, batch, where=None, **extra)[:2]
    spread = jax.pmap(local, axis_name="i")
    found, other = spread(jax.tree.map(cut, batch), jax.tree.map(cut, extra))
    last = lambda tree: jax.tree.map(lambda x: x[3], tree)
    chex.assert_trees_all_close(last(found), right, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(last(other), after, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- the rules


def test_split_of_the_noise_multiplier():
    """Published values, and that the two releases cost what one would."""
    for size, right in ((100, 1.00504), (1000, 1.00005)):
        rule = privacy.quantile(1.0, count_stddev=size / 20)
        grad = dp(1.0, rule)
        assert grad.gradient_noise_multiplier() == pytest.approx(right, abs=1e-5)
        assert grad.noise_multiplier == 1.0
    for rule, reach in (
        (privacy.quantile(1.0, count_stddev=4.0), math.sqrt(3) / 2),
        (privacy.dpsgd_global_adapt(1.0, count_stddev=4.0), math.sqrt(3)),
    ):
        own = dp(1.2, rule).gradient_noise_multiplier(3)
        assert own**-2 + (reach / 4.0) ** 2 == pytest.approx(1.2**-2)
    assert dp(0.0, privacy.quantile(1.0, count_stddev=0.1)).rule.count_stddev == 0.1


@pytest.mark.parametrize("rule", in_tiers(RULES.keys(), {"quantile"}))
def test_noise_has_its_level_and_is_fresh(rule):
    """Of counts and of every coordinate, at every step, independent of all others."""
    grad, steps = dp(1.0, RULES[rule]()), 2000
    params, batch = params_of(), batch_of()
    state = grad.init(params)
    extra = {"where": None}
    if rule == "dpsgd_f":  # with nobody: sums would depend on the noise of counts
        extra = {"where": jnp.zeros(SIZE, bool), "population_ids": POPULATION}
    _, right, _ = once(dp(0.0, RULES[rule]()), params, batch, state, **extra)

    def draws(step):
        found, after, _ = grad(state._replace(step=step), params, batch, **extra)
        noise = [x.ravel() for x in jax.tree.leaves(found)]
        return after.counts, jnp.concatenate(noise) / after.stddev

    counts, noise = jax.jit(jax.vmap(draws))(jnp.arange(steps))
    counts, noise = np.float64(counts), np.float64(noise)
    np.testing.assert_allclose(SIZE * noise.std(0), 1, atol=5 / math.sqrt(2 * steps))
    assert len(np.unique(noise)) > 0.98 * noise.size
    if rule in WITHOUT_COUNTS:
        assert counts.shape == (steps, 0)
    else:
        assert counts.std(0) == pytest.approx(grad.rule.count_stddev, rel=0.06)
        off = np.abs(counts.mean(0) - right.counts).max()
        assert off < 5 * grad.rule.count_stddev / math.sqrt(steps)
    # Nothing has to do with anything else, nor with the step before.
    rows = np.concatenate([counts, noise], 1)
    count = rows.shape[1]
    rows = np.concatenate([rows[1:], rows[:-1]], 1)
    related = np.corrcoef(rows.T)[:count]
    related[np.arange(count), np.arange(count)] = 0
    assert np.abs(related).max() < 6 / math.sqrt(steps)


ADAPTING = {
    f"{rule}-{size}": (rule, size)
    for rule in ("quantile", "dpsgd_f")
    for size in (None, 4)
}


@pytest.mark.parametrize("case", in_tiers(ADAPTING, {"quantile-4"}))
def test_noise_follows_the_threshold_as_it_adapts(case):
    """At every step: what clips each example, and what noise is drawn, exactly."""
    rule, microbatch_size = case
    rules = {
        "quantile": privacy.quantile(
            0.05, count_stddev=0.6, quantile=1.0, step_size=3.0
        ),
        "dpsgd_f": privacy.dpsgd_f(0.7, 2, count_stddev=1.2),
    }
    own = (1.1**-2 - ({"quantile": 0.5, "dpsgd_f": 1}[rule]
                      / rules[rule].count_stddev) ** 2) ** -0.5  # fmt: skip
    grad = dp(1.1, rules[rule], microbatch_size=microbatch_size)
    params, batch = params_of(), batch_of()
    extra = {"population_ids": POPULATION} if rule == "dpsgd_f" else {}
    step = jax.jit(functools.partial(grad, where=None, **extra), donate_argnums=0)
    clipped = jax.jit(per_example.clipped_grad(loss, 1.0))
    tx = privacy.add_gaussian_noise(1.0, KEY)
    nothing = jax.tree.map(jnp.zeros_like, params)
    state, limits, limit = grad.init(params), [], np.full((SIZE, 1), 0.05, np.float32)
    for turn in range(8):
        found, state, info = step(state, params, batch)
        counts = np.float64(state.counts)
        if rule == "dpsgd_f":
            above, below = counts.clip(0).reshape(2, 2)
            share = above.sum() / max(counts.clip(0).sum(), 1e-9)
            ratio = [m / (m + k) / share if m else float(m + k == 0)
                     for m, k in zip(above, below, strict=True)]  # fmt: skip
            both = 0.7 * (1 + np.float32(ratio) * (share > 0))
            limit = both[np.asarray(POPULATION)][:, None]
            limits.append(both[0] / both[1])
        else:
            limits.append(limit.max())
        most = limit.max()
        np.testing.assert_allclose(state.threshold, most, rtol=1e-5)
        np.testing.assert_allclose(state.stddev, own * most, rtol=1e-5)
        right = np.minimum(1, limit / np.float64(info.norm))
        np.testing.assert_allclose(info.factor, right, rtol=1e-5)
        sums, _ = clipped(params, batch, max_norm=jnp.float32(limit))
        noise, _ = tx.update(nothing, privacy.NoiseState(jnp.int32(turn)))
        total = flat(sums) + own * most * flat(noise)
        np.testing.assert_allclose(SIZE * flat(found), total, rtol=1e-4, atol=1e-4)
        if rule == "quantile":
            move = -3.0 * (counts[0] / SIZE + 0.5 - 1.0)
            limit = limit * np.float32(np.exp(move))
    assert max(limits) > 1.3 * min(limits) if rule == "dpsgd_f" else (
        max(limits) > 10 * min(limits))  # fmt: skip


def test_rule_of_the_last_counts_is_one_rule():
    """What clips and what noise follows are the same where the last counts decide."""
    ask = lambda state, norm, member: jnp.where(norm > 1, 1.0, 0.0)
    rule = privacy.quantile(0.7, count_stddev=3.0)._replace(
        ask=ask,
        limit=lambda start, state, counts: start[None] * (1 + counts[None] ** 2),
        reach=lambda groups: math.sqrt(groups),
        update=lambda state, counts, size, noise: state,
    )
    grad = dp(max_norm=rule)
    _, first, info = once(grad)
    assert first.threshold.tolist() == [np.float32(0.7)]
    _, second, info = once(grad, state=first)
    kept = np.float64(info.norm) * np.float64(info.factor)
    limit = 0.7 * (1 + float(first.counts[0]) ** 2)
    np.testing.assert_allclose(second.threshold, limit, rtol=1e-5)
    np.testing.assert_allclose(kept, np.minimum(info.norm, limit), rtol=1e-5)


@pytest.mark.parametrize(
    "allocation", in_tiers(["global", "equal_budget"], {"equal_budget"})
)
def test_noise_never_vanishes_before_what_it_hides(allocation):
    """Thresholds whose squares leave float32, up to those that leave it themselves."""
    params = {"a": {"w": jnp.zeros(2)}, "b": {"w": jnp.zeros(2)}}

    @jax.jit
    def step(limit, x):
        grad = privacy.dp_grad(
            lambda w, x: jnp.vdot(w["a"]["w"], x) + jnp.vdot(w["b"]["w"], x),
            max_norm=limit, noise_multiplier=1.5, expected_batch_size=1, key=KEY,
            groups="layer", allocation=allocation,
        )  # fmt: skip
        return grad(grad.init(params), params, x, where=None)[:2]

    for power in range(-38, 38, 4):
        limit = 10.0**power
        found, state = step(jnp.float32(limit), jnp.full((1, 2), 1e3 * limit))
        if limit < 2.0**-100:
            assert not flat(found).any()
        else:
            right = 1.5 * math.sqrt(2) * limit
            np.testing.assert_allclose(state.threshold, limit, rtol=1e-6)
            np.testing.assert_allclose(state.stddev, right, rtol=1e-5)
    for limit in (math.nan, math.inf):  # nothing is said rather than too much
        found, _ = step(jnp.float32(limit), jnp.ones((1, 2)))
        assert not np.isfinite(flat(found)).any()


def test_key_is_never_shown():
    """Not by what prints, copies or writes; a trace is given it where it must not."""
    seed = 987654321
    key = jax.random.key(seed)
    make = lambda key: privacy.dp_grad(
        lambda w, x: jnp.vdot(w, x), max_norm=1.0, noise_multiplier=1.1,
        expected_batch_size=2, key=key,
    )  # fmt: skip
    grad, params, batch = make(key), jnp.zeros(2), jnp.ones((2, 2))
    renewed = dataclasses.replace(grad, key=key)
    args = grad.init(params), params, batch
    step = lambda *args: grad(*args, where=None)
    tx = privacy.add_gaussian_noise(1.0, key)
    inside = [cell.cell_contents for cell in tx.update.__closure__]
    secrets = [x for x in inside if isinstance(x, type(grad.key))]
    assert len(secrets) == 1
    shown = [
        grad, renewed, copy.copy(grad), copy.deepcopy(grad), vars(grad), jax.jit(grad),
        dataclasses.asdict(grad), dataclasses.astuple(grad), tx, inside,
        jax.make_jaxpr(step)(*args),
    ]  # fmt: skip
    for thing in shown:
        for text in (repr(thing), str(thing), f"{thing}", pprint.pformat(thing)):
            assert str(seed) not in text
    for thing in (grad, renewed, grad.key, *secrets):
        with pytest.raises(TypeError, match="must not be pickled") as caught:
            pickle.dumps(thing)
        assert str(seed) not in str(caught.value)
    raises_one_sentence((lambda: pickle.dumps(grad), TypeError, "must not be pickled"))
    assert str(seed) in jax.jit(step).lower(*args).as_text()  # as documented
    given = lambda key, *args: make(key)(*args, where=None)[:2]
    assert str(seed) not in jax.jit(given).lower(key, *args).as_text()
    found, right = jax.jit(given)(key, *args), jax.jit(step)(*args)[:2]
    chex.assert_trees_all_close(found, right, rtol=1e-6)


def test_mask_by_another_name_is_asked_for():
    grad, params = dp(), params_of()
    with pytest.raises(TypeError, match="got 'mask'; did you mean where"):
        grad(grad.init(params), params, batch_of(), mask=jnp.ones(SIZE, bool))
    with pytest.raises(TypeError, match="got 'l2_norm_clip'; did you mean max_norm"):
        privacy.dp_grad(loss, l2_norm_clip=1.0)
    with pytest.raises(TypeError, match="got 'batch_size'; did you mean expected"):
        dp(batch_size=8)


def adapt(rule, norms, steps, m=None, state=None, noise=0.0):
    """Runs a rule alone, without noise or with its own."""
    norms = np.asarray(norms, np.float32)
    m = len(norms) if m is None else m
    start = jnp.asarray([rule.max_norm], jnp.float32)
    state = rule.init(start) if state is None else state
    rng, seen = np.random.default_rng(0), []
    for _ in range(steps):
        counts = np.asarray(rule.ask(state, jnp.asarray(norms)[:, None], None)).sum(0)
        counts = counts + noise * rng.normal(size=counts.shape)
        counts = jnp.asarray(counts, jnp.float32)
        state = rule.update(state, counts, m, jnp.zeros(1))
        seen.append(float(state[0]))
    return seen


def test_quantile_follows_the_paper():
    norms = np.random.default_rng(0).lognormal(size=200)
    seen = adapt(privacy.quantile(0.1, count_stddev=1.0, quantile=0.3), norms, 60)
    c, right = 0.1, []
    for _ in range(60):
        share = ((norms <= c) - 0.5).sum() / 200 + 0.5
        c *= math.exp(-0.2 * (share - 0.3))
        right.append(c)
    np.testing.assert_allclose(seen, right, rtol=1e-4)
    median = np.median(norms)
    rule = privacy.quantile(0.1 * median, count_stddev=10.0)
    late = adapt(rule, norms, 80, noise=10.0)[40:]
    assert np.abs(np.log(np.array(late) / median)).mean() < 0.1


@pytest.mark.parametrize(
    ("least", "right"), [(0.0, 0.0), (0.05, 1 / 30), (0.25, 1 / 6), (1.0, 0.4)]
)
def test_lower_bound_keeps_a_minority_heard(least, right):
    """Six tenths of the data at 0, four at 1; without a bound the mean goes to 0."""
    data = jnp.repeat(jnp.array([0.0, 1.0]), jnp.array([6, 4]), total_repeat_length=10)
    rule = privacy.quantile(1.0, count_stddev=1.0, min_norm=least)
    grad = privacy.dp_grad(
        lambda mu, x: jnp.square(mu - x) / 2, max_norm=rule, noise_multiplier=0.0,
        expected_batch_size=10, key=KEY,
    )  # fmt: skip

    def step(carry, _):
        mu, state = carry
        g, state, _ = grad(state, mu, data, where=None)
        return (mu - 0.1 * g, state), None

    start = jnp.zeros(())
    (mu, _), _ = jax.lax.scan(step, (start, grad.init(start)), None, length=4000)
    assert float(mu) == pytest.approx(right, abs=2e-3)


def test_dpsgd_f_follows_the_paper():
    rule = privacy.dpsgd_f(0.5, 3, count_stddev=1.0)
    start = jnp.array([0.5])
    above, below = np.array([4.0, 1.0, 0.0]), np.array([4.0, 9.0, 12.0])
    size, m, b = above + below, above.sum(), (above + below).sum()
    right = 0.5 * (1 + (above / size) / (m / b))
    counts = jnp.asarray([*above, *below], jnp.float32)
    np.testing.assert_allclose(rule.limit(start, (), counts)[:, 0], right, rtol=1e-6)
    # Noise made a population empty, all counts negative, or nobody exceed the bound.
    found = rule.limit(start, (), jnp.array([4.0, -2, 1, 4, -1, 3]))[:, 0]
    assert found[1] == pytest.approx(1.0)
    assert rule.limit(start, (), jnp.full(6, -3.0))[:, 0].tolist() == [0.5] * 3
    found = rule.limit(start, (), jnp.array([0.0, 0, 0, 5, 5, 5]))[:, 0]
    assert found.tolist() == [0.5] * 3
    # In a step: each example at the threshold of its population.
    grad = dp(0.0, privacy.dpsgd_f(0.7, 2, count_stddev=1.0))
    _, state, info = once(grad)
    norm, pop = np.float64(info.norm[:, 0]), np.asarray(POPULATION)
    share = np.array([(norm[pop == k] > 0.7).mean() for k in (0, 1)])
    limit = 0.7 * (1 + share / (norm > 0.7).mean())
    np.testing.assert_allclose(
        info.factor[:, 0], np.minimum(1, limit[pop] / norm), rtol=1e-5
    )
    assert float(state.threshold[0]) == pytest.approx(limit.max(), rel=1e-6)


def test_dpsgd_global_and_adapt_follow_the_papers():
    _, _, info = once(dp(0.0, privacy.dpsgd_global(0.7, 5.0)))
    norm = np.float64(info.norm)
    right = np.where(norm <= 5, 0.7 / 5, 0)
    np.testing.assert_allclose(info.factor, right, rtol=3e-6)
    rule = privacy.dpsgd_global_adapt(0.7, 5.0, count_stddev=1.0)
    _, state, info = once(dp(0.0, rule))
    right = np.where(norm <= 5, 0.7 / 5, np.minimum(1, 0.7 / norm))
    np.testing.assert_allclose(info.factor, right, rtol=3e-6)
    b = (norm > 0.7 * 5).mean()
    assert float(state.rule[0]) == pytest.approx(5 * math.exp(b - 0.1), rel=1e-6)
    norms = np.random.default_rng(0).lognormal(size=1000)
    late = adapt(rule, norms, 400)[-100:]
    assert (norms > 0.7 * np.mean(late)).mean() == pytest.approx(0.1, abs=0.01)


def test_constant_thresholds_are_those_of_the_new_run():
    """A resumed state does not bring back an old threshold."""
    _, state, _ = once(dp(1.0, 0.7))
    _, after, _ = once(dp(1.0, 0.3), state=state)
    assert after.threshold.tolist() == [np.float32(0.3)]
    assert after.stddev.tolist() == [np.float32(0.3)]


# ---------------------------------------------------------------------- bad input

QUANTILE = {"count_stddev": 1.0}
ERRORS = [
    (lambda: dp(-1.0), ValueError, "noise_multiplier"),
    (lambda: dp("1"), TypeError, "noise_multiplier"),
    (lambda: dp(math.inf), ValueError, "noise_multiplier"),
    (lambda: dp(1.0, math.inf), ValueError, "finite"),
    (lambda: dp(1.0, {"a": 1.0, "c": math.inf}, groups="layer"), ValueError, "finite"),
    (lambda: dp(1.0, -1.0), ValueError, ">= 0"),
    (lambda: dp(1.0, lambda n, w: n), TypeError, "not private"),
    (lambda: dp(1.0, lambda count: 0.9**count), TypeError, "a schedule is evaluated"),
    (lambda: dp(1.0, clipfx.quantile_clip()), TypeError, "privacy.quantile"),
    (lambda: dp(1.0, clipfx.thresholds.constant(1)), TypeError, "privacy.quantile"),
    (lambda: dp(1.0, "1"), TypeError, "max_norm must be"),
    (
        lambda: dp(1.0, unbounded())(
            dp().init(params_of()), params_of(), batch_of(), where=None
        ),
        ValueError,
        "bounded",
    ),
    (lambda: dp(allocation="even"), ValueError, "allocation"),
    (lambda: dp(ord=3), ValueError, "ord"),
    (lambda: dp(response=responses.log), ValueError, "bounded"),
    (lambda: dp(1.0, RULES["quantile"](), ord=1), ValueError, "ord=1"),
    (lambda: dp(7.0, RULES["quantile"]()), ValueError, "count_stddev"),
    (lambda: dp(2.0, RULES["dpsgd_f"](), groups="layer"), ValueError, "population"),
    (
        lambda: dp(5.0, RULES["quantile"](), groups="layer").init(params_of()),
        ValueError,
        "2 group",
    ),
    (
        lambda: privacy.dp_grad(
            loss, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=0, key=KEY
        ),
        ValueError,
        "expected_batch_size",
    ),
    (
        lambda: privacy.dp_grad(
            loss, max_norm=1.0, noise_multiplier=1.0, expected_batch_size=1, key=1
        ),
        TypeError,
        "key",
    ),
    (lambda: privacy.quantile(1.0, count_stddev=0.0), ValueError, "count_stddev"),
    (lambda: privacy.quantile(1.0, quantile=2.0, **QUANTILE), ValueError, "quantile"),
    (lambda: privacy.quantile(1.0, step_size=0.0, **QUANTILE), ValueError, "step_size"),
    (lambda: privacy.quantile(1.0, min_norm=-1.0, **QUANTILE), ValueError, "min_norm"),
    (lambda: privacy.dpsgd_f(0.0, 2, count_stddev=1.0), ValueError, "max_norm"),
    (lambda: privacy.dpsgd_f(1.0, 0, count_stddev=1.0), ValueError, "num_populations"),
    (lambda: privacy.dpsgd_global(1.0, 0.0), ValueError, "upper"),
    (
        lambda: privacy.dpsgd_global_adapt(1.0, count_stddev=1.0, tolerance=0.0),
        ValueError,
        "tolerance",
    ),
    (lambda: dp()(params_of(), batch_of()), TypeError, "state must be a DPState"),
    (lambda: dp()(None, params_of(), batch_of()), TypeError, "got NoneType"),
    (
        lambda: dp()(dp().init(params_of()), params_of(), batch_of()),
        TypeError,
        "where must be passed .* None if nobody is",
    ),
    (lambda: ask(None), TypeError, "population_ids must be passed"),
    (
        lambda: ask(np.array([0, 1, 2, 0, 0, 0])),
        ValueError,
        "population_ids must be in",
    ),
    (lambda: ask(np.zeros(5, np.int32)), ValueError, "population_ids must have shape"),
    (lambda: ask(POPULATION, "fixed"), TypeError, "left out without"),
]


def unbounded():
    rule = privacy.dpsgd_global(0.7)
    return rule._replace(response=lambda state: lambda norm, limit: norm)


def ask(population, rule="dpsgd_f"):
    grad, params = dp(1.0, RULES[rule]()), params_of()
    return grad(
        grad.init(params), params, batch_of(), where=None, population_ids=population
    )


@pytest.mark.parametrize("case", ERRORS, ids=range(len(ERRORS)))
def test_bad_input_gets_one_sentence(case):
    raises_one_sentence(case)
