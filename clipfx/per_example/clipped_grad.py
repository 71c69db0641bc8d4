"""Bounded sums of every example's gradient."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import responses
from clipfx._core.checks import check_choice, helpful
from clipfx._core.groups import EACH, group_leaves
from clipfx._core.leaves import widen
from clipfx._types import AxisName, GroupSpec, Limit, LossFn, Positions
from clipfx.per_example.engine import clip, trace
from clipfx.per_example.engine.clip import PerExample
from clipfx.per_example.engine.microbatch import (
    check_step,
    in_parts,
    measuring,
    reduced,
)
from clipfx.per_example.engine.thresholds import check_limit, limits
from clipfx.per_example.engine.trace import Signature


@dataclasses.dataclass(frozen=True, eq=False)
class ClippedGrad:
    """The function that `clipped_grad` returns.

    Attributes:
      signature: The loss and its arguments.
      max_norm: The threshold.
      groups: Which leaves share a norm.
      response: What happens to a norm.
      ord: p of the norm.
      microbatch_size: How many examples at a time.
      reduce: `"sum"` or `"mean"`.
      batch_axis_name: Mesh axes to add up over.

    Reference: none.
    """

    signature: Signature
    max_norm: Any
    groups: Any
    response: responses.Response
    ord: int
    microbatch_size: int | None
    reduce: str
    batch_axis_name: Any

    __name__ = "clipped_grad"  # of the compiled function

    def __call__(
        self, *args: Any, where: Any = None, max_norm: Any = None, **kwargs: Any
    ) -> tuple[Any, PerExample]:
        """Returns the bounded sum, and what is known of every example.

        Args:
          *args: Of the loss, with a batch in place of an example.
          where: bool `[B]`, False for padding, which contributes exactly nothing.
          max_norm: In place of the one given before: a number, `[G]`, `[B]`, `[B, G]`
            (`[B, 1]` or `[1, G]` if B = G), a dict by group name, or a function
            `max_norm(norm, where)` from norms `[B, G]` and the mask `[B]` of this
            batch to one of these. In `shard_map` it sees the part of a device.
          **kwargs: Of the loss, the same for every example.
        """
        params = trace.params_of(self.signature, args)
        members = group_leaves(self.groups, params, by_slice=True)
        size = trace.size_of(self.signature, args)
        given = self.max_norm if max_norm is None else max_norm
        keep = trace.mask_of(where, size)
        fit = lambda given: limits(given, members, size)
        parted = self.microbatch_size is not None and size > self.microbatch_size

        def some(args: Any, keep: Any, limit: Any) -> tuple[Any, PerExample]:
            call = trace.prepare(
                self.signature, args, kwargs, ord=self.ord, members=members
            )
            if not call.size:
                zeros = [jnp.zeros_like(widen(call.inputs[k]))
                         for k in call.program.params]  # fmt: skip
                return zeros, clip.empty(call, len(members.names))
            if limit is None:
                limit = of_norms if callable(given) else fit(given)
            return clip.bounded_sum(call, members, limit, self.response, keep)

        def of_norms(norm: jax.Array, keep: jax.Array) -> jax.Array:
            return fit(given(norm, keep))

        limit = None
        if parted and callable(given):  # of the whole batch: one more pass
            measure = measuring(self.signature, members, self.ord, kwargs)
            _, info = self._parts(measure, args, keep, None, size)
            every = jnp.ones(size, bool) if keep is None else keep
            limit = of_norms(info.norm, every)
        elif parted:
            limit = fit(given)
        if limit is not None:
            limit = jnp.broadcast_to(limit, (size, limit.shape[1]))
        sums, info = self._parts(some, args, keep, limit, size)
        sums = reduced(sums, info.value, keep, self.reduce, self.batch_axis_name)
        return jax.tree.structure(params).unflatten(sums), info

    def _parts(
        self, some: Callable, args: Any, keep: Any, limit: Any, size: int
    ) -> Any:
        step = self.microbatch_size
        return in_parts(some, self.signature, step, args, keep, limit, size)

    def sensitivity(
        self,
        relation: str = "add_or_remove_one",
        *,
        max_norm: Any = None,
        params: Any = None,
    ) -> float:
        r"""How far the sum moves between neighbouring batches, in the norm of `ord`.

        With :math:`S = (\sum_k c_k^p)^{1/p}` over groups k: S if one example is added
        or removed, or replaced by one that contributes nothing, and 2 S if it is
        replaced by any other. Holds for what is stored, evaluated in float64, up to
        the rounding of the sum itself.

        Args:
          relation: `"add_or_remove_one"`, `"replace_one"` or `"replace_special"`.
          max_norm: The largest threshold passed to calls, if other than the one given
            before.
          params: Needed if one number bounds several groups, or several slices: tells
            how many.

        Raises:
          ValueError: If the response has no bound, the relation is unknown, or the
            number of groups is.
        """
        relations = ("add_or_remove_one", "replace_one", "replace_special")
        check_choice("relation", relation, relations)
        check_bounded(self.response)
        if self.reduce != "sum":
            raise ValueError(
                f'reduce must be "sum" for a sensitivity, got {self.reduce!r}; divide '
                "by an expected batch size after the noise, as privacy.dp_grad does."
            )
        limit = self.max_norm if max_norm is None else max_norm
        if callable(limit):
            raise ValueError(
                f"max_norm must be known to sensitivity, got the function {limit!r}; "
                "pass the largest threshold it returns, as max_norm."
            )
        many = limit if isinstance(limit, Mapping) else {}
        if params is not None and many:
            members = group_leaves(self.groups, params, by_slice=True)
            limit = limits(many, members, 1)
        elif any(str(name).endswith(EACH) for name in many):
            raise ValueError(
                f"params must be passed to sensitivity with {sorted(many)}, got None; "
                "they tell how many slices there are."
            )
        elif many:
            limit = list(many.values())
        limit = np.asarray(limit, np.float64)
        limit = limit.max(0) if limit.ndim == 2 else limit
        if limit.ndim == 0 and self.groups != "global":
            if params is None:
                raise ValueError(
                    "params must be passed to sensitivity with one max_norm for "
                    f"groups={self.groups!r}, got None; they tell how many groups "
                    "there are."
                )
            members = group_leaves(self.groups, params, by_slice=True)
            limit = np.full(len(members.names), limit)
        bound = float(np.linalg.norm(np.atleast_1d(limit), self.ord))
        return 2 * bound if relation == "replace_one" else bound


def check_bounded(response: responses.Response) -> None:
    """Checks that no value exceeds the threshold."""
    if not getattr(response, "bounded", False):
        raise ValueError(
            f"response must be bounded by its threshold, got {response!r}, which is "
            "not known to be; responses.hard is, and a response of your own that is "
            "may say so with an attribute bounded = True."
        )


@helpful
def clipped_grad(
    fun: LossFn,
    max_norm: Limit,
    *,
    argnums: Positions = 0,
    batch_argnums: Positions = 1,
    has_aux: bool = False,
    groups: GroupSpec = "global",
    response: responses.Response | None = None,
    ord: int | None = None,
    norm_method: Any = "auto",
    microbatch_size: int | None = None,
    reduce: str = "sum",
    batch_axis_name: AxisName | None = None,
) -> ClippedGrad:
    r"""Sums the gradients of a batch, each example's bounded, at one gradient's price.

    With :math:`g_{b,k}` the gradient of example b with respect to group k of leaves,
    :math:`n_{b,k}` its norm, c the threshold and :math:`\psi` the response,

    .. math:: \sum_b g_{b,k} \, \psi_c(n_{b,k}) / n_{b,k} .

    No gradient of a single example is formed where it can be helped: the loss is
    traced once, norms come from what each equation that uses a parameter has seen and
    from the gradient of its output, and sums from the same. Right for every loss of one
    example that JAX can differentiate; `explain` tells how each norm is found.

    The result is a *sum*, in float32 or wider whatever the dtype of the parameters:
    rounded to bfloat16 it would have no provable sensitivity. Divide it, cast it, pass
    it to an optimizer. An example whose gradient is not finite contributes zero.

    The loss is of one example. What mixes examples, as batch normalization does, cannot
    be written so and has no gradient of one example: where it is recognised it is
    refused; use group or layer normalization. What JAX cannot map over examples, as
    an ordered callback, takes `microbatch_size=1`. Randomness: a key for every
    example, by `batch_argnums`.

    Args:
      fun: `fun(params, example, ...)` returns the loss of one example, a scalar.
      max_norm: :math:`c`: a number >= 0, `[G]`, a dict by group name (`blocks/*` for
        all slices), or a function of the norms of a batch; can be given at each call,
        also for every example, `[B, 1]` or `[B, G]`.
      argnums: Which arguments to differentiate, as in `jax.grad`. Static.
      batch_argnums: Which arguments have an axis of examples in front: trees of arrays
        `[B, ...]`. All others are the same for every example. Static.
      has_aux: Whether `fun` returns `(loss, aux)`. Static.
      groups: Which leaves share a norm, see `clipfx.clip_by_norm`. A label that ends in
        `/*` is one group for each slice along the leaf's first dimension, for layers
        that are stacked for `scan`: `blocks/*` means `blocks/0`, `blocks/1` and so on.
        Static.
      response: From norms and thresholds to new norms, one of `clipfx.responses` or
        your own; None means `hard`.
      ord: p of the norm, 2 or 1; None means 2. The 1-norm, for Laplace noise, has a
        cheap method where an example uses a parameter once; all others are
        instantiated. Static.
      norm_method: How norms are found: `"auto"`, the cheapest way by a count of FLOPs
        and bytes; `"ghost"`, without forming an example's gradient wherever that can
        be; `"instantiate"`, by forming it; or a tree prefix of these. The result is the
        same to rounding. Static.
      microbatch_size: How many examples at a time, by a scan; None takes all. Bounds
        memory, the result is the same. A function of norms needs one more pass. Static.
      reduce: `"sum"`, or `"mean"` over the examples that `where` keeps, also over
        devices. Static.
      batch_axis_name: Mesh axes to add up over, for `pmap` and
        `shard_map(check_vma=False)`; under `jit` and `shard_map` this happens by
        itself. Static.

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
    they go on saving memory; one, if each group is within one part that they run
    again, as layers and their weights are. What an example has contributed there stays
    if its gradient turns out not to be finite in earlier layers.

    Reference: Abadi et al., `Deep learning with differential privacy
    <https://arxiv.org/abs/1607.00133>`_, 2016; Bu et al., `Differentially private
    optimization on large model at small cost <https://arxiv.org/abs/2210.00038>`_,
    2023.
    """
    signature = Signature(fun, argnums, batch_argnums, has_aux, norm_method)
    trace.check_signature(signature, "where", "max_norm")
    check_limit(max_norm)
    check_choice("reduce", reduce, ("sum", "mean"))
    return ClippedGrad(
        signature=signature,
        max_norm=max_norm,
        groups=groups,
        response=responses.check_response(response),
        ord=trace.check_ord(ord),
        microbatch_size=check_step(microbatch_size),
        reduce=reduce,
        batch_axis_name=batch_axis_name,
    )
