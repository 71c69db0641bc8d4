"""Groups and single leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import mixed, sample

from clipfx._tree import group_leaves, map_counted, narrow, widen


def test_names_of_global_layer_and_leaf():
    tree = sample()
    assert group_leaves("global", tree).names == ("global",)
    layers = group_leaves("layer", tree)
    assert layers == (("decoder", "encoder"), (0, 1, 1))
    names = ("decoder/kernel", "encoder/bias", "encoder/kernel")
    assert group_leaves("leaf", tree) == (names, (0, 1, 2))


def test_names_of_unusual_trees():
    bare = jnp.ones(3)
    for groups in ("layer", "leaf"):
        assert group_leaves(groups, bare).names == ("(root)",)
    assert group_leaves("layer", {"w": bare, "b": bare}).names == ("(root)",)
    # Haiku's two levels, lists, and names that are not sorted as text.
    haiku = {"mlp/~/linear_10": {"w": bare}, "mlp/~/linear_9": {"w": bare}}
    assert group_leaves("layer", haiku).names == tuple(sorted(haiku))
    assert group_leaves("layer", [{"w": bare}, {"w": bare}]).names == ("0", "1")
    assert group_leaves("global", {}).names == ("global",)
    assert group_leaves("leaf", {}) == ((), ())


def test_uncounted_leaves_belong_to_no_group():
    tree = mixed()
    groups = group_leaves("leaf", tree)
    counted = {"bf16", "complex", "empty", "f16/w", "f32", "scalar"}
    assert set(groups.names) == counted
    assert len(groups.index) == len(jax.tree.leaves(tree))
    assert group_leaves("leaf", {"k": jax.random.key(0)}).names == ()


def test_labels_are_a_tree_prefix_found_by_path():
    tree = sample()
    prefix = {"decoder": "a", "encoder": {"bias": "b", "kernel": 7}}
    assert group_leaves(prefix, tree) == (("7", "a", "b"), (1, 2, 0))
    hidden = {"decoder": optax.MaskedNode(), "encoder": tree["encoder"]}
    assert group_leaves(prefix, hidden) == (("7", "b"), (1, 0))
    assert group_leaves({**prefix, "gone": "c"}, tree).names == ("7", "a", "b")


def test_errors_of_groups():
    with pytest.raises(ValueError, match=r'"global", "layer", "leaf".*got \'layers\''):
        group_leaves("layers", sample())
    with pytest.raises(ValueError, match=r"no label for 'encoder/bias'.*optax\.masked"):
        group_leaves({"decoder": "a"}, sample())


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2],
    ids=lambda d: d.__name__,
)
def test_narrow_rounds_towards_zero(dtype):
    info = jnp.finfo(dtype)
    top = min(float(info.max), 1e6)
    x = np.random.default_rng(0).uniform(-1, 1, 4000) ** 3
    x = np.concatenate([x * top, x * float(info.smallest_normal) * 3, [0.0, -0.0]])
    wide = jnp.asarray(x, jnp.float32)
    stored = np.asarray(jax.jit(lambda x: narrow(x, dtype))(wide)).astype(np.float64)
    exact = np.asarray(wide, np.float64)
    assert (np.abs(stored) <= np.abs(exact)).all()
    spacing = np.maximum(
        np.abs(exact) * float(info.eps), float(info.smallest_subnormal)
    )
    if dtype == jnp.bfloat16:  # its subnormal numbers are those of float32
        spacing = np.maximum(spacing, 1.2e-38)
    assert (np.abs(exact) - np.abs(stored) < spacing).all()
    # What the dtype holds is kept.
    held = wide.astype(dtype)
    normal = np.abs(held.astype(jnp.float32)) >= info.smallest_normal
    again = narrow(held.astype(jnp.float32), dtype)
    np.testing.assert_array_equal(
        np.asarray(again)[normal], np.asarray(held)[np.asarray(normal)]
    )


def test_narrow_has_the_derivative_of_a_cast():
    slope = jax.grad(lambda x: narrow(x, jnp.bfloat16).astype(jnp.float32) * 3)(1.23)
    assert float(slope) == 3.0


def test_map_counted_keeps_everything_else():
    tree = mixed()
    groups = group_leaves("global", tree)
    out = map_counted(lambda x, i: x * 0, tree, groups)
    assert out["ints"] is tree["ints"]
    assert out["float0"] is tree["float0"]
    assert not np.any(np.asarray(out["f32"]))
    assert out["bf16"].dtype == jnp.bfloat16


def test_widen_leaves_wide_leaves_alone():
    assert widen(jnp.ones(2, jnp.float16)).dtype == jnp.float32
    assert widen(jnp.ones(2, jnp.complex64)).dtype == jnp.complex64
