"""Parameters in disguise: values whose elements are elements of leaves, each once.

Between a leaf and its use lie casts, transposes, reshapes, slices and concatenations.
They move elements without changing them, so the norm of a gradient with respect to
such a value is that of the leaf. A `ParamView` follows them through a program. Where
elements have been multiplied by constants on the way, as by scales and masks, it says
so: these coefficients belong to the gradient of the leaf.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.constants import Constant, Varies, moved


class LeafSlice(NamedTuple):
    """The elements of one leaf, or of a constant, in a value.

    Attributes:
      leaf: Number of the leaf, None for a constant.
      start: Where the part begins along the axis of the `ParamView`.
      stop: Where it ends.
      dims: For every dimension of the value the dimensions of the leaf that it runs
        over, None if that is no longer known.
      region: For every dimension of the leaf the interval that the part covers, None
        if that is not known.
      stack: For every loop that takes one slice each turn its number and the
        dimensions of the leaf that it runs over.
      scaled: Along which dimensions of the value coefficients differ, beside the turns
        of loops that slice; None if there are none.
    """

    leaf: int | None
    start: int
    stop: int
    dims: tuple[tuple[int, ...], ...] | None
    region: tuple[tuple[int, int], ...] | None
    stack: tuple[tuple[int, tuple[int, ...] | None], ...] = ()
    scaled: Varies | None = None


class ParamView(NamedTuple):
    """What a value consists of.

    Attributes:
      parts: One after the other along `axis`.
      axis: None if there is only one part.
      repeated: Dimensions of the value along which every element is repeated.
    """

    parts: tuple[LeafSlice, ...]
    axis: int | None = None
    repeated: frozenset[int] = frozenset()

    @property
    def leaves(self) -> frozenset[int]:
        """The leaves that it consists of."""
        return frozenset(p.leaf for p in self.parts if p.leaf is not None)


def whole(leaf: int, shape: Sequence[int]) -> ParamView:
    """The view of a leaf itself."""
    dims = tuple((k,) for k in range(len(shape)))
    return ParamView((LeafSlice(leaf, 0, 0, dims, tuple((0, n) for n in shape)),))


def of_equation(
    eqn: Any,
    views: Sequence[ParamView | None],
    fixed: Sequence[bool],
    constants: Sequence[Constant | None],
) -> list[ParamView | None]:
    """The views of what an equation returns.

    Args:
      eqn: All its inputs depend on parameters alone, or are constant.
      views: Of its inputs; None where unknown or constant.
      fixed: Which inputs have no derivative.
      constants: Those of them that do not depend on parameters at all.
    """
    name = eqn.primitive.name
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    outs = [tuple(v.aval.shape) for v in eqn.outvars]
    view = views[0] if views else None
    if name in primitives.SAME and all(_real(v) for v in (*eqn.invars, *eqn.outvars)):
        return list(views)
    if name == primitives.CONCATENATE:
        return [_concatenate(views, fixed, shapes, primitives.concatenated(eqn))]
    if name in (primitives.SELECT, *primitives.ARITHMETIC):
        return [_scaled(eqn, views, fixed, constants, shapes)]
    if view is None:
        return [None] * len(outs)
    if name == primitives.BROADCAST and math.prod(shapes[0]) != math.prod(outs[0]):
        at = primitives.broadcast_dimensions(eqn)
        return [_repeat(view, shapes[0], outs[0], at)]
    if view.repeated:
        return [None] * len(outs)
    if name == primitives.TRANSPOSE:
        return [_transpose(view, primitives.permutation(eqn))]
    if name in primitives.RESHAPES and math.prod(shapes[0]) == math.prod(outs[0]):
        return [_regroup(view, shapes[0], outs[0])]
    if name == primitives.SLICE:
        return [_slice(view, shapes[0], primitives.cuts(eqn))]
    if name == primitives.SPLIT:
        return _split(view, shapes[0], *primitives.pieces(eqn))
    if name == primitives.PAD and fixed[1]:
        return [_pad(view, shapes[0], primitives.edges(eqn))]
    if name == primitives.REVERSE:
        return [_blur(view)]
    if name == primitives.DYNAMIC_SLICE:
        return [_depends(_blur(view), constants[1:])]
    if name == primitives.GATHER and _takes_once(eqn, shapes[0], constants[1]):
        every = range(len(outs[0]))
        mixed = [p._replace(scaled=_moved(p, lambda d: every)) for p in view.parts]
        view = _blur(view._replace(parts=tuple(mixed)))
        return [_depends(view, constants[1:])]
    return [None] * len(outs)


def _real(v: Any) -> bool:
    return jnp.issubdtype(v.aval.dtype, jnp.floating)


def slice_of_loop(view: ParamView, loop: int) -> ParamView | None:
    """The view of one turn's slice along the first dimension."""
    if view.axis == 0 or view.repeated:
        return None
    parts = [
        p._replace(
            dims=p.dims and p.dims[1:],
            scaled=_moved(p, lambda d: (d - 1,) * (d > 0)),
            stack=(*p.stack, (loop, p.dims[0] if p.dims else None)),
        )
        for p in view.parts
    ]
    return ParamView(tuple(parts), None if view.axis is None else view.axis - 1)


