"""Sums of contributions of populations, none of which outweighs the others."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import _compat, responses
from clipfx._checks import (
    check_count,
    check_number,
    check_static,
    helpful,
    is_known,
)
from clipfx._clip import (
    ClipState,
    check_same_groups,
    factors,
    fresh_metrics,
    next_state,
    reported,
)
from clipfx._export import exportable
from clipfx._norms import Norms, group_norms
from clipfx._paths import check_stacked, ranks
from clipfx._statistics import LARGEST, multiple
from clipfx._tree import Groups, is_counted, narrow, times, widen

DECAY = 0.9  # of the average norm of a population


class Bounds(NamedTuple):
    """How contributions are bounded.

    Attributes:
      max_ratio: To the reference.
      reference: `"min"`, `"ema"` or the number of a population.
      floor: Share of the norm of the whole sum that the reference never goes below.
    """

    max_ratio: Any
    reference: str | int
    floor: Any


@exportable("clipfx.Populations")
class Populations(NamedTuple):
    """What `clip_fair_groups` keeps besides metrics.

    Attributes:
      averages: float32 `[K]`, of norms, 0 where never seen; `()` if not needed.
      ranks: Numbers of axes of the parameters, as structure.
    """

    averages: Any
    ranks: Any


@helpful
def clip_fair_groups(
    max_ratio: Any = 2.0,
    *,
    num_groups: int | None = None,
    reference: str | int = "min",
    floor: Any = 0.05,
    axis_name: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps every population's contribution within a multiple of the smallest.

    With :math:`c_k = \sum_{b: group(b) = k} g_b` the contribution of population k to
    the gradient and r the reference,

    .. math::
        r &= \max\bigl(\min_{k\ present} \lVert c_k \rVert,\
            \phi \lVert \textstyle\sum_k c_k \rVert\bigr) \\
        g &\leftarrow \sum_k c_k \min\Bigl(1, \frac{\rho\, r}{\lVert c_k \rVert}\Bigr)

    So no contribution exceeds :math:`\rho` times the smallest present one, unless that
    is below the floor, which keeps a population that is fitted, and contributes next to
    nothing, from stopping the training of all others.

    A population without examples, or whose contribution is zero, is absent: it has no
    say. One whose contribution is not finite is absent too, contributes nothing, and is
    counted.

    Args:
      max_ratio: :math:`\rho \ge 1`; `math.inf` bounds nothing.
      num_groups: K >= 1, the size of the first axis of all updates; None means 2.
        Static.
      reference: What to measure by: `"min"`, the smallest contribution present;
        `"ema"`, the smallest of the populations' average norms, 9 parts past and 1 part
        present, which also speak for those absent from a batch; or the number of one
        population, if it is present, else as `"min"`. Static.
      floor: :math:`\phi \ge 0`; with 0 the bound always holds.
      axis_name: Mesh axes to add contributions up over before norms are taken, for
        `pmap` and `shard_map(check_vma=False)` with examples split over devices.
        Static.

    Returns:
      A transform from contributions `[K, ...]`, as `clipfx.per_example.group_grad`
      returns them, to their bounded sum, like the parameters. `init` needs these, whose
      axes updates are held against. `update` takes `present=`
      (bool `[K]`) where zero does not mean absent. Its state is a `ClipState`; metrics
      `[K]` are of `population_0` and so on.

    Raises:
      TypeError: If an argument is no number, or no static one.
      ValueError: If an argument is out of range, updates have no axis of K populations
        before those of the parameters, or a concrete `present` has none.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_fair_groups(2.0)
      >>> params = {"w": jnp.zeros(2)}
      >>> majority_and_minority = {"w": jnp.array([[9.0, 0.0], [0.0, 1.0]])}
      >>> updates, _ = tx.update(majority_and_minority, tx.init(params), params)
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['2.000', '1.000']

    Reference: none that defines it; for populations and clipping see Esipova et al.,
    `Disparate impact in differential privacy from gradient misalignment
    <https://arxiv.org/abs/2206.07737>`_, 2023.
    """
    num_groups = check_populations(2 if num_groups is None else num_groups)
    bounds = check_bounds(Bounds(max_ratio, reference, floor), num_groups)
    names = tuple(f"population_{k}" for k in range(num_groups))
    members = Groups(names, ())

    def init(params: Any) -> ClipState:
        averages = jnp.zeros(num_groups, jnp.float32) if reference == "ema" else ()
        kept = Populations(averages, ranks(params))
        return ClipState(kept, fresh_metrics(params, members))

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        present: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, ClipState]:
        del extra_args
        leaves, treedef = jax.tree.flatten(updates)
        check_same_groups(state, members)
        _check_contributions(leaves, num_groups)
        made = "clipfx.per_example.group_grad makes them"
        check_stacked(updates, params, state.threshold.ranks, "populations", made)
        counted = [jnp.asarray(x) for x in leaves if is_counted(x)]
        wide = [widen(x) for x in counted]
        if axis_name is not None:
            wide = [jax.lax.psum(x, axis_name) for x in wide]
        wide = [_compat.lead_whole(x) for x in wide]
        rows = [[x[k] for x in wide] for k in range(num_groups)]
        present = _check_present(present, num_groups)
        scales, norm, limit, averages = bound(
            measure(rows), bounds, state.threshold.averages, present
        )
        sums, factor = combine(rows, scales, norm), scales[0] * scales[1]
        bounded = iter(narrow(x, y.dtype) for x, y in zip(sums, counted, strict=True))
        out = [next(bounded) if is_counted(x) else jnp.zeros_like(x[0])
               for x in leaves]  # fmt: skip
        kept = state.threshold._replace(averages=averages)
        return treedef.unflatten(out), next_state(state, kept, norm, limit, factor)

    return optax.GradientTransformationExtraArgs(init, update)


