"""Sums of contributions of populations, none of which outweighs the others."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipfx import _compat, responses
from clipfx._core import builder, populations
from clipfx._core.checks import helpful, is_known
from clipfx._core.clip_factors import finite_norms
from clipfx._core.export import exportable
from clipfx._core.groups import Groups, is_counted
from clipfx._core.leaves import narrow, widen
from clipfx._core.paths import check_stacked, ranks
from clipfx._core.populations import (
    Bounds,
    bound,
    check_bounds,
    check_populations,
    combine,
    each,
)
from clipfx._types import AxisName, Scalar
from clipfx.thresholds import Threshold


@exportable("clipfx.FairGroupsState")
class FairGroupsState(NamedTuple):
    """What `clip_fair_groups` learns.

    Attributes:
      averages: float32 `[K]`, of norms, 0 where never seen; `()` if not needed.
      ranks: Numbers of axes of the parameters, as structure.

    Reference: none.
    """

    averages: Any
    ranks: Any


@helpful
def clip_fair_groups(
    max_ratio: Scalar = 2.0,
    *,
    num_populations: int | None = None,
    reference: str | int = "min",
    floor: Scalar = 0.05,
    batch_axis_name: AxisName | None = None,
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
      num_populations: K >= 1, the size of the first axis of all updates; None means 2.
        Static.
      reference: What to measure by: `"min"`, the smallest contribution present;
        `"ema"`, the smallest of the populations' average norms, 9 parts past and 1 part
        present, which also speak for those absent from a batch; or the number of one
        population, if it is present, else as `"min"`. Static.
      floor: :math:`\phi \ge 0`; with 0 the bound always holds.
      batch_axis_name: Mesh axes to add contributions up over before norms are taken,
        for `pmap` and `shard_map(check_vma=False)` with examples split over devices.
        Static.

    Returns:
      A transform from contributions `[K, ...]`, as `clipfx.per_example.population_grad`
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
    count = check_populations(2 if num_populations is None else num_populations)
    bounds = check_bounds(Bounds(max_ratio, reference, floor), count)
    members = Groups(tuple(f"population_{k}" for k in range(count)), ())

    def init(groups: Groups, params: Any) -> FairGroupsState:
        averages = jnp.zeros(count, jnp.float32) if reference == "ema" else ()
        return FairGroupsState(averages, ranks(params))

    def measure(updates: Any, groups: Groups, params: Any, kept: Any) -> tuple:
        leaves = jax.tree.leaves(updates)
        _check_contributions(leaves, count)
        made = "clipfx.per_example.population_grad makes them"
        check_stacked(updates, params, kept.ranks, "populations", made)
        wide = [widen(jnp.asarray(x)) for x in leaves if is_counted(x)]
        if batch_axis_name is not None:
            wide = [jax.lax.psum(x, batch_axis_name) for x in wide]
        wide = [_compat.lead_whole(x) for x in wide]
        rows = [[x[k] for x in wide] for k in range(count)]
        norms = populations.measure(rows)
        total = finite_norms(norms)[-1]
        return each(norms), {"rows": rows, "all_norms": norms, "total": total}

    def rule(norm, kept, *, all_norms, present=None, **_) -> tuple:
        present = _check_present(present, count)
        limit, averages = bound(all_norms, bounds, kept.averages, present)
        return limit, kept._replace(averages=averages)

    def add_up(updates: Any, step: builder.Step) -> tuple[Any, jax.Array]:
        sums = iter(combine(step.facts["rows"], step.factors, step.norm))
        leaves, treedef = jax.tree.flatten(updates)
        out = [narrow(next(sums), jnp.asarray(x).dtype) if is_counted(x)
               else jnp.zeros_like(x[0]) for x in leaves]  # fmt: skip
        return treedef.unflatten(out), step.factor()

    return builder.by_norm(
        Threshold(init, rule),
        responses.hard,
        groups=members,
        nonfinite="zero",
        measure=measure,
        apply=add_up,
    )


def _check_contributions(leaves: Sequence[Any], count: int) -> None:
    shapes = {jnp.shape(x) for x in leaves}
    wrong = sorted(shape for shape in shapes if shape[:1] != (count,))
    if wrong:
        raise ValueError(
            f"updates must have an axis of num_populations={count} first, got "
            f"shape {wrong[0]}; clipfx.per_example.population_grad makes such."
        )


def _check_present(present: Any, count: int) -> Any:
    if present is None:
        return None
    nobody = is_known(present) and not np.asarray(present).any()
    present = jnp.asarray(present)
    if present.shape != (count,) or present.dtype != jnp.bool_:
        raise ValueError(
            f"present must be bool[{count}], one entry for each population, "
            f"got {present.dtype}{list(present.shape)}; False marks one that is absent."
        )
    if nobody:
        raise ValueError(
            "present must be True for a population, got all absent; there is nothing "
            "to sum."
        )
    return present
