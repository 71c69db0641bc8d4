"""Sums of powers that leave the range of their dtype before their root does.

They are taken at other scales too, with the elements multiplied by a power of two.
"""

import bisect
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.leaves import MANY, times, unseen, widen
from clipfx._core.reductions import (
    Layout,
    by_device,
    by_group,
    combine,
    pairwise,
    varying,
)

# What the loops here pass on.
_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]

# Sums `[G]`, and the scales at which they were taken.
_Scaled: TypeAlias = tuple[jax.Array, jax.Array]


def far(dtype: Any) -> float:
    """A power of two at three quarters of the exponents, 2^96 for float32.

    Divided by it what overflowed comes down, and multiplied what vanished comes up,
    with room for 2^60 elements.
    """
    return 2.0 ** (jnp.finfo(dtype).maxexp * 3 // 4)


def sums_in_range(
    leaves: list[jax.Array], layout: Layout, ord: int
) -> tuple[jax.Array, jax.Array]:
    """Sums `[G]` of the powers of elements times a scale `[G]`, and that scale.

    What a pass over memory costs decides how they are taken at three scales. A TPU
    fuses a sum into what makes the gradient, if it is one of its own; a GPU takes all
    three in one reduction; on a CPU the second and third wait until they are needed.
    """
    loop = functools.partial(_in_loops, layout=layout, ord=ord)
    separate = functools.partial(_at_once, _separate, layout=layout, ord=ord)
    together = functools.partial(_at_once, _together, layout=layout, ord=ord)

    def on_mesh(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        # No loop: with a collective inside devices of XLA:CPU may wait for each other
        # for ever. And what is reduced together XLA gathers first.
        if not leaves or layout.axis_names or varying(leaves):  # in shard_map
            return separate(leaves)
        stacked = functools.partial(_stacked_at_once, layout=layout, ord=ord)
        return jax.lax.platform_dependent(leaves, cpu=stacked, default=separate)

    ways = {"cpu": loop, "gpu": together, "tpu": separate, "mesh": on_mesh}
    return by_device(ways, layout.device, leaves)


def _at_once(
    parts: Callable[..., Any], leaves: list[jax.Array], layout: Layout, ord: int
) -> tuple[jax.Array, jax.Array]:
    """All three sums of every leaf, and one collective."""
    dtype = layout.dtype
    columns = zip(*(parts(x, dtype, ord) for x in leaves), strict=True)
    scalars = [x for column in columns for x in column]
    index = tuple(3 * i + k for k in range(3) for i in layout.index)
    every = layout._replace(index=index, number=3 * layout.number)
    return _in_range(*combine(jnp.add, scalars, every).reshape(-1, 3).T)


def _stacked_at_once(leaves: list[jax.Array], layout: Layout, ord: int) -> _Scaled:
    """All three sums of every leaf in one vector."""
    vectors: list[Any] = [_stacked(x, layout.dtype, ord) for x in leaves]
    return _in_range(*combine(jnp.add, *_in_parts(vectors, layout)).T)


def _in_parts(sums: list[jax.Array], layout: Layout) -> tuple[list[jax.Array], Layout]:
    """Fewer sums, of MANY each, for `combine`.

    XLA:CPU fuses additions until they are all in one kernel, and the time that it takes
    grows with the square of their number.
    """
    rows = by_group(sums, layout)
    if max(map(len, rows), default=0) <= MANY:
        return sums, layout
    index = tuple(i for i, row in enumerate(rows) for _ in range(0, len(row), MANY))
    parts = [pairwise(jnp.add, row[k : k + MANY])
             for row in rows for k in range(0, len(row), MANY)]  # fmt: skip
    return unseen(parts, parts[0].ravel()[0]), layout._replace(index=index)


def _in_range(usual: jax.Array, down: jax.Array, lifted: jax.Array) -> _Scaled:
    """Of sums at three scales those that are in range."""
    up, tiny = far(usual.dtype), _least(usual.dtype)
    over, under = usual == jnp.inf, usual < tiny
    total = jnp.where(over, down, jnp.where(under, lifted, usual))
    scale = jnp.where(over, 1 / up, jnp.where(under, up, jnp.ones_like(usual)))
    return total, scale


# The three sums of a leaf, traced once for all leaves of a shape.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _separate(x: jax.Array, dtype: Any, ord: int) -> list[jax.Array]:
    return [add_up(x) for x in _powers(x, dtype, ord)]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _together(x: jax.Array, dtype: Any, ord: int) -> list[jax.Array]:
    powers = _powers(x, dtype, ord)
    zero = _compat.vary(jnp.zeros([], dtype), _compat.varying_axes(x))
    add = functools.partial(jax.tree.map, jnp.add)
    return list(jax.lax.reduce(powers, (zero,) * 3, add, tuple(range(x.ndim))))


# With Auto axes XLA:CPU sends every 256 sums together: one vector of a leaf, not three
# numbers. A TPU would not fuse it into what makes the gradient, and sends all at once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _stacked(x: jax.Array, dtype: Any, ord: int) -> jax.Array:
    powers = jnp.stack(_powers(x, dtype, ord))
    return add_up(powers, tuple(range(1, powers.ndim)))


def _powers(x: jax.Array, dtype: Any, ord: int) -> tuple[jax.Array, ...]:
    wide, up = widen(x, dtype), far(dtype)
    # Behind a barrier, or XLA would square the scales, which leaves the range.
    scales = jax.lax.optimization_barrier(
        (jnp.asarray(1 / up, dtype), jnp.asarray(up, dtype))
    )
    return tuple(abs_power(x, ord) for x in (wide, *(times(wide, s) for s in scales)))


def _in_loops(leaves: list[jax.Array], layout: Layout, ord: int) -> _Scaled:
    """The sums in loops of few leaves each, and of whole groups, if those are small."""
    if len(leaves) <= MANY:
        return _in_a_loop(leaves, layout, ord)

    def of(rows: list[list[jax.Array]]) -> _Scaled:
        sizes = [*map(len, rows)]
        if sum(sizes) <= MANY:
            index = tuple(i for i, n in enumerate(sizes) for _ in range(n))
            part = layout._replace(index=index, number=len(rows))
            return _in_a_loop([x for row in rows for x in row], part, ord)
        if len(rows) == 1:
            cuts = range(0, sizes[0], MANY)
            return _joined([of([rows[0][k : k + MANY]]) for k in cuts], ord)
        half = bisect.bisect([*itertools.accumulate(sizes)], sum(sizes) // 2)
        half = min(max(half, 1), len(rows) - 1)
        return _concatenated([of(rows[:half]), of(rows[half:])])

    return of(by_group(leaves, layout))


def _joined(parts: list[_Scaled], ord: int) -> _Scaled:
    """The sum `[1]` of parts `[1]` of one group."""
    total, scale = _concatenated(parts)

    def at(wanted: float) -> jax.Array:
        # One factor after the other: their product may be no normal number.
        moved = functools.reduce(times, [wanted / scale] * ord, total)
        return add_up(moved).reshape(1)

    up = far(total.dtype)
    return _in_range(at(1.0), at(1 / up), at(up))


def _concatenated(parts: list[_Scaled]) -> _Scaled:
    total, scale = map(jnp.concatenate, zip(*parts, strict=True))
    return total, scale


def _in_a_loop(leaves: list[jax.Array], layout: Layout, ord: int) -> _Scaled:
    """The sums, again at another scale if some group left the range.

    One scale for all groups, so that nothing in the loop depends on their number.
    """
    dtype = layout.dtype
    up, tiny = far(dtype), _least(dtype)

    def part(x: jax.Array, scale: jax.Array) -> jax.Array:
        # A barrier for each leaf: else XLA takes widened leaves out of the loop, and
        # scales of full size, shared by leaves of one shape.
        x, scale = jax.lax.optimization_barrier((x, scale))
        return add_up(abs_power(times(widen(x, dtype), scale), ord))

    def body(carry: _Carry) -> _Carry:
        scale, total, used = carry
        over, under = total == jnp.inf, total < tiny
        wanted = (scale == 1) | ((scale < 1) & over) | ((scale > 1) & under)
        sums = combine(jnp.add, [part(x, scale) for x in leaves], layout)
        total = jnp.where(wanted, sums, total)
        used = jnp.where(wanted, scale, used)
        bring_down = (scale == 1) & jnp.any(total == jnp.inf)
        bring_up = (scale <= 1) & jnp.any(total < tiny)
        after = jnp.where(bring_down, 1 / up, jnp.where(bring_up, up, 0.0))
        return after.astype(dtype), total, used

    zeros = jnp.zeros(layout.number, dtype)
    vary: Callable[[jax.Array], jax.Array] = lambda x: _compat.vary(x, layout.apart)
    start = (vary(jnp.ones([], dtype)), vary(zeros), vary(zeros + 1))
    return jax.lax.while_loop(lambda carry: carry[0] > 0, body, start)[1:]


def rescue_out_of_range(
    sums: jax.Array,
    roots: jax.Array,
    around_largest: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """Takes norms whose sums left the range from `around_largest(start)` instead.

    High powers leave it soon, on either side: no fixed scale brings them back. A loop
    that hardly ever turns, as a branch would be taken always under `vmap`.
    """
    lost = (sums == jnp.inf) | (sums < _least(layout.dtype))

    def body(carry: _Carry) -> _Carry:
        _, value, scale = carry
        again, closer = around_largest(scale)
        done = jnp.zeros_like(carry[0])
        return done, jnp.where(lost, again, value), jnp.where(lost, closer, scale)

    with jax.named_scope("out_of_range"):
        start = (jnp.any(lost), roots, jnp.ones_like(roots))
        return jax.lax.while_loop(lambda carry: carry[0], body, start)[1:]


def _least(dtype: Any) -> float:
    """Below this, powers that were lost could add up to more than a rounding: 2^-72."""
    info = jnp.finfo(dtype)
    return float(info.tiny / info.eps) * 2.0**31


def root(total: jax.Array, power: float) -> jax.Array:
    """`total ** (1 / power)`, to a rounding or two.

    The exponent is rounded, which far from 1 costs a few units: hence a Newton step.
    """
    near = total ** (1 / power)
    error = total / near**power - 1
    return jnp.where(jnp.abs(error) < 1e-3, near + near * error / power, near)


def square_root(total: jax.Array) -> jax.Array:
    """That of a sum of squares, with derivative 0 at 0."""
    zero = total == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, total)))


def abs_power(x: jax.Array, power: float) -> jax.Array:
    """`|x| ** power`, real."""
    if power == 2:
        return jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else x * x
    return jnp.abs(x) if power == 1 else jnp.abs(x) ** power


def add_up(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The sum along axes, not negative, or all; of small arrays too to a few roundings.

    XLA:CPU adds in short runs along dimensions of at least 32 elements, and an array
    that has none, however many elements it has, in one: 31 x 31 equal numbers came out
    wrong by 9e-6. So those are added up dimension by dimension.
    """
    axes = tuple(range(x.ndim)) if axes is None else axes
    lengths = [x.shape[k] for k in axes]
    known = all(isinstance(n, int) for n in lengths)  # none of a symbolic shape
    if not known or math.prod(lengths) <= 64 or max(lengths) >= 32:
        return jnp.sum(x, axes)
    last, *others = sorted(axes, reverse=True)
    x = jnp.sum(x, last)
    for k in others:
        x = jnp.sum(summed(x), k)
    return x


def summed(x: jax.Array) -> jax.Array:
    """`x`, but XLA does not see that, and keeps a sum of sums apart."""
    return jnp.maximum(x, 0) + jnp.minimum(x, 0)


def largest(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The largest magnitude along axes, or of all.

    It is infinite where there is a NaN: collectives may lose that.
    """
    size = jnp.abs(x)
    return jnp.max(jnp.where(jnp.isnan(size), jnp.inf, size), axes, initial=0.0)


def reciprocal_power_of_two(x: jax.Array) -> jax.Array:
    """A power of two within a factor of two of `1 / x`, but for the ends of the range.

    XLA:CPU may flush a quotient to 0 that is the least normal number.
    """
    limit = jnp.finfo(x.dtype).maxexp - 8
    exponent = jnp.frexp(jnp.where(jnp.isfinite(x) & (x > 0), x, 1))[1]
    # XLA computes a division once, and what is cheaper again for every leaf.
    return 1 / jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent, -limit, limit))
