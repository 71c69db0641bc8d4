"""`population_grad`: a sum of gradients for each population."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._core.checks import helpful
from clipfx._core.leaves import widen
from clipfx._core.populations import check_populations
from clipfx.per_example.engine import clip, trace
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.populations import by_group, contributions, one_pass
from clipfx.per_example.engine.trace import Signature


@helpful
def population_grad(
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
      >>> grad = clipfx.per_example.population_grad(loss, 2)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5], [1.0, 1.0]])
      >>> grad(jnp.zeros(2), batch, jnp.array([0, 1, 0]))[0]
      Array([[4. , 5. ],
             [0. , 0.5]], dtype=float32)

    Reference: none; the pieces of `clipped_grad`.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    trace.check_signature(signature)
    check_populations(num_groups)

    def grad(*args: Any, where: Any = None, **kwargs: Any) -> tuple[Any, PerExample]:
        args, params, member = by_group(signature, args, where, num_groups)
        call = trace.prepare(signature, args, kwargs, norms=False)
        if call.size:
            run = one_pass(call, member)
            parts = contributions(run, range(len(call.program.params)))
            sums, info = [jnp.stack(x) for x in zip(*parts, strict=True)], run.info
        else:
            like = [widen(call.inputs[k]) for k in call.program.params]
            sums = [jnp.zeros((num_groups, *x.shape), x.dtype) for x in like]
            info = clip.empty(call, num_groups)._replace(norm=None)
        if axis_name is not None:
            sums = [jax.lax.psum(x, axis_name) for x in sums]
        return jax.tree.structure(params).unflatten(sums), info

    return grad
