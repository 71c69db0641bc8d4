"""Every difference between JAX versions, and nothing else.

Features are detected, never inferred from a version string.
"""

import sys
from typing import Any

import jax


def varying_axes(x: jax.typing.ArrayLike) -> frozenset[str]:
    """Returns the mesh axes that `x` varies over inside `jax.shard_map`.

    Empty outside `shard_map`, and where its `check_vma=False` or `jax.pmap` keep no
    such types.
    """
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)  # jax >= 0.10
    if manual is not None:
        return frozenset(manual.varying)
    return frozenset(getattr(aval, "vma", ()))


def is_boxed(node: Any) -> bool:
    """Whether `node` is a Flax box around one array.

    `nnx.Optimizer` shows boxes to `init` and bare arrays to `update`, so a path must
    end where the box begins. Flax is looked up, not imported: where it is not loaded,
    no tree can hold its boxes.
    """
    nnx = sys.modules.get("flax.nnx")
    meta = sys.modules.get("flax.core.meta")
    return (nnx is not None and isinstance(node, nnx.Variable)) or (
        meta is not None and isinstance(node, meta.AxisMetadata)
    )
