"""Convolutions: positions are those of the output, rows are patches of the data."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clipfx._core.leaves import widen
from clipfx.per_example.engine import primitives
from clipfx.per_example.engine.param_views import LeafSlice, ParamView
from clipfx.per_example.engine.primitives import Convolution
from clipfx.per_example.engine.rules import site as sites
from clipfx.per_example.engine.rules.site import Site, SiteRule


def _why_not(eqn: Any, weight: int, view: ParamView) -> str | None:
    if view.repeated:
        return f"{eqn.primitive.name} of a broadcast"
    if view.axis is not None:
        return f"{eqn.primitive.name} of a concatenation"
    if weight != 1:
        return "convolution of a parameter"
    grouped = primitives.convolution(eqn).batch_groups != 1
    return "batch_group_count" if grouped else None


def _factors(site: Site, part: LeafSlice, x: jax.Array, d: jax.Array) -> tuple:
    x = sites.floating(x, widen(d).dtype)
    conv, lead = primitives.convolution(site.eqn), len(site.loops)
    images = sites.matrix(x, [*range(lead), lead + conv.lhs[0]],
                          *[[lead + k] for k in conv.lhs[1:]])  # fmt: skip
    kernel = [site.shape[k] for k in conv.rhs[2:]]
    space = [site.eqn.outvars[0].aval.shape[k] for k in conv.out[2:]]
    patches = _patches(images, kernel, space, conv)
    turns = [n for _, n in site.loops]
    count = x.shape[lead + conv.lhs[0]]
    patches = patches.reshape(*turns, count, conv.groups, -1, math.prod(space))
    rows = jnp.transpose(d, [*range(lead), *(lead + k for k in conv.out)])
    rows = rows.reshape(*turns, count, conv.groups, -1, math.prod(space))
    outer, inner = sites.split_loops(site, part)
    split = ([*outer, lead + 1], [*inner, lead, lead + 3], [lead + 2])
    return sites.matrix(patches, *split), sites.matrix(rows, *split)


def _patches(
    images: jax.Array, kernel: list, space: list, conv: Convolution
) -> jax.Array:
    """What each output position sees, `[images, channels, kernel size, *space]`."""
    edges = zip(conv.padding, conv.lhs_dilation, strict=True)
    padding = [(0, 0, 0), (0, 0, 0), *((lo, hi, step - 1) for (lo, hi), step in edges)]
    images = lax.pad(images, jnp.zeros((), images.dtype), padding)
    patches = []
    for offset in np.ndindex(*kernel):
        start = [o * r for o, r in zip(offset, conv.rhs_dilation, strict=True)]
        ends = zip(start, space, conv.strides, strict=True)
        stop = [a + (n - 1) * step + 1 for a, n, step in ends]
        patches.append(lax.slice(images, (0, 0, *start), (*images.shape[:2], *stop),
                                 (1, 1, *conv.strides)))  # fmt: skip
    return jnp.stack(patches, axis=2)


def _dims(site: Site, part: LeafSlice) -> tuple[list[int], ...] | None:
    """Of groups rows and columns are both parts of a dimension of the kernel."""
    conv = primitives.convolution(site.eqn)
    out, *rows = conv.rhs
    return None if conv.groups > 1 else ([], rows, [out])


RULE = SiteRule(
    left=sites.NUMBERS,
    why_not=_why_not,
    operand=sites.other_input,
    factors=_factors,
    dims=_dims,
    gradient=functools.partial(sites.transposed, sites.bind_numbers),
    copied=True,
)
