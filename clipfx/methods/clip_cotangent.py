"""Bounds on the gradient that flows back through one place of a program."""

import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat, responses
from clipfx._core.checks import helpful, is_known, is_number
from clipfx._core.clip_factors import SLACK, check_nonfinite
from clipfx._core.groups import is_counted
from clipfx._core.leaves import narrow, times, widen, widest
from clipfx._core.reductions import Layout, as_tuple, combine
from clipfx._core.safe_sums import add_up, far, largest, summed
from clipfx._types import AxisName, Scalar, Tree
from clipfx.methods.clip_by_value import bounded


@helpful
def clip_cotangent(
    x: Tree,
    max_norm: Scalar | None = None,
    max_abs: Scalar | None = None,
    *,
    axis: Any = ...,
    axis_name: AxisName | None = None,
    nonfinite: str = "propagate",
) -> Tree:
    r"""Returns `x`; the gradient that flows back through it is clipped.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} \leftarrow
        g \min\Bigl(1, \frac{c}{\lVert g \rVert}\Bigr)
        \quad\text{or}\quad \operatorname{sign}(g) \min(|g|, c), \qquad
        g = \frac{\partial L}{\partial y}

    For a place where gradients grow: the state of a recurrent network at every step,
    the input of an attention, what a critic returns, one term of a loss. Only what
    passes there is bounded; parameters get whatever follows from it.

    >>> import clipfx
    >>> def grow(h, max_norm):
    ...     def step(h, _):
    ...         return 2 * clipfx.clip_cotangent(h, max_norm, axis=-1), None
    ...     return jax.lax.scan(step, h, None, length=10)[0].sum()
    >>> [float(jax.grad(grow)(jnp.zeros(1), c)[0]) for c in (1.0, jnp.inf)]
    [1.0, 1024.0]

    In a module, Flax NNX's or Linen's, it stands where the value is:
    `h = jnp.tanh(self.inner(clip_cotangent(h, 1.0, axis=-1)) + x)`.

    The result is the gradient of no loss. A line search, L-BFGS, or a test by finite
    differences, which compare it with values of the loss, go wrong. Of derivatives of
    higher order there are those of the clipped gradient, as of `jax.grad` of a function
    of gradients, `jax.jacfwd(jax.grad(f))` and `jax.jvp(jax.grad(f), ...)`. Forward
    mode has no gradient that flows back: `jax.jvp(f, ...)` and `jax.jacfwd(f)` raise
    JAX's `TypeError` for a `custom_vjp`.

    It keeps no state, and so no metrics. To see what it would clip, take the gradient
    with respect to zeros that are added to `x` in its place.

    Args:
      x: Any tree of arrays `[...]`. Leaves that are not floating pass through.
      max_norm: :math:`c` >= 0: a number, or an array that broadcasts against the norms,
        whose shape is that of `x` without `axis`. Infinity changes nothing. Its own
        gradient is zero.
      max_abs: The same for single elements, in place of `max_norm`; an array broadcasts
        against `x`. A complex element keeps its argument. To bound both, call it twice.
      axis: The axes that a norm runs over, an int, a tuple of ints, or None for all.
        There is no default: of `[batch, hidden]`, -1 bounds each example and None the
        batch. Under `jax.vmap` axes are those of one example. Leaves of a tree share a
        norm, as the two states of an LSTM do, and have to have one shape without these
        axes. Not used by `max_abs`. Static.
      axis_name: Mesh axes that `axis` is split over, in `shard_map` and `pmap`: a name
        or a tuple of names; `()` if each norm lies whole on one device. Needed in
        `shard_map` for what is split: whether along `axis` or across it its type does
        not tell. In `pmap`, and with `check_vma=False`, types do not tell copies from
        parts, and all of `x` counts as parts. Static.
      nonfinite: What becomes of a gradient whose norm is infinite or NaN: "propagate"
        makes all of it NaN, "zero" makes it zero. By element NaN stays, an infinite one
        is cut to the bound, and "zero" makes both zero. Static.

    Returns:
      `x`, bit for bit. Its gradient keeps shapes, dtypes and sharding, is taken in
      float32 or wider, and never exceeds the bound by more than 1e-6 of it, as stored:
      half precision is rounded towards zero. A gradient within the bound is unchanged.

    Raises:
      TypeError: If a bound is no number, or `axis` no axes.
      ValueError: If not exactly one bound is given, a concrete one is negative or NaN,
        or does not fit; a traced one below zero acts as 0. If `axis` is missing or does
        not fit, or `x` is split in `shard_map` and `axis_name` is missing.

    Example:
      >>> loss = lambda x: 3 * x[0] + 4 * x[1]
      >>> jax.grad(lambda x: loss(clip_cotangent(x, 1.0, axis=None)))(jnp.zeros(2))
      Array([0.6, 0.8], dtype=float32)
      >>> jax.grad(lambda x: loss(clip_cotangent(x, max_abs=3.5)))(jnp.zeros(2))
      Array([3. , 3.5], dtype=float32)

    Differs from the source: Graves bounds elements, and only of the inputs of a layer's
    activations. `clip_gradient(lo, hi, x)` of JAX's documentation bounds elements by
    two numbers.

    Reference: Graves, `Generating sequences with recurrent neural networks
    <https://arxiv.org/abs/1308.0850>`_, 2013; norms: Pascanu et al., `On the difficulty
    of training recurrent neural networks <https://arxiv.org/abs/1211.5063>`_, 2013.
    """
    check_nonfinite(nonfinite)
    name, bound = _the_bound(max_norm, max_abs)
    pairs, treedef = jax.tree_util.tree_flatten_with_path(x)
    leaves = [leaf for _, leaf in pairs]
    floating = [k for k, leaf in enumerate(leaves) if is_counted(leaf)]
    if not floating:
        return x
    some = [jnp.asarray(leaves[k]) for k in floating]
    limit = jnp.asarray(bound).astype(widest(v.dtype for v in some))
    limit = jnp.maximum(jax.lax.stop_gradient(limit), 0)
    names = as_tuple(axis_name)
    if name == "max_abs":
        how = _How(None, names, nonfinite)
        shapes = [v.shape for v in some]
    else:
        paths = [pairs[k][0] for k in floating]
        axes = tuple(map(functools.partial(_axes_of, axis), paths, some))
        how = _How(axes, names, nonfinite)
        shapes = [_one_shape(paths, some, axes)]
        _check_split(some, axis_name)
    for shape in shapes:
        _check_fits(name, limit, shape)
    for k, leaf in zip(floating, _marked(how, some, limit), strict=True):
        leaves[k] = leaf
    return treedef.unflatten(leaves)


