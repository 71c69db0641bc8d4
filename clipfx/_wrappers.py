"""Transforms around transforms: skip steps, carry on what was cut, map over layers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat, responses
from clipfx._checks import check_number, helpful
from clipfx._clip import ClipState, factors, fresh_metrics, global_norm, next_state
from clipfx._combine import apart, axes_apart
from clipfx._export import exportable
from clipfx._match import check_state, places, put, take
from clipfx._norms import measure_together
from clipfx._range import reciprocal_power_of_two
from clipfx._statistics import (
    LARGEST,
    Window,
    check_window,
    empty_window,
    multiple,
    push,
    rows_seen,
)
from clipfx._tree import (
    Groups,
    counted_zeros,
    group_leaves,
    is_counted,
    narrow_counted,
    scale_groups,
    widen,
)


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
    window: Any = 128,
    num_std: Any = 6.0,
    min_steps: Any = 64,
    axis_name: Any = None,
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
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `SkipState`. In the metrics, `[2]`, of `skip0/clipped/global`
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
        edge = _edge(state.clip.threshold, num_std, min_steps)
        taken = jnp.isfinite(seen).all() & (seen <= edge).all()
        factor = jnp.broadcast_to(taken.astype(jnp.float32), (2,))
        learned = push(state.clip.threshold, seen)
        clip = next_state(state.clip, learned, seen, edge, factor)
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


@exportable("clipfx.ErrorFeedbackState")
class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`.

    Attributes:
      error: What was cut off and not yet given back, a tree like the updates, float32
        or wider.
      inner: State of the clip inside.

    Reference: none.
    """

    error: Any
    inner: Any


@helpful
def error_feedback(
    clip: optax.GradientTransformation,
    *,
    max_ratio: Any = 1.0,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Carries on what clipping removed, and adds it to later gradients.

    .. math:: u_t = \operatorname{clip}(g_t + e_t), \qquad
        e_{t+1} = \operatorname{clip}(g_t + e_t - u_t;\, \rho \lVert u_t \rVert)

    so that clipping delays instead of biases. The second clip bounds what is carried
    by a multiple of what was let through: without it a single spike would be played
    back, step after step, for as many steps as it was thresholds long.

    Memory: one number of float32 or wider per parameter. In private training e comes
    from unclipped gradients: it must never be released.

    Args:
      clip: A transform that shortens updates.
      max_ratio: :math:`\rho` >= 0; 0 carries nothing, `math.inf` everything.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      A transform with `ErrorFeedbackState`. Updates `[...]` keep structure, shapes and
      dtypes. On a step that is not finite the error stays as it was.

    Raises:
      TypeError: If `clip` is not a transform or `max_ratio` not a number.
      ValueError: If `max_ratio` is negative.

    Example:
      >>> clip = optax.clip_by_global_norm(1.0)
      >>> tx = optax.chain(error_feedback(clip), optax.sgd(0.1))

    Differs from the source: there the bound is a second threshold, in units of the
    gradient.

    Reference: Zhang et al., `DiceSGD <https://arxiv.org/abs/2311.14632>`_, 2024; for
    many workers Khirirat et al., `Clip21 <https://arxiv.org/abs/2305.18929>`_, 2023.
    """
    check_transform("clip", clip)
    check_number("max_ratio", max_ratio, "[0, inf]", "1 carries at most one step")
    inner = optax.with_extra_args_support(clip)

    def init(params):
        return ErrorFeedbackState(counted_zeros(params, wide=True), clip.init(params))

    def update(updates, state, params=None, **extra_args):
        check_state(state, ErrorFeedbackState, "error_feedback")
        members = group_leaves("global", updates)
        at = places(state.error, updates, members, "the state of error_feedback")
        before = error = take(state.error, at, updates)

        def combine(tree, sign):
            """The error plus or minus the counted leaves of a tree."""
            rows = zip(error, jax.tree.leaves(tree), members.index, strict=True)
            return [e if i is None else e + sign * widen(jnp.asarray(x)).astype(e.dtype)
                    for e, x, i in rows]  # fmt: skip

        error = combine(updates, 1)
        total = jax.tree.structure(updates).unflatten(error)
        total = narrow_counted(total, updates, members)
        out, after = inner.update(total, state.inner, params, **extra_args)
        error = combine(out, -1)
        left, through = measure_together((error, out), members, axis_name)
        limit = multiple(max_ratio, through.value / through.scale)
        scales = factors(left, limit, responses.hard, "zero")
        kept = scale_groups(error, members, *scales)
        finite = (jnp.isfinite(left.value) & jnp.isfinite(through.value)).all()
        rows = zip(kept, before, members.index, strict=True)
        kept = [e if i is None else jnp.where(finite, x, e) for x, e, i in rows]
        return out, ErrorFeedbackState(put(state.error, at, kept), after)

    return optax.GradientTransformationExtraArgs(init, update)


def check_transform(name: str, tx: Any) -> None:
    """Checks that an argument is a transform, and not, say, its class."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {tx!r}; pass the "
            "transform itself, such as optax.adam(1e-3) or "
            "clipfx.clip_by_global_norm(1.0)."
        )


