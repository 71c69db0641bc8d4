"""Bounded sums by `jax.grad` of one example after the other, and what runs beside them.

All but the derivatives themselves is plain float64 NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
from trees import enable_x64

from clipfx import per_example, responses
from clipfx._core.groups import group_leaves
from clipfx.per_example.engine import clip, trace

# Thresholds are lowered by this share, or rounding would exceed them.
SLACK = {"float32": 2.0**-20, "float64": 2.0**-49}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
RESPONSES = {
    "hard": (responses.hard, np.minimum),
    "normalize": (responses.normalize, lambda n, c: c + 0 * n),
    "auto_s": (responses.auto_s(0.01), lambda n, c: c * n / (n + 0.01)),
}
LIMIT = 0.7


def cast(tree, dtype):
    """Floating leaves, also NumPy's, as arrays of `dtype`."""

    def one(x):
        if jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.asarray(np.asarray(x, np.float64), dtype)
        return jnp.asarray(x)

    return jax.tree.map(one, tree)


def each_gradient(loss, params, batch, dtype="float64"):
    """`[B, ...]` for every leaf, by a loop over examples."""
    with enable_x64(dtype == "float64"):
        params, batch = cast(params, dtype), cast(batch, dtype)
        one = jax.jit(jax.grad(loss))
        count = len(jax.tree.leaves(batch)[0])
        rows = [one(params, jax.tree.map(lambda x: x[b], batch)) for b in range(count)]  # noqa: B023
        return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *rows)


def expected(
    grads, groups="global", limit=LIMIT, response="hard", slack=2.0**-20, ord=2
):
    """Sums, as the gradients but for the examples, and norms and factors `[B, G]`."""
    leaves = jax.tree.leaves(grads)
    members = _members(groups, grads)
    powers = np.zeros((len(leaves[0]), len(members.names)))
    for x, g in zip(leaves, members.index, strict=True):
        several = g if isinstance(g, tuple) else (g,)
        slices = x.reshape(len(x), len(several), -1)
        for k, i in enumerate(several):
            powers[:, i] += (np.abs(slices[:, k]) ** ord).sum(1)
    norm = powers ** (1 / ord)
    target = RESPONSES[response][1](norm, limit * (1 - slack))
    factor = np.where(norm > 0, target / np.where(norm > 0, norm, 1), 1.0)
    return total(grads, factor, groups), norm, factor


def total(grads, factor, groups="global"):
    """The sum over examples of gradients times factors `[B, G]`."""
    leaves, treedef = jax.tree.flatten(grads)

    def of_leaf(x, g):
        if not isinstance(g, tuple):
            return np.tensordot(factor[:, g], x, 1)
        return np.einsum("bk,bk...->k...", factor[:, list(g)], x)

    index = _members(groups, grads).index
    return treedef.unflatten(map(of_leaf, leaves, index))


def _members(groups, grads):
    return group_leaves(groups, jax.tree.map(lambda x: x[0], grads), by_slice=True)


def methods(loss, params, *args, force=None):
    """By name of the leaf; batches may be NumPy's."""
    signature = trace.Signature(loss, 0, 1, False)
    plan = trace.prepare(signature, (params, *args), {}, force=force).program.plan
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): x for (path, _), x in zip(paths, plan.methods, strict=True)}


def forced(loss, force, groups="global", limit=LIMIT, ord=2):
    """`clipped_grad` with one method for every parameter that can take it."""
    signature = trace.Signature(loss, 0, 1, False)

    def run(params, batch):
        args = (params, batch)
        members = group_leaves(groups, params, by_slice=True)
        call = trace.prepare(signature, args, {}, force=force, ord=ord, members=members)
        dtype = jax.tree.leaves(params)[0].dtype
        limits = jnp.full((1, len(members.names)), limit, dtype)
        sums, info = clip.bounded_sum(call, members, limits, responses.hard, None)
        return jax.tree.structure(params).unflatten(sums), info

    return run


def assert_near(found, exact, tolerance, what=""):
    """Relative to the largest entry of each leaf."""
    found = dict(jax.tree_util.tree_leaves_with_path(found))
    exact = dict(jax.tree_util.tree_leaves_with_path(exact))
    assert found.keys() == exact.keys()
    for path, x in found.items():
        assert x.shape == exact[path].shape, f"{what}{path}"
        error = np.abs(np.asarray(x, np.float64) - exact[path]).max(initial=0)
        scale = np.abs(exact[path]).max(initial=0)
        assert error <= tolerance * scale + 1e-30, f"{what}{path}: {error / scale}"


def _off(x, y):
    return np.abs(x - y).max(initial=0) / max(np.abs(y).max(initial=0), 1e-30)


def check(run, loss, params, batch, dtype, *, where=None, grads=None, **kwargs):
    """That `run(params, batch)`, compiled, returns what the oracle does."""
    with enable_x64(True):
        rounded = cast(params, dtype), cast(batch, dtype)
    grads = each_gradient(loss, *rounded) if grads is None else grads
    _, norm, factor = expected(grads, slack=SLACK[dtype], **kwargs)
    if where is not None:
        norm, factor = (np.where(where[:, None], x, 0) for x in (norm, factor))
    with enable_x64(dtype == "float64"):
        sums, info = jax.jit(run)(*rounded)
        assert {str(x.dtype) for x in jax.tree.leaves(sums)} <= {dtype}
    tolerance = TOLERANCE[dtype]
    if dtype == "float32":  # and what rounding does to the gradients themselves
        own = each_gradient(loss, *rounded, dtype="float32")
        tolerance += max(jax.tree.leaves(jax.tree.map(_off, own, grads)), default=0)
    assert_near(info.norm, norm, tolerance, "norm")
    assert_near(info.factor, factor, tolerance, "factor")
    right = total(grads, factor, kwargs.get("groups", "global"))
    assert_near(sums, right, tolerance, "sum")


# ------------------------------------------------------- programs in their own dtype


def agrees(loss, params, *args, **kwargs):
    """Compiled, with the gradients of the same program; returns methods by name.

    In the model's own dtype: layers make constants of float32. Relative to the largest
    entry of all: some gradients are nothing but rounding.
    """
    sums, info = jax.jit(per_example.clipped_grad(loss, LIMIT, **kwargs))(params, *args)
    batched = kwargs.get("batch_argnums", 1)
    batched = (batched,) if isinstance(batched, int) else batched
    axes = tuple(0 if 1 + k in batched else None for k in range(len(args)))
    grads = jax.jit(jax.vmap(jax.grad(loss), (None, *axes)))(params, *args)
    total, norm, factor = expected(exact(grads), limit=LIMIT)
    assert jax.tree.structure(sums) == jax.tree.structure(params)
    near(info.norm, norm)
    near(info.factor, factor)
    near(sums, total)
    return methods(loss, params, *args) if batched == (1,) else {}


def exact(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def near(found, right, tolerance=1e-5):
    found, right = jax.tree.leaves(found), jax.tree.leaves(right)
    scale = max(np.abs(x).max() for x in right)
    for x, y in zip(found, right, strict=True):
        assert x.shape == y.shape
        assert np.abs(np.asarray(x, np.float64) - y).max() <= tolerance * scale
