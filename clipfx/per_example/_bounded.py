"""One batch: norms, factors, and the sum that no bad example can spoil."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat, responses
from clipfx._clip import factors, reported
from clipfx._norms import Norms
from clipfx._tree import Groups
from clipfx.per_example import _tape
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
    """

    value: jax.Array
    norm: Any
    factor: Any
    aux: Any


def bounded_sum(
    call: Call,
    members: Groups,
    limit: jax.Array,
    response: responses.Response,
    where: jax.Array | None,
) -> tuple[list[jax.Array], PerExample]:
    """Bounds every example's gradient and adds up.

    Args:
      call: The loss and its inputs.
      members: Of the leaves of the parameters.
      limit: Thresholds `[B or 1, G]`.
      response: From norms and thresholds to new norms.
      where: bool `[B]`, False for padding.

    Returns:
      The sum by leaf, and what is known of every example.
    """
    inputs = vary_params(call)
    outs, tape = _tape.record(call.program, inputs, norms=True)
    squares = _measured(call, tape, members)
    dtype = squares.dtype
    limit = jnp.broadcast_to(limit.astype(dtype) * (1 - _slack(dtype)), squares.shape)
    fine = jnp.isfinite(squares).all(1)
    keep = jnp.ones_like(fine) if where is None else where

    def bounded(norm: Norms) -> tuple[jax.Array, jax.Array]:
        return factors(norm, limit, response, "zero")

    def usual(_):
        norm = Norms(jnp.sqrt(squares), jnp.ones_like(squares))
        before, factor = bounded(norm)
        factor = jnp.where(keep[:, None], before * factor, 0)
        return _sum(call, inputs, tape, members, factor), norm.value, factor

    def careful(_):
        # Squares overflowed, or an example is not finite.
        norm = _any_norms(call, tape, members)
        before, factor = bounded(norm)
        good = jnp.isfinite(norm.value).all(1) & keep
        factor = jnp.where(good[:, None], factor, 0)
        some, rest = _tape.only(call.program, inputs, tape, good)
        # Two factors, one after the other: their product may be no normal number.
        least = before.min(1)
        rest = _tape.scale(rest, least)
        if tape.squares is None:
            rated = jnp.where(good[:, None], before / least[:, None] * factor, 0)
        else:
            rated = before * factor
        sums = _sum(call, some, rest, members, rated)
        sums = [jnp.where(good.any(), x, jnp.zeros_like(x)) for x in sums]
        return sums, reported(norm, dtype), before * factor

    sums, norm, factor = jax.lax.cond((fine | ~keep).all(), usual, careful, None)
    norm = jnp.where(keep[:, None], norm, 0)
    return total(call, sums), per_example(call, outs, keep, norm, factor)


def _measured(call: Call, tape: Tape, members: Groups) -> jax.Array:
    """Squared norms `[B, G]`."""
    squares = _tape.squares(call.program.plan, tape)
    return _by_group(_over_mesh(call, squares), members)


def _any_norms(call: Call, tape: Tape, members: Groups) -> Norms:
    """Norms `[B, G]` of any magnitude."""
    squares, exponents = _tape.scaled_squares(call.program.plan, tape)
    exponents = jnp.where(squares > 0, exponents, -(2**20))
    columns = [[k for k, i in enumerate(members.index) if i == g]
               for g in range(len(members.names))]  # fmt: skip
    most = jnp.stack([exponents[:, k].max(1) for k in columns], axis=1)
    most = jnp.clip(_most_over_mesh(call, most), -100, 100)
    powers = jnp.clip(exponents - most[:, jnp.asarray(members.index)], -120, 60)
    ones = jnp.ones_like(squares)
    shifted = squares * jnp.ldexp(ones, powers) * jnp.ldexp(ones, powers)
    value = jnp.sqrt(_by_group(_over_mesh(call, shifted), members))
    return Norms(value, jnp.ldexp(jnp.ones_like(value), -most))


def _by_leaf(factor: jax.Array, members: Groups) -> jax.Array:
    """`[B, L]` from `[B, G]`."""
    return factor[:, jnp.asarray(members.index, jnp.int32)]


def _split_axes(call: Call) -> list[frozenset[str]]:
    """Per leaf the mesh axes that it varies over and the batch does not."""
    batch = _batch_axes(call)
    return [_compat.varying_axes(call.inputs[k]) - batch for k in call.program.params]


def _over_mesh(call: Call, squares: jax.Array) -> jax.Array:
    """Adds up `[B, L]` over the mesh axes that a leaf is split over."""
    axes = _split_axes(call)
    if not any(axes):
        return squares
    columns = [
        jax.lax.psum(squares[:, k], tuple(sorted(a))) if a else squares[:, k]
        for k, a in enumerate(axes)
    ]
    return jnp.stack(columns, axis=1)


