"""Reads the metrics of every clip out of any optimizer state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipfx import _compat
from clipfx._core.checks import helpful
from clipfx._core.paths import ordered
from clipfx._core.state import ClipMetrics, ClipState

__all__ = ["read"]


@helpful
def read(opt_state: Any, prefix: str = "clip") -> dict[str, Any]:
    """Finds every `ClipState` and names its numbers.

    Looks through `optax.chain`, `named_chain`, `masked`, `partition`, `MultiSteps`,
    `apply_if_finite`, `inject_hyperparams`, and the `opt_state` of a Linen
    `TrainState` or an `nnx.Optimizer`.

    Args:
      opt_state: The state of an optimizer, or anything that holds one.
      prefix: What keys begin with; the clips are numbered in the order they are found.

    Returns:
      A flat dict: `clip0/norm/decoder/layer_3`, and likewise `threshold`, `factor`,
      `steps`, `clipped`, `nonfinite`, and `clip_rate`, the share of steps that were
      clipped (0 before the first). A state of `clipfx.per_stacked_layer` adds the
      number of the layer: `clip0/norm/global/11`. Values are scalars: NumPy's, with one
      transfer for each vector, or traced ones under `jit`. A state without a clip
      gives an empty dict.

    Example:
      >>> import clipfx, jax.numpy as jnp
      >>> tx = clipfx.clip_by_global_norm(1.0)
      >>> grads = {"w": jnp.array([3.0, 4.0])}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> float(read(state)["clip0/norm/global"])
      5.0

    Reference: none.
    """
    is_clip = lambda node: isinstance(node, ClipState)
    states = filter(is_clip, jax.tree.leaves(opt_state, is_leaf=is_clip))
    found = {}
    for number, state in enumerate(states):
        for field, values in _vectors(state.metrics).items():
            for index in np.ndindex(values.shape[:-1]):
                names = ordered(state.metrics.groups)
                for group, value in zip(names, values[index], strict=True):
                    name = "/".join(map(str, (field, group, *index)))
                    found[f"{prefix}{number}/{name}"] = value
    return found


def _vectors(metrics: ClipMetrics) -> dict[str, Any]:
    fields = metrics._asdict()
    del fields["groups"]
    bare = {k: jax.tree.leaves(v)[0] if _compat.is_boxed(v) else v
            for k, v in fields.items()}  # fmt: skip
    traced = any(isinstance(v, jax.core.Tracer) for v in bare.values())
    math = jnp if traced else np
    bare = {k: math.asarray(v) for k, v in bare.items()}
    steps = math.maximum(bare["steps"], 1)
    bare["clip_rate"] = (bare["clipped"] / steps).astype(np.float32)
    return bare
