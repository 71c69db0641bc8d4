"""Bounded sums of every example's gradient, norms alone, and sums by group."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import responses
from clipfx._checks import check_choice
from clipfx._tree import group_leaves, widen
from clipfx.per_example import _batch, _bounded
from clipfx.per_example._batch import Signature
from clipfx.per_example._bounded import PerExample
from clipfx.per_example._limits import check_limit, limits


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad:
    """The function that `clipped_grad` returns.

    Attributes:
      signature: The loss and its arguments.
      max_norm: The threshold.
      groups: Which leaves share a norm.
      response: What happens to a norm.
      microbatch_size: How many examples at a time.
      axis_name: Mesh axes to add up over.

    Reference: none.
    """

    signature: Signature
    max_norm: Any
    groups: Any
    response: responses.Response
    microbatch_size: int | None
    axis_name: Any

    __name__ = "clipped_grad"  # of the compiled function

    def __call__(
        self, *args: Any, where: Any = None, max_norm: Any = None, **kwargs: Any
    ) -> tuple[Any, PerExample]:
        """Returns the bounded sum, and what is known of every example.

        Args:
          *args: Of the loss, with a batch in place of an example.
          where: bool `[B]`, False for padding, which contributes exactly nothing.
          max_norm: In place of the one given before: a number, `[G]`, `[B]`, `[B, G]`
            (`[B, 1]` or `[1, G]` if B = G), or a dict by group name.
          **kwargs: Of the loss, the same for every example.
        """
        params = params_of(self.signature, args)
        members = group_leaves(self.groups, params)
        size = size_of(self.signature, args)
        given = self.max_norm if max_norm is None else max_norm
        limit = limits(given, members, size)
        keep = mask_of(where, size)

        def some(args: Any, keep: Any, limit: Any) -> tuple[Any, PerExample]:
            call = _batch.prepare(self.signature, args, kwargs)
            if not call.size:
                zeros = [jnp.zeros_like(widen(call.inputs[k]))
                         for k in call.program.params]  # fmt: skip
                return zeros, _bounded.empty(call, len(members.names))
            return _bounded.bounded_sum(call, members, limit, self.response, keep)

        sums, info = _in_parts(some, self, args, keep, limit, size)
        if self.axis_name is not None:
            sums = [_psum(x, self.axis_name) for x in sums]
        return jax.tree.structure(params).unflatten(sums), info

    def sensitivity(
        self,
        relation: str = "add_or_remove_one",
        *,
        max_norm: Any = None,
        params: Any = None,
    ) -> float:
        r"""How far the sum moves between neighbouring batches, in the 2-norm.

        With :math:`S = (\sum_k c_k^2)^{1/2}` over groups k: S if one example is added
        or removed, or replaced by one that contributes nothing, and 2 S if it is
        replaced by any other. Holds for what is stored, evaluated in float64, up to
        the rounding of the sum itself.

        Args:
          relation: `"add_or_remove_one"`, `"replace_one"` or `"replace_special"`.
          max_norm: The largest threshold passed to calls, if other than the one given
            before.
          params: Needed if one number bounds several groups: tells how many.

        Raises:
          ValueError: If the response has no bound, the relation is unknown, or the
            number of groups is.
        """
        relations = ("add_or_remove_one", "replace_one", "replace_special")
        check_choice("relation", relation, relations)
        if not getattr(self.response, "bounded", False):
            raise ValueError(
                f"response must be bounded by its threshold, got {self.response!r}, "
                "which is not known to be; responses.hard is, and a response of your "
                "own that is may say so with an attribute bounded = True."
            )
        limit = self.max_norm if max_norm is None else max_norm
        if isinstance(limit, Mapping):
            limit = list(limit.values())
        limit = np.asarray(limit, np.float64)
        if limit.ndim == 2:
            limit = limit.max(0)
        if limit.ndim == 0 and self.groups == "global":
            count = 1
        elif limit.ndim == 0:
            if params is None:
                raise ValueError(
                    "params must be passed to sensitivity with one max_norm for "
                    f"groups={self.groups!r}, got None; they tell how many groups "
                    "there are."
                )
            count = len(group_leaves(self.groups, params).names)
        else:
            count = 1
        bound = math.sqrt(count) * float(np.linalg.norm(limit))
        return 2 * bound if relation == "replace_one" else bound


def clipped_grad(
    fun: Callable,
    max_norm: Any,
    *,
    argnums: int | tuple[int, ...] = 0,
    batch_argnums: int | tuple[int, ...] = 1,
    has_aux: bool = False,
    groups: Any = "global",
    response: responses.Response = responses.hard,
    microbatch_size: int | None = None,
    axis_name: Any = None,
) -> ClippedGrad:
    r"""Sums the gradients of a batch, each example's bounded, at one gradient's price.

    With :math:`g_{b,k}` the gradient of example b with respect to group k of leaves,
    :math:`n_{b,k}` its 2-norm, c the threshold and :math:`\psi` the response,

    .. math:: \sum_b g_{b,k} \, \psi_c(n_{b,k}) / n_{b,k} .

    No gradient of a single example is formed where it can be helped: the loss is
    traced once, norms come from what each equation that uses a parameter has seen and
    from the gradient of its output, and sums from the same. Right for every loss that
    JAX can differentiate; `explain` tells which road each parameter takes.

    The result is a *sum*, in float32 or wider whatever the dtype of the parameters:
    rounded to bfloat16 it would have no provable sensitivity. Divide it, cast it, pass
    it to an optimizer. An example whose gradient is not finite contributes zero.

    The loss is of one example. What mixes examples, as batch normalization does, cannot
    be written so and has no gradient of one example; use group or layer normalization.
    Randomness: a key for every example, by `batch_argnums`.

    Args:
      fun: `fun(params, example, ...)` returns the loss of one example, a scalar.
      max_norm: :math:`c`: a number >= 0, `[G]`, or a dict by group name; can be given
        at each call, also for every example.
      argnums: Which arguments to differentiate, as in `jax.grad`. Static.
      batch_argnums: Which arguments have an axis of examples in front: trees of arrays
        `[B, ...]`. All others are the same for every example. Static.
      has_aux: Whether `fun` returns `(loss, aux)`. Static.
      groups: Which leaves share a norm, see `clipfx.clip_by_norm`. Static.
      response: From norms and thresholds to new norms, one of `clipfx.responses` or
        your own.
      microbatch_size: How many examples at a time, by a scan; None takes all. Bounds
        memory, the result is the same. Static.
      axis_name: Mesh axes to add up over, for `pmap` and `shard_map(check_vma=False)`;
        under `jit` and `shard_map` this happens by itself. Static.

    Returns:
      A function of the same arguments, batches in place of examples, and `where=`
      (bool `[B]`, False for padding) and `max_norm=`. It returns the sum, like the
      parameters but float32 or wider, and `PerExample`. Its method `sensitivity` says
      how far the sum moves between neighbouring batches.

    Raises:
      TypeError: If an argument is of the wrong kind, parameters are not floating, or
        the loss is no scalar.
      ValueError: If thresholds are negative or of a shape that does not fit, batches
        have no common size, or `where` is no mask of them.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> loss = lambda w, x: jnp.vdot(w, x)  # its gradient is x
      >>> grad = clipfx.per_example.clipped_grad(loss, 1.0)
      >>> sums, info = grad(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
      >>> info.norm[:, 0], [f"{x:.3f}" for x in sums]
      (Array([5. , 0.5], dtype=float32), ['0.600', '1.300'])

    Differs from the source: one pass where ghost clipping takes two, for any program
    instead of a list of layers. Thresholds are lowered by 2^-20 (2^-49 in float64), or
    rounding would exceed them. Programs that rematerialize take two passes, so that
    they go on saving memory.

    Reference: Abadi et al., `Deep learning with differential privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016; Bu et al., `Differentially private
    optimization on large model at small cost <https://arxiv.org/abs/2210.00038>`_,
    2023.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux)
    _batch.check_signature(signature)
    responses.check_response(response)
    check_limit(max_norm)
    if microbatch_size is not None and (
        type(microbatch_size) is not int or microbatch_size < 1
    ):
        raise ValueError(
            f"microbatch_size must be an int >= 1 or None, got {microbatch_size!r}; "
            "it is the number of examples computed at a time."
        )
    return ClippedGrad(
        signature, max_norm, groups, response, microbatch_size, axis_name
    )


