r"""Singular values of matrices: measured, and bounded by matrix products alone.

With x = U s V^H and a bound c, the rows of [c I | x] have no singular value below c. So
the polar factor of it, [U cos V^H | U sin V^H] with tan = s / c, is found by a known
number of steps: minimax polynomials of degree five, each of which takes [l, 1] to
[l', 1] (Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025;
these are other intervals). Steps for ratios beyond the s / c at hand are left out.

Shape letters: `B` matrices, `m` <= `n` their sides, both of all devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core import safe_sums
from clipfx._core.reductions import device_of_programs
from clipfx._core.safe_sums import abs_power, reciprocal_power_of_two, square_root

# Least value, and the odd polynomial that is closest to 1 from there to 1, divided by
# its largest value: so values end between 1 - 2e-5 and 1.
STEPS = (
    (1.471509e-06, (4.22414421, -12.3491267, 9.02556784)),
    (6.215865e-06, (4.22412565, -12.3489728, 9.02543432)),
    (2.62566e-05, (4.22404727, -12.3483227, 9.02487031)),
    (0.0001109091, (4.22371617, -12.3455772, 9.02248809)),
    (0.0004684485, (4.2223175, -12.3339836, 9.0124294)),
    (0.001977937, (4.21640866, -12.285086, 8.97001468)),
    (0.008339696, (4.19144187, -12.0799155, 8.79221436)),
    (0.03494835, (4.08620692, -11.2403991, 8.06767288)),
    (0.1423268, (3.66538415, -8.27344327, 5.55446302)),
    (0.4981536, (2.60045165, -3.17668624, 1.56871252)),
    (0.9508452, (1.92291134, -1.34767666, 0.424765314)),
    # What is left becomes 1e-14.
    (1 - 3e-5, (1.875, -1.25, 0.375)),
)
# Elements that keep a device busy.
_AT_ONCE = 2**22

_Pair: TypeAlias = tuple[jax.Array, jax.Array]
_Part: TypeAlias = tuple[jax.Array, ...]


class Split(NamedTuple):
    """How matrices are split over the mesh axes of a `shard_map`.

    Attributes:
      short: Axes over which the smaller side is split.
      long: Axes over which the larger one is.
    """

    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ()


def largest(
    x: jax.Array, start: jax.Array | None, split: Split, rounds: int, precision: str
) -> tuple[jax.Array, jax.Array | None]:
    """Estimates the largest singular values `[B]`, by power iteration.

    A unit vector u for which `x x^H u` is `t^2 u + r` is near to one of a value of t.
    Taken is (t^2 + |r|)^(1/2): t alone is too small where many values are close.

    Args:
      x: `[B, m, n]`, float32 or wider.
      start: `[B, m]`, the singular vectors of the last call, or any; whole. None for
        matrices of one row, whose value is their length.
      split: Of `x`.
      rounds: Of multiplication by `x x^H`.
      precision: Of the products.

    Returns:
      The values, infinite where an element is not finite, and the vectors.
    """
    y, unit, peak = _scaled(x, split)
    times = functools.partial(jnp.matmul, precision=precision)

    def across(u: jax.Array) -> jax.Array:
        own = _own_rows(u, y.shape[1], split.short)
        return _sum(times(_adjoint(y), own), split.short)

    if start is None:
        value, vector = _length(y, (*split.short, *split.long)), None
    else:
        u, near = start[..., None], jnp.ones(y.shape[:1], unit.dtype)
        for _ in range(rounds):
            back = jax.lax.stop_gradient(across(u))
            turned = _all_rows(_sum(times(y, back), split.long), split.short)
            square = _length(back, split.long) ** 2
            some = jnp.isfinite(square) & (square > 0)
            left = _length(turned - _each(square, u) * u)
            near = jnp.where(some, left / jnp.where(some, square, 1), 0)
            length = _each(jnp.where(some, _length(turned), 1), u)
            u = jax.lax.stop_gradient(
                jnp.where(some[:, None, None], turned / length, u)
            )
        value = _length(across(u), split.long)
        value *= jnp.sqrt(1 + jax.lax.stop_gradient(near))
        vector = u[..., 0]
    value = jnp.minimum(value, unit * jnp.finfo(value.dtype).max) / unit
    return jnp.where(jnp.isfinite(peak), value, peak), vector


def bounded(
    x: jax.Array, limit: jax.Array, split: Split, response: str, precision: str
) -> jax.Array:
    r"""Bounds all singular values, and keeps the vectors.

    Args:
      x: `[B, m, n]`, float32 or wider.
      limit: `[B]`, >= 0.
      split: Of `x`.
      response: `"soft"`, :math:`s / \sqrt{1 + (s / c)^2}`, or `"hard"`, min(s, c).
      precision: Of the products.

    Returns:
      As `x`, which it is itself where even the Frobenius norm asks for no change. Of
      what is not finite, anything.
    """
    y, unit, _ = _scaled(x, split)
    low = limit * unit
    size = jax.lax.stop_gradient(_length(y, (*split.short, *split.long)))
    # 1 / sqrt(1 + 2^-26) is 1, in float32.
    near = 2.0 ** -(13 if low.dtype == jnp.float32 else 27)
    same = size <= (low if response == "hard" else low * near)
    low, limit = jnp.where(same, 0, low), jnp.where(same, 0, limit)

    def change(y: jax.Array, low: jax.Array, branches: bool) -> jax.Array:
        whole, long = _whole_rows(y, split)
        cos, sin = _cos_and_sin(whole, low, long, precision, branches)
        if response == "hard":
            sin = _least_of_tan_and_one(_all_columns(cos, long), sin, precision)
        return _as_before(sin, y, split)

    def unless_same(row: _Part) -> jax.Array:
        y, low, same = row
        on = functools.partial(change, branches=True)
        return jax.lax.cond(same.all(), _first, on, y, low)

    def by_parts(*row: jax.Array) -> jax.Array:
        parts = _parts(y.shape)
        if parts == 1:
            return unless_same(row)
        rows = tuple(x.reshape(parts, -1, *x.shape[1:]) for x in row)
        return jax.lax.map(unless_same, rows).reshape(y.shape)

    def straight(*row: jax.Array) -> jax.Array:
        return change(*row[:2], branches=False)

    if device_of_programs() == "mesh":
        # Devices of XLA:CPU may wait for each other for ever if collectives are in a
        # branch or loop.
        ways = {"cpu": straight, "default": by_parts}
        sin = jax.lax.platform_dependent(y, low, same, **ways)
    else:
        sin = by_parts(y, low, same)
    return jnp.where(same[:, None, None], x, sin * _each(limit, x))


def _parts(shape: tuple[int, ...]) -> int:
    """In how many parts so many matrices are worked on, for all the memory it takes."""
    if not all(isinstance(n, int) for n in shape):
        return 1  # symbolic
    number, size = shape[0], max(math.prod(shape[1:]), 1)
    most = max(_AT_ONCE // size, 1)
    return next(
        n for n in range(1, number + 1) if not number % n and number // n <= most
    )


def _cos_and_sin(
    y: jax.Array,
    limit: jax.Array,
    long: tuple[str, ...],
    precision: str,
    branches: bool,
) -> _Pair:
    """`U cos U^H` `[B, m, m]` and `U sin V^H` `[B, m, n]` of the angles.

    Of both the columns of this device, of the cosines as many as of any other.
    """
    times = functools.partial(jnp.matmul, precision=precision)

    def gram(y: jax.Array) -> jax.Array:
        return _sum(times(y, _adjoint(y)), long)

    # An upper bound of the largest singular value, at most m^(1/8) times it. The polar
    # factor does not depend on the scale, so its derivative neither.
    fixed = jax.lax.stop_gradient(y)
    square = _sum(fixed @ _adjoint(fixed), long)  # in bfloat16 on a TPU
    top = jnp.sqrt(jnp.sqrt(_length(square @ square)))
    over = jnp.hypot(top, jax.lax.stop_gradient(limit)) * (1 + 2.0**-5)
    over = jnp.where(over > 0, over, 1)
    least = jnp.maximum(limit / over, STEPS[0][0])
    eye = _own_columns_of_eye(y.shape[1], y.dtype, long)[None]
    own = _compat.vary(_each(least, y) * eye, _compat.varying_axes(y))
    both = jnp.concatenate([own, y / _each(over, y)], 2)

    def step(both: jax.Array, p: jax.Array) -> jax.Array:
        g = gram(both)
        return p[0] * both + times(p[1] * g + p[2] * times(g, g), both)

    table = jnp.asarray([p for _, p in STEPS], y.dtype)
    # The last two are always taken.
    ends = [*(end for end, _ in STEPS[1:-1]), 2.0, 2.0]
    needed = jnp.min(least) < jnp.asarray(ends, over.dtype)

    def turn(both: jax.Array, row: Any) -> tuple[jax.Array, None]:
        p, needed = row
        return jax.lax.cond(needed, step, _first, both, p), None

    if branches:
        both, _ = jax.lax.scan(turn, both, (table, needed))
    else:
        for k in range(len(STEPS)):
            both = jnp.where(needed[k], step(both, table[k]), both)
    return both[..., : eye.shape[2]], both[..., eye.shape[2] :]


def _least_of_tan_and_one(cos: jax.Array, sin: jax.Array, precision: str) -> jax.Array:
    """`U min(tan, 1) V^H` `[B, m, n]`.

    With t the sign of cos^2 - sin^2 it is (1 + t)/2 sin / cos + (1 - t)/2 sin / sin;
    each quotient counts only where its divisor is above 0.7.
    """
    times = functools.partial(jnp.matmul, precision=precision)
    eye = jnp.eye(cos.shape[1], dtype=cos.dtype)[None]
    square = times(cos, _adjoint(cos))

    def turn(sign: jax.Array, step: Any) -> tuple[jax.Array, None]:
        a, b, c = step
        # Not its square: rounding is not symmetric, and would grow.
        g = times(sign, _adjoint(sign))
        return a * sign + times(b * g + c * times(g, g), sign), None

    # Where the two differ by less than 0.2% it ends in between.
    steps = jnp.asarray([p for _, p in STEPS[5:]], cos.dtype)
    sign, _ = jax.lax.scan(turn, 2 * square - eye, steps)
    squares = jnp.concatenate([square, eye - square])
    roots = _product_of([p for _, p in STEPS[9:]], squares, times)
    parts = times(jnp.concatenate([eye + sign, eye - sign]), roots)
    return times(0.5 * (parts[: len(cos)] + parts[len(cos) :]), sin)


def _product_of(steps: Any, g: jax.Array, times: Callable[..., jax.Array]) -> jax.Array:
    """What takes y to the end of three steps, from `y y^H`."""
    rows, eye = g.shape[1], jnp.eye(g.shape[1], dtype=g.dtype)[None]

    def factor(step: Any, g: jax.Array) -> jax.Array:
        a, b, c = step
        return a * eye + b * g + c * times(g, g)

    first = factor(steps[0], g)
    g = times(times(first, g), first)
    second = factor(steps[1], g)
    both = times(second, jnp.concatenate([first, g], 2))  # two products in one
    g = times(both[..., rows:], second)
    return times(factor(steps[2], g), both[..., :rows])


def _scaled(x: jax.Array, split: Split) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`x` times powers of two `[B]`, these, and the largest size of an element."""
    peak = jax.lax.stop_gradient(safe_sums.largest(x, (1, 2)))
    names = (*split.short, *split.long)
    peak = jax.lax.pmax(peak, names) if names else peak
    unit = reciprocal_power_of_two(peak)
    return x * _each(unit, x), unit, peak