def _depends(
    view: ParamView | None, constants: Sequence[Constant | None]
) -> ParamView | None:
    """The view, if constants that it depends on change in no loop that it does not."""
    if view is None or any(constant is None for constant in constants):
        return None
    known = [constant for constant in constants if constant is not None]
    loops = frozenset().union(*(constant.loops for constant in known))
    stacks = [{loop for loop, _ in p.stack} for p in view.parts if p.leaf is not None]
    if not all(loops <= stack for stack in stacks):
        return None
    for constant in known:
        constant.need()
    return view


def _moved(part: LeafSlice, to: Callable[[int], Iterable[int]]) -> Varies | None:
    return None if part.scaled is None else moved(part.scaled, to)


def _times(view: ParamView, varies: Varies) -> ParamView:
    parts = [p._replace(scaled=varies.union(p.scaled or ())) for p in view.parts]
    return view._replace(parts=tuple(parts))


def _scaled(
    eqn: Any,
    views: Sequence[ParamView | None],
    fixed: Sequence[bool],
    constants: Sequence[Constant | None],
    shapes: Sequence[Sequence[int]],
) -> ParamView | None:
    """Through arithmetic with constants, and a choice between them and parameters."""
    name, out = eqn.primitive.name, tuple(eqn.outvars[0].aval.shape)
    (k, *others) = [j for j, constant in enumerate(fixed) if not constant]
    view, rest = views[k], [c for j, c in enumerate(constants) if j != k]
    if others or view is None or shapes[k] != out or not _real(eqn.outvars[0]):
        return None
    if name in primitives.ADD or (name == primitives.SUBTRACT and k == 0):
        return view
    if name in (primitives.SUBTRACT, primitives.NEGATE):
        return _times(view, frozenset())
    if name == primitives.DIVIDE and k == 1:
        return None
    by = rest[0]  # of a choice what decides, the other cases have no derivative
    varies = None if by is None else by.differs()
    if varies is None or any(dims & view.repeated for dims in varies):
        return None  # what repeats an element is added up as it is
    return _depends(_times(view, varies), [by])


def _pad(
    view: ParamView, shape: Sequence[int], edges: Sequence[tuple[int, int, int]]
) -> ParamView | None:
    """Through a padding: constants beside the parts, or a coefficient of 0."""
    if any(min(edge) < 0 or edge[2] for edge in edges):
        return None
    padded = [d for d, edge in enumerate(edges) if edge != (0, 0, 0)]
    joined = view.axis
    for d in sorted(padded, key=lambda d: d != joined):
        if view.axis not in (None, d):
            # Longer than the leaf there, so that it fits no other use of it.
            parts = tuple(p._replace(dims=None) for p in view.parts)
            along = frozenset({frozenset({d})})
            view = _times(view._replace(parts=parts), along)
            continue
        before, after, _ = edges[d]
        sizes = [*[before] * (before > 0), shape[d], *[after] * (after > 0)]
        views = [*[None] * (before > 0), view, *[None] * (after > 0)]
        fixed, shapes = [x is None for x in views], [[n] * len(shape) for n in sizes]
        if (longer := _concatenate(views, fixed, shapes, d)) is None:
            return None
        view = longer
    return view


def _takes_once(eqn: Any, shape: Sequence[int], ids: Constant | None) -> bool:
    """Whether a `gather` is known to take no element twice, and none from outside."""
    where = None if ids is None else ids.value()
    if where is None:
        return False
    p = primitives.gather(eqn)
    last = np.array([shape[d] - p.sizes[d] for d in p.start])
    if (where < 0).any() or (where > last).any():
        return False
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    with jax.ensure_compile_time_eval():
        taken = np.asarray(primitives.take(eqn, jnp.asarray(numbers), where))
    return np.unique(taken).size == taken.size


def _blur(view: ParamView) -> ParamView | None:
    if view.axis is not None:
        return None
    return ParamView((view.parts[0]._replace(dims=None, region=None),))


