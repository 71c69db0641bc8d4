r"""Norms of groups: right in every dtype, at every magnitude, on every mesh.

A sum of squares leaves the range of float32 long before its root does. Here a sum
that overflowed or vanished is taken a second time with the elements multiplied by a
power of two, by the same code in a loop: the usual case pays for one reduction.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._tree import Groups, counted_leaves, times, widen


class Norms(NamedTuple):
    """Norms `[G]` that neither overflow nor vanish: each is `value / scale`.

    Attributes:
      value: `[G]`, float32 or wider.
      scale: `[G]`, powers of two, 1 unless the norm is enormous or tiny.
    """

    value: jax.Array
    scale: jax.Array


def check_ord(ord: Any) -> float:
    """Returns `ord` as a float >= 1 or infinity, 2 for None."""
    if ord is None:
        return 2.0
    if isinstance(ord, jax.Array):
        raise TypeError(
            "ord must be a static Python number, got an array; under "
            'optax.inject_hyperparams pass static_args="ord".'
        )
    if isinstance(ord, bool) or not isinstance(ord, int | float):
        raise TypeError(
            f"ord must be a number >= 1 or math.inf, got {ord!r}; for the Euclidean "
            "norm pass 2."
        )
    if not ord >= 1:
        raise ValueError(
            f"ord must be a number >= 1 or math.inf, got {ord!r}; for the Euclidean "
            "norm pass 2."
        )
    return float(ord)


def group_norms(
    tree: Any, groups: Groups, ord: float = 2.0, axis_name: Any = None
) -> Norms:
    r"""Measures each group, :math:`(\sum_i |x_i|^p)^{1/p}`, p = `ord`.

    Accumulates in float32 or wider, pairwise over leaves. Inside `jax.shard_map` sums
    run over the mesh axes that each leaf varies over. Its derivative is that of the
    norm, and zero where the norm is zero.

    Args:
      tree: Leaves `[...]`.
      groups: From `group_leaves(..., tree)`.
      ord: p >= 1 or infinity.
      axis_name: Mesh axes besides, which all leaves are split over.
    """
    pairs = counted_leaves(tree, groups)
    leaves, index = [leaf for leaf, _ in pairs], tuple(i for _, i in pairs)
    if not groups.names:
        return Norms(jnp.zeros(0, jnp.float32), jnp.ones(0, jnp.float32))
    wide = {jnp.finfo(leaf.dtype).dtype for leaf in leaves}
    dtype = jnp.float64 if jnp.dtype(jnp.float64) in wide else jnp.float32
    names = _as_tuple(axis_name)
    layout = Layout(index, len(groups.names), dtype, names, _APART.get())
    return _jitted(leaves, layout, ord)


class Layout(NamedTuple):
    """What of a tree is known while tracing; hashable."""

    index: tuple[int, ...]
    number: int
    dtype: Any
    axis_names: tuple
    apart: frozenset[str]


_APART = contextvars.ContextVar[frozenset[str]]("apart", default=frozenset())


@contextlib.contextmanager
def apart(axes: frozenset[str]) -> Iterator[None]:
    """While tracing, these mesh axes of `shard_map` have trees of their own each."""
    token = _APART.set(axes)
    try:
        yield
    finally:
        _APART.reset(token)


def axes_apart(tree: Any, axis_name: Any, what: str) -> frozenset[str]:
    """The mesh axes that `what` is split over, which the type of a leaf does not tell.

    Raises:
      ValueError: If leaves are split in `shard_map` and `axis_name` is None.
    """
    if axis_name is not None:
        return frozenset(_as_tuple(axis_name))
    split = frozenset[str]().union(*map(_compat.varying_axes, jax.tree.leaves(tree)))
    if split:
        raise ValueError(
            f"axis_name must say over which mesh axes {what} are split, got nothing, "
            f"and updates are split over {sorted(split)}; name those, () for none."
        )
    return split


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _measure(leaves: list[jax.Array], layout: Layout, ord: float) -> Norms:
    return _per_shard(lambda leaves: _norms_of(leaves, layout, ord), leaves)


def _per_shard(fun: Callable, leaves: list[jax.Array]) -> Any:
    """Calls `fun`; where types say how leaves are split, on the shards.

    On a mesh with Explicit axes `combine` then needs one collective. Left to XLA it is
    one for every set of axes that leaves are split over, and for every 256 leaves.
    """
    specs = [_compat.explicit_spec(x) or () for x in leaves]
    mesh = next(
        (_compat.mesh_of(x) for x, s in zip(leaves, specs, strict=True) if any(s)), None
    )
    if mesh is None or _compat.is_manual(mesh):  # no shard_map within another
        return fun(leaves)
    split = jax.shard_map(
        fun,
        mesh=mesh,
        in_specs=([jax.sharding.PartitionSpec(*spec) for spec in specs],),
        out_specs=jax.sharding.PartitionSpec(),
        axis_names=_compat.explicit_axes(mesh),
    )
    whole = jax.custom_batching.custom_vmap(split)

    @whole.def_vmap
    def mapped(axis_size, in_batched, leaves):
        # Under vmap a shard_map would gather what is split along the mapped axis.
        axes = [0 if batched else None for batched in in_batched[0]]
        out = jax.vmap(fun, in_axes=(axes,), axis_size=axis_size)(leaves)
        return out, jax.tree.map(lambda _: True, out)

    return whole(leaves)


def _norms_of(leaves: list[jax.Array], layout: Layout, ord: float) -> Norms:
    def part(x, scale):
        # A barrier for each leaf: else XLA takes widened leaves out of the loop, and
        # scales of full size, shared by leaves of one shape.
        x, scale = jax.lax.optimization_barrier((x, scale))
        return jnp.sum(_power(times(widen(x), scale), ord))

    if ord in (1, 2):
        sums = lambda scale: combine(jnp.add, [part(x, scale) for x in leaves], layout)
        total, scale = _rescaled(sums, layout)
        return Norms(jnp.sqrt(total) if ord == 2 else total, scale)
    peak = combine(jnp.maximum, [_peak(widen(x)) for x in leaves], layout)
    # Other powers leave the range even sooner: divide by the largest first.
    scale = _reciprocal_power_of_two(peak)
    if ord == math.inf:
        return Norms(peak * scale, scale)
    scales = jnp.unstack(scale)
    parts = [part(x, scales[i]) for x, i in zip(leaves, layout.index, strict=True)]
    return Norms(combine(jnp.add, parts, layout) ** (1 / ord), scale)


@_measure.defjvp
def _measure_jvp(layout, ord, primals, tangents):
    norms = _measure(*primals, layout, ord)
    inverse = jnp.unstack(jnp.where(norms.value > 0, 1 / norms.value, 0))
    scales = jnp.unstack(norms.scale)
    # The unit vector dual to x, |u| <= 1: the derivative is its inner product.
    duals = [
        _dual(times(times(widen(x), scales[i]), inverse[i]), ord)
        for x, i in zip(primals[0], layout.index, strict=True)
    ]
    dots = [_inner(u, widen(dx)) for u, dx in zip(duals, tangents[0], strict=True)]
    slope = combine(jnp.add, dots, layout) * norms.scale
    if ord == math.inf:  # ties share the derivative
        ties = combine(jnp.add, [jnp.sum(jnp.abs(u)) for u in duals], layout)
        slope = slope / jnp.maximum(ties, 1)
    return norms, Norms(slope, jnp.zeros_like(norms.scale))


# Without jit around it, every call outside of jit would compile the loop anew.
_jitted = jax.jit(_measure, static_argnums=(1, 2), inline=True)


def cosines(
    a: Any, b: Any, groups: Groups, norms: tuple[Norms, Norms], axis_name: Any = None
) -> jax.Array:
    """The cosine `[G]` between two trees whose norms are known, 0 where one is 0."""

    def unit(x, n, i):
        size = jnp.where(n.value[i] > 0, n.value[i], 1)
        return times(times(widen(x), n.scale[i]), 1 / size)

    pairs = zip(counted_leaves(a, groups), counted_leaves(b, groups), strict=True)
    dots = [
        _inner(unit(x, norms[0], i), unit(y, norms[1], i)) for (x, i), (y, _) in pairs
    ]
    index = tuple(i for i in groups.index if i is not None)
    dtype = norms[0].value.dtype
    names = _as_tuple(axis_name)
    layout = Layout(index, len(groups.names), dtype, names, _APART.get())
    return combine(jnp.add, dots, layout)


def group_sizes(tree: Any, groups: Groups, axis_name: Any = None) -> jax.Array:
    """Counts the elements of each group, float32 `[G]`, over all shards."""
    sizes = [0] * len(groups.names)
    for x, i in counted_leaves(tree, groups):
        axes = (_compat.varying_axes(x) | {*_as_tuple(axis_name)}) - _APART.get()
        shards = (jax.lax.psum(1, axis) for axis in axes)
        sizes[i] += x.size * math.prod(shards)
    return jnp.array(sizes, jnp.float32)


def _as_tuple(axis_name: Any) -> tuple:
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def combine(op: Callable, scalars: Sequence[jax.Array], layout: Layout) -> jax.Array:
    """Combines one scalar per leaf into `[G]`, over leaves and mesh axes.

    Or one array per leaf, all `[B]`, into `[G, B]`. `op` is `jnp.add`, or `jnp.maximum`
    of what is not negative. One collective, whatever the number of groups and however
    leaves are split.
    """
    split = [
        (_compat.varying_axes(x) | {*layout.axis_names}) - layout.apart for x in scalars
    ]
    every = frozenset[Any]().union(*split)
    rows: list[list[jax.Array]] = [[] for _ in range(layout.number)]
    for x, i, axes in zip(scalars, layout.index, split, strict=True):
        x = x.astype(layout.dtype)
        # Of equal copies all but one count as zero.
        for axis in every - axes:
            x = jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x))
        rows[i].append(x)
    total = jnp.stack([_pairwise(op, row, layout.dtype) for row in rows])
    across = jax.lax.psum if op is jnp.add else jax.lax.pmax
    return across(total, tuple(sorted(every, key=str))) if every else total


def _pairwise(op: Callable, row: list[jax.Array], dtype: Any) -> jax.Array:
    """Reduces in a balanced tree: the error grows with the log of the length."""
    while len(row) > 1:
        row = [op(*row[i : i + 2]) if row[i + 1 :] else row[i]
               for i in range(0, len(row), 2)]  # fmt: skip
    return row[0] if row else jnp.zeros([], dtype)


def far(dtype: Any) -> float:
    """A power of two at three quarters of the exponents, 2^96 for float32.

    Divided by it what overflowed comes down, and multiplied what vanished comes up,
    with room for 2^60 elements.
    """
    return 2.0 ** (jnp.finfo(dtype).maxexp * 3 // 4)


def _rescaled(sums: Callable, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """Runs `sums(scale)`, again at another scale for groups that left the range.

    One scale for all groups, so that nothing in the loop depends on their number.
    """
    dtype = layout.dtype
    info = jnp.finfo(dtype)
    up = far(dtype)
    # Below this, squares that were lost could add up to more than a rounding: 2^-72.
    tiny = float(info.tiny / info.eps) * 2.0**31

    def body(carry):
        scale, total, used = carry
        over, under = total == jnp.inf, total < tiny
        wanted = (scale == 1) | ((scale < 1) & over) | ((scale > 1) & under)
        total = jnp.where(wanted, sums(scale), total)
        used = jnp.where(wanted, scale, used)
        bring_down = (scale == 1) & jnp.any(total == jnp.inf)
        bring_up = (scale <= 1) & jnp.any(total < tiny)
        after = jnp.where(bring_down, 1 / up, jnp.where(bring_up, up, 0.0))
        return after.astype(dtype), total, used

    zeros = jnp.zeros(layout.number, dtype)
    vary = lambda x: _compat.vary(x, layout.apart)
    start = (vary(jnp.ones([], dtype)), vary(zeros), vary(zeros + 1))
    return jax.lax.while_loop(lambda carry: carry[0] > 0, body, start)[1:]


def _power(x: jax.Array, power: float) -> jax.Array:
    """`|x| ** power`, real."""
    if power == 2:
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else x * x
    return jnp.abs(x) if power == 1 else jnp.abs(x) ** power


def _peak(x: jax.Array) -> jax.Array:
    """The largest magnitude, infinite where there is a NaN: collectives may lose it."""
    size = jnp.abs(x)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), initial=0.0)


def _reciprocal_power_of_two(x: jax.Array) -> jax.Array:
    """A power of two within a factor of two of `1 / x`, kept a normal number."""
    limit = jnp.finfo(x.dtype).maxexp - 2
    exponent = jnp.frexp(jnp.where(jnp.isfinite(x) & (x > 0), x, 1))[1]
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(-exponent, -limit, limit))


def _inner(u: jax.Array, dx: jax.Array) -> jax.Array:
    """The real inner product."""
    if jnp.iscomplexobj(u):
        return jnp.sum(u.real * dx.real + u.imag * dx.imag)
    return jnp.sum(u * dx)


def _dual(unit: jax.Array, ord: float) -> jax.Array:
    """The derivative of the p-norm at a vector of norm one."""
    if ord == 2:
        return unit
    if ord == math.inf:
        return jnp.where(
            jnp.abs(unit) >= 1 - 1e-6, jnp.sign(unit), jnp.zeros_like(unit)
        )
    return times(jnp.sign(unit), jnp.abs(unit) ** (ord - 1))
