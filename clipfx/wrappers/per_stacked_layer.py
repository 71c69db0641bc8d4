"""A transform for each of the layers that a leaf stacks."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipfx import _compat
from clipfx._core.checks import check_transform, helpful
from clipfx._core.reductions import apart, axes_apart
from clipfx._types import AxisName


@helpful
def per_stacked_layer(
    inner: optax.GradientTransformation,
    *,
    layer_axis_name: AxisName | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Applies a transform to each slice of layers that are stacked for `scan`.

    Where L equal layers are one leaf `[L, ...]`, a norm "per layer" or "per leaf" is
    the norm of all of them. This maps `inner` over the leading axis of every leaf, so
    each layer has a norm, and statistics, of its own. For a model with other leaves
    too, wrap it in `optax.masked` or `optax.partition`.

    Args:
      inner: Any transform; its updates, params and state are mapped, extra arguments
        are given to every slice whole.
      layer_axis_name: In `shard_map` the mesh axes that the layers are split over, a
        name or a tuple of names; `()` if every device holds all of them. Needed there
        for leaves that are split: whether within a layer or across layers their type
        does not tell. Static. Where layers are split, split the state as they are.
      axis_name: The same, by the name that it has in other transforms: all that updates
        are split over here are layers.

    Returns:
      A transform whose state is that of `inner` with a leading axis, `[L, ...]`.

    Raises:
      TypeError: If `inner` is not a gradient transformation.
      ValueError: If the leaves do not share the size of their leading axis, or are
        split in `shard_map` and `layer_axis_name` says nothing of it.

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
    check_transform("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        if not jax.tree.leaves(params):  # no params yet, as in optax.tree.map_params
            return inner.init(params)
        size = _stack_size(params)
        if not any(
            isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)
        ):
            return jax.vmap(inner.init)(params)
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        repeat = lambda x: jnp.broadcast_to(x, (size, *jnp.shape(x)))
        return jax.tree.map(repeat, inner.init(jax.tree.map(one, params)))

    def update(updates, state, params=None, **extra_args):
        if not jax.tree.leaves(updates):
            return inner.update(updates, state, params, **extra_args)
        _stack_size(updates)
        what = "the layers of per_stacked_layer"
        split = axis_name if layer_axis_name is None else layer_axis_name
        axes = axes_apart(updates, split, "layer_axis_name", what)
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
