"""A model of some library as a test: its clipped sums, and what is formed for them."""

import contextlib
import math
import re

import jax
import numpy as np
import optax
from per_example_oracle import SLACK, TOLERANCE, cast, each_gradient, expected, near
from trees import enable_x64

from clipfx import per_example

B, T, WIDTH, VOCABULARY = 4, 6, 32, 160
_rng = np.random.default_rng(0)
TOKENS = _rng.integers(0, VOCABULARY, (B, T), np.int32)
LABELS = np.arange(B, dtype=np.int32)


def vectors(*shape):
    """A batch of examples, of which some have larger gradients than others."""
    size = np.linspace(0.5, 2, B).reshape(B, *(1 for _ in shape))
    return size * _rng.normal(size=(B, *shape))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


@contextlib.contextmanager
def lenient():
    """For layers that add biases of lower rank, or constants of float32."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def check(loss, params, batch, *, formed=(), dtype="float64"):
    """Clips half of the examples, together and by leaf, and compares with a loop.

    The loop is `jax.grad` of one example after the other, in float64, the clipping is
    NumPy's. Whose gradients are formed for each example is what the report says, and of
    the largest leaf the compiled program must have no array of that size.

    Args:
      loss: Of one example.
      params: In any dtype.
      batch: A tree of arrays, `[B, ...]`.
      formed: Leaves whose gradients are formed for each example, and no others.
      dtype: That the clipped sums are computed in.
    """
    with enable_x64(True):
        params, batch = cast(params, dtype), cast(batch, dtype)
        report = per_example.explain(loss, params, jax.tree.map(lambda x: x[0], batch))
    assert {x.leaf for x in report.rows if x.method == "instantiated"} == set(formed)
    largest = max(x.size for x in jax.tree.leaves(params))
    grads = each_gradient(loss, params, batch)
    for groups in ("global", lambda path: path):
        _, norm, _ = expected(grads, groups)
        # Gradients of the biases of keys are nothing but rounding.
        limit = np.maximum(np.median(norm, axis=0), 1e-4 * norm.max())
        total, _, factor = expected(grads, groups, limit, slack=SLACK[dtype])
        assert (factor < 0.999).any() and (factor == 1).any()
        with enable_x64(dtype == "float64"):
            clip = per_example.clipped_grad(loss, limit.astype(dtype), groups=groups)
            step = jax.jit(clip).lower(params, batch).compile()
            sums, info = step(params, batch)
        near(info.norm, norm, TOLERANCE[dtype])
        near(info.factor, factor, TOLERANCE[dtype])
        near(sums, total, TOLERANCE[dtype])
        shapes = re.findall(r"\bf(?:32|64)\[([\d,]+)\]", step.as_text())
        assert max(math.prod(map(int, x.split(","))) for x in shapes) < B * largest
