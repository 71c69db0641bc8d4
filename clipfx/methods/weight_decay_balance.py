"""Where a clipped step and weight decay hold each other."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from clipfx._core.checks import check_number, helpful
from clipfx._core.export import exportable
from clipfx._core.groups import group_leaves
from clipfx._core.matching import places, take
from clipfx._core.norms import cosines, measure_together
from clipfx._types import AxisName, GroupSpec, Scalar, Tree


@exportable("clipfx.WeightDecayBalance")
class WeightDecayBalance(NamedTuple):
    r"""Where a clipped step and weight decay hold each other, per group.

    Attributes:
      weight: `[G]`, :math:`\lVert w \rVert`.
      update: `[G]`, :math:`\lVert u \rVert`.
      cosine: `[G]`, of the step `-u` with `w`: positive where it points away from the
        origin.
      opposed: `[G]`, :math:`\lambda \lVert w \rVert`: the threshold at which a step
        straight away from the origin is undone altogether.
      radial: `[G]`, :math:`\lambda \lVert w \rVert / \cos\varphi`: the threshold at
        which step and decay cancel along w; infinite where the cosine is not positive.
        Below it the weights shrink along w, above they grow.
      exact: `[G]`, the threshold at which the norm of w stays what it is; infinite
        where no step can do that.
      reached: bool `[G]`, whether u is as long as `exact`, so that a clip there acts.
      groups: The names of the groups, the keys of a dict of nothing.

    Reference: none.
    """

    weight: jax.Array
    update: jax.Array
    cosine: jax.Array
    opposed: jax.Array
    radial: jax.Array
    exact: jax.Array
    reached: jax.Array
    groups: dict[str, tuple[()]]


@helpful
def weight_decay_balance(
    updates: Tree,
    params: Tree,
    *,
    weight_decay: Scalar,
    learning_rate: Scalar,
    scaled: bool = True,
    groups: GroupSpec = "layer",
    axis_name: AxisName | None = None,
) -> WeightDecayBalance:
    r"""Finds the thresholds at which a clipped step cancels weight decay.

    For :math:`w \leftarrow (1 - \eta\lambda) w - \eta u` with u of length c, and
    :math:`\cos\varphi = -\langle u, w \rangle / (\lVert u \rVert \lVert w \rVert)`:

    .. math:: c_{\text{opposed}} = \lambda \lVert w \rVert, \qquad
        c_{\text{radial}} = \frac{\lambda \lVert w \rVert}{\cos\varphi}, \qquad
        c_{\text{exact}} = \frac{\lVert w \rVert}{\eta} \Bigl(-(1-e)\cos\varphi +
        \sqrt{(1-e)^2 \cos^2\varphi + 2e - e^2}\Bigr), \quad e = \eta\lambda .

    For a cosine of 0 the last is :math:`\lVert w \rVert \sqrt{2\lambda/\eta -
    \lambda^2}`, the rotational equilibrium. It is a diagnostic: nothing is changed.
    With Adam, whose result does not depend on the scale of gradients, pass the update
    that Adam made, not the gradient; coordinate by coordinate it cancels decay where
    :math:`|u_i| = \lambda |w_i|`. Steps of sign descent thus hold :math:`|w_i|` at
    :math:`1/\lambda`, SGD that always clips :math:`\lVert w \rVert` at
    :math:`c/\lambda`. Decay that is added to the gradient before the clip has no such
    threshold: the clip scales both.

    Args:
      updates: Leaves `[...]`: gradients for SGD, else what the optimizer made of them,
        before the learning rate.
      params: Leaves `[...]` of the same structure.
      weight_decay: :math:`\lambda` >= 0.
      learning_rate: :math:`\eta` > 0.
      scaled: Whether the decay is multiplied by the learning rate, as in `optax.adamw`;
        else :math:`w \leftarrow (1 - \lambda) w - \eta u`. Static.
      groups: See `clipfx.clip_by_norm`. Static.
      axis_name: See `clipfx.clip_by_norm`. Static.

    Returns:
      `WeightDecayBalance`, `[G]` each, float32, or float64 if a leaf is.

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If one is out of range.

    Example:
      >>> w = {"w": jnp.array([3.0, 4.0])}
      >>> u = {"w": jnp.array([-3.0, -4.0])}
      >>> balance = weight_decay_balance(u, w, weight_decay=0.1, learning_rate=0.01)
      >>> [f"{x.item():.3f}" for x in (balance.cosine, balance.radial, balance.exact)]
      ['1.000', '0.500', '0.500']

    Reference: the equilibrium is that of Kosson et al., `Rotational equilibrium
    <https://arxiv.org/abs/2305.17212>`_, 2024; the thresholds follow from the update.
    """
    check_number("weight_decay", weight_decay, "[0, inf)", "pass the optimizer's")
    check_number("learning_rate", learning_rate, "(0, inf)", "pass the optimizer's")
    members = group_leaves(groups, updates)
    weights = take(params, places(params, updates, members, "params"), updates)
    u, w = measure_together((updates, weights), members, axis_name)
    cosine = -cosines(updates, weights, members, (u, w), axis_name)
    update, weight = u.value / u.scale, w.value / w.scale
    rate = jnp.asarray(learning_rate).astype(weight.dtype)
    decay = jnp.asarray(weight_decay).astype(weight.dtype)
    decay = decay if scaled else decay / rate
    opposed = decay * weight
    away = cosine > 0
    radial = jnp.where(away, opposed / jnp.where(away, cosine, 1), jnp.inf)
    share = rate * decay
    keep = (1 - share) * cosine
    rest = share * (2 - share)
    possible = keep * keep + rest >= 0
    root = jnp.sqrt(jnp.where(possible, keep * keep + rest, 0))
    # Of the two forms of the root the one that does not cancel.
    down = rest / jnp.where(keep > 0, keep + root, 1)
    exact = jnp.where(keep > 0, down, root - keep) * weight / rate
    exact = jnp.where(possible & (exact >= 0), exact, jnp.inf)
    names = dict.fromkeys(members.names, ())
    reached = update >= exact
    return WeightDecayBalance(
        weight, update, cosine, opposed, radial, exact, reached, names
    )
