"""Groups and single leaves."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import mixed, sample

import clipfx
from clipfx._core import groups as grouping
from clipfx._core.groups import group_leaves
from clipfx._core.leaves import map_counted, narrow, widen


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
    grouping._say_that_all_are_one.cache_clear()
    with pytest.warns(UserWarning, match='"leaf" for a norm of each'):
        assert group_leaves("layer", {"w": bare, "b": bare}).names == ("(root)",)
    with warnings.catch_warnings(action="error"):  # it is said once
        group_leaves("layer", {"w": bare, "b": bare})
    # Haiku's two levels, lists, and numbers that are not sorted as text.
    haiku = {"mlp/~/linear_10": {"w": bare}, "mlp/~/linear_9": {"w": bare}}
    assert group_leaves("layer", haiku) == (tuple(sorted(haiku)[::-1]), (1, 0))
    assert group_leaves("layer", [{"w": bare}, {"w": bare}]).names == ("0", "1")
    assert group_leaves("global", {}).names == ("global",)
    assert group_leaves("leaf", {}) == ((), ())


def test_keys_of_a_flat_dict_may_be_paths():
    x = jnp.ones(2)
    for sign in "/.":
        flat = {sign.join(k): x for k in (("a", "0", "w"), ("a", "0", "b"), ("z", "w"))}
        assert group_leaves("layer", flat) == (("a/0", "z"), (0, 0, 1))
        assert len(group_leaves("leaf", flat).names) == 3
    # In a tree that has levels of its own a key is one word.
    levels = {"a/b": {"w": x}, "c": {"w": x}}
    assert group_leaves("layer", levels).names == ("a/b", "c")


def test_groups_by_a_function_of_the_path():
    tree = {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}, "z": [jnp.ones(3)]}
    by_name = lambda path: "bias" if path[-1] == "b" else path[0]
    assert group_leaves(by_name, tree) == (("a", "bias", "z"), (1, 0, 2))
    _, state = jax.jit(clipfx.clip_by_norm(1.0, groups=by_name).update)(
        tree, clipfx.clip_by_norm(1.0, groups=by_name).init(tree)
    )
    np.testing.assert_allclose(state.metrics.norm, np.sqrt([2, 1, 3]), rtol=1e-6)
    labels = lambda tree: jax.tree.map(lambda x: str(x.size), tree)
    assert group_leaves(labels, tree).names == ("1", "2", "3")


@pytest.mark.parametrize(
    ("module", "name"),
    [("haliax.core", "NamedArray"), ("paramax.wrappers", "AbstractUnwrappable"),
     ("penzai.core.variables", "AbstractVariableValue")],
)  # fmt: skip
def test_boxes_of_libraries_are_no_layers(module, name):
    base = type(name, (), {"__module__": module})

    @jax.tree_util.register_pytree_with_keys_class
    class Box(base):
        def __init__(self, *arrays):
            self.arrays = arrays

        def tree_flatten_with_keys(self):
            keys = map(jax.tree_util.SequenceKey, range(len(self.arrays)))
            return [*zip(keys, self.arrays, strict=True)], None

        @classmethod
        def tree_unflatten(cls, _, arrays):
            return cls(*arrays)

    tree = {"dense": {"w": Box(jnp.ones(2), jnp.ones(1)), "b": Box(jnp.ones(3))}}
    assert group_leaves("layer", tree) == (("dense",), (0, 0, 0))
    assert group_leaves("leaf", tree) == (("dense/b", "dense/w"), (0, 1, 1))


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


def test_a_label_may_stand_for_every_slice():
    tree = {"a": jnp.zeros((11, 2)), "b": jnp.zeros((2, 3)), "c": jnp.zeros(2)}
    labels = {"a": "x/*", "b": "x/*", "c": "y"}
    names, index = group_leaves(labels, tree, by_slice=True)
    assert names == (*(f"x/{k}" for k in range(11)), "y")
    assert index == (tuple(range(11)), (0, 1), 11)
    with pytest.raises(ValueError, match=r"got 'x/\*'.*per_stacked_layer"):
        group_leaves(labels, tree)
    with pytest.raises(ValueError, match=r"of arrays, got 'x/\*' for a scalar"):
        group_leaves({"s": "x/*"}, {"s": 1.0}, by_slice=True)


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
    out = map_counted(lambda x: x * 0, tree, groups)
    assert out["ints"] is tree["ints"]
    assert out["float0"] is tree["float0"]
    assert not np.any(np.asarray(out["f32"]))
    assert out["bf16"].dtype == jnp.bfloat16


def test_widen_leaves_wide_leaves_alone():
    assert widen(jnp.ones(2, jnp.float16)).dtype == jnp.float32
    assert widen(jnp.ones(2, jnp.complex64)).dtype == jnp.complex64


def test_two_paths_never_share_a_name():
    x = jnp.ones(2)
    trees = [
        {"a/b": x, "a": {"b": x}},
        {"a/b": {"c": x}, "a": {"b/c": x, "b": {"c": x}}},
        {"": {"w": x}, "w": x, "(root)": {"w": x}},
        {"a\\/b": x, "a/b": x, "a": {"b": x}},
        {"/": x, "//": x, "": {"": x}},
    ]
    for tree in trees:
        groups = group_leaves("leaf", tree)
        assert len(set(groups.names)) == len(jax.tree.leaves(tree))
        assert sorted(groups.index) == [*range(len(groups.names))]
        tx = clipfx.clip_by_norm(dict.fromkeys(groups.names, 0.5), groups="leaf")
        _, state = tx.update(tree, tx.init(tree))
        read = clipfx.metrics.read(state)
        names = {name for name in read if name.startswith("clip0/norm/")}
        assert len(names) == len(groups.names)
    layers = group_leaves("layer", {"": {"w": x}, "b": x})
    assert len(layers.names) == 2
    assert group_leaves("leaf", {"a/b": x}).names == ("a/b",)


def test_numbers_in_names_are_ordered_as_numbers():
    layers = {str(k): {"w": jnp.full(1, 2.0)} for k in range(12)}
    limits = np.arange(12.0) / 12
    tx = clipfx.clip_by_norm(limits, groups="layer")
    for update in (tx.update, jax.jit(tx.update)):
        state = optax.tree.map_params(tx, lambda x: x, tx.init(layers))
        for _ in range(2):  # the state that comes back is taken
            out, state = update(layers, state)
        read = clipfx.metrics.read(state)
        for k in range(12):
            assert float(out[str(k)]["w"][0]) == pytest.approx(limits[k])
            assert float(read[f"clip0/threshold/{k}"]) == pytest.approx(limits[k])
    as_list = group_leaves("layer", [{"w": jnp.ones(1)}] * 12)
    assert as_list.names == tuple(map(str, range(12)))


def test_groups_as_a_function_and_modules_that_are_called():
    eqx = pytest.importorskip("equinox")
    tree = sample()
    assert group_leaves(lambda tree: {"decoder": 1, "encoder": 2}, tree).names == (
        "1",
        "2",
    )
    assert group_leaves(lambda tree: "layer", tree).names == ("layer",)
    module = eqx.filter(eqx.nn.Linear(2, 2, key=jax.random.key(0)), eqx.is_array)
    labels = jax.tree.map(lambda x: f"{x.ndim}", module)
    assert group_leaves(labels, module).names == ("1", "2")
    made = lambda tree: jax.tree.map(lambda x: f"{x.ndim}", tree)
    assert group_leaves(made, module) == group_leaves(labels, module)
    nobody = lambda tree: tree["not there"]
    assert group_leaves(nobody, {"a": optax.MaskedNode(), "b": None}) == ((), ())


def test_what_is_no_array_is_refused_where_it_is():
    for leaf, kind in (
        (jnp.tanh, "PjitFunction"),
        ("float32", "str"),
        (jnp.float32, ""),
    ):
        for groups in ("global", "leaf"):
            with pytest.raises(
                TypeError, match=rf"got a .*{kind} at 'a/f'; take it out"
            ):
                clipfx.clip_by_norm(1.0, groups=groups).init({"a": {"f": leaf}})


def test_sparse_arrays_with_repeated_indices_are_refused():
    from jax.experimental import sparse

    places = jnp.array([[0, 1], [0, 1], [2, 0]])
    values = jnp.array([3.0, 1.0, 2.0])
    twice = {"w": {"kernel": sparse.BCOO((values, places), shape=(3, 3))}}
    clip = lambda tree: clipfx.tree_clip(tree, 1.0, groups="layer")
    for call in (clip, jax.jit(clip)):
        with pytest.raises(ValueError, match=r"BCOO at 'w/kernel'.*sum_duplicates"):
            call(twice)
    summed = jax.tree.map(sparse.BCOO.sum_duplicates, twice,
                          is_leaf=lambda x: isinstance(x, sparse.BCOO))  # fmt: skip
    for call in (clip, jax.jit(clip)):
        out, metrics = call(summed)
        assert tuple(metrics.groups) == ("w",)
        assert float(metrics.norm[0]) == pytest.approx(20**0.5)
        np.testing.assert_array_equal(out["w"]["kernel"].indices,
                                      summed["w"]["kernel"].indices)  # fmt: skip
    unmarked = {
        "w": sparse.BCOO((values, jnp.array([[0, 1], [1, 1], [2, 0]])), shape=(3, 3))
    }
    assert float(clip(unmarked)[1].norm[0]) == pytest.approx(14**0.5)
    for kind in (sparse.COO, sparse.CSR, sparse.CSC, sparse.BCSR):
        dense = {"w": kind.fromdense(jnp.array([[0.0, 3.0], [4.0, 0.0]]))}
        assert float(clip(dense)[1].norm[0]) == 5.0