def _repeat(
    view: ParamView, old: Sequence[int], new: Sequence[int], at: Sequence
) -> Any:
    """Through a broadcast: new dimensions, and old ones of size 1 that grow."""
    if view.repeated:
        return None
    stays = {e: d for d, e in enumerate(at) if old[d] == new[e]}
    dims = lambda p: tuple(
        p.dims[stays[e]] if e in stays else () for e in range(len(new))
    )
    parts = [
        p._replace(dims=p.dims and dims(p), scaled=_moved(p, lambda d: (at[d],)))
        for p in view.parts
    ]
    axis = None if view.axis is None else at[view.axis]
    return ParamView(tuple(parts), axis, frozenset(range(len(new))) - stays.keys())


def _transpose(view: ParamView, order: Sequence[int]) -> ParamView:
    dims = lambda p: tuple(p.dims[k] for k in order)
    to = lambda d: (list(order).index(d),)
    parts = [
        p._replace(dims=p.dims and dims(p), scaled=_moved(p, to)) for p in view.parts
    ]
    axis = None if view.axis is None else list(order).index(view.axis)
    return ParamView(tuple(parts), axis)


def _regroup(
    view: ParamView, old: Sequence[int], new: Sequence[int]
) -> ParamView | None:
    """Through a reshape, in the smallest blocks of dimensions of equal size."""
    if 0 in old:
        return None
    sources: list[tuple[int, ...]] = [()] * len(new)
    to: dict[int, Sequence[int]] = {}  # of old dimensions longer than 1
    known, axis, i, j = True, None, 0, 0
    while i < len(old) or j < len(new):
        k, n = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (a := math.prod(old[k:i])) != (b := math.prod(new[n:j])):
            i, j = (i + 1, j) if a < b else (i, j + 1)
        before = [d for d in range(k, i) if old[d] > 1]
        after = [d for d in range(n, j) if new[d] > 1]
        if len(before) == len(after):
            for d, e in zip(before, after, strict=True):
                known &= old[d] == new[e]  # (2, 3) -> (3, 2) mixes both
                sources[e] = (d,)
                to[d] = (e,) if len(after) == 1 else after
        elif len(after) == 1:
            sources[after[0]] = tuple(before)
            to.update(dict.fromkeys(before, after))
        else:
            known = False
            to.update(dict.fromkeys(before, after))
        if view.axis is not None and k <= view.axis < i:
            if len(before) != 1 or len(after) != 1 or before[0] != view.axis:
                return None
            axis = after[0]
    if view.axis is not None and axis is None:
        return None

    def regroup(p: LeafSlice) -> LeafSlice:
        p = p._replace(scaled=_moved(p, lambda d: to.get(d, ())))
        if p.dims is None or not known:
            return p._replace(dims=None)
        gather = lambda source: tuple(x for d in source for x in p.dims[d])
        return p._replace(dims=tuple(gather(source) for source in sources))

    return ParamView(tuple(map(regroup, view.parts)), axis)


def _slice(view: ParamView, shape: Sequence[int], cuts: list) -> ParamView | None:
    """Through a slice, `cuts` (start, stop, step) along every dimension."""
    cut = [d for d, (lo, hi, step) in enumerate(cuts)
           if (lo, hi, step) != (0, shape[d], 1)]  # fmt: skip
    if not cut:
        return view
    if view.axis is not None:
        return None
    part = view.parts[0]
    if part.dims is None or part.region is None:
        return _blur(view)
    region = list(part.region)
    for d in cut:
        start, stop, step = cuts[d]
        if step != 1 or len(part.dims[d]) != 1:
            return _blur(view)
        (leaf_dim,) = part.dims[d]
        low = region[leaf_dim][0]
        region[leaf_dim] = (low + start, low + stop)
    return ParamView((part._replace(region=tuple(region)),))


def _split(
    view: ParamView, shape: Sequence[int], axis: int, sizes: Sequence[int]
) -> list:
    views, start = [], 0
    for size in sizes:
        cuts = [(0, n, 1) for n in shape]
        cuts[axis] = (start, start + size, 1)
        views.append(_slice(view, shape, cuts))
        start += size
    return views


def _concatenate(
    views: Sequence[ParamView | None],
    constant: Sequence[bool],
    shapes: Sequence[Sequence[int]],
    axis: int,
) -> ParamView | None:
    parts, start = [], 0
    for view, fixed, shape in zip(views, constant, shapes, strict=True):
        if fixed:
            view = ParamView((LeafSlice(None, 0, 0, None, None),))
        if view is None or view.repeated or view.axis not in (None, axis):
            return None
        for part in view.parts:
            first, last = (0, shape[axis]) if view.axis is None else part[1:3]
            parts.append(part._replace(start=start + first, stop=start + last))
        start += shape[axis]
    return ParamView(tuple(parts), axis) if len(parts) > 1 else views[0]
