"""Bounds hold for data of every dtype and magnitude, and norms are those of `jax.grad`.

Losses are linear in their parameters, so what an example holds is all there is to its
gradient: data, the gradient of an output, ids. Each is drawn over the whole range.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from per_example_oracle import methods
from tiers import in_tiers
from trees import enable_x64

from clipfx import per_example, responses
from clipfx._core.groups import group_leaves
from clipfx.per_example.engine import target

ROWS, WIDE, NARROW, TIME = 5, 4, 3, 4
INTEGERS = ["int8", "int16", "int32", "uint8", "uint16", "uint32", "bool"]
FLOATS = ["float16", "bfloat16", "float32"]
MODES = [None, "clip", "fill", "wrap", "promise_in_bounds"]


def cast(x, like):
    return x.astype(like.dtype)


def dense(p, e):
    return jnp.sum(jnp.dot(cast(e["x"][0], p["w"]), p["w"]) * e["d"][0])


def raw(p, e):
    """Data of any dtype meet the weight as they are."""
    dims = (((1,), (0,)), ((), ()))
    with jax.numpy_dtype_promotion("standard"):
        out = jax.lax.dot_general(
            e["x"], p["w"], dims, preferred_element_type=jnp.float32
        )
    return jnp.sum(out * e["d"])


def sequence(p, e):
    return jnp.sum((cast(e["x"], p["w"]) @ p["w"] + p["b"][None]) * e["d"])


def attended(p, e):
    """Gradients of a softmax add up to nothing over positions."""
    d = e["d"] - e["d"].mean(0, keepdims=True)
    x = 1 + e["tiny"] * cast(e["x"], p["w"])
    return jnp.sum((x @ p["w"] + p["b"][None]) * d)


def looked_up(p, e, mode=None):
    if mode == "wrap":
        rows = jnp.take(p["w"], e["ids"], axis=0, mode=mode)
    else:
        rows = p["w"].at[e["ids"]].get(mode=mode)
    return jnp.sum(rows * e["d"])


def one_by_one(p, e):
    look_up = lambda k: p["w"].at[k, :].get(mode="clip")
    step = lambda c, xs: (c + jnp.sum(jax.lax.dynamic_index_in_dim(
        p["w"], xs[0], keepdims=False) * xs[1]), None)  # fmt: skip
    more = jax.lax.scan(step, jnp.float32(0), (e["ids"], e["d"]))[0]
    return jnp.sum(jax.vmap(look_up)(e["ids"] + 1) * e["d"]) + more


def by_id(p, e):
    """A matrix for each position, that of `ids`."""
    x, matrices = cast(e["x"], p["w"]), p["w"].at[e["ids"]].get(mode="clip")
    return jnp.sum(jnp.einsum("tk,tkn->tn", x, matrices) * e["d"])


def attended_by_id(p, e):
    """Positions of one id add up to nothing."""
    d = e["d"] - e["d"].mean(0, keepdims=True)
    x = 1 + e["tiny"] * cast(e["x"], p["w"])
    return by_id(p, {"x": x, "d": d, "ids": e["ids"][:1].repeat(TIME)})


by_id.shape = attended_by_id.shape = (ROWS, WIDE, NARROW)


def tied(p, e):
    rows = p["w"].at[e["ids"]].get(mode="fill", fill_value=0)
    return jnp.sum(rows * e["d"]) + jnp.sum((e["d"] @ p["w"].T) * e["y"])


def looped(p, e):
    def step(carry, xs):
        x, d = xs
        return carry + jnp.sum((cast(x, p["w"]) @ p["w"] + p["b"]) * d), None

    return jax.lax.scan(step, jnp.float32(0), (e["x"], e["d"]))[0]


def remat(p, e):
    block = jax.checkpoint(lambda x, w: jnp.dot(cast(x, w), w))
    return jnp.sum(block(e["x"], p["w"]) * e["d"])


def convolved(p, e):
    x, w = cast(e["x"], p["w"]).T[None], p["w"].T[:, :, None]
    out = jax.lax.conv_general_dilated(x, w, (1,), "SAME")
    return jnp.sum(out[0].T * e["d"])


def twice(p, e):
    x = cast(e["x"], p["w"])
    return jnp.sum((x @ p["w"]) * e["d"]) + jnp.sum((x[0] @ p["w"]) * e["d"][0])


def instantiated(p, e):
    half = 0.5 * jnp.eye(NARROW, dtype=p["w"].dtype)
    return jnp.sum((cast(e["x"], p["w"]) @ (p["w"] @ half)) * e["d"])


def with_scales(p, e):
    """By one number a position, by data alone, and in the loop of a matrix product."""
    x = cast(e["x"], p["w"])
    last = x[:, :1] * p["w"][3][None] - x[:1, :NARROW] * p["b"][None]
    return jnp.sum((x[:, :3] @ p["w"][:3] + last) * e["d"])


def with_scales_in_loops(p, e):
    def step(carry, xs):
        x, d = xs
        x = cast(x, p["w"])
        return carry + jnp.sum((p["w"] * x[:, None] - p["b"][None]) * d[None]), None

    return jax.lax.scan(step, jnp.float32(0), (e["x"], e["d"]))[0]


def with_scales_remat(p, e):
    block = jax.checkpoint(lambda x, w, b: jnp.dot(x, w) + x[:, :NARROW] * b[None])
    return jnp.sum(block(cast(e["x"], p["w"]), p["w"], p["b"]) * e["d"])


def scaled(loss, by, name):
    """The same of parameters times constants."""

    def of_scaled(p, e):
        times = by if np.ndim(by) else np.full((1, 1), by, np.float32)
        b = p["b"] * times[0]
        return loss({"b": b, "w": p["w"] * jnp.asarray(times, b.dtype)}, e)

    of_scaled.__name__ = f"{loss.__name__}_scaled_by_{name}"
    of_scaled.largest = np.abs(by).max()
    return of_scaled


MASK = np.float32([[1, 0, 1], [0, 0, 1], [1, 1, 0], [1, 0.5, 1]])
VECTORS = np.float32([[1], [0], [1e-3], [3]]) * np.float32([[-2, 1e-4, 1]])
SCALED = [
    *[scaled(dense, x, n) for x, n in [(1e-19, "little"), (1e19, "much"),
                                       (MASK, "mask")]],
    *[scaled(loss, x, n) for loss in (sequence, looped, remat, convolved)
      for x, n in [(-1e-19, "little"), (1e19, "much"), (MASK * 1e-19, "mask")]],
    scaled(twice, VECTORS * 1e-9, "vectors"),
]  # fmt: skip


def draw(rng, ids, batch, dtype, magnitudes):
    """A batch whose examples differ in size, from nothing to what float32 can hold."""

    def size(*shape):
        low, high = magnitudes
        return 10.0 ** rng.uniform(low, high, shape)

    normal = lambda *shape: rng.normal(size=shape)
    if dtype in FLOATS:
        x = normal(batch, TIME, WIDE) * size(batch, 1, 1)
        if rng.random() < 0.5:  # and positions among themselves
            x = x * size(batch, TIME, 1) ** 0.5
        limit = float(jnp.finfo(dtype).max)
        x = np.clip(x, -limit, limit)
    elif dtype == "bool":
        x = rng.random((batch, TIME, WIDE)) < 0.5
    else:
        info = np.iinfo(dtype)
        x = rng.integers(info.min, info.max, (batch, TIME, WIDE), endpoint=True)
    clip = lambda x: np.clip(x, -3e38, 3e38)
    d = clip(normal(batch, TIME, NARROW) * size(batch, 1, 1))
    if rng.random() < 0.3:
        d[rng.random((batch, TIME)) < 0.5] = 0
    low, high = (0, ROWS) if rng.random() < 0.3 else (-2 * ROWS, 3 * ROWS)
    where = rng.integers(max(low, np.iinfo(ids).min), high, (batch, TIME))
    return {
        "x": jnp.asarray(x, dtype),
        "d": jnp.asarray(d, jnp.float32),
        "y": jnp.asarray(
            clip(normal(batch, TIME, ROWS) * size(batch, 1, 1)), jnp.float32
        ),
        "ids": jnp.asarray(where, ids),
        "tiny": jnp.asarray(10.0 ** rng.uniform(-6, 0, batch), jnp.float32),
    }


def norms64(tree, groups):
    """`[B, G]` of stacked trees in float64."""
    members = group_leaves(groups, jax.tree.map(lambda x: x[0], tree))
    squares = np.zeros((len(jax.tree.leaves(tree)[0]), len(members.names)))
    for x, g in zip(jax.tree.leaves(tree), members.index, strict=True):
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        squares[:, g] += (x * x).sum(1)
    return np.sqrt(squares)


def functions(loss, groups, response, weight):
    """Compiled once: contributions one by one, of a batch, and `jax.grad`."""
    tables = tuple(table.__name__ for table in TABLES)
    shape = (ROWS if loss.__name__.startswith(tables) else WIDE, NARROW)
    shape = getattr(loss, "shape", shape)
    params = {"b": jnp.zeros(NARROW), "w": jnp.zeros(shape, weight)}
    grad = per_example.clipped_grad(loss, 1.0, groups=groups, response=response)
    one = lambda e, c: grad(params, jax.tree.map(lambda x: x[None], e), max_norm=c)
    single = jax.jit(jax.vmap(one, (0, None)))
    whole = jax.jit(lambda e, c, keep: grad(params, e, max_norm=c, where=keep))
    ordinary = jax.jit(jax.vmap(lambda e: jax.grad(loss)(params, e)))
    return single, whole, ordinary


def table(mode):
    def loss(p, e):
        return looked_up(p, e, mode)

    loss.__name__ = f"looked_up_{mode}"
    return loss


LOOKED_UP = [table(mode) for mode in MODES]
TABLES = [*LOOKED_UP, one_by_one, tied]


def check(fun, batch, limit, groups, rng, largest=1.0, above=False):
    """What holds of norms and sums; `above` where norms that cancel read too large."""
    single, whole, ordinary = fun
    sums, info = jax.device_get(single(batch, limit))
    grads = jax.device_get(ordinary(batch))
    true = norms64(grads, groups)
    norm = np.asarray(info.norm, np.float64)[:, 0]
    finite = np.isfinite(true).all(1)
    # The bound, whatever else is true of an example.
    assert np.isfinite(norms64(sums, groups)).all()
    assert (norms64(sums, groups) <= limit * (1 + 1e-6)).all()
    # A gradient that is not finite contributes nothing.
    assert (norms64(sums, groups)[~finite] == 0).all()
    # Norms are those of the gradient, up to its own roundings.
    rounding = 2e-6 * true + largest * rounding_of(batch, true.shape)
    usual = finite & (true < 1e38).all(1)
    most = largest * most_of(batch, true.shape)
    if above:  # of what has no square nothing is known
        gone = ~np.isfinite(norm).all(1)
        peak = lambda x: np.abs(np.asarray(x, np.float64)).max((1, 2))
        sizes = [most[:, 0], *(peak(batch[k]) for k in "xdy")]
        assert (np.max(sizes, 0)[usual & gone] > 1e18).all()
        usual &= ~gone
    off = norm[usual] - true[usual]
    assert (-off <= rounding[usual]).all(), (norm[usual], true[usual])
    if above:  # no more than some times what all positions have in all
        off -= 12 * most[usual] + 1e-14 * largest
    assert (off <= rounding[usual]).all(), (norm[usual], true[usual])
    # What is not too long is left as it is, and a batch is the sum of its examples.
    keep = rng.random(len(norm)) < 0.8
    together, _ = jax.device_get(whole(batch, limit, jnp.asarray(keep)))
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(sums), strict=True):
        y = np.asarray(y, np.float64)[keep]
        near = 1e-5 * np.abs(y).sum(0).max()
        if above:  # what is lifted may be nothing but rounding
            factor = np.asarray(info.factor, np.float64)[:, 0]
            near = 10 * near + 1e-5 * np.minimum(most * factor, limit)[keep].sum()
        assert np.abs(x - y.sum(0)).max() <= near + 1e-37 * largest


def rounding_of(batch, shape):
    """What float32 may lose of a sum that cancels."""
    return 8 * 2.0**-24 * most_of(batch, shape) + 1e-37


def most_of(batch, shape):
    """What positions add up to, where nothing cancels."""
    size = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).sum(-1))
    x = size(batch["x"]) + 1
    most = (x * size(batch["d"])).sum(1) + (size(batch["y"]) * size(batch["d"])).sum(1)
    return np.broadcast_to(most[:, None], shape)


SOME = {
    f"{loss.__name__}-{dtype}": (loss, dtype, *rest)
    for loss, dtype, *rest in [
        (dense, "float32", "int32", "global", "hard"),
        (sequence, "float32", "int32", "leaf", "hard"),
        (attended, "float32", "int32", "leaf", "normalize"),
        (raw, "uint8", "int32", "global", "hard"),
        (raw, "bool", "int32", "global", "hard"),
        (looped, "bfloat16", "int32", "global", "hard"),
        (remat, "float32", "int32", "global", "normalize"),
        (convolved, "float16", "int32", "global", "hard"),
        (LOOKED_UP[0], "float32", "int8", "global", "hard"),
        (one_by_one, "float32", "int32", "leaf", "normalize"),
        (by_id, "bfloat16", "int8", "global", "hard"),
        (attended_by_id, "float32", "int32", "leaf", "normalize"),
        (tied, "float32", "int32", "global", "hard"),
        (with_scales, "float32", "int32", "leaf", "normalize"),
        (with_scales_in_loops, "float32", "int32", "leaf", "normalize"),
        (with_scales_remat, "bfloat16", "int32", "leaf", "hard"),
        *[(x, "float32", "int32", "global", "hard") for x in SCALED[:-1]],
        (SCALED[-1], "float32", "int32", "leaf", "normalize"),
        (scaled(dense, VECTORS * 1e19, "vectors"), "float32", "int32", "global",
         "normalize"),
        (scaled(LOOKED_UP[1], np.resize(MASK, (ROWS, NARROW)), "mask"), "float32",
         "int32", "leaf", "normalize"),
        (scaled(tied, -1e-19, "little"), "float32", "int32", "global", "hard"),
    ]
}  # fmt: skip
RANGES = [(-2, 2), (-19, 19), (-38, 38), (-25, -15), (15, 25)]


USUAL = {"raw-uint8", "remat-float32", "with_scales-float32",
         "dense_scaled_by_mask-float32"}  # fmt: skip


@pytest.mark.parametrize("case", in_tiers(SOME, USUAL))
@pytest.mark.parametrize("platform", in_tiers(["cpu", "tpu"], {"cpu"}))
def test_bounds_and_norms_at_every_magnitude(case, platform, monkeypatch):
    monkeypatch.setattr(target, "forced", platform)
    loss, dtype, ids, groups, response = case
    fun = functions(loss, groups, getattr(responses, response), "float32")
    rng = np.random.default_rng(0)
    for magnitudes in RANGES * 2:
        limit = np.float32(10.0 ** rng.uniform(-8, 2))
        batch = draw(rng, ids, 6, dtype, magnitudes)
        # What JAX's own gradient loses is multiplied too.
        largest = max(1.0, getattr(loss, "largest", 1.0))
        check(fun, batch, limit, groups, rng, largest, above=platform == "tpu")


def by_group(p, e):
    """The first two groups of rows, or more than there are; others are left out."""
    sizes = jnp.pad(jnp.abs(e["ids"][:2]), (0, ROWS - 2))
    return jnp.sum(jax.lax.ragged_dot(cast(e["x"], p["w"]), p["w"], sizes) * e["d"])


@pytest.mark.parametrize("dtype", in_tiers(["float32", "bfloat16"], {"float32"}))
@pytest.mark.parametrize("loss", [by_id, by_group])
def test_a_neighbour_among_experts_moves_the_sum_by_its_threshold(loss, dtype):
    batch = draw(np.random.default_rng(1), "int32", 6, dtype, (-2, 2))
    batch["d"] = batch["d"].astype(dtype)
    params = {"w": jnp.zeros(by_id.shape, dtype)}
    run = jax.jit(per_example.clipped_grad(loss, 0.1))
    vector = lambda *args, **kw: np.asarray(run(*args, **kw)[0]["w"], np.float64)
    without = vector(params, batch, where=jnp.arange(6) != 1)
    each = [jax.grad(loss)(params, jax.tree.map(lambda x: x[k], batch))["w"]  # noqa: B023
            for k in range(6)]  # fmt: skip
    norm = np.asarray(run(params, batch)[1].norm[:, 0])
    true = np.linalg.norm(np.asarray(each, np.float64).reshape(6, -1), axis=1)
    np.testing.assert_allclose(norm, true, rtol=1e-5 if dtype == "float32" else 0.02)
    for scale in (0.0, 1.0, 1e3, 1e38, np.inf, np.nan):
        changed = batch | {"d": batch["d"].at[1].set(scale)}
        moved = np.linalg.norm(vector(params, changed) - without)
        assert moved <= 0.1 * (1 + 1e-6) + 1e-6 * np.linalg.norm(without)
    assert moved <= 1e-6  # nothing is left of what is not finite


def test_counts_of_integers_are_measured():
    """Their squares do not fit into them: the Gram matrix of uint8 read 8 for 775."""
    x = np.arange(2 * 16 * 8, dtype=np.uint8).reshape(2, 16, 8)
    with jax.numpy_dtype_promotion("standard"):
        grad = per_example.clipped_grad(lambda w, x: jnp.sum(x @ w), 1.0)
        sums, info = jax.jit(grad)(jnp.zeros((8, 3)), jnp.asarray(x))
    rows = np.repeat(x.astype(float).sum(1)[:, :, None], 3, 2)
    true = np.linalg.norm(rows, axis=(1, 2))
    np.testing.assert_allclose(info.norm[:, 0], true, rtol=1e-6)
    np.testing.assert_allclose(sums, (rows / true[:, None, None]).sum(0), rtol=1e-5)


def test_products_whose_squares_vanish_are_measured():
    x, d = jnp.full((1, 1024), 0.9e-19), jnp.full(1, 1e19)
    grad = per_example.clipped_grad(lambda w, e: (e[0] @ w) * e[1], 1.0)
    sums, info = jax.jit(grad)(jnp.zeros(1024), (x, d))
    np.testing.assert_allclose(info.norm[0, 0], 28.8, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(sums), 1, rtol=2e-6)


def nearly_cancelled(p, e):
    """Positions add up to a thousandth, exactly, and `p["b"]` is not used."""
    sign = jnp.array([[1.0], [-1.0], [1.0], [2.0**-10 - 1]], e.dtype)
    return jnp.sum((jnp.full((4, 3), e) @ p["w"]) * sign)


ALIKE = {
    "broadcast": lambda p, e: e * jnp.sum(p["w"]) + e * jnp.sum(p["b"]),
    "cancelled": nearly_cancelled,
    "cancelled, remat": jax.checkpoint(nearly_cancelled),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("loss", ALIKE)
def test_gradients_of_one_number_are_measured(loss, x64):
    """Of a constant XLA takes the scale out of the square, where it overflows."""
    with enable_x64(x64):
        params = {"b": jnp.ones(5), "w": jnp.ones((3, 5))}
        grad = per_example.clipped_grad(ALIKE[loss], 1.0, groups="global")
        step = jax.jit(lambda e, c: grad(params, e, max_norm=c))
        one = jax.jit(jax.vmap(lambda e: jax.grad(ALIKE[loss])(params, e)))

        def length(tree, power):
            scaled = lambda x: np.asarray(x, np.float64) * 2.0**-power
            return norms64(jax.tree.map(scaled, tree), "global")

        for power in [-664, -83, 0, 332] if x64 else [-100, -83, 0, 100]:
            batch = 2.0**power * jnp.array([1.0, 2.0, 0.5])
            true = length(one(batch), power)
            sums, info = step(batch, jnp.asarray(2.0**power))
            norm = np.asarray(info.norm, np.float64) * 2.0**-power
            np.testing.assert_allclose(norm, true, rtol=1e-6)
            whole = length(jax.tree.map(lambda x: x[None], sums), power)
            bounded = np.minimum(true, 1).sum()
            np.testing.assert_allclose(whole, [[bounded]], rtol=3e-6)


@pytest.mark.parametrize("mode", in_tiers(MODES[:4], {"fill", "wrap"}))
def test_ids_outside_of_a_table_have_the_gradient_of_jax(mode):
    ids = jnp.array([[1, 9, 2, 9], [0, 3, -9, 4]])
    loss = lambda w, i: jnp.sum(jnp.sin(jnp.take(w, i, axis=0, mode=mode)))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, 3)), jnp.float32)
    sums, info = jax.jit(per_example.clipped_grad(loss, 100.0))(w, ids)
    rows = [jax.grad(loss)(w, i) for i in ids]
    true = [float(jnp.linalg.norm(row)) for row in rows]
    if not np.isfinite(true).all():  # "fill" looks up NaN, whose sine has no slope
        assert mode == "fill"
    np.testing.assert_allclose(info.norm[:, 0], true, rtol=1e-6)
    good = [row for row, n in zip(rows, true, strict=True) if np.isfinite(n)]
    np.testing.assert_allclose(sums, sum(good, np.zeros((ROWS, 3))), rtol=1e-6)


def gathered(w, i, mode):
    """With an index along the columns too, which are taken whole."""
    numbers = jax.lax.GatherDimensionNumbers((1, 2), (), (0, 1))
    pairs = jnp.stack([i, i % 2], 1)
    return jax.lax.gather(w, pairs, numbers, (1, 3), mode=mode, fill_value=0.5)


get = lambda x, mode: x.get(mode=mode, fill_value=0.5)
LOOK_UPS = {
    "each": lambda w, i, mode: jax.vmap(lambda k: get(w.at[k], mode))(i),
    "columns": lambda w, i, mode: get(w.at[:, i], mode),
    "pairs": lambda w, i, mode: get(w.at[i, i - 1], mode),
    "whole": gathered,
    "loop": lambda w, i, _: jax.lax.map(lambda k: w[k], i),
}


@pytest.mark.parametrize("mode", [None, "clip", "fill", "promise_in_bounds"])
@pytest.mark.parametrize("look_up", in_tiers(LOOK_UPS, {"whole", "pairs"}))
def test_every_look_up_has_the_gradient_of_jax(look_up, mode):
    """Whatever the ids, and whichever dimensions they are of."""
    ids = jnp.array([[1, 9, 2, 9, -20], [0, 3, -9, 4, 1], [-1, 2, 2, -2, 0]])
    loss = lambda p, i: jnp.sum(jnp.sin(look_up(p["w"], i, mode)))
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(ROWS, 3)), jnp.float32)}
    assert methods(loss, params, ids, force="factored") == {"w": "segment sum"}
    grad = per_example.clipped_grad(loss, 1.0, norm_method="ghost")
    sums, info = jax.jit(grad)(params, ids)
    rows = np.asarray([jax.grad(loss)(params, i)["w"] for i in ids], float)
    true = np.linalg.norm(rows, axis=(1, 2))
    np.testing.assert_allclose(info.norm[:, 0], true, rtol=1e-6)
    share = np.minimum(1, 1 / true)
    np.testing.assert_allclose(sums["w"], np.tensordot(share, rows, 1), 1e-5, 1e-6)


@pytest.mark.parametrize("response", [responses.hard, responses.normalize])
@pytest.mark.parametrize("size", in_tiers([1e-36, 1e-19, 1.0, 1e19, 1e37], 2))
def test_stacked_gradients_of_every_magnitude(size, response):
    stacked = {"w": size * jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])}
    limit = float(size)
    tx = per_example.clip_per_example(limit, response=response, reduce="sum")
    sums, _ = jax.jit(tx.update)(stacked, tx.init({"w": jnp.zeros(2)}))
    share = 1.5 if response is responses.hard else 2.0
    sums = np.asarray(sums["w"], np.float64) / size
    np.testing.assert_allclose(sums, [0.6 * share, 0.8 * share], rtol=3e-6)


def test_biases_of_keys_are_one_addition():
    """Their gradient is rounding: norm and sum must be of the same one."""
    rng = np.random.default_rng(0)
    d = jnp.asarray(rng.normal(size=(16, 40, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(16, 40, 4)), jnp.float32)
    d = d - d.mean(1, keepdims=True)
    params = {"b": jnp.zeros(3), "w": jnp.zeros((4, 3))}

    def loss(p, e):
        x, d = e
        return jnp.sum((x @ p["w"] + p["b"][None]) * d)

    grad = per_example.clipped_grad(loss, 1e-9, groups="leaf")
    one = lambda e: grad(params, jax.tree.map(lambda x: x[None], e))[0]["b"]
    size = np.linalg.norm(np.asarray(jax.jit(jax.vmap(one))((x, d)), float), axis=1)
    assert (size <= 1e-9 * (1 + 1e-6)).all() and (size > 0.9e-9).any()


@jax.custom_vjp
def kernel(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes)


def of_kernel(kept, delta):
    x, w, sizes = kept
    pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)[1]
    return (*pull(delta), None)


kernel.defvjp(lambda *args: (kernel(*args), args), of_kernel)


def test_what_jax_cannot_map_goes_one_by_one():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 5, 4)), jnp.float32)
    sizes = jnp.array([[2, 3], [1, 1], [0, 5]], jnp.int32)
    plain = lambda w, e: jnp.tanh(kernel(e[0], w, e[1])).sum()
    rows = [jax.grad(plain)(w, e) for e in zip(x, sizes, strict=True)]
    for loss in (plain, jax.checkpoint(plain)):
        grad = per_example.clipped_grad(loss, 1e3, microbatch_size=np.int64(1))
        sums, info = jax.jit(grad)(w, (x, sizes))
        np.testing.assert_allclose(sums, sum(rows), rtol=1e-5, atol=1e-6)
        true = [float(jnp.linalg.norm(row)) for row in rows]
        np.testing.assert_allclose(info.norm[:, 0], true, rtol=1e-5)


def test_a_loss_with_a_shard_map_of_its_own():
    """On a mesh with Explicit axes that nobody has set."""
    mesh = jax.make_mesh((1,), ("d",))
    whole = jax.sharding.PartitionSpec()
    inside = lambda w, x: jnp.sin(x @ w).sum()
    loss = jax.shard_map(inside, mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    w, x = jnp.ones((4, 2)), jnp.arange(12.0).reshape(3, 4)
    sums, info = jax.jit(per_example.clipped_grad(loss, 0.1))(w, x)
    rows = [jax.grad(lambda w: jnp.sin(row @ w).sum())(w) for row in x]  # noqa: B023
    true = np.array([float(jnp.linalg.norm(row)) for row in rows])
    np.testing.assert_allclose(info.norm[:, 0], true, rtol=1e-5)
    want = sum(row * min(1, 0.1 / n) for row, n in zip(rows, true, strict=True))
    np.testing.assert_allclose(sums, want, rtol=1e-4, atol=1e-6)


def test_batch_statistics_are_no_parameters():
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    model = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    loss = lambda state, x: nnx.merge(graph, state)(x).sum()
    with pytest.raises(TypeError, match="got BatchStat at"):
        per_example.clipped_grad(loss, 1.0)(state, jnp.ones((3, 2)))
    layer = linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.ones((3, 2)))
    apply = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[0].sum()
    with pytest.raises(TypeError, match="got batch_stats at"):
        per_example.clipped_grad(apply, 1.0)(variables, jnp.ones((3, 2)))
    rest = {"batch_stats": variables["batch_stats"]}
    with pytest.raises(ValueError, match="group or layer normalization"):
        per_example.clipped_grad(lambda p, x: apply({"params": p, **rest}, x), 1.0)(
            variables["params"], jnp.ones((3, 2))
        )
    fixed = linen.BatchNorm(use_running_average=True)
    run = lambda p, x: fixed.apply({"params": p, **rest}, x).sum()
    bounded = per_example.clipped_grad(run, 1.0)
    jax.eval_shape(bounded, variables["params"], jnp.ones((3, 2)))
