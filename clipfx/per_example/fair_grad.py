"""Gradients in which no population outweighs the others."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipfx import _compat, responses
from clipfx._core.checks import check_choice, helpful
from clipfx._core.clip_factors import factors, finite_norms
from clipfx._core.norms import Norms
from clipfx._core.populations import (
    Bounds,
    bound,
    check_bounds,
    check_populations,
    combine,
    each,
    measure,
)
from clipfx._types import AxisName, LossFn, Positions, Scalar
from clipfx.per_example.engine import population_norms, trace
from clipfx.per_example.engine.bookkeeping import over
from clipfx.per_example.engine.microbatch import averaged, check_step, in_parts
from clipfx.per_example.engine.populations import (
    adding_up,
    by_population,
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
    fun: LossFn,
    num_populations: int,
    max_ratio: Scalar = 2.0,
    *,
    reference: str | int = "min",
    floor: Scalar = 0.05,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    reduce: str = "sum",
    batch_axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, PerPopulation]]:
    r"""Sums gradients so that no population outweighs the others.

    :math:`\sum_k c_k \min(1, \rho r / \lVert c_k \rVert)` with the contributions
    :math:`c_k = \sum_{b: population(b) = k} g_b`, as `clipfx.clip_fair_groups` does
    with those of `population_grad`, in one function and for less: where the norm of a
    leaf's contributions is cheaper than they are, from inner products of what examples
    left behind, or from rows that were looked up, only the bounded sum is formed. All
    others cost, by population, the part of a backward pass that makes weight gradients.

    Args:
      fun: See `clipped_grad`.
      num_populations: K >= 1. Static.
      max_ratio: :math:`\rho`, see `clipfx.clip_fair_groups`.
      reference: `"min"` or the number of a population; with `"ema"`, which needs state,
        use `clipfx.clip_fair_groups`. Static.
      floor: See `clipfx.clip_fair_groups`.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      microbatch_size: See `clipped_grad`. Static.
      reduce: See `population_grad`. Static.
      batch_axis_name: See `clipped_grad`. Static.

    Returns:
      A function of the same arguments, batches in place of examples, and of
      `population_ids=`, integers `[B]` in [0, K), and `where=` (bool `[B]`, False for
      padding). It returns the bounded sum, like the parameters, float32 or wider, and
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
      >>> ids = jnp.array([0, 0, 1])
      >>> sums, info = grad(jnp.zeros(2), batch, population_ids=ids)
      >>> info.norm, [f"{x:.3f}" for x in sums]
      (Array([9., 1.], dtype=float32), ['2.000', '1.000'])

    Reference: see `clipfx.clip_fair_groups`.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    trace.check_signature(signature, "where", "population_ids")
    check_populations(num_populations)
    check_choice("reduce", reduce, ("sum", "mean"))
    step = check_step(microbatch_size)
    bounds = check_bounds(Bounds(max_ratio, reference, floor), num_populations)
    if reference == "ema":
        raise ValueError(
            'reference must be "min" or the number of a population, got "ema", which '
            "needs state; use clipfx.clip_fair_groups behind population_grad."
        )

    def grad(
        *args: Any, population_ids: Any = None, where: Any = None, **kwargs: Any
    ) -> tuple[Any, PerPopulation]:
        params, keep, member = by_population(
            signature, args, where, population_ids, num_populations
        )
        size = member.shape[0]
        if not size:
            raise ValueError(
                "the batch must have examples, got none, so that all populations are "
                "absent; skip the step."
            )
        if step is None and batch_axis_name is None:
            call = trace.prepare(signature, args, kwargs, norms=False)
            run = one_pass(call, member)
            light = population_norms.choose(run)
            heavy = [k for k in range(len(call.program.params)) if k not in light]
            parts, info, counted = contributions(run, heavy), run.info, run.member
        else:  # what is cheaper than contributions is not known of a part of them
            some = adding_up(signature, num_populations, kwargs)
            stacked, info = in_parts(some, signature, step, args, keep, member, size)
            if batch_axis_name is not None:
                stacked = jax.lax.psum(stacked, batch_axis_name)
            parts = [[x[k] for x in stacked] for k in range(num_populations)]
            run, light, heavy, counted = None, {}, [*range(len(stacked))], info.factor
        count = counted.sum(0)
        count = over(count, _compat.varying_axes(count))
        if batch_axis_name is not None:
            count = jax.lax.psum(count, batch_axis_name)
        norms = measure(parts)
        if run is not None and light:
            more = population_norms.norms(run, light)
            value = jnp.hypot(norms.value / norms.scale, more.value / more.scale)
            norms = Norms(value, jnp.ones_like(value))
        limit, _ = bound(norms, bounds)
        norms = each(norms)
        norm = finite_norms(norms)
        scales = factors(norms, limit, responses.hard, "zero")
        sums = dict(zip(heavy, combine(parts, scales, norm), strict=True))
        factor = scales[0] * scales[1]
        if run is not None:
            finite = jnp.where(jnp.isfinite(norm), factor, 0)
            weights = (counted * finite[None]).sum(1)
            sums.update(zip(light, weighted(run, weights, list(light)), strict=True))
        ordered = [sums[k] for k in sorted(sums)]
        bounded = averaged(ordered, info.value, keep, reduce, batch_axis_name)
        found = PerPopulation(info.value, count, norm, factor, info.aux)
        return jax.tree.structure(params).unflatten(bounded), found

    return grad
