"""A transform for those who have every example's gradient already."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat, responses
from clipfx._core.checks import check_choice, helpful
from clipfx._core.clip_factors import SLACK, exceeds, factors, finite_norms
from clipfx._core.groups import Groups, counted_leaves, group_leaves
from clipfx._core.leaves import narrow, times, widen, widest
from clipfx._core.norms import Norms
from clipfx._core.paths import check_stacked, ranks
from clipfx._core.reductions import Layout, axes_apart, combine
from clipfx._core.safe_sums import (
    abs_power,
    add_up,
    reciprocal_power_of_two,
    square_root,
)
from clipfx._core.state import (
    ClipMetrics,
    ClipState,
    check_same_groups,
    fresh_metrics,
    joint_norm,
)
from clipfx._types import AxisName, GroupSpec, Limit
from clipfx.per_example.engine import bookkeeping, target
from clipfx.per_example.engine.clip import with_rounding_margin
from clipfx.per_example.engine.row_sums import by_rows, column, sum_of_rows
from clipfx.per_example.engine.thresholds import check_limit, limits
from clipfx.per_example.engine.trace import batch_size


@helpful
def clip_per_example(
    max_norm: Limit,
    *,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    reduce: str = "mean",
    batch_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Bounds each example's gradient in stacked updates, and reduces them to one.

    With :math:`g_{b,k}` the gradient of example b with respect to group k, n its norm,
    c the threshold and :math:`\psi` the response,

    .. math:: \frac{1}{B} \sum_b g_{b,k} \, \psi_c(n_{b,k}) / n_{b,k} .

    First in a chain, behind `jax.vmap(jax.grad(loss), (None, 0))`. Where the loss is at
    hand `clipfx.per_example.clipped_grad` does the same without the stack. An example
    with a norm that is not finite contributes zero.

    In `jax.shard_map` sums, means and counts are of all examples on the mesh, and norms
    those of whole gradients, where these are split too.

    Args:
      max_norm: :math:`c`: a number >= 0, `[G]`, or a dict by group name.
      groups: Which leaves share a norm, see `clipfx.clip_by_norm`. Static.
      response: From norms and thresholds to new norms, None for `hard`. Static.
      reduce: `"mean"` over the B examples, dropped ones included, or `"sum"`. Static.
      batch_axis_name: The mesh axes that examples are split over, a name or a tuple of
        names, `()` for none. Needed in `shard_map`, whose types do not tell these axes
        from those that parameters are split over; and in `pmap` and under
        `check_vma=False`, where nothing tells, and all but these are taken to hold the
        same. Static.

    Returns:
      A transform from updates `[B, ...]` to updates like the parameters, of the same
      dtypes, with `ClipState`: its metrics `[G]` show means over the finite examples of
      a step, and count examples instead of steps.

    Raises:
      TypeError: If an argument is of the wrong kind.
      ValueError: If a threshold is negative or does not fit the groups, `reduce` is
        unknown, updates have no common axis of examples, or they are split in
        `shard_map` and `batch_axis_name` says nothing of it.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(clip_per_example(1.0, reduce="sum"), optax.sgd(1.0))
      >>> params = {"w": jnp.zeros(2)}
      >>> stacked = {"w": jnp.array([[3.0, 4.0], [0.0, 0.5]])}
      >>> updates, _ = tx.update(stacked, tx.init(params), params)
      >>> [f"{x:.2f}" for x in updates["w"]]
      ['-0.60', '-1.30']

    Reference: Abadi et al., `Deep learning with differential privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016.
    """
    check_limit(max_norm)
    response = responses.check_response(response)
    check_choice("reduce", reduce, ("mean", "sum"))

    def init(params: Any) -> ClipState:
        metrics = fresh_metrics(params, group_leaves(groups, params))
        return ClipState(ranks(params), metrics)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ClipState]:
        del extra_args
        members = group_leaves(groups, updates)
        check_same_groups(state, members)
        advice = "jax.vmap(jax.grad(loss), (None, 0)) makes such"
        check_stacked(updates, params, state.rule_state, "examples", advice)
        size = batch_size((updates,), (0,))
        axes = axes_apart(
            updates,
            batch_axis_name,
            "batch_axis_name",
            "the examples of clip_per_example",
        )
        updates = jax.tree.map(by_rows, updates)
        over = functools.partial(bookkeeping.over, axes=axes)
        norms = _norms(updates, members, axes)
        limit = limits(max_norm, members, size).astype(norms.value.dtype)
        limit = jnp.broadcast_to(limit, norms.value.shape)
        limit = _compat.as_like(limit, norms.value)
        before, factor = factors(norms, with_rounding_margin(limit), response, "zero")
        good = jnp.isfinite(norms.value).all(1)
        count = 1
        if reduce == "mean":
            count = size * math.prod(jax.lax.psum(1, axis) for axis in axes)

        def bound(x: Any, i: int | None) -> Any:
            if i is None:  # no gradient
                return jnp.zeros(jnp.shape(x)[1:], jnp.result_type(x))
            rows = column(before[:, i], x), column(factor[:, i], x)
            return narrow(over(sum_of_rows(x, rows, good)) / max(count, 1), x.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        pairs = zip(leaves, members.index, strict=True)
        clipped = treedef.unflatten([bound(x, i) for x, i in pairs])
        return clipped, _next(state, norms, limit, before * factor, good, over)

    return optax.GradientTransformationExtraArgs(init, update)


def _norms(updates: Any, members: Groups, axes: frozenset) -> Norms:
    """Norms `[B, G]` of the examples here, the mesh axes of which are given."""
    pairs = counted_leaves(updates, members)
    dtype = widest(x.dtype for x, _ in pairs)
    if not pairs:
        nothing = jnp.zeros((batch_size((updates,), (0,)), 0), dtype)
        return Norms(nothing, nothing)
    index = tuple(i for _, i in pairs)
    layout = Layout(index, len(members.names), dtype, (), axes)

    one_cpu = target.is_one_cpu(x for x, _ in pairs)
    flat = lambda x: x.reshape(x.shape[0], -1) if one_cpu else x
    leaves = [(flat(widen(x, dtype)), i) for x, i in pairs]
    square = jax.vmap(lambda x: add_up(abs_power(x, 2)))

    def peaks() -> jax.Array:
        # Of scales alone: what is not finite shows in the squares.
        most = jax.vmap(lambda x: jnp.max(jnp.abs(x), initial=0))
        return combine(jnp.maximum, [most(x) for x, _ in leaves], layout)

    def scaled(peaks: jax.Array) -> Norms:
        scale = reciprocal_power_of_two(peaks)
        rows = [square(times(x, column(scale[i], x))) for x, i in leaves]
        return Norms(square_root(combine(jnp.add, rows, layout)).T, scale.T)

    if not one_cpu:
        return scaled(peaks())
    # With scales XLA:CPU takes ten times as long: it writes them out for each element.
    total = combine(jnp.add, [square(x) for x, _ in leaves], layout)
    usual = jnp.isfinite(total) & (total >= 2.0 ** (-jnp.finfo(dtype).maxexp // 2))
    plain = lambda: Norms(square_root(total).T, jnp.ones_like(total).T)

    def looked_at() -> Norms:
        most = peaks()
        known = usual | (most == 0) | ~jnp.isfinite(most)
        return jax.lax.cond(known.all(), plain, lambda: scaled(most))

    return jax.lax.cond(usual.all(), plain, looked_at)


def _next(
    state: ClipState,
    norms: Norms,
    limit: jax.Array,
    factor: jax.Array,
    good: jax.Array,
    over: Callable,
) -> ClipState:
    seen, norm = state.metrics, finite_norms(norms)
    finite, every = good[:, None], jnp.ones_like(norm, bool)
    total = lambda x: over(jnp.where(finite, x.astype(jnp.float32), 0).sum(0))
    count = lambda x: over(x.astype(jnp.int32).sum(0))
    number = jnp.maximum(total(every), 1)
    joint = joint_norm(norm)[:, None]
    clipped = finite & exceeds(norm, limit)
    return state._replace(
        metrics=ClipMetrics(
            norm=total(norm) / number,
            total=(total(joint) / jnp.maximum(total(jnp.ones_like(joint)), 1))[0],
            threshold=limit.max(0, initial=0).astype(jnp.float32),
            factor=total(factor) / number,
            share=total(clipped) / number,
            steps=seen.steps + count(every),
            clipped=seen.clipped + count(clipped),
            lifted=seen.lifted + count(finite & (factor > 1 + SLACK)),
            nonfinite=seen.nonfinite + count(~finite & every),
            groups=seen.groups,
        )
    )
