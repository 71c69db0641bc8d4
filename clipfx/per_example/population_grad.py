"""`population_grad`: a sum of gradients for each population."""

from collections.abc import Callable
from typing import Any

import jax

from clipfx._core.checks import check_choice, helpful
from clipfx._core.populations import check_populations
from clipfx._types import AxisName, LossFn, Positions
from clipfx.per_example.engine import trace
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.microbatch import check_step, in_parts, reduced
from clipfx.per_example.engine.populations import adding_up, by_population
from clipfx.per_example.engine.trace import Signature


@helpful
def population_grad(
    fun: LossFn,
    num_populations: int,
    *,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    microbatch_size: int | None = None,
    reduce: str = "sum",
    batch_axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, PerExample]]:
    r"""Sums gradients by population, :math:`\sum_{b: population(b) = k} g_b`.

    One forward and one backward pass of the data, and for each of the K populations the
    part of a backward pass that makes weight gradients.

    Args:
      fun: See `clipped_grad`.
      num_populations: K >= 1. Static.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      microbatch_size: See `clipped_grad`. Static.
      reduce: `"sum"`, or `"mean"`: divided by the number of all examples. Static.
      batch_axis_name: See `clipped_grad`. Static.

    Returns:
      A function of the same arguments, batches in place of examples, and of
      `population_ids=`, integers `[B]` in [0, K), and `where=` (bool `[B]`, False for
      padding). It returns the contributions, like the parameters with an axis K in
      front, float32 or wider, and `PerExample` with `norm` None and `factor` `[B, K]`,
      1 where an example is counted. An example whose gradient is not finite is counted
      nowhere, nor is one whose traced id is out of range.

    Raises:
      TypeError: See `clipped_grad`, and if ids are missing or not integers.
      ValueError: See `clipped_grad`, and if concrete ids are out of range.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.vdot(w, x)
      >>> grad = clipfx.per_example.population_grad(loss, 2)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5], [1.0, 1.0]])
      >>> grad(jnp.zeros(2), batch, population_ids=jnp.array([0, 1, 0]))[0]
      Array([[4. , 5. ],
             [0. , 0.5]], dtype=float32)

    Reference: none; the pieces of `clipped_grad`.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    trace.check_signature(signature, "where", "population_ids")
    check_populations(num_populations)
    check_choice("reduce", reduce, ("sum", "mean"))
    step = check_step(microbatch_size)

    def grad(
        *args: Any, population_ids: Any = None, where: Any = None, **kwargs: Any
    ) -> tuple[Any, PerExample]:
        params, keep, member = by_population(
            signature, args, where, population_ids, num_populations
        )
        some = adding_up(signature, num_populations, kwargs)
        size = member.shape[0]
        sums, info = in_parts(some, signature, step, args, keep, member, size)
        sums = reduced(sums, info.value, keep, reduce, batch_axis_name)
        return jax.tree.structure(params).unflatten(sums), info

    return grad
