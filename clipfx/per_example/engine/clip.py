"""One batch: norms, factors, and the sum that no bad example can spoil."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat, responses
from clipfx._core.clip_factors import factors
from clipfx._core.groups import Groups, entry
from clipfx._core.leaves import times
from clipfx._core.norms import Norms
from clipfx.per_example.engine import (
    bookkeeping,
    one_by_one,
    regions,
    scaled_sums,
    target,
)
from clipfx.per_example.engine.bookkeeping import Tape
from clipfx.per_example.engine.regions import Spot
from clipfx.per_example.engine.trace import Call
from clipfx.per_example.engine.weighted_sum import weighted_sum


class PerExample(NamedTuple):
    """What is known of every example of a batch.

    Attributes:
      value: `[B]`, its loss; 0 for padding.
      norm: `[B, G]` float32 or wider, the norm of its gradient by group, not finite
        where the gradient is not, 0 for padding. None where norms were not asked for.
      factor: `[B, G]`, what its gradient was multiplied with: 0 for padding and for an
        example with a norm that is not finite, in all groups but those that were added
        up before, see `clipped_grad`.
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
    inputs, index, plan = call.inputs, members.index, call.program.plan
    apart = plan.adds_up and target.is_cpu()
    decide = functools.partial(_decide, response=response, apart=apart)
    lowered = lambda limit: with_rounding_margin(limit.astype(bookkeeping.dtype(plan)))
    spot = None if callable(limit) else Spot(decide, lowered(limit), where)
    outs, tape = regions.backward_pass(call, members, spot)
    norms, trusted = _norms(call, members, tape)
    good = jnp.isfinite(norms.value / norms.scale).all(1)
    keep = jnp.ones_like(good) if where is None else _compat.as_like(where, good)
    each = functools.partial(one_by_one.each, call, tape, members)
    if callable(limit):
        if apart:
            alone = good & keep & ~trusted.all(1)
            start = one_by_one.Progress(norms, jnp.zeros_like(norms.value), [])
            norms = each(alone, progress=start, bound=None).norms
        limit = limit(_shown(norms, keep), keep)
    limit = jnp.broadcast_to(lowered(limit), norms.value.shape)
    limit = _compat.as_like(limit, norms.value)
    factor, later = decide(norms, trusted, limit, good & keep)
    # What is not finite, as may turn out later, contributes nothing to any group.
    factor, later = regions.with_verdicts(tape, factor, later)
    if not apart:
        sums = weighted_sum(call.program, inputs, tape, factor, index, good)
        return total(call, sums), make_info(
            call, outs, keep, _shown(norms, keep), factor
        )
    kept = None if tape.again is None else good
    now = jnp.where(later, jnp.zeros_like(factor), factor)
    sums = weighted_sum(call.program, inputs, tape, now, index, kept)
    # A factor of 0 is not enough for what is not finite, 0 times NaN is NaN: then all
    # others are added up anew, one by one.
    anew = jnp.zeros((), bool) if kept is not None else ~good.all()
    later |= anew
    counts = good & keep

    def bound(gradient: list, norms: Norms, row: Callable) -> tuple[list, jax.Array]:
        finite = jnp.isfinite(norms.value / norms.scale).all() & row(counts).all()
        fit, missing = _factor_of(norms, row(limit), response), row(later)
        alone = jnp.where(finite & missing, fit, 0)
        scaled = [times(x, entry(alone[0], i, x))
                  for x, i in zip(gradient, index, strict=True)]  # fmt: skip
        added = [jnp.where(finite, x, jnp.zeros_like(x)) for x in scaled]
        return added, jnp.where(missing, alone, row(factor))

    start = one_by_one.Progress(norms, factor, sums)
    progress = each(later.any(1), progress=start, bound=bound, anew=anew)
    shown = _shown(progress.norms, keep)
    return total(call, progress.sums), make_info(
        call, outs, keep, shown, progress.factor
    )


def _factor_of(norms: Norms, limit: jax.Array, response: responses.Response) -> Any:
    """0 where a product with it would leave the range, for cuts and lifts alike."""
    before, factor = factors(norms, limit, response, "zero")
    both = before * factor
    return jnp.where((both >= _LEAST) & (both <= _MOST), both, jnp.zeros_like(both))


