"""One batch: norms, factors, and the sum that no bad example can spoil."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat, responses
from clipfx._clip import factors
from clipfx._norms import Norms
from clipfx._tree import Groups
from clipfx.per_example import _sums, _tape
from clipfx.per_example._batch import Call
from clipfx.per_example._tape import Tape


class PerExample(NamedTuple):
    """What is known of every example of a batch.

    Attributes:
      value: `[B]`, its loss; 0 for padding.
      norm: `[B, G]` float32 or wider, the norm of its gradient by group, not finite
        where the gradient is not, 0 for padding. None where norms were not asked for.
      factor: `[B, G]`, what its gradient was multiplied with: 0 for padding and, in
        all groups, for an example with a norm that is not finite.
      aux: The second output of the loss, `[B, ...]`.

    Reference: none.
    """

    value: jax.Array
    norm: Any
    factor: Any
    aux: Any


def bounded_sum(
    call: Call,
    members: Groups,
    limit: jax.Array | Callable,
    response: responses.Response,
    where: jax.Array | None,
) -> tuple[list[jax.Array], PerExample]:
    """Bounds every example's gradient and adds up.

    Args:
      call: The loss and its inputs.
      members: Of the leaves of the parameters.
      limit: Thresholds `[B or 1, G]`, or from norms and a mask to them.
      response: From norms and thresholds to new norms.
      where: bool `[B]`, False for padding.

    Returns:
      The sum by leaf, and what is known of every example.
    """
    inputs = call.inputs
    outs, tape = _tape.record(call.program, inputs, norms=True)
    norm = _measured(call, tape, members)
    good = jnp.isfinite(norm).all(1)
    rows = _compat.explicit_spec(good)
    keep = jnp.ones_like(good) if where is None else _compat.reshard(where, rows)
    shown = jnp.where(keep[:, None], norm, 0)
    if callable(limit):
        limit = limit(shown, keep)
    limit = jnp.broadcast_to(lowered(limit.astype(norm.dtype)), norm.shape)
    limit = _compat.reshard(limit, _compat.explicit_spec(norm))
    norms = Norms(norm, jnp.ones_like(norm))
    before, factor = factors(norms, limit, response, "zero")
    factor = jnp.where((good & keep)[:, None], before * factor, 0)
    sums = _sums.weighted_sum(call.program, inputs, tape, factor, members.index, good)
    return total(call, sums), known(call, outs, keep, shown, factor)


def _measured(call: Call, tape: Tape, members: Groups) -> jax.Array:
    """Norms `[B, G]`."""
    plan = call.program.plan
    powers = by_group(_tape.powers(plan, tape, call.size, call.split), members.index,
                      len(members.names))  # fmt: skip
    return powers if plan.ord == 1 else jnp.sqrt(powers)


def known(
    call: Call, outs: list, keep: jax.Array, norm: Any, factor: Any
) -> PerExample:
    """Puts together what is known; the loss of padding is 0."""
    keep = _compat.reshard(keep, _compat.explicit_spec(outs[0]))
    value = jnp.where(keep, outs[0], jnp.zeros_like(outs[0]))
    return PerExample(value, norm, factor, jax.tree.unflatten(call.aux, outs[1:]))


def empty(call: Call, groups: int) -> PerExample:
    """What is known of no examples."""
    nothing = jnp.zeros((0, groups), jnp.float32)
    return known(call, _none(call), jnp.ones(0, bool), nothing, nothing)


def total(call: Call, sums: Sequence[jax.Array]) -> list[jax.Array]:
    """Adds up over the mesh axes that the batch varies over and parameters do not."""
    sums = [_tape.over(x, axes) for x, axes in zip(sums, call.axes, strict=True)]
    return [_compat.reshard(x, spec) for x, spec in zip(sums, call.specs, strict=True)]


def lowered(limit: jax.Array) -> jax.Array:
    """A little less than the threshold, or rounding would exceed it."""
    wide = jnp.finfo(limit.dtype).bits > 32
    return limit * (1 - 2.0 ** (-49 if wide else -20))


def by_group(rows: jax.Array, index: Sequence[int | None], count: int) -> jax.Array:
    """Adds up `[B, L]` by group, `[B, G]`."""
    columns = [
        sum((rows[:, k] for k, i in enumerate(index) if i == g),
            jnp.zeros_like(rows[:, 0]))
        for g in range(count)
    ]  # fmt: skip
    return jnp.stack(columns, axis=1)


def measure(call: Call, members: Groups, where: jax.Array | None) -> PerExample:
    """Norms alone."""
    outs, tape = _tape.record(call.program, call.inputs, norms=True)
    norm = _measured(call, tape, members)
    keep = jnp.ones_like(outs[0], bool) if where is None else where
    keep = _compat.reshard(keep, _compat.explicit_spec(outs[0]))
    norm = jnp.where(keep[:, None], norm, 0)
    return known(call, outs, keep, norm, None)


def _none(call: Call) -> list[jax.Array]:
    avals = [v.aval for v in call.program.plan.root.jaxpr.outvars]
    return [jnp.zeros((call.size, *x.shape), x.dtype) for x in avals]