def params_of(signature: Signature, args: Any) -> Any:
    numbers = _batch.numbers(signature, "argnums", len(args))
    params = tuple(args[k] for k in numbers)
    _batch.check_params(params)
    return params[0] if isinstance(signature.argnums, int) else params


def size_of(signature: Signature, args: Any) -> int:
    return _batch.batch_size(
        args, _batch.numbers(signature, "batch_argnums", len(args))
    )


def mask_of(where: Any, size: int) -> jax.Array | None:
    """Checks which examples count."""
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.shape != (size,) or where.dtype != jnp.bool_:
        raise ValueError(
            f"where must be bool[{size}], one entry for each example, got "
            f"{where.dtype}{list(where.shape)}; False marks padding."
        )
    return where


def _psum(x: jax.Array, axis_name: Any) -> jax.Array:
    return jax.lax.psum(x, axis_name)


def _in_parts(
    some: Callable, grad: ClippedGrad, args: Any, keep: Any, limit: Any, size: int
) -> tuple[Any, PerExample]:
    """All at once, or `microbatch_size` at a time, added up in the order of a scan."""
    step = grad.microbatch_size
    if step is None or size <= step:
        return some(args, keep, limit)
    count = -(-size // step)
    keep = jnp.ones(size, bool) if keep is None else keep
    limit = jnp.broadcast_to(limit, (size, limit.shape[1]))
    numbers = _batch.numbers(grad.signature, "batch_argnums", len(args))
    batches = [args[k] for k in numbers]

    def cut(x):
        x = jnp.asarray(x)
        if count * step > size:  # the last example again, masked
            x = x[jnp.minimum(jnp.arange(count * step), size - 1)]
        # Every part takes from the whole length: a batch split over devices stays so.
        return x.reshape(step, count, *x.shape[1:]).swapaxes(0, 1)

    inside = (jnp.arange(count * step) < size).reshape(step, count).T
    parts = jax.tree.map(cut, (batches, keep, limit))

    def body(sums, part):
        (batches, keep, limit), inside = part
        filled = list(args)
        for k, batch in zip(numbers, batches, strict=True):
            filled[k] = batch
        more, info = some(tuple(filled), keep & inside, limit)
        return [a + b for a, b in zip(sums, more, strict=True)], info

    first = jax.tree.map(lambda x: x[0], (parts, inside))
    like, _ = jax.eval_shape(
        lambda part: body([0.0] * _leaves(grad, args), part), first
    )
    zeros = [jnp.zeros(x.shape, x.dtype) for x in like]
    sums, info = jax.lax.scan(body, zeros, (parts, inside))
    join = lambda x: x.swapaxes(0, 1).reshape(count * step, *x.shape[2:])[:size]
    return sums, jax.tree.map(join, info)


def _leaves(grad: ClippedGrad, args: Any) -> int:
    return len(jax.tree.leaves(params_of(grad.signature, args)))
