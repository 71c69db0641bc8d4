"""Sums of gradients by population."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._checks import helpful, is_known
from clipfx._fair import check_populations
from clipfx._tree import widen
from clipfx.per_example import _batch, _bounded, _sums, _tape
from clipfx.per_example._batch import Call, Signature
from clipfx.per_example._bounded import PerExample
from clipfx.per_example._tape import Tape


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


@helpful
def group_grad(
    fun: Callable,
    num_groups: int,
    *,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    axis_name: Any = None,
) -> Callable[..., tuple[Any, PerExample]]:
    r"""Sums gradients by group of examples, :math:`\sum_{b: group(b) = k} g_b`.

    One forward and one backward pass of the data, and for each of the K groups the
    part of a backward pass that makes weight gradients.

    Args:
      fun: See `clipped_grad`.
      num_groups: K >= 1. Static.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      axis_name: See `clipped_grad`. Static.

    Returns:
      A function of the same arguments, batches in place of examples, followed by the
      groups, integers `[B]` in [0, K), and `where=` (bool `[B]`, False for padding). It
      returns the contributions, like the parameters with an axis K in front, float32 or
      wider, and `PerExample` with `norm` None and `factor` `[B, K]`, 1 where an example
      is counted. An example whose gradient is not finite is counted nowhere, nor is one
      whose traced group is out of range.

    Raises:
      TypeError: See `clipped_grad`, and if groups are not integers.
      ValueError: See `clipped_grad`, and if concrete groups are out of range.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.vdot(w, x)
      >>> grad = clipfx.per_example.group_grad(loss, 2)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5], [1.0, 1.0]])
      >>> grad(jnp.zeros(2), batch, jnp.array([0, 1, 0]))[0]
      Array([[4. , 5. ],
             [0. , 0.5]], dtype=float32)

    Reference: none; the pieces of `clipped_grad`.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    _batch.check_signature(signature)
    check_populations(num_groups)

    def grad(*args: Any, where: Any = None, **kwargs: Any) -> tuple[Any, PerExample]:
        args, params, member = by_group(signature, args, where, num_groups)
        call = _batch.prepare(signature, args, kwargs, norms=False)
        if call.size:
            run = one_pass(call, member)
            parts = contributions(run, range(len(call.program.params)))
            sums, info = [jnp.stack(x) for x in zip(*parts, strict=True)], run.info
        else:
            like = [widen(call.inputs[k]) for k in call.program.params]
            sums = [jnp.zeros((num_groups, *x.shape), x.dtype) for x in like]
            info = _bounded.empty(call, num_groups)._replace(norm=None)
        if axis_name is not None:
            sums = [jax.lax.psum(x, axis_name) for x in sums]
        return jax.tree.structure(params).unflatten(sums), info

    return grad


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
    params = _batch.params_of(signature, args)
    size = _batch.size_of(signature, args)
    keep = _batch.mask_of(where, size)
    member = membership(group, num_groups, size)
    member = member if keep is None else jnp.where(keep[:, None], member, 0)
    return args, params, member


def one_pass(call: Call, member: jax.Array) -> Pass:
    """Runs forward and backward once, and drops what is not finite."""
    outs, tape = _tape.record(call.program, call.inputs, norms=False)
    floats = [x for x in jax.tree.leaves(tape) if jnp.issubdtype(x.dtype, jnp.inexact)]
    rows = [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in floats]
    good = functools.reduce(jnp.logical_and, rows, jnp.ones(call.size, bool))
    # What one part of a split parameter has seen all others have to know.
    apart = frozenset().union(*call.split) & _compat.varying_axes(good)
    good = _tape.over(jnp.where(good, 0.0, 1.0), apart) == 0
    spec = _compat.explicit_spec(good)
    member = _compat.reshard(member, spec and (*spec, None))
    member = jnp.where(good[:, None], member, 0)
    info = _bounded.known(call, outs, jnp.ones_like(good), None, member)
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
    sums = _sums.weighted_sum(
        program, call.inputs, tape._replace(leaves=some), factor[:, None], index,
        run.good,
    )  # fmt: skip
    sums = _bounded.total(call, sums)
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
