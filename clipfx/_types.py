"""Names for the kinds of arguments that many functions share."""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import jax
import numpy as np

# A tree of arrays: parameters, updates, batches.
Tree: TypeAlias = Any
# A number, which `optax.inject_hyperparams` may make a traced one.
Scalar: TypeAlias = float | jax.Array | np.ndarray
# A threshold: one for all, `[G]`, by group name, a schedule, or a `Threshold`.
Limit: TypeAlias = Any
# "global", "layer", "leaf", a tree prefix of labels, a function of the tree or a path.
GroupSpec: TypeAlias = str | Tree | Callable[..., Any]
# Names of mesh axes: one or a tuple.
AxisName: TypeAlias = Hashable
# From norms and thresholds to new norms.
Response: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
# `fun(params, example, ...)`, a scalar or a pair with `has_aux`.
LossFn: TypeAlias = Callable[..., Any]
# Positions of arguments.
Positions: TypeAlias = int | tuple[int, ...]
