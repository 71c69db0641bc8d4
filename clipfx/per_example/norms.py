"""Norms alone."""

from collections.abc import Callable
from typing import Any

from clipfx._core.checks import helpful
from clipfx._core.groups import group_leaves
from clipfx._types import GroupSpec, LossFn, Positions
from clipfx.per_example.engine import trace
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.microbatch import check_step, in_parts, measuring
from clipfx.per_example.engine.trace import Signature


@helpful
def norms(
    fun: LossFn,
    *,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    groups: GroupSpec = "global",
    ord: int | None = None,
    norm_method: Any = "auto",
    microbatch_size: int | None = None,
) -> Callable[..., PerExample]:
    r"""Measures the gradient of every example, :math:`n_{b,k} = \|g_{b,k}\|_p`.

    For finding outliers, choosing thresholds, estimating the noise of a gradient. No
    sum is computed.

    Args:
      fun: See `clipped_grad`.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      groups: See `clipped_grad`. Static.
      ord: See `clipped_grad`. Static.
      norm_method: See `clipped_grad`. Static.
      microbatch_size: See `clipped_grad`. Static.

    Returns:
      A function of the same arguments, batches in place of examples, and `where=` (bool
      `[B]`, False for padding). It returns `PerExample` with `factor` None.

    Raises:
      TypeError: See `clipped_grad`.
      ValueError: See `clipped_grad`.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.vdot(w, x)
      >>> measure = clipfx.per_example.norms(loss)
      >>> measure(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]])).norm
      Array([[5. ],
             [0.5]], dtype=float32)

    Reference: Goodfellow, `Efficient per-example gradient computations
    <https://arxiv.org/abs/1510.01799>`_, 2015.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux, norm_method)
    trace.check_signature(signature, "where")
    power = trace.check_ord(ord)
    microbatch_size = check_step(microbatch_size)

    def measure(*args: Any, where: Any = None, **kwargs: Any) -> PerExample:
        params = trace.params_of(signature, args)
        members = group_leaves(groups, params, by_slice=True)
        size = trace.size_of(signature, args)
        keep = trace.mask_of(where, size)
        some = measuring(signature, members, power, kwargs)
        return in_parts(some, signature, microbatch_size, args, keep, None, size)[1]

    return measure