class _How(NamedTuple):
    """What of a clip is known while tracing; hashable.

    Attributes:
      axes: Of each leaf those that norms run over, not negative; None for elements.
      axis_name: Mesh axes that they are split over.
      nonfinite: What becomes of infinite and NaN.
    """

    axes: tuple[tuple[int, ...], ...] | None
    axis_name: tuple[Any, ...]
    nonfinite: str


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _marked(how: _How, leaves: list[jax.Array], limit: jax.Array) -> list[jax.Array]:
    return leaves


def _forward(how: _How, leaves: list[jax.Array], limit: jax.Array) -> tuple[list, Any]:
    return leaves, limit


def _backward(how: _How, limit: jax.Array, gradient: list) -> tuple[list, None]:
    clip = _clip_elements if how.axes is None else _clip_norms
    wide = clip(how, [widen(g) for g in gradient], limit)
    return [narrow(w, g.dtype) for w, g in zip(wide, gradient, strict=True)], None


_marked.defvjp(_forward, _backward)


def _clip_elements(how: _How, gradient: list, limit: jax.Array) -> list[jax.Array]:
    def clip(g: jax.Array) -> jax.Array:
        most = _of_rank(limit, g.ndim).astype(jnp.finfo(g.dtype).dtype)
        clipped = bounded(g, most, responses.hard)
        if how.nonfinite == "propagate":
            return clipped
        return jnp.where(jnp.isfinite(g), clipped, jnp.zeros_like(g))

    return [clip(g) for g in gradient]


