"""Steps that stand out are skipped."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat
from clipfx._core.checks import check_number, check_transform, helpful
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, is_counted
from clipfx._core.matching import check_state
from clipfx._core.running_stats import (
    LARGEST,
    Window,
    check_window,
    empty_window,
    multiple,
    push,
    rows_seen,
)
from clipfx._core.safe_sums import reciprocal_power_of_two
from clipfx._core.state import ClipState, fresh_metrics, next_state
from clipfx._types import AxisName, Limit, Scalar
from clipfx.methods.clip_by_norm import global_norm


@exportable("clipfx.SkipState")
class SkipState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      clip: A `clipfx.ClipState` of two groups for `clipfx.metrics.read`: `global`, the
        norm of the updates, and `loss`, the loss. Its threshold holds the window.
      skipped: int32, steps skipped for whatever reason.
      inner: State of the optimizer inside.

    Reference: none.
    """

    clip: ClipState
    skipped: jax.Array
    inner: Any


@helpful
def skip_spikes(
    inner: optax.GradientTransformation,
    *,
    window: Scalar = 128,
    num_std: Scalar = 6.0,
    min_steps: Scalar = 64,
    max_norm: Limit = math.inf,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Skips the steps whose loss or gradient norm stands out from the last ones.

    With mean :math:`\mu` and sample deviation :math:`\sigma` of the values in a window
    before it, a step is taken if

    .. math:: n_t \le \mu_n + k\sigma_n \quad\text{and}\quad
        \ell_t \le \mu_\ell + k\sigma_\ell ,

    and else the updates are zero and the state of the optimizer inside stays as it
    was. A step is also skipped, always, if norm or loss is infinite or NaN; such never
    enter the window. Spikes do: where the level has shifted for good, it is accepted
    once the window has seen enough of it.

    The loss comes as `value=`, as for Optax's line searches; without it the norm alone
    decides. Pass it always or never:

    >>> tx = skip_spikes(optax.adamw(3e-4))
    >>> params = {"w": jnp.ones(2)}
    >>> grads, loss = {"w": jnp.ones(2)}, 0.5
    >>> updates, state = tx.update(grads, tx.init(params), params, value=loss)

    Args:
      inner: The optimizer whose steps to skip, clips included.
      window: Number of steps to remember. Static.
      num_std: k > 0.
      min_steps: Finite steps to see before any is skipped as a spike, at least 2.
      max_norm: Skips every step whose norm is above it, from the first step on.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `SkipState`. In the metrics, `[2]`, of `clip0/clipped/global`
      kind, `clipped` counts the spikes of norm and loss each, `threshold` is where they
      begin, and `factor` is 0 where the step was skipped.

    Raises:
      TypeError: If `inner` is not a transform, or `window` is not static.
      ValueError: If a number is out of range, or `value` is not a scalar.

    Example:
      >>> clip = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
      >>> tx = skip_spikes(clip, window=100, num_std=4.0)

    Differs from the source: a loss that is not finite never enters the window, where
    there it makes every later decision false.

    Reference: the rule is that of OLMo's optimizer, `2 OLMo 2 Furious
    <https://arxiv.org/abs/2501.00656>`_, 2025; `PaLM
    <https://arxiv.org/abs/2204.02311>`_, 2022, rewinds and skips batches by hand.
    """
    check_transform("inner", inner)
    check_window(window)
    check_number("num_std", num_std, "(0, inf]", "6 is the usual number")
    check_number("min_steps", min_steps, "[2, inf)", "64 is the usual number")
    check_number("max_norm", max_norm, "[0, inf]", "math.inf sets no bound")
    wrapped = optax.with_extra_args_support(inner)
    names = Groups(("global", "loss"), ())

    def init(params):
        metrics = fresh_metrics({}, names)
        clip = ClipState(empty_window(window, 2), metrics)
        return SkipState(clip, jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        check_state(state, SkipState, "skip_spikes")
        value = extra_args.get("value")
        if value is not None and jnp.ndim(value) > 0:
            raise ValueError(
                "value must be a scalar, the loss of the whole batch, got shape "
                f"{jnp.shape(value)}; pass its mean."
            )
        norm = global_norm(updates, axis_name=axis_name).astype(jnp.float32)
        loss = jnp.asarray(0.0 if value is None else value).astype(jnp.float32)
        seen = jnp.stack([norm, loss])
        edge = _edge(state.clip.rule_state, num_std, min_steps)
        # No infinity of our own, for jax_debug_infs.
        number = isinstance(max_norm, int | float)
        bound = jnp.asarray(min(max_norm, LARGEST) if number else max_norm)
        bound = bound.astype(jnp.float32)
        edge = jnp.stack([jnp.minimum(edge[0], bound), edge[1]])
        taken = jnp.isfinite(seen).all() & (seen <= edge).all()
        factor = jnp.broadcast_to(taken.astype(jnp.float32), (2,))
        learned = push(state.clip.rule_state, seen)
        clip = next_state(state.clip, learned, seen, edge, factor, norm)
        leaves, treedef = jax.tree.flatten(updates)
        counted = [at for at, x in enumerate(leaves) if is_counted(x)]

        def step():
            stepped, after = wrapped.update(updates, state.inner, params, **extra_args)
            stepped = jax.tree.leaves(stepped)
            # What is constant there varies over the mesh axes that the state does.
            like = lambda new, old: _compat.vary(new, _compat.varying_axes(old))
            after = jax.tree.map(like, after, state.inner)
            return [stepped[at] for at in counted], after

        def skip():
            like = jax.eval_shape(step)[0]
            pairs = zip(counted, like, strict=True)
            # Their values are dropped below; as zeros they would not vary over meshes.
            return [
                jnp.asarray(leaves[at]).astype(x.dtype) for at, x in pairs
            ], state.inner

        # A select of every leaf of the state takes more time and memory than a branch.
        stepped, after = jax.lax.cond(taken, step, skip)
        for at, x in zip(counted, stepped, strict=True):
            leaves[at] = jnp.where(taken, x, jnp.zeros_like(x))
        skipped = state.skipped + (~taken).astype(jnp.int32)
        return treedef.unflatten(leaves), SkipState(clip, skipped, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _edge(window: Window, num_std: Any, min_steps: Any) -> jax.Array:
    """Mean and `num_std` sample deviations above it, of the rows seen."""
    known = rows_seen(window)
    scale = reciprocal_power_of_two(jnp.max(jnp.abs(window.rows), axis=0))
    rows = window.rows * scale[None]  # squares stay in range
    number = jnp.sum(known).astype(jnp.float32)
    mean = jnp.sum(rows, axis=0) / jnp.maximum(number, 1)
    gaps = jnp.where(known, rows - mean[None], 0)
    std = jnp.sqrt(jnp.sum(gaps * gaps, axis=0) / jnp.maximum(number - 1, 1))
    # What is constant up to rounding has no spikes.
    edge = mean + multiple(num_std, std) + 2.0**-20 * jnp.abs(mean)
    ready = number >= jnp.asarray(min_steps).astype(jnp.float32)
    return jnp.where(ready, multiple(1 / scale, edge), LARGEST)
