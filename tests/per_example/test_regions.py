"""Programs that rematerialize, as models are trained: measured region by region."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from per_example_oracle import check, methods
from tiers import in_tiers
from trees import enable_x64

from clipfx import per_example, responses
from clipfx.per_example.engine import target

B, T, D, V = 4, 5, 6, 9
remat = jax.checkpoint
policies = jax.checkpoint_policies


def draw():
    rng = np.random.default_rng(0)
    normal = lambda *shape: 0.5 * rng.normal(size=shape)
    params = {"a": normal(D, D), "b": normal(D, D), "c": normal(D), "e": normal(V, D),
              "stack": normal(6, D, D)}  # fmt: skip
    return params, (normal(B, T, D), rng.integers(0, V, (B, T)))


PARAMS, BATCH = draw()


def block(p, h):
    return h + jnp.tanh(h @ p["a"] + p["c"][None]) @ p["b"]


def whole(p, x, t):
    return remat(lambda p: block(p, x).sum())(p)


def saving(policy):
    def loss(p, x, t):
        def named(p, h):
            return checkpoint_name(jnp.tanh(h @ p["a"]), "kept") @ p["b"]

        return remat(named, policy=policy)(p, x).sum()

    return loss


def twice_in_a_block(p, x, t):
    return remat(lambda w: jnp.tanh(jnp.tanh(x @ w) @ w).sum())(p["a"])


def in_and_out(p, x, t):
    return (remat(lambda w: jnp.tanh(x @ w))(p["a"]) @ p["a"]).sum()


def tied_outside(p, x, t):
    h = remat(block)(p, p["e"][t])
    return jax.nn.log_softmax(h @ p["e"].T)[jnp.arange(T), t].sum()


def tied_inside(p, x, t):
    def loss(p, t):
        h = block(p, p["e"][t % V])  # integers that are computed inside
        return jax.nn.log_softmax(h @ p["e"].T)[jnp.arange(T), t].sum()

    return remat(loss)(p, t)


def layers(p, x, t):
    turn = remat(lambda h, w: (jnp.tanh(h @ w), None))
    return jax.lax.scan(turn, x, p["stack"])[0].sum()


def unrolled_layers(p, x, t):
    for k in range(6):
        x = remat(lambda h, w: jnp.tanh(h @ w))(x, p["stack"][k])
    return x.sum()


def nested(p, x, t):
    turn = remat(lambda h, w: (jnp.tanh(h @ w), None))
    several = remat(lambda h, ws: (jax.lax.scan(turn, h @ p["a"], ws)[0], None))
    h = jax.lax.scan(several, x, p["stack"].reshape(2, 3, D, D))[0]
    return (h @ p["b"]).sum()


def same_in_each_turn(p, x, t):
    turn = lambda h, _: (remat(lambda h, w: jnp.tanh(h @ w))(h, p["a"]), None)
    return jax.lax.scan(turn, x, None, length=3)[0].sum()


def recurrent(p, x, t):
    def step(h, row):
        h = jnp.tanh(h @ p["a"] + row @ p["b"] + p["c"])
        return h, h

    return remat(lambda x: jax.lax.scan(step, 0 * x[0], x)[1].sum())(x)


def joined_outside(p, x, t):
    w = jnp.concatenate([p["a"].T, p["b"]], 1)
    return remat(lambda w: jnp.tanh(x @ w).sum())(w)


def joined_with_an_odd_one(p, x, t):
    return joined_outside(p, x, t) + (x @ (p["a"] * p["a"])).sum()


def of_a_norm(p, x, t):
    w = p["a"] / jnp.sqrt((p["a"] ** 2).sum())
    return remat(lambda x: jnp.tanh(x @ w @ p["b"]).sum())(x)


def nothing_comes_of_it(p, x, t):
    def some(p, x):
        return (x @ p["a"]).sum() + jax.lax.stop_gradient(x @ p["b"]).sum()

    return remat(some)(p, x)


def mapped_inside(p, x, t):
    one = lambda h: jnp.tanh(h @ p["a"] + p["c"]) @ p["b"]
    return jax.vmap(remat(one))(x).sum()


def chosen_inside(p, x, t):
    def some(x):
        one, other = (lambda h, k=k: jnp.tanh(h @ p[k]) for k in "ab")
        return jax.lax.cond(x.sum() > 0, one, other, x) @ p["a"]

    return remat(some)(x).sum()


def inside_a_branch(p, x, t):
    def step(h, w):
        kept, other = remat(lambda h: jnp.tanh(h @ w)), lambda h: h * p["c"][None]
        third = lambda h: h @ p["b"]
        return jax.lax.switch(t[0] % 3, [kept, other, third], h), None

    return jax.lax.scan(step, x, p["stack"])[0].sum()


def compiled_inside(p, x, t):
    return jax.jit(lambda p, x: (remat(block)(p, x) @ p["a"]).sum())(p, x)


def counts(dtype):
    size = 2.0 ** (8 * jnp.dtype(dtype).itemsize - 2)

    def loss(p, x, t):
        def inside(x):
            with jax.numpy_dtype_promotion("standard"):  # a product of two dtypes
                return jnp.tanh((x + jnp.ones((), dtype)) @ p["a"] / size).sum()

        return remat(inside)((x * size / 4).astype(dtype))

    return loss


def in_chunks(p, x, t):
    """A tied head whose loss is taken chunk by chunk."""

    @remat
    def chunk(total, h):
        return total + jax.nn.logsumexp(h @ p["e"].T), None

    h = jnp.tanh(p["e"][t] @ p["a"])[:2, None]
    return jax.lax.scan(chunk, 0.0, h)[0]


def in_two_regions(p, x, t):
    part = remat(lambda h: jnp.tanh(h @ p["e"].T) @ p["e"])
    return part(part(x) @ p["a"]).sum()


LOSSES = (
    in_chunks, in_two_regions,
    whole, twice_in_a_block, in_and_out, tied_outside, tied_inside, layers,
    unrolled_layers, nested, same_in_each_turn, recurrent, joined_outside,
    joined_with_an_odd_one, of_a_norm, nothing_comes_of_it, mapped_inside,
    compiled_inside, chosen_inside, inside_a_branch,
)  # fmt: skip
CASES = {loss.__name__: loss for loss in LOSSES} | {
    "dots": saving(policies.dots_saveable),
    "names": saving(policies.save_only_these_names("kept")),
    "everything": saving(policies.everything_saveable),
    "int8": counts(jnp.int8),
    "int32": counts(jnp.int32),
    "int64": counts(jnp.int64),
}
GROUPS = {
    "leaf": "leaf",
    "global": "global",
    "layers": {"a": "a", "b": "a", "c": "c", "e": "e", "stack": "stack/*"},
    "slices": {name: f"{name}/*" for name in PARAMS},
    "shared": dict.fromkeys(PARAMS, "every/*"),
}
STACKED = {"layers", "unrolled_layers", "nested", "inside_a_branch", "whole"}
PAIRS = {
    f"{name}-{groups}": (name, groups)
    for name in CASES
    for groups in (GROUPS if name in STACKED else ("leaf", "global"))
}
USUAL = {
    "inside_a_branch-layers",
    "nested-layers",
    "tied_outside-leaf",
    "tied_inside-leaf",
    "joined_with_an_odd_one-leaf",
}


@pytest.mark.parametrize("pair", in_tiers(PAIRS, USUAL))
def test_norms_and_sums(pair):
    program, groups = CASES[pair[0]], GROUPS[pair[1]]
    loss = lambda p, e: program(p, *e)
    for platform in ("cpu", "tpu"):  # with and without a loop over examples
        target.forced = platform
        try:
            run = per_example.clipped_grad(loss, 0.7, groups=groups)
            check(run, loss, PARAMS, BATCH, "float64", groups=groups)
        finally:
            target.forced = ""


def test_a_table_outside_of_regions_is_measured_jointly():
    table = {"e": jnp.zeros((3000, 32)), "w": jnp.zeros((32, 32))}

    def loss(p, t):
        h = remat(lambda h: h + jnp.tanh(h @ p["w"]))(p["e"][t])
        return jax.nn.log_softmax(h @ p["e"].T)[jnp.arange(T), t].sum()

    assert methods(loss, table, BATCH[1]) == {"e": "Gram", "w": "Gram"}


@pytest.mark.parametrize("loss", [in_chunks, in_two_regions])
def test_a_weight_of_several_regions_is_kept_where_that_takes_less(loss):
    table = {"a": jnp.zeros((32, 32)), "e": jnp.zeros((3000, 32))}
    one = lambda p, e: loss(p, *e)
    found = methods(one, table, (jnp.zeros((B, T, 32)), BATCH[1]))
    assert found == {"a": "Gram", "e": "Gram"}


def test_a_weight_used_twice_in_a_region_is_measured_jointly():
    loss = lambda p, x: remat(lambda w: jnp.tanh(jnp.tanh(x @ w) @ w).sum())(p)
    found = methods(loss, jnp.zeros((40, 40)), jnp.zeros((B, T, 40)))
    assert set(found.values()) == {"Gram"}


@pytest.mark.parametrize("loss", [layers, tied_outside])
def test_bad_examples_are_left_out(loss):
    one = lambda p, e: loss(p, *e)
    run = jax.jit(per_example.clipped_grad(one, 0.7))
    x, t = BATCH
    if loss is tied_outside:  # of ids no example is bad
        one = lambda p, e: loss(p, e[0], e[1]) * e[0].sum()
        run = jax.jit(per_example.clipped_grad(one, 0.7))
    bad = x.copy()
    bad[1], bad[2, 0, 0] = np.nan, np.inf
    sums, info = run(PARAMS, (bad, t))
    keep = np.array([0, 3])
    want, _ = run(PARAMS, (x[keep], t[keep]))
    for got, right in zip(jax.tree.leaves(sums), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-7)
    assert list(np.isfinite(info.norm[:, 0])) == [True, False, False, True]
    sums, _ = run(PARAMS, (bad[1:3], t[1:3]))
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(sums))


CALLS = {
    "thresholds by example": {"max_norm": np.linspace(0.1, 1, 4 * 10).reshape(4, 10)},
    "a threshold for each": {"max_norm": np.geomspace(1e-3, 10, 10)},
    "a mask": {"where": np.array([True, False, True, True])},
    "nobody": {"where": np.zeros(4, bool)},
    "a function": {"max_norm": lambda norm, where: jnp.median(norm)},
    "a name for all slices": {
        "max_norm": dict.fromkeys(["a", "b", "c", "rest"], 0.2) | {"stack/*": 0.1}
    },
    "infinity": {"max_norm": np.inf},
    "nothing": {"max_norm": 0.0},
}
SETTINGS = {
    "microbatches": {"microbatch_size": 3},
    "normalize": {"response": responses.normalize},
    "ord": {"ord": 1},
    "mean": {"reduce": "mean"},
}


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("case", in_tiers([*CALLS, *SETTINGS], 4))
def test_one_pass_is_the_same_as_without_regions(case, platform, monkeypatch):
    monkeypatch.setattr(target, "forced", platform)
    groups = {**dict.fromkeys(PARAMS, "rest"), "stack": "stack/*", "a": "a", "b": "b",
              "c": "c"}  # fmt: skip

    def loss(p, x, t):
        h = layers_of(p, x)
        return remat(lambda h: block(p, h).sum())(h)

    def layers_of(p, x):
        turn = remat(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(turn, x, p["stack"])[0]

    def run(loss):
        make = functools.partial(per_example.clipped_grad, loss, 0.3, groups=groups)
        grad = make(**SETTINGS.get(case, {}))
        return jax.jit(lambda p, e: grad(p, e, **CALLS.get(case, {})))(PARAMS, BATCH)

    with enable_x64(True):
        found = run(lambda p, e: loss(p, *e))
        with mock.patch(f"{__name__}.remat", lambda f: f):
            right = run(lambda p, e: loss(p, *e))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", in_tiers([jnp.bfloat16, jnp.float32], {jnp.bfloat16}))
@pytest.mark.parametrize("groups", in_tiers(["slices", "global"], {"slices"}))
def test_a_neighbour_moves_the_sum_by_at_most_the_sensitivity(
    groups, dtype, platform, monkeypatch
):
    monkeypatch.setattr(target, "forced", platform)

    def loss(p, x):
        turn = remat(lambda h, w: (jnp.tanh(h @ w), None))
        return (jax.lax.scan(turn, x, p["stack"])[0] @ p["a"]).sum()

    params = {k: jnp.asarray(PARAMS[k], dtype) for k in ("a", "stack")}
    labels = {"a": "a", "stack": "stack/*"}
    grad = per_example.clipped_grad(
        loss, 0.1, groups=labels if groups == "slices" else "global"
    )
    bound, run = grad.sensitivity(params=params), jax.jit(grad)
    assert bound == pytest.approx(0.1 * (7**0.5 if groups == "slices" else 1))
    if groups == "slices":
        named = {"a": 0.1, "stack/*": 0.1}
        assert grad.sensitivity(max_norm=named, params=params) == pytest.approx(bound)
        with pytest.raises(
            ValueError, match=r"params must be passed .*how many slices"
        ):
            grad.sensitivity(max_norm=named)
    x = jnp.asarray(BATCH[0], dtype)
    flat = lambda sums: np.concatenate(
        [np.asarray(y, np.float64).ravel() for y in jax.tree.leaves(sums)]
    )
    without = flat(run(params, x, where=np.arange(B) != 1)[0])
    for scale in (0.0, 1e-20, 1.0, 1e3, 1e38, np.inf, np.nan):
        changed = x.at[1].multiply(jnp.asarray(scale, dtype))
        moved = np.linalg.norm(flat(run(params, changed)[0]) - without)
        # The sums themselves are rounded, in float32.
        assert moved <= bound + 1e-6 * np.linalg.norm(without), scale
    assert moved <= 1e-6  # nothing is left of what is not finite


def test_in_one_pass_what_overflows_early_stays_out_from_there_on():
    """Its contribution to later layers is there by then, within their thresholds."""

    def loss(p, x):
        first = remat(lambda h: (h @ p["a"]) * x[0, 0])(x)
        return remat(lambda h: (h @ p["b"]).sum())(first)

    x = np.ones((2, T, D), np.float32)
    x[1, 0, 0] = 1e30
    p = {"a": 1e-30 * np.ones((D, D), np.float32), "b": 1e9 * np.ones((D, D))}
    p = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), p)
    sums, info = jax.jit(per_example.clipped_grad(loss, 1.0, groups="leaf"))(p, x)
    assert list(np.isfinite(np.asarray(info.norm)).all(1)) == [True, False]
    norm = [np.linalg.norm(np.asarray(w, np.float64)) for w in sums.values()]
    assert (np.asarray(info.factor)[1] > 0).sum() <= 1
    assert all(np.isfinite(norm)) and norm[0] <= 1 + 1e-6 and norm[1] <= 2 + 1e-6


def unrolled(p, x):
    """Blocks of two products."""
    for k in range(6):
        layer = {n: w[k] for n, w in p.items()}
        x = remat(lambda h, q: h + jnp.tanh(h @ q["up"]) @ q["down"])(x, layer)
    return (x**2).sum()


def in_a_loop(p, x):
    turn = lambda h, q: (h + jnp.tanh(h @ q["up"]) @ q["down"], None)
    return (jax.lax.scan(remat(turn), x, p)[0] ** 2).sum()


def ratio_to_gradient(loss, size_of, groups="global"):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {"up": shape(6, 64, 256), "down": shape(6, 256, 64)}
    each = jax.vmap(loss, (None, 0))
    ordinary = jax.grad(lambda p, x: each(p, x).sum())
    grad = per_example.clipped_grad(loss, 1.0, groups=groups)
    clipped = lambda p, x: grad(p, x)[0]
    compiled = [
        jax.jit(f).lower(params, shape(8, 16, 64)).compile()
        for f in (clipped, ordinary)
    ]
    return size_of(compiled[0]) / size_of(compiled[1])


def test_both_passes_share_the_forward_pass(monkeypatch):
    """6 products for each weight where a rematerialized gradient has 4."""
    monkeypatch.setattr(target, "forced", "tpu")
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    assert ratio_to_gradient(unrolled, flops) < 1.55


SLICES = {"up": "up/*", "down": "down/*"}


@pytest.mark.parametrize("loss", [unrolled, in_a_loop])
def test_a_group_in_each_region_takes_one_pass(loss, monkeypatch):
    """And hardly more memory than its gradient: 0.8 to 1.3, by XLA:CPU's scheduler."""
    monkeypatch.setattr(target, "forced", "tpu")
    size = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    flops = lambda compiled: compiled.cost_analysis()["flops"]
    assert ratio_to_gradient(loss, flops, SLICES) < 1.15
    assert ratio_to_gradient(loss, size, SLICES) < 1.3


@pytest.mark.parametrize("loss", [unrolled, in_a_loop])
def test_nothing_of_a_region_is_kept(loss, monkeypatch):
    monkeypatch.setattr(target, "forced", "tpu")
    size = lambda compiled: compiled.memory_analysis().temp_size_in_bytes
    assert ratio_to_gradient(loss, size) < 1.5