def _clip_norms(how: _How, gradient: list, limit: jax.Array) -> list[jax.Array]:
    """Under `vmap` JAX forgets the mesh of constants: here none is chosen by a `where`.

    The gradient is divided by its largest element, in two factors that are normal
    numbers, which are constants to derivatives: what depends on them cancels.
    """
    assert how.axes is not None
    layout = _layout(gradient, how.axis_name)
    fixed = map(jax.lax.stop_gradient, gradient)
    peak = combine(jnp.maximum, list(map(largest, fixed, how.axes)), layout)[0]
    peak = jnp.where((peak > 0) & (peak < jnp.inf), peak, 1)
    up, is_large = far(layout.dtype), (peak > 1).astype(layout.dtype)
    first = is_large / up + (1 - is_large) * up
    second = 1 / (peak * first)

    def unit(g: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        scales = (jnp.expand_dims(x, axes) for x in (first, second))
        return functools.reduce(times, scales, widen(g, layout.dtype))

    def power(unit: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        rows = [unit.real, unit.imag] if jnp.iscomplexobj(unit) else [unit]
        # Hidden, or XLA would square a constant gradient and the scale one by one.
        squares = [jnp.square(summed(row)) for row in rows]
        return add_up(functools.reduce(jnp.add, squares), axes)

    units = list(map(unit, gradient, how.axes))
    total = combine(jnp.add, list(map(power, units, how.axes)), layout)[0]
    norm = jnp.sqrt(jnp.where(total == 0, 1, total))
    limit = _of_rank(limit, norm.ndim)
    good = jnp.isfinite(norm)
    # A traced bound that is NaN is none that anything is within.
    small = norm * (1 - SLACK) <= limit * first * second
    within = good & small | (total == 0)
    # NaN for what is not finite, even at a bound of 0.
    factor = jnp.where(within, norm, limit) / norm + (norm - norm)

    def clip(g: jax.Array, unit: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        again = lambda row: jnp.expand_dims(row, axes)
        clipped = jnp.where(
            again(within), g, times(unit, again(factor)).astype(g.dtype)
        )
        if how.nonfinite == "propagate":
            return clipped
        return jnp.where(again(good), clipped, jnp.zeros_like(g))

    return list(map(clip, gradient, units, how.axes))


def _layout(gradient: Sequence[jax.Array], names: tuple[Any, ...]) -> Layout:
    """All in one group, summed over the mesh axes named, where leaves vary over them.

    Types tell of a copy, which must not be counted more than once, if they tell at all.
    """
    tells = any(_compat.varying_axes(jax.lax.axis_index(name)) for name in names)
    others = _varying(gradient) - {*names}
    dtype = widest(g.dtype for g in gradient)
    return Layout((0,) * len(gradient), 1, dtype, () if tells else names, others)


def _varying(leaves: Sequence[jax.Array]) -> frozenset[str]:
    return frozenset[str]().union(*map(_compat.varying_axes, leaves))


def _of_rank(limit: jax.Array, rank: int) -> jax.Array:
    """With dimensions of length 1 in front, but for a scalar."""
    if not limit.ndim:
        return limit
    return limit.reshape((1,) * (rank - limit.ndim) + limit.shape)


def _the_bound(max_norm: Any, max_abs: Any) -> tuple[str, Any]:
    given = {"max_norm": max_norm, "max_abs": max_abs}
    given = {name: bound for name, bound in given.items() if bound is not None}
    if len(given) != 1:
        raise ValueError(
            f"max_norm or max_abs must be given, one of them, got {given or 'none'}; "
            "for both bounds call clip_cotangent twice, for none pass math.inf."
        )
    ((name, bound),) = given.items()
    if not is_number(bound):
        raise TypeError(
            f"{name} must be a number or an array of such, got {bound!r}; to clip "
            "nothing pass math.inf."
        )
    if is_known(bound) and not np.all(np.asarray(bound, np.float64) >= 0):
        raise ValueError(
            f"{name} must be >= 0, got {bound!r}; to clip nothing pass math.inf."
        )
    return name, bound


def _axes_of(axis: Any, path: tuple, x: jax.Array) -> tuple[int, ...]:
    if axis is None:
        return tuple(range(x.ndim))
    advice = "-1 for each row of [..., features], None for all axes"
    if axis is ...:
        raise ValueError(
            f"axis must say which axes a norm runs over, got nothing; {advice}."
        )
    try:
        entries = axis if isinstance(axis, tuple | list) else (axis,)
        axes = [operator.index(a) for a in entries]
    except TypeError:
        raise TypeError(
            f"axis must be an int, a tuple of ints or None, got {axis!r}; {advice}."
        ) from None
    whole = {a % x.ndim for a in axes if -x.ndim <= a < x.ndim}
    if len(whole) < len(axes):
        raise ValueError(
            f"axis must name axes of every leaf, once, got {axis!r} for {_show(path)} "
            f"of shape {x.shape}; {advice}."
        )
    return tuple(sorted(whole))


def _one_shape(
    paths: Sequence[tuple], leaves: Sequence[jax.Array], axes: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """The shape of norms, checked to be the same for every leaf."""
    shapes = [
        tuple(n for k, n in enumerate(x.shape) if k not in over)
        for x, over in zip(leaves, axes, strict=True)
    ]
    for path, shape in zip(paths, shapes, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                "x must have leaves of one shape without axis, which share a norm, got "
                f"{shapes[0]} for {_show(paths[0])} and {shape} for {_show(path)}; to "
                "clip leaves by themselves use jax.tree.map."
            )
    return shapes[0]


def _check_split(leaves: Sequence[jax.Array], axis_name: Any) -> None:
    split = _varying(leaves)
    if split and axis_name is None:
        raise ValueError(
            "axis_name must say over which mesh axes the axes of a norm are split, got "
            f"nothing, and x is split over {sorted(split)}; name those, () for none."
        )
    rest = [_compat.varying_axes(x) - {*as_tuple(axis_name)} for x in leaves]
    if len({*rest}) > 1:
        raise ValueError(
            "x must have leaves that are split alike across axis, got "
            f"{', '.join(str(sorted(axes)) for axes in rest)} by leaf; to clip leaves "
            "by themselves use jax.tree.map."
        )


def _check_fits(name: str, limit: jax.Array, shape: tuple[int, ...]) -> None:
    try:
        fits = not limit.ndim or np.broadcast_shapes(limit.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        what = "norms" if name == "max_norm" else "x"
        raise ValueError(
            f"{name} must be a scalar or broadcast against {what} of shape {shape}, "
            f"got shape {limit.shape}; norms have the shape of x without axis."
        )


def _show(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the only leaf"