def _decide(
    norms: Norms,
    trusted: jax.Array,
    limit: jax.Array,
    counts: jax.Array,
    *,
    response: responses.Response,
    apart: bool,
) -> tuple[jax.Array, jax.Array]:
    """Factors `[B, N]`, and for which of them the gradient has to be formed, alone.

    Args:
      norms: `[B, N]`.
      trusted: Whether they are exact enough.
      limit: Thresholds, likewise.
      counts: bool `[B]`, False for padding and for examples that are not finite.
      response: From norms and thresholds to new norms.
      apart: Whether anything can be formed alone.
    """
    counts = counts[:, None]
    factor = jnp.where(counts, _factor_of(norms, limit, response), 0)
    if not apart:
        return factor, jnp.zeros_like(trusted)
    # What is flushed to 0 of a sum may make it longer, not only shorter.
    reached = factor * (norms.value / norms.scale)
    tiny = (reached > 0) & (reached < _tiny(reached.dtype))
    return factor, counts & (~trusted | tiny)


# Factors beyond these are no normal numbers, or their products are not.
_LEAST, _MOST = 2.0**-120, 2.0**64


def _tiny(dtype: Any) -> float:
    """The least normal number does not matter beside this, 2^-90 for float32."""
    return 2.0 ** -(jnp.finfo(dtype).maxexp * 45 // 64)


def _shown(norms: Norms, keep: jax.Array) -> jax.Array:
    """Norms `[B, G]` as plain numbers, 0 for padding."""
    norm = norms.value / norms.scale
    return jnp.where(keep[:, None], norm, jnp.zeros_like(norm))


def _norms(call: Call, members: Groups, tape: Tape) -> tuple[Norms, jax.Array]:
    """Norms `[B, G]`, and whether they are to be trusted.

    A GPU's host would have to wait for a loop over those that are not, and all compile
    it: elsewhere than on CPUs an upper bound takes their place.
    """
    plan = call.program.plan
    scales = bookkeeping.scales_of(call.program, call.inputs)
    powers = bookkeeping.powers(plan, tape, call.size, call.split, members, scales)
    return scaled_sums.norms(powers, plan.ord, bound=not target.is_cpu())


def make_info(
    call: Call, outs: list, keep: jax.Array, norm: Any, factor: Any
) -> PerExample:
    """Puts together what is known; the loss of padding is 0."""
    keep = _compat.as_like(keep, outs[0])
    value = jnp.where(keep, outs[0], jnp.zeros_like(outs[0]))
    return PerExample(value, norm, factor, jax.tree.unflatten(call.aux, outs[1:]))


def empty(call: Call, groups: int) -> PerExample:
    """What is known of no examples."""
    nothing = jnp.zeros((0, groups), jnp.float32)
    return make_info(call, _none(call), jnp.ones(0, bool), nothing, nothing)


def total(call: Call, sums: Sequence[jax.Array]) -> list[jax.Array]:
    """Adds up over the mesh axes that the batch varies over and parameters do not."""
    sums = [bookkeeping.over(x, axes) for x, axes in zip(sums, call.axes, strict=True)]
    return [_compat.reshard(x, spec) for x, spec in zip(sums, call.specs, strict=True)]


def with_rounding_margin(limit: jax.Array) -> jax.Array:
    """A little less than the threshold, or rounding would exceed it."""
    wide = jnp.finfo(limit.dtype).bits > 32
    return limit * (1 - 2.0 ** (-49 if wide else -20))


def measure(call: Call, members: Groups, where: jax.Array | None) -> PerExample:
    """Norms alone."""
    outs, tape = regions.backward_pass(call, members)
    norms, trusted = _norms(call, members, tape)
    keep = jnp.ones_like(outs[0], bool) if where is None else where
    keep = _compat.as_like(keep, outs[0])
    if call.program.plan.adds_up and target.is_cpu():
        alone = jnp.isfinite(norms.value / norms.scale).all(1) & keep & ~trusted.all(1)
        start = one_by_one.Progress(norms, jnp.zeros_like(norms.value), [])
        norms = one_by_one.each(call, tape, members, alone, start, None).norms
    return make_info(call, outs, keep, _shown(norms, keep), None)


def _none(call: Call) -> list[jax.Array]:
    avals = [v.aval for v in call.program.plan.root.jaxpr.outvars]
    return [jnp.zeros((call.size, *x.shape), x.dtype) for x in avals]