def _length(y: jax.Array, names: tuple[str, ...] = ()) -> jax.Array:
    """The Frobenius norm of each `[B]`, whose derivative at zero is zero."""
    total = _sum(jnp.sum(abs_power(y, 2), (1, 2)), names)
    return square_root(total)


def _first(x: Any, _: Any) -> Any:
    return x


def _adjoint(y: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(y, 1, 2))


def _each(x: jax.Array, like: jax.Array) -> jax.Array:
    return x[:, None, None].astype(like.dtype)


# ------------------------------------------------------------------- over mesh axes


def _sum(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, names) if names else x


def _place(names: tuple[str, ...]) -> Any:
    """The number of this device among those that rows are split over."""
    place = 0
    for name in names:
        place = place * jax.lax.psum(1, name) + jax.lax.axis_index(name)
    return place


def _own_rows(u: jax.Array, rows: int, names: tuple[str, ...]) -> jax.Array:
    """Of `[B, m, ...]` the part of this device."""
    if not names:
        return u
    return jax.lax.dynamic_slice_in_dim(u, _place(names) * rows, rows, axis=1)


def _all_rows(u: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`[B, m, 1]` from the parts of all devices."""
    if not names:
        return u
    rows = u.shape[1]
    whole = jnp.zeros(
        (u.shape[0], rows * jax.lax.psum(1, names), *u.shape[2:]), u.dtype
    )
    at = _place(names) * rows
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, u, at, 1), names)


def _own_columns_of_eye(rows: int, dtype: Any, names: tuple[str, ...]) -> jax.Array:
    """`[m, w]` of an identity; zeros fill up what divides over no devices."""
    if not names:
        return jnp.eye(rows, dtype=dtype)
    width = -(-rows // jax.lax.psum(1, names))
    columns = _place(names) * width + jnp.arange(width)
    return (jnp.arange(rows)[:, None] == columns[None]).astype(dtype)


def _all_columns(cos: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """`[B, m, m]` from the parts of all devices."""
    if not names:
        return cos
    whole = jax.lax.all_gather(cos, names, axis=2, tiled=True)
    return whole[..., : cos.shape[1]]


def _whole_rows(y: jax.Array, split: Split) -> tuple[jax.Array, tuple[str, ...]]:
    """All rows of fewer columns, or of as many where those cannot be split."""
    if not split.short:
        return y, split.long
    if y.shape[2] % jax.lax.psum(1, split.short):
        return jax.lax.all_gather(y, split.short, axis=1, tiled=True), split.long
    whole = jax.lax.all_to_all(y, split.short, 2, 1, tiled=True)
    return whole, (*split.short, *split.long)


def _as_before(whole: jax.Array, y: jax.Array, split: Split) -> jax.Array:
    """The rows and columns that `y` has, of what `_whole_rows` made of it."""
    if whole.shape == y.shape:
        return whole
    if whole.shape[2] == y.shape[2]:
        return _own_rows(whole, y.shape[1], split.short)
    return jax.lax.all_to_all(whole, split.short, 1, 2, tiled=True)
