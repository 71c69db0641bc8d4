"""AGC, Clippy and the ratio of groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import DTYPES, assert_close, assert_same, norm, sample

import clipfx

SHAPES = {
    "attention": {"out": (2, 4, 6)},
    "bias": (8,),
    "conv": (3, 3, 4, 8),
    "conv3d": (2, 3, 3, 4, 8),
    "embed": (16, 6),
    "gain": (1, 8),
    "kernel": (8, 5),
    "scale": (),
}


def tree_of(seed, scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(
        scale * rng.normal(size=shape) * rng.lognormal(size=shape), dtype
    )
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


# -------------------------------------------------------------------------------- agc


def agc_oracle(g, w, axes, ratio=0.01, eps=1e-3):
    g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
    length = lambda x: np.sqrt(np.sum(x * x, axis=axes, keepdims=True))
    limit = ratio * np.maximum(length(w), eps)
    return g * np.minimum(1, limit / np.maximum(length(g), 1e-300))


BY_RANK = {"attention": {"out": (0,)}, "bias": (0,), "conv": (0, 1, 2),
           "conv3d": (0, 1, 2, 3), "embed": (0,), "gain": (0, 1), "kernel": (0,),
           "scale": ()}  # fmt: skip
is_axes = lambda x: isinstance(x, tuple)


def clip(tx, grads, params):
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


@pytest.mark.parametrize("ratio", [0.01, 0.3, 5.0])
def test_agc_follows_the_paper_by_rank(ratio):
    grads, params = tree_of(0), tree_of(1, 3.0)
    params["bias"] = jnp.zeros(8)  # counts as eps
    out = clip(clipfx.agc(ratio), grads, params)
    want = jax.tree.map(
        lambda axes, g, w: agc_oracle(g, w, axes, ratio),
        BY_RANK,
        grads,
        params,
        is_leaf=is_axes,
    )
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6)


def test_agc_equals_optax_where_optax_goes():
    grads, params = tree_of(0), tree_of(1)
    for tree in (grads, params):
        del tree["conv3d"]  # the oldest supported Optax stops at rank 4
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        want = clip(optax.adaptive_grad_clip(0.05), grads, params)
    assert_close(clip(clipfx.agc(0.05), grads, params), want, rtol=2e-6)


def test_agc_axes_by_path():
    grads, params = tree_of(0), tree_of(1)
    axes = {"attention": {"out": (0, 1)}, "embed": 1, "kernel": None}
    out = clip(clipfx.agc(axis=axes), grads, params)
    expected = {**BY_RANK, "attention": {"out": (0, 1)}, "embed": (1,)}
    for name in ("attention", "embed", "kernel", "conv"):
        leaf = lambda tree, name=name: (
            tree[name]["out"] if name == "attention" else tree[name]
        )
        want = agc_oracle(leaf(grads), leaf(params), leaf(expected))
        np.testing.assert_allclose(leaf(out), want, rtol=2e-6)
    everywhere = clip(
        clipfx.agc(axis=-1), {"w": grads["embed"]}, {"w": params["embed"]}
    )
    np.testing.assert_allclose(
        everywhere["w"], agc_oracle(grads["embed"], params["embed"], (1,)), rtol=2e-6
    )


def test_agc_axes_by_a_function_of_the_path():
    grads, params = tree_of(0), tree_of(1)
    along = {"attention": {"out": (0, 1)}, "embed": np.int64(1)}
    by_dict = clip(clipfx.agc(axis=along), grads, params)
    of = lambda path: {"out": (0, 1), "embed": 1}.get(path[-1].key)
    assert_same(clip(clipfx.agc(axis=of), grads, params), by_dict)
    nested = {"attention": lambda path: (0, 1), "embed": lambda path: 1}
    assert_same(clip(clipfx.agc(axis=nested), grads, params), by_dict)


def test_agc_leaves_out_the_classifier():
    params = {"body": jnp.ones((4, 4)), "head": jnp.ones((4, 4))}
    not_head = lambda params: {name: name != "head" for name in params}
    tx = optax.chain(optax.masked(clipfx.agc(), not_head))
    out, _ = tx.update(params, tx.init(params), params)
    assert_same(out["head"], params["head"])
    assert norm(out["body"]) == pytest.approx(0.01 * 4)


HUNDREDTH = clipfx.agc(0.01)  # one, to be compiled once


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_agc_bounds_what_is_stored_and_leaves_the_rest(scale, dtype):
    if dtype == jnp.float16:
        scale = {1e-30: 1e-4, 1.0: 1.0, 1e30: 300.0}[scale]
    grads, params = (
        {"w": tree_of(0, scale, dtype)["kernel"]},
        {"w": tree_of(1)["kernel"]},
    )
    out = clip(HUNDREDTH, grads, params)
    for column in range(5):
        limit = 0.01 * norm(params["w"][:, column])
        before, after = grads["w"][:, column], out["w"][:, column]
        assert norm(after) <= limit * (1 + 1e-6)
        if norm(before) <= limit:
            assert_same(after, before)
        else:
            assert norm(after) >= 0.97 * limit
    assert_same(clip(HUNDREDTH, out, params), out)


def test_agc_bad_units():
    grads, params = {"w": jnp.ones((3, 4))}, {"w": jnp.ones((3, 4))}
    grads["w"] = grads["w"].at[1, 2].set(jnp.inf).at[0, 0].set(jnp.nan)
    good = clip(clipfx.agc(), {"w": jnp.ones((3, 4))}, params)["w"]
    bad = clip(clipfx.agc(), grads, params)["w"]
    assert np.isnan(bad[:, [0, 2]]).all()
    assert_same(bad[:, [1, 3]], good[:, [1, 3]])
    dropped = clip(clipfx.agc(nonfinite="zero"), grads, params)["w"]
    assert (dropped[:, jnp.array([0, 2])] == 0).all()


def test_agc_on_every_mesh():
    grads, params = tree_of(0), tree_of(1)
    want = clip(clipfx.agc(), grads, params)
    split = {
        "attention": {"out": P()},
        "bias": P("x"),
        "conv": P(None, None, None, "x"),
        "conv3d": P(None, None, None, None, "x"),
        "embed": P("x"),
        "gain": P(None, "x"),
        "kernel": P("x"),
        "scale": P(),
    }
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), split)  # noqa: B023
        g, w = jax.device_put((grads, params), (shardings, shardings))
        out = jax.jit(lambda g, w: clip(clipfx.agc(), g, w))(g, w)
        assert_close(out, want)
        for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(g), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    along = {"bias": "x", "embed": "x", "gain": "x", "kernel": "x", "conv": (),
             "conv3d": ()}  # fmt: skip
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    step = lambda tx: jax.jit(
        jax.shard_map(
            lambda g, w: clip(tx, g, w),
            mesh=mesh,
            in_specs=(split,) * 2,
            out_specs=split,
        )
    )
    axis = {"gain": (0, 1), "kernel": 0}
    tx = clipfx.agc(axis_name=along, axis=axis)
    assert_close(step(tx)(grads, params), want)
    with pytest.raises(
        ValueError, match=r"axis must be given for \['gain'\].*\(1, 1\)"
    ):
        step(clipfx.agc(axis_name=along))(grads, params)
    with pytest.raises(ValueError, match=r"axis_name must say .*'bias'.*\['x'\]"):
        step(clipfx.agc())(grads, params)


# --------------------------------------------------------------------- clip_by_params

CLIPPY = [  # update, weight, relative, absolute, clipped
    (2.0, 4.0, 0.1, 0.02, 0.42),
    (-2.0, 4.0, 0.1, 0.0, -0.4),
    (2.0, 0.0, 0.1, 0.0, 0.0),
    (0.0, 0.0, 0.1, 0.0, 0.0),
    (0.0, 4.0, 0.1, 0.02, 0.0),
]


@pytest.mark.parametrize("per", ["tensor", "element"])
@pytest.mark.parametrize(("u", "w", "rel", "floor", "want"), CLIPPY)
def test_clippy_known_numbers(u, w, rel, floor, want, per):
    tx = clipfx.clip_by_params(rel, floor, per=per)
    updates, params = {"w": jnp.array([u])}, {"w": jnp.array([w])}
    out, state = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["w"], [want], rtol=1e-6)
    if per == "tensor":
        factor = {0.42: 0.21, -0.4: 0.2}.get(want, 0.0 if u else 1.0)
        np.testing.assert_allclose(state.metrics.factor, [factor], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("per", ["tensor", "element"])
def test_clippy_against_numpy(per, dtype):
    for seed in range(4):
        updates, params = sample(dtype, seed, 2.0), sample(seed=seed + 9)
        tx = clipfx.clip_by_params(0.3, 0.05, per=per)
        out, _ = tx.update(updates, tx.init(params), params)
        rows = zip(*map(jax.tree.leaves, (updates, params, out)), strict=True)
        for row in rows:
            u, w, got = (np.asarray(x, np.float64) for x in row)
            limit = 0.3 * np.abs(w) + 0.05
            ratio = limit / np.abs(u)
            scale = np.minimum(1, ratio if per == "element" else ratio.min())
            ulp = 2.0 ** -jnp.finfo(dtype).nmant
            np.testing.assert_allclose(got, u * scale, rtol=ulp + 1e-6)
            assert (np.abs(got) <= limit * (1 + 1e-6)).all()


def test_clippy_one_weight_of_zero_binds_its_tensor():
    params = {"a": jnp.array([1.0, 0.0]), "b": jnp.ones(2)}
    updates = {"a": jnp.array([1.0, 1.0]), "b": jnp.ones(2)}
    tx = clipfx.clip_by_params(0.5, 1e-7)
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["a"], [1e-7, 1e-7], rtol=1e-5)
    np.testing.assert_allclose(out["b"], [0.5, 0.5], rtol=1e-6)
    tx = clipfx.clip_by_params(0.5, 1e-7, per="element")
    out, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_allclose(out["a"], [0.5, 1e-7], rtol=1e-5)


def test_clippy_with_large_updates_and_no_room_stands_still():
    params = {"w": jnp.array([0.0, 1.0])}
    for u in (1e-30, 1.0, 1e38):
        tx = clipfx.clip_by_params(0.1, 0.0)
        out, state = tx.update({"w": jnp.full(2, u)}, tx.init(params), params)
        assert out["w"].tolist() == [0.0, 0.0]
        assert state.metrics.factor.tolist() == [0.0]
    out, state = tx.update({"w": jnp.array([jnp.nan, 1.0])}, tx.init(params), params)
    assert np.isnan(out["w"]).all()
    assert state.metrics.nonfinite.tolist() == [1]


# ------------------------------------------------------------------- clip_group_ratio

LABELS = {"a": "a", "b": "b", "c": "c"}


def group_norms(ratio, lengths, **kwargs):
    tree = {k: jnp.array([v]) for k, v in zip("abc", lengths, strict=False)}
    tx = clipfx.clip_group_ratio(ratio, groups="leaf", **kwargs)
    out, state = tx.update(tree, tx.init(tree))
    return [float(x[0]) for x in jax.tree.leaves(out)], state


def test_no_group_is_longer_than_a_multiple_of_the_median():
    assert group_norms(2.0, [1.0, 3.0, 100.0])[0] == [1, 3, 6]
    assert group_norms(1.0, [1.0, 3.0, 100.0])[0] == [1, 3, 3]
    assert group_norms(np.inf, [1.0, 3.0, 100.0])[0] == [1, 3, 100]
    # Groups without a gradient have no say, nor have bad ones.
    assert group_norms(2.0, [0.0, 3.0, 100.0])[0] == [0, 3, 100]
    assert group_norms(1.5, [0.0, 4.0, 100.0])[0] == pytest.approx([0, 4, 78])
    out, state = group_norms(1.0, [np.nan, 3.0, 5.0])
    assert np.isnan(out[0])
    assert out[1:] == [3.0, 4.0]
    assert state.metrics.nonfinite.tolist() == [1, 0, 0]
    assert group_norms(2.0, [0.0, 0.0, 0.0])[0] == [0, 0, 0]


def test_a_named_group_may_be_the_measure():
    assert group_norms(2.0, [1.0, 3.0, 100.0], reference_group="b")[0] == [1, 3, 6]
    assert group_norms(0.5, [1.0, 3.0, 100.0], reference_group="b")[0] == [1, 3, 1.5]
    assert group_norms(0.5, [1.0, 0.0, 100.0], reference_group="b")[0] == [1, 0, 100]


def test_the_ratio_does_not_see_the_scale_of_the_loss():
    for scale in (1e-20, 1e20):
        out = group_norms(2.0, [1.0 * scale, 3 * scale, 100 * scale])[0]
        np.testing.assert_allclose(np.array(out) / scale, [1, 3, 6], rtol=1e-6)
