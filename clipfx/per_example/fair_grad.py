"""Gradients in which no population outweighs the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat
from clipfx._core.checks import helpful
from clipfx._core.norms import Norms
from clipfx._core.populations import (
    Bounds,
    bound,
    check_bounds,
    check_populations,
    combine,
    measure,
)
from clipfx.per_example.engine import population_norms, trace
from clipfx.per_example.engine.bookkeeping import over
from clipfx.per_example.engine.populations import (
    by_group,
    contributions,
    one_pass,
    weighted,
)
from clipfx.per_example.engine.trace import Signature


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


@helpful
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
    those of `population_grad`, in one function and for less: where the norm of a leaf's
    contributions is cheaper than they are, from inner products of what examples left
    behind, or from rows that were looked up, only the bounded sum is formed. All others
    cost, by population, the part of a backward pass that makes weight gradients.

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
      TypeError: See `population_grad`.
      ValueError: See `population_grad` and `clipfx.clip_fair_groups`, and if a
        batch has no examples, so that all populations are absent.

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
    trace.check_signature(signature)
    check_populations(num_groups)
    bounds = check_bounds(Bounds(max_ratio, reference, floor), num_groups)
    if reference == "ema":
        raise ValueError(
            'reference must be "min" or the number of a population, got "ema", which '
            "needs state; use clipfx.clip_fair_groups behind population_grad."
        )

    def grad(*args: Any, where: Any = None, **kwargs: Any) -> tuple[Any, PerPopulation]:
        args, params, member = by_group(signature, args, where, num_groups)
        call = trace.prepare(signature, args, kwargs, norms=False)
        if not call.size:
            raise ValueError(
                "the batch must have examples, got none, so that all populations are "
                "absent; skip the step."
            )
        run = one_pass(call, member)
        light = {} if axis_name is not None else population_norms.choose(run)
        heavy = [k for k in range(len(call.program.params)) if k not in light]
        parts = contributions(run, heavy)
        count = run.member.sum(0)
        count = over(count, _compat.varying_axes(count))
        if axis_name is not None:
            parts, count = jax.lax.psum((parts, count), axis_name)
        norms = measure(parts)
        if light:
            more = population_norms.norms(run, light)
            value = jnp.hypot(norms.value / norms.scale, more.value / more.scale)
            norms = Norms(value, jnp.ones_like(value))
        scales, norm, _, _ = bound(norms, bounds)
        sums = dict(zip(heavy, combine(parts, scales, norm), strict=True))
        factor = scales[0] * scales[1]
        each = (run.member * jnp.where(jnp.isfinite(norm), factor, 0)[None]).sum(1)
        sums.update(zip(light, weighted(run, each, list(light)), strict=True))
        found = PerPopulation(run.info.value, count, norm, factor, run.info.aux)
        return jax.tree.structure(params).unflatten(
            [sums[k] for k in sorted(sums)]
        ), found

    return grad