def _most_over_mesh(call: Call, x: jax.Array) -> jax.Array:
    axes = frozenset().union(*_split_axes(call))
    return jax.lax.pmax(x, tuple(sorted(axes))) if axes else x


def per_example(
    call: Call, outs: list, keep: jax.Array, norm: Any, factor: Any
) -> PerExample:
    """Puts together what is known; the loss of padding is 0."""
    value = jnp.where(keep, outs[0], jnp.zeros_like(outs[0]))
    return PerExample(value, norm, factor, jax.tree.unflatten(call.aux, outs[1:]))


def empty(call: Call, groups: int) -> PerExample:
    """What is known of no examples."""
    avals = [v.aval for v in call.program.plan.root.jaxpr.outvars]
    outs = [jnp.zeros((0, *x.shape), x.dtype) for x in avals]
    nothing = jnp.zeros((0, groups), jnp.float32)
    return per_example(call, outs, jnp.ones(0, bool), nothing, nothing)


def vary_params(call: Call) -> list[jax.Array]:
    """Inputs whose parameters vary over what the batch varies over.

    Or `jax.shard_map` would add up the gradients of different examples.
    """
    axes = _batch_axes(call)
    inputs = list(call.inputs)
    for k in call.program.params:
        inputs[k] = _compat.vary(inputs[k], axes)
    return inputs


def total(call: Call, sums: Sequence[jax.Array]) -> list[jax.Array]:
    """Adds up over the mesh axes that the batch varies over, parameters do not."""
    batch = _batch_axes(call)
    out = []
    for k, x in zip(call.program.params, sums, strict=True):
        axes = batch - _compat.varying_axes(call.inputs[k])
        out.append(jax.lax.psum(x, tuple(sorted(axes))) if axes else x)
    return out


def _batch_axes(call: Call) -> frozenset[str]:
    pairs = zip(call.inputs, call.program.mapped, strict=True)
    return frozenset().union(*(_compat.varying_axes(x) for x, m in pairs if m))


def _slack(dtype: Any) -> float:
    """Thresholds are lowered by this share, or rounding would exceed them."""
    return 2.0**-20 if jnp.finfo(dtype).bits == 32 else 2.0**-49


def _by_group(squares: jax.Array, members: Groups) -> jax.Array:
    """`[B, G]` from `[B, L]`."""
    columns = [
        sum((squares[:, k] for k, i in enumerate(members.index) if i == g),
            jnp.zeros_like(squares[:, 0]))
        for g in range(len(members.names))
    ]  # fmt: skip
    return jnp.stack(columns, axis=1)


def _sum(
    call: Call, inputs: list, tape: Tape, members: Groups, factor: jax.Array
) -> list[jax.Array]:
    return _tape.weighted_sum(call.program, inputs, tape, _by_leaf(factor, members))


def measure(call: Call, members: Groups) -> PerExample:
    """Norms alone."""
    inputs = vary_params(call)
    outs, tape = _tape.record(call.program, inputs, norms=True)
    squares = _measured(call, tape, members)

    def careful(_):
        return reported(_any_norms(call, tape, members), squares.dtype)

    fine = jnp.isfinite(squares).all()
    norm = jax.lax.cond(fine, lambda _: jnp.sqrt(squares), careful, None)
    return per_example(call, outs, jnp.ones(call.size, bool), norm, None)


def sums_by_group(call: Call, member: jax.Array) -> tuple[list, PerExample]:
    """Sums by group of examples, `[K, ...]` by leaf.

    Args:
      call: The loss and its inputs.
      member: `[B, K]`, 1 where an example belongs.
    """
    inputs = vary_params(call)
    outs, tape = _tape.record(call.program, inputs, norms=False)
    count = len(call.program.params)

    def sums(inputs, tape, member):
        def one(column):
            factor = jnp.broadcast_to(column[:, None], (call.size, count))
            return _tape.weighted_sum(call.program, inputs, tape, factor)

        return jax.lax.map(one, member.T)

    def careful(_):
        finite = jnp.ones(call.size, bool)
        for x in jax.tree.leaves(tape):
            if jnp.issubdtype(x.dtype, jnp.floating):
                finite &= jnp.isfinite(x).all(tuple(range(1, x.ndim)))
        good = jnp.where(finite[:, None], member, 0)
        return sums(*_tape.only(call.program, inputs, tape, finite), good), good

    # 0 times NaN is NaN: one bad example shows in every group.
    plain = sums(inputs, tape, member)
    fine = jnp.stack([jnp.isfinite(x).all() for x in plain]).all()
    found, counted = jax.lax.cond(fine, lambda _: (plain, member), careful, None)
    return total(call, found), per_example(
        call, outs, jnp.ones(call.size, bool), None, counted
    )
