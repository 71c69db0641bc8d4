"""Sums of bounded gradients by population."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import is_known
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


def by_group(
    signature: Signature, args: Sequence[Any], where: Any, num_groups: int
) -> tuple[tuple[Any, ...], Any, jax.Array]:
    """Arguments without the last, parameters, and who belongs to what `[B, K]`."""
    if len(args) < 3:
        raise TypeError(
            "group must be the last positional argument, integers [B], got "
            f"{len(args)} arguments; call it with parameters, batch and group."
        )
    args, group = tuple(args[:-1]), args[-1]
    params = trace.params_of(signature, args)
    size = trace.size_of(signature, args)
    keep = trace.mask_of(where, size)
    member = membership(group, num_groups, size)
    member = member if keep is None else jnp.where(keep[:, None], member, 0)
    return args, params, member


def one_pass(call: Call, member: jax.Array) -> Pass:
    """Runs forward and backward once, and drops what is not finite."""
    outs, tape = bookkeeping.record(call.program, call.inputs, norms=False)
    floats = [x for x in jax.tree.leaves(tape) if jnp.issubdtype(x.dtype, jnp.inexact)]
    rows = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in floats]
    good = functools.reduce(jnp.logical_and, rows, jnp.ones(call.size, bool))
    # What one part of a split parameter has seen all others have to know.
    apart = frozenset().union(*call.split) & _compat.varying_axes(good)
    good = bookkeeping.over(jnp.where(good, 0.0, 1.0), apart) == 0
    spec = _compat.explicit_spec(good)
    member = _compat.reshard(member, spec and (*spec, None))
    member = jnp.where(good[:, None], member, 0)
    info = clip.known(call, outs, jnp.ones_like(good), None, member)
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
    some = {k: x for k, x in tape.leaves.items() if k in leaves}
    index = [0] * len(program.params)
    sums = weighted_sum(
        program, call.inputs, tape._replace(leaves=some), factor[:, None], index,
        run.good,
    )  # fmt: skip
    sums = clip.total(call, sums)
    return [sums[k] for k in leaves]


def membership(
    group: Any, num_groups: int, size: int, name: str = "group"
) -> jax.Array:
    """float32 `[B, K]`, 1 where an example belongs."""
    known = np.asarray(group) if is_known(group) else None
    group = jnp.asarray(group)
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be integers [B], got {group.dtype}; number the populations "
            "from 0."
        )
    if group.shape != (size,):
        raise ValueError(
            f"{name} must have shape ({size},), one entry for each example, got "
            f"{group.shape}; every example is of one population."
        )
    if known is not None and size:
        low, high = int(known.min()), int(known.max())
        if not 0 <= low <= high < num_groups:
            raise ValueError(
                f"{name} must be in [0, {num_groups}), got {low} to {high}; num_groups "
                "says how many populations there are."
            )
    if jnp.iinfo(group.dtype).bits < 32:  # there may be more populations than it counts
        group = group.astype(jnp.int32)
    numbers = jnp.arange(num_groups, dtype=group.dtype)
    return (group[:, None] == numbers[None]).astype(jnp.float32)
