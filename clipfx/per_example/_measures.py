"""Norms alone, and sums by group of examples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipfx._checks import is_known
from clipfx._tree import group_leaves, widen
from clipfx.per_example import _batch, _bounded
from clipfx.per_example._batch import Signature
from clipfx.per_example._bounded import PerExample
from clipfx.per_example._grad import mask_of, params_of, size_of


def norms(
    fun: Callable,
    *,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    groups: Any = "global",
) -> Callable[..., PerExample]:
    r"""Measures the gradient of every example, :math:`n_{b,k} = \|g_{b,k}\|_2`.

    For finding outliers, choosing thresholds, estimating the noise of a gradient. No
    sum is computed.

    Args:
      fun: See `clipped_grad`.
      argnums: See `clipped_grad`. Static.
      batch_argnums: See `clipped_grad`. Static.
      has_aux: See `clipped_grad`. Static.
      groups: See `clipfx.clip_by_norm`. Static.

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
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    _batch.check_signature(signature)

    def measure(*args: Any, where: Any = None, **kwargs: Any) -> PerExample:
        members = group_leaves(groups, params_of(signature, args))
        call = _batch.prepare(signature, args, kwargs)
        if not call.size:
            return _bounded.empty(call, len(members.names))._replace(factor=None)
        return _bounded.measure(call, members, mask_of(where, call.size))

    return measure


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
      groups, integers `[B]` in [0, K). It returns the contributions, like the
      parameters with an axis K in front, float32 or wider, and `PerExample` with
      `norm` None and `factor` `[B, K]`, 1 where an example is counted. An example
      whose gradient is not finite is counted nowhere, nor is one whose traced group is
      out of range.

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
    if type(num_groups) is not int or num_groups < 1:
        raise ValueError(
            f"num_groups must be an int >= 1, got {num_groups!r}; it is the number of "
            "populations."
        )

    def grad(*args: Any, **kwargs: Any) -> tuple[Any, PerExample]:
        if len(args) < 3:
            raise TypeError(
                "group must be the last positional argument, integers [B], got "
                f"{len(args)} arguments; call it with parameters, batch and group."
            )
        group, args = args[-1], args[:-1]
        params = params_of(signature, args)
        size = size_of(signature, args)
        member = _membership(group, num_groups, size)
        call = _batch.prepare(signature, args, kwargs, norms=False)
        if size:
            sums, info = _bounded.sums_by_group(call, member)
        else:
            like = [widen(call.inputs[k]) for k in call.program.params]
            sums = [jnp.zeros((num_groups, *x.shape), x.dtype) for x in like]
            info = _bounded.empty(call, num_groups)._replace(norm=None)
        if axis_name is not None:
            sums = [jax.lax.psum(x, axis_name) for x in sums]
        return jax.tree.structure(params).unflatten(sums), info

    return grad


def _membership(group: Any, num_groups: int, size: int) -> jax.Array:
    """float32 `[B, K]`, 1 where an example belongs."""
    group = jnp.asarray(group)
    if not jnp.issubdtype(group.dtype, jnp.integer):
        raise TypeError(
            f"group must be integers [B], got {group.dtype}; number the populations "
            "from 0."
        )
    if group.shape != (size,):
        raise ValueError(
            f"group must have shape ({size},), one entry for each example, got "
            f"{group.shape}; it is the last positional argument."
        )
    if is_known(group) and size and not (0 <= group.min() <= group.max() < num_groups):
        raise ValueError(
            f"group must be in [0, {num_groups}), got {int(group.min())} to "
            f"{int(group.max())}; num_groups says how many populations there are."
        )
    return (group[:, None] == jnp.arange(num_groups)[None]).astype(jnp.float32)
