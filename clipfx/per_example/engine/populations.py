"""Sums of bounded gradients by population."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import is_known
from clipfx._core.leaves import widen
from clipfx.per_example.engine import bookkeeping, clip, trace
from clipfx.per_example.engine.bookkeeping import Tape
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.trace import Call, Signature
from clipfx.per_example.engine.weighted_sum import weighted_sum


class Pass(NamedTuple):
    """One pass over a batch, from which any weighted sum can be made.

    Attributes:
      call: The loss and its inputs.
      tape: What the pass left behind.
      member: `[B, K]`, 1 where an example belongs and is finite.
      good: bool `[B]`, which examples are finite.
      info: What is known of every example.
    """

    call: Call
    tape: Tape
    member: jax.Array
    good: jax.Array
    info: PerExample


def by_population(
    signature: Signature, args: Sequence[Any], where: Any, ids: Any, number: int
) -> tuple[Any, Any, jax.Array]:
    """Parameters, the mask, and who belongs to what `[B, K]`."""
    if ids is None:
        raise TypeError(
            "population_ids must be passed, integers [B] that number the population of "
            "each example from 0, got None; call it with (params, batch, "
            "population_ids=ids)."
        )
    params = trace.params_of(signature, args)
    size = trace.size_of(signature, args)
    keep = trace.mask_of(where, size)
    member = membership(ids, number, size)
    return params, keep, member if keep is None else jnp.where(keep[:, None], member, 0)


def adding_up(
    signature: Signature, number: int, kwargs: dict[str, Any]
) -> Callable[..., tuple[list, PerExample]]:
    """What `in_parts` needs to add up contributions, by the members `[B, K]`."""

    def compute(args: Any, keep: Any, member: jax.Array) -> tuple[list, PerExample]:
        if keep is not None:
            member = jnp.where(keep[:, None], member, 0)
        call = trace.prepare(signature, args, kwargs, norms=False)
        if not call.size:
            like = [widen(call.inputs[k]) for k in call.program.params]
            zeros = [jnp.zeros((number, *x.shape), x.dtype) for x in like]
            return zeros, clip.empty(call, number)._replace(norm=None)
        run = one_pass(call, member)
        parts = contributions(run, range(len(call.program.params)))
        return [jnp.stack(x) for x in zip(*parts, strict=True)], run.info

    return compute


def one_pass(call: Call, member: jax.Array) -> Pass:
    """Runs forward and backward once, and drops what is not finite."""
    outs, tape = bookkeeping.backward_pass(call.program, call.inputs, norms=False)
    floats = [x for x in jax.tree.leaves(tape) if jnp.issubdtype(x.dtype, jnp.inexact)]
    rows = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in floats]
    good = functools.reduce(jnp.logical_and, rows, jnp.ones(call.size, bool))
    # What one part of a split parameter has seen all others have to know.
    apart = frozenset().union(*call.split) & _compat.varying_axes(good)
    good = bookkeeping.over(jnp.where(good, 0.0, 1.0), apart) == 0
    spec = _compat.explicit_spec(good)
    member = _compat.reshard(member, spec and (*spec, None))
    member = jnp.where(good[:, None], member, 0)
    info = clip.make_info(call, outs, jnp.ones_like(good), None, member)
    return Pass(call, tape, member, good, info)


def contributions(run: Pass, leaves: Sequence[int]) -> list[list[jax.Array]]:
    """The sums of the gradients of every population, K times some leaves.

    One after the other: XLA's convolutions are slow in a loop on CPUs.
    """
    columns = jnp.unstack(run.member, axis=1)
    return [weighted(run, column, leaves) for column in columns]


def weighted(run: Pass, factor: jax.Array, leaves: Sequence[int]) -> list[jax.Array]:
    """The sum of gradients times factors `[B]`, of some leaves."""
    call, tape, plan = run.call, run.tape, run.call.program.plan
    sites = {n: site for n, site in plan.sites.items()
             if any(part.leaf in leaves for part in site.view.parts)}  # fmt: skip
    program = call.program._replace(plan=plan._replace(sites=sites))
    gradients = {k: x for k, x in tape.leaves.items() if k in leaves}
    index = [0] * len(program.params)
    sums = weighted_sum(
        program, call.inputs, tape._replace(leaves=gradients), factor[:, None], index,
        run.good,
    )  # fmt: skip
    sums = clip.total(call, sums)
    return [sums[k] for k in leaves]


def membership(ids: Any, number: int, size: int) -> jax.Array:
    """float32 `[B, K]`, 1 where an example belongs."""
    known = np.asarray(ids) if is_known(ids) else None
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            f"population_ids must be integers [B], got {ids.dtype}; number the "
            "populations from 0."
        )
    if ids.shape != (size,):
        raise ValueError(
            f"population_ids must have shape ({size},), one entry for each example, "
            f"got {ids.shape}; every example is of one population."
        )
    if known is not None and size:
        low, high = int(known.min()), int(known.max())
        if not 0 <= low <= high < number:
            raise ValueError(
                f"population_ids must be in [0, {number}), got {low} to {high}; "
                "num_populations says how many there are."
            )
    if jnp.iinfo(ids.dtype).bits < 32:  # there may be more populations than it counts
        ids = ids.astype(jnp.int32)
    numbers = jnp.arange(number, dtype=ids.dtype)
    return (ids[:, None] == numbers[None]).astype(jnp.float32)