def per_stacked_layer(
    tx: optax.GradientTransformation, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Applies a transform to each slice of layers that are stacked for `scan`.

    Where L equal layers are one leaf `[L, ...]`, a norm "per layer" or "per leaf" is
    the norm of all of them. This maps `tx` over the leading axis of every leaf, so
    each layer has a norm, and statistics, of its own. For a model with other leaves
    too, wrap it in `optax.masked` or `optax.partition`.

    Args:
      tx: Any transform; its updates, params and state are mapped, extra arguments are
        given to every slice whole.
      axis_name: In `shard_map` the mesh axes that the layers are split over, a name or
        a tuple of names; `()` if every device holds all of them. Needed there for
        leaves that are split: whether within a layer or across layers their type does
        not tell. Static. Where layers are split, split the state as they are.

    Returns:
      A transform whose state is that of `tx` with a leading axis, `[L, ...]`.

    Raises:
      TypeError: If `tx` is not a gradient transformation.
      ValueError: If the leaves do not share the size of their leading axis, or are
        split in `shard_map` and `axis_name` says nothing of it.

    Example:
      >>> import clipfx
      >>> tx = per_stacked_layer(clipfx.clip_by_global_norm(1.0))
      >>> layers = {"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}
      >>> clipped, _ = tx.update(layers, tx.init(layers))
      >>> clipped["w"]
      Array([[0.6, 0.8],
             [0.3, 0.4]], dtype=float32)

    Reference: none; Levanter and axlearn each carry a clip of their own for this.
    """
    check_transform("tx", tx)
    inner = optax.with_extra_args_support(tx)

    def init(params):
        if not jax.tree.leaves(params):  # no params yet, as in optax.tree.map_params
            return tx.init(params)
        size = _stack_size(params)
        if not any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)
        ):
            return jax.vmap(tx.init)(params)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        repeat = lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x)))
        return jax.tree.map(repeat, tx.init(jax.tree.map(one, params)))

    def update(updates, state, params=None, **extra_args):
        if not jax.tree.leaves(updates):
            return inner.update(updates, state, params, **extra_args)
        _stack_size(updates)
        axes = axes_apart(updates, axis_name, "the layers of per_stacked_layer")
        state = jax.tree.map(lambda x: _compat.vary(x, axes), state)
        each = lambda u, s, p: inner.update(u, s, p, **extra_args)
        return apart(jax.vmap(each), axes)(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _stack_size(tree: Any) -> int:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "per_stacked_layer expects leaves that share the size of a leading axis, "
            f"got shapes {shapes}; take the others out with optax.masked."
        )
    return sizes.pop()[0]
