"""Gradients in which no population outweighs the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx._fair import (
    Bounds,
    bound,
    check_bounds,
    check_populations,
    combine,
    measure,
)
from clipfx._norms import Norms
from clipfx._tree import widen
from clipfx.per_example import _batch, _factors, _squares
from clipfx.per_example._batch import Signature
from clipfx.per_example._groups import Pass, by_group, contribution, one_pass, weighted


class PerPopulation(NamedTuple):
    """What is known of the populations of a batch.

    Attributes:
      value: `[B]`, the loss of every example.
      count: float32 `[K]`, how many examples are counted.
      norm: float32 `[K]`, of the contribution before it was bounded.
      factor: float32 `[K]`, what it was multiplied with.
      aux: The second output of the loss, `[B, ...]`.

    Reference: none.
    """

    value: jax.Array
    count: jax.Array
    norm: jax.Array
    factor: jax.Array
    aux: Any


def fair_grad(
    fun: Callable,
    num_groups: int,
    max_ratio: Any = 2.0,
    *,
    reference: str | int = "min",
    floor: Any = 0.05,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    axis_name: Any = None,
) -> Callable[..., tuple[Any, PerPopulation]]:
    r"""Sums gradients so that no population outweighs the others.

    :math:`\sum_k c_k \min(1, \rho r / \lVert c_k \rVert)` with the contributions
    :math:`c_k = \sum_{b: group(b) = k} g_b`, as `clipfx.clip_fair_groups` does with
    those of `group_grad`, in one function. Costs one backward pass, and for each
    further population the part of it that makes weight gradients. Contributions of a
    table of rows that are looked up are not formed if the table has many more rows than
    a batch looks up.

    Args:
      fun: See `clipped_grad`.
      num_groups: K >= 1. Static.
      max_ratio: :math:`\rho`, see `clipfx.clip_fair_groups`.
      reference: `"min"` or the number of a population; with `"ema"`, which needs state,
        use `clipfx.clip_fair_groups`. Static.
      floor: See `clipfx.clip_fair_groups`.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      axis_name: See `clipped_grad`. Static.

    Returns:
      A function of the same arguments, batches in place of examples, followed by the
      groups, integers `[B]` in [0, K), and `where=` (bool `[B]`, False for padding). It
      returns the bounded sum, like the parameters, float32 or wider, and
      `PerPopulation`. An example whose gradient is not finite is counted nowhere.

    Raises:
      TypeError: See `group_grad`.
      ValueError: See `group_grad` and `clipfx.clip_fair_groups`, and if a batch has no
        examples, so that all populations are absent.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.vdot(w, x)  # its gradient is x
      >>> grad = clipfx.per_example.fair_grad(loss, 2)
      >>> batch = jnp.array([[4.0, 0.0], [5.0, 0.0], [0.0, 1.0]])
      >>> sums, info = grad(jnp.zeros(2), batch, jnp.array([0, 0, 1]))
      >>> info.norm, [f"{x:.3f}" for x in sums]
      (Array([9., 1.], dtype=float32), ['2.000', '1.000'])

    Reference: see `clipfx.clip_fair_groups`.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    _batch.check_signature(signature)
    check_populations(num_groups)
    bounds = check_bounds(Bounds(max_ratio, reference, floor), num_groups)
    if reference == "ema":
        raise ValueError(
            'reference must be "min" or the number of a population, got "ema", which '
            "needs state; use clipfx.clip_fair_groups behind group_grad."
        )

    def grad(*args: Any, where: Any = None, **kwargs: Any) -> tuple[Any, PerPopulation]:
        args, params, member = by_group(signature, args, where, num_groups)
        call = _batch.prepare(signature, args, kwargs, norms=False)
        if not call.size:
            raise ValueError(
                "the batch must have examples, got none, so that all populations are "
                "absent; skip the step."
            )
        run = one_pass(call, member)
        light = [] if axis_name is not None else _light(run, num_groups)
        heavy = [k for k in range(len(call.program.params)) if k not in light]
        parts = [contribution(run, k) for k in range(num_groups)]
        parts = [[part[k] for k in heavy] for part in parts]
        count = run.member.sum(0)
        if axis_name is not None:
            parts, count = jax.lax.psum((parts, count), axis_name)
        norms = measure(parts)
        for leaf in light:
            more = jnp.sqrt(_squares_of_rows(run, leaf))
            value = jnp.hypot(norms.value / norms.scale, more)
            norms = Norms(value, jnp.ones_like(value))
        scales, norm, _, _ = bound(norms, bounds)
        sums = dict(zip(heavy, combine(parts, scales, norm), strict=True))
        factor = scales[0] * scales[1]
        if light:
            every = weighted(run, run.member @ factor)
            sums.update((leaf, every[leaf]) for leaf in light)
        found = PerPopulation(run.info.value, count, norm, factor, run.info.aux)
        return jax.tree.structure(params).unflatten(
            [sums[k] for k in sorted(sums)]
        ), found

    return grad


def _light(run: Pass, num_groups: int) -> list[int]:
    """Leaves whose contributions have norms that are cheaper than they are.

    Tables of rows that are looked up, many more than a batch looks up. The same
    through inner products of examples, as for products within an example, would square
    what cancels between examples: too inexact a norm to bound a ratio by.
    """
    plan, found = run.call.program.plan, []
    if any(run.call.axes):  # rows of other devices are needed
        return found
    for leaf, places in enumerate(plan.uses):
        if plan.roads[leaf] != "sum" or len(places) != 1:
            continue
        ((site, part),) = places
        if site.kind == "gather" and site.view.axis is None:
            blocks, looked_up, rows, _ = _factors.sizes(site, part)
            every = run.call.size * looked_up
            if blocks == 1 and 2 * every < (num_groups - 1) * rows:
                found.append(leaf)
    return found


def _squares_of_rows(run: Pass, leaf: int) -> jax.Array:
    """Squared norms `[K + 1]` of contributions to a table, and of their sum."""
    ((site, part),) = run.call.program.plan.uses[leaf]
    make = lambda x, d: tuple(_factors.factors(site, part, x, d)[:2])
    ids, rows = jax.vmap(make)(run.tape.operand(site), run.tape.deltas[site.tap])
    member = jnp.repeat(run.member, ids[0].size, axis=0)
    ids, rows = ids.reshape(-1), widen(rows).reshape(ids.size, -1)
    rows = jnp.where(member.sum(1, keepdims=True) > 0, rows, 0)
    number = member.argmax(1)
    each = _squared_sums(ids, number, rows)
    own = [jnp.where(number == k, each, 0).sum() for k in range(member.shape[1])]
    whole = _squared_sums(ids, jnp.zeros_like(number), rows).sum()
    return jnp.stack([*own, whole])


def _squared_sums(ids: jax.Array, number: jax.Array, rows: jax.Array) -> jax.Array:
    """Adds up rows `[N, ...]` of equal id and number, and squares.

    Returns `[N]`, each square where its id and number come first, elsewhere 0.
    """
    order = jnp.lexsort((ids, number))
    ids, number = ids[order], number[order]
    new = jnp.ones(ids.shape, bool)
    new = new.at[1:].set((ids[1:] != ids[:-1]) | (number[1:] != number[:-1]))
    place = jnp.cumsum(new) - 1
    sums = jax.ops.segment_sum(
        rows[order], place, num_segments=ids.size, indices_are_sorted=True
    )
    squares = _squares.power(sums, axis=-1)
    first = jnp.where(new, squares[place], 0)
    return jnp.zeros_like(first).at[order].set(first)
