"""Values that are neither parameters nor data, and which of them views depend on.

A parameter times a constant is a view with a coefficient. To know the coefficient a
program's constants are computed once more, apart from examples: only those needed.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import is_known
from clipfx.per_example.engine import primitives

# Along which dimensions numbers differ: as a product of a function for each of these
# sets of dimensions. That of no set is one number.
Varies = frozenset[frozenset[int]]


def moved(varies: Varies, to: Callable[[int], Iterable[int]]) -> Varies:
    """Where each dimension has become those that `to` tells, none if it is no more."""
    sets = (frozenset(e for d in dims for e in to(d)) for dims in varies)
    return frozenset(dims for dims in sets if dims)


class Constant(NamedTuple):
    """A value that is the same for all examples, whatever the parameters are.

    Attributes:
      need: `need()` notes that it has to be there wherever views are computed.
      value: `value()` as a NumPy array, None if that is not known while tracing.
      varies: Along which dimensions, None if that is not known.
      loops: Numbers of those that take a slice of it each turn.
    """

    need: Callable[[], None] = lambda: None
    value: Callable[[], Any] = lambda: None
    varies: Varies | None = None
    loops: frozenset[int] = frozenset()

    def differs(self) -> Varies | None:
        """As `varies`, of numbers that are known as they are: masks are written out."""
        x = self.value() if self.varies else None
        if self.varies is None or x is None or not x.size:
            return self.varies
        same = [d for d in range(x.ndim) if (x == x.take([0], d)).all()]
        alone = frozenset(frozenset({d}) for d in range(x.ndim) if d not in same)
        known = moved(self.varies, lambda d: {d}.difference(same))
        return alone if _is_product(x) else known


def _is_product(x: np.ndarray) -> bool:
    """Whether it is one of vectors, exactly, one for each dimension."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return False
    x = x.astype(np.float64)
    at = np.unravel_index(np.abs(x).argmax(), x.shape)
    lines = [x[(*at[:d], slice(None), *at[d + 1 :])] for d in range(x.ndim)]
    unit = x[at] or 1.0
    product = functools.reduce(np.multiply.outer, [line / unit for line in lines])
    return np.array_equal(product * unit, x)


def literal(v: Any) -> Constant:
    """What is written into the program."""
    return Constant(value=lambda: np.asarray(v.val), varies=_long(v.aval, None))


def of_const(x: Any) -> Constant:
    """What a program closes over."""
    return Constant(value=lambda: np.asarray(x) if is_known(x) else None)


def named(constant: Constant, v: Any, needed: set[Any]) -> Constant:
    """The same as a variable of a program, which `needed` is to hold if it is."""

    def need() -> None:
        if v not in needed:
            needed.add(v)
            constant.need()

    return constant._replace(need=need, varies=_long(v.aval, constant.varies))


def _long(aval: Any, varies: Varies | None) -> Varies:
    """Only along dimensions longer than 1."""
    long = {d for d, n in enumerate(getattr(aval, "shape", ())) if n > 1}
    every = frozenset({frozenset(long)}) if varies is None else varies
    return moved(every, lambda d: {d} & long)


def of_equation(
    eqn: Any, inputs: Sequence[Constant], needed: set[Any]
) -> list[Constant]:
    """What an equation makes of constants."""

    def need() -> None:
        for constant in inputs:
            constant.need()

    @functools.cache
    def outs() -> Any:
        values = [constant.value() for constant in inputs]
        # What is typed by a mesh cannot be computed on one device.
        typed = [_compat.spec_of_type(v.aval) for v in eqn.outvars]
        if any(x is None for x in values) or any(x is not None for x in typed):
            return None
        with jax.ensure_compile_time_eval():
            return [np.asarray(x) for x in _compat.evaluate(eqn, values)]

    loops = frozenset().union(*(constant.loops for constant in inputs))
    made = Constant(need, loops=loops, varies=_of_output(eqn, inputs))
    value = lambda k: (outs() or {k: None})[k]
    each = [made._replace(value=functools.partial(value, k))
            for k in range(len(eqn.outvars))]  # fmt: skip
    return [named(x, v, needed) for x, v in zip(each, eqn.outvars, strict=True)]


def _every(varies: Varies) -> frozenset[int]:
    return frozenset().union(*varies)


def _keeps_products(eqn: Any) -> bool:
    """Whether rounding leaves products what they are, and nothing else changes them."""
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return False
    *before, after = (jnp.finfo(dtype).bits for dtype in dtypes)
    return min(before) >= after >= 32


def _of_output(eqn: Any, inputs: Sequence[Constant]) -> Varies | None:
    name, known = eqn.primitive.name, [x.varies for x in inputs if x.varies is not None]
    varies: Varies = frozenset().union(*known)
    if len(known) < len(inputs) or not inputs:
        return None
    if name in primitives.PRODUCTS or name in primitives.SAME:
        return varies if _keeps_products(eqn) else frozenset({_every(varies)})
    if name == primitives.BROADCAST:
        at = primitives.broadcast_dimensions(eqn)
        return moved(varies, lambda d: (at[d],))
    alone = name in primitives.ARITHMETIC or name in primitives.RESHAPES
    return varies if alone and not varies else None


def slice_of_loop(constant: Constant, loop: int) -> Constant:
    """One turn's slice along the first dimension."""
    varies = constant.varies and moved(constant.varies, lambda d: (d - 1,) * (d > 0))
    return Constant(constant.need, varies=varies, loops=constant.loops | {loop})
