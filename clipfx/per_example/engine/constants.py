"""Values that are neither parameters nor data, and which of them views depend on.

A parameter times a constant is a view with a coefficient. To know the coefficient a
program's constants are computed once more, apart from examples: only those needed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clipfx import _compat
from clipfx._core.checks import is_known
from clipfx.per_example.engine import primitives


class Constant(NamedTuple):
    """A value that is the same for all examples, whatever the parameters are.

    Attributes:
      need: `need()` notes that it has to be there wherever views are computed.
      value: `value()` as a NumPy array, None if that is not known while tracing.
      alike: Whether all its elements are one number.
      loops: Numbers of those that take a slice of it each turn.
    """

    need: Callable[[], None] = lambda: None
    value: Callable[[], Any] = lambda: None
    alike: bool = False
    loops: frozenset[int] = frozenset()


def literal(v: Any) -> Constant:
    """What is written into the program."""
    return Constant(value=lambda: np.asarray(v.val), alike=np.size(v.val) == 1)


def of_const(x: Any) -> Constant:
    """What a program closes over."""
    return Constant(value=lambda: np.asarray(x) if is_known(x) else None)


def named(constant: Constant, v: Any, needed: set[Any]) -> Constant:
    """The same as a variable of a program, which `needed` is to hold if it is."""

    def need() -> None:
        if v not in needed:
            needed.add(v)
            constant.need()

    single = math.prod(v.aval.shape) == 1
    return constant._replace(need=need, alike=constant.alike or single)


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
        if any(x is None for x in values):
            return None
        with jax.ensure_compile_time_eval():
            return [np.asarray(x) for x in _compat.evaluate(eqn, values)]

    value = lambda k: (outs() or {k: None})[k]
    loops = frozenset().union(*(constant.loops for constant in inputs))
    alike = eqn.primitive.name in primitives.UNIFORM and all(c.alike for c in inputs)
    made = lambda k: Constant(need, functools.partial(value, k), alike, loops)
    return [named(made(k), v, needed) for k, v in enumerate(eqn.outvars)]


def slice_of_loop(constant: Constant, loop: int) -> Constant:
    """One turn's slice along the first dimension."""
    return Constant(constant.need, alike=constant.alike, loops=constant.loops | {loop})