def measure(contributions: Sequence[Sequence[jax.Array]]) -> Norms:
    """Norms `[K + 1]` of the contributions of K populations and of their sum.

    Args:
      contributions: K times leaves `[...]`, float32 or wider.
    """
    total = [functools.reduce(jnp.add, x) for x in zip(*contributions, strict=True)]
    rows = [*contributions, total]
    index = [k for k, leaves in enumerate(rows) for _ in leaves]
    return group_norms(rows, Groups(tuple(map(str, range(len(rows)))), tuple(index)), 2)


def bound(
    norms: Norms, bounds: Bounds, averages: Any = (), present: Any = None
) -> tuple[list[jax.Array], jax.Array, jax.Array, Any]:
    """Decides on factors.

    Args:
      norms: `[K + 1]`, from `measure`.
      bounds: How.
      averages: `[K]`, averages of norms, 0 where never seen; only for `"ema"`.
      present: bool `[K]`, or None for all whose contribution is not zero.

    Returns:
      Factors `[K]` to apply in turn; norms and thresholds `[K]`; the next averages.
    """
    dtype = norms.value.dtype
    number = lambda x: jnp.asarray(x).astype(dtype)
    *_, whole = every = reported(norms, dtype)
    norm, norms = every[:-1], jax.tree.map(lambda x: x[:-1], norms)
    here = jnp.isfinite(norm) & (norm > 0)
    here = here if present is None else here & present
    usual = smallest = jnp.where(here, norm, LARGEST).min()
    if bounds.reference == "ema":
        now = reported(norms)
        after = jnp.where(averages > 0, DECAY * averages + (1 - DECAY) * now, now)
        averages = jnp.where(here, after, averages)
        usual = number(jnp.where(averages > 0, averages, LARGEST).min())
    elif bounds.reference != "min":
        own = bounds.reference
        usual = jnp.where(here[own], norm[own], smallest)
    # A sum that is not finite has no share to keep.
    least = jnp.where(jnp.isfinite(whole), multiple(number(bounds.floor), whole), 0)
    usual = jnp.maximum(usual, least)
    # Below the bound by a rounding, but not below the reference.
    ratio = number(bounds.max_ratio) * (1 - 2.0 ** (-49 if norm.itemsize == 8 else -20))
    limit = jnp.maximum(usual, multiple(ratio, usual))
    limit = jnp.broadcast_to(limit, norm.shape)
    scales = factors(norms, limit, responses.hard, "zero")
    return [*scales], reported(norms), limit, averages


def combine(
    contributions: Sequence[Sequence[jax.Array]],
    factors: Sequence[jax.Array],
    norm: jax.Array,
) -> list[jax.Array]:
    """The sum of contributions times factors `[K]`, of those with a finite norm."""
    finite = jnp.isfinite(norm)

    def bounded(k: int, x: jax.Array) -> jax.Array:
        for factor in factors:
            x = times(x, factor[k])
        return jnp.where(finite[k], x, jnp.zeros_like(x))

    add = functools.partial(functools.reduce, jnp.add)
    return [add([bounded(k, x) for k, x in enumerate(row)])
            for row in zip(*contributions, strict=True)]  # fmt: skip


def check_populations(num_groups: Any) -> int:
    """Checks the number of populations."""
    return check_count("num_groups", num_groups, 1, "it is the number of populations")


def check_bounds(bounds: Bounds, num_groups: int) -> Bounds:
    """Checks how contributions are bounded."""
    check_number("max_ratio", bounds.max_ratio, "[1, inf]", "math.inf bounds nothing")
    check_number("floor", bounds.floor, "[0, inf)", "0.05 is usual, 0 is none")
    reference = bounds.reference
    if isinstance(reference, str) and reference in ("min", "ema"):
        return bounds
    check_static("reference", reference)
    number = isinstance(reference, int | np.integer) and not isinstance(reference, bool)
    if not (number and 0 <= reference < num_groups):
        raise ValueError(
            f'reference must be "min", "ema" or the number of one of {num_groups} '
            f"populations, got {reference!r}; the first is the default."
        )
    return bounds._replace(reference=int(reference))


def _check_contributions(leaves: Sequence[Any], num_groups: int) -> None:
    shapes = {jnp.shape(x) for x in leaves}
    wrong = sorted(shape for shape in shapes if shape[:1] != (num_groups,))
    if wrong:
        raise ValueError(
            f"updates must have an axis of num_groups={num_groups} populations first, "
            f"got a leaf of shape {wrong[0]}; clipfx.per_example.group_grad makes them."
        )


def _check_present(present: Any, num_groups: int) -> Any:
    if present is None:
        return None
    nobody = is_known(present) and not np.asarray(present).any()
    present = jnp.asarray(present)
    if present.shape != (num_groups,) or present.dtype != jnp.bool_:
        raise ValueError(
            f"present must be bool[{num_groups}], one entry for each population, got "
            f"{present.dtype}{list(present.shape)}; False marks one without examples."
        )
    if nobody:
        raise ValueError(
            "present must be True for a population, got all absent; there is nothing "
            "to sum."
        )
    return present
