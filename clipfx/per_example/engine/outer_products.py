r"""The gradient of one example at a site, as a sum of outer products.

:math:`G = \sum_t u_t v_t^T` over positions t: rows u of the data, or of patches of it,
or one-hot rows of an index, against rows v of the gradient of the output.
"""

from typing import NamedTuple

import jax

from clipfx._core.leaves import widen
from clipfx.per_example.engine import coefficients
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules.site import IDS, NUMBERS, Site, split_loops


class Factors(NamedTuple):
    """The gradient of one part as a sum of outer products.

    Attributes:
      left: `[S, T, K]`, or ids `[S, T]` of one-hot rows.
      right: `[S, T, N]`.
      key: The dimensions of the leaf behind S, K and N; None where unknown.
      scale: What the outer products are to be multiplied by; None for 1.
      block: Of a leaf of several matrices the one that each is in, ids `[S, T]`; None
        if there is one.
    """

    left: jax.Array
    right: jax.Array
    key: tuple | None
    scale: coefficients.Scale | None = None
    block: jax.Array | None = None

    @property
    def by_index(self) -> bool:
        """Whether rows are positions of one entry, as of a looked-up table."""
        return self.left.ndim == 2


def factors(
    site: Site,
    part: LeafSlice,
    data: jax.Array,
    delta: jax.Array,
    c: jax.Array | None = None,
) -> Factors:
    """The gradient of one example with respect to one part, as outer products.

    Args:
      site: Where.
      part: One of `site.view.parts`.
      data: Recorded operand, `[loops..., ...]`.
      delta: Gradient with respect to the output, `[loops..., ...]`.
      c: Coefficients of the weight, None if it has none.
    """
    left, right, *block = site.rule.factors(site, part, data, delta)
    if c is not None and part.scaled and site.rule.left == IDS:
        right = widen(right) * coefficients.of_rows(site, part, c, left)
        return Factors(left, right, key(site, part))
    scale = coefficients.scale(site, part, c, right.shape[0])
    return Factors(left, right, key(site, part), scale, *block)


def by_element(site: Site, part: LeafSlice) -> bool:
    """Whether nothing but the gradient itself can be multiplied by coefficients.

    Those of an addition belong to the gradient of the output, those of a table to its
    rows, and those that are products to both factors of outer products.
    """
    if site.adds or not part.scaled:
        return False
    dims = site.rule.dims(site, part)
    if dims is None or site.rule.left == IDS:
        return dims is None
    _, rows, free = dims
    return any(x.intersection(rows) and x.intersection(free) for x in part.scaled)


def differ(site: Site, part: LeafSlice) -> bool:
    """Whether coefficients differ within the one outer product that there is."""
    if site.adds or not part.scaled or site.rule.left == IDS:
        return False
    dims = site.rule.dims(site, part)
    within = None if dims is None else {*dims[1], *dims[2]}
    several = sizes(site, part)[1] > 1
    return not several and (within is None or any(x & within for x in part.scaled))


def key(site: Site, part: LeafSlice) -> tuple | None:
    """The dimensions of the leaf behind S, K and N; None where unknown."""
    outer, _ = split_loops(site, part)
    stacks = dict(part.stack)
    stacked = [stacks[site.loops[k][0]] for k in outer]
    if part.dims is None or None in stacked:
        return None
    dims = site.rule.dims(site, part)
    if dims is None:
        return None
    first = tuple(k for dims in stacked for k in dims or ())
    batch, rows, free = (tuple(k for d in ds for k in part.dims[d]) for ds in dims)
    return first + batch, rows, free


def sizes(site: Site, part: LeafSlice) -> tuple[int, int, int, int]:
    """S, T, K and N of the factors of a part."""
    if site.adds:
        return 1, 1, 1, 1
    turns = tuple(n for _, n in site.loops)
    like = lambda v: jax.ShapeDtypeStruct((*turns, *v.aval.shape), v.aval.dtype)
    data = site.operands({n: like(v) for _, n, v in site.recorded})
    left, right, *_ = jax.eval_shape(
        lambda x, d: tuple(site.rule.factors(site, part, x, d)),
        data,
        like(site.tapped.outvars[0]),
    )
    left, right = left.shape, right.shape
    left = left if site.rule.left == NUMBERS else (*left, site.rule.rows(site))
    return (*left, right[2])
