"""What of each group is in each region of a program that rematerializes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipfx._core.groups import Groups, each_of, picked
from clipfx.per_example.engine.plan import Plan, Region
from clipfx.per_example.engine.rules.site import groups_of, slices_of


class Columns(NamedTuple):
    """What a region measures, and bounds, apart from each other.

    Attributes:
      ids: int32 `[outer loops..., N]`, in every turn the group of each of N columns.
      axes: Per column the mesh axes of `jax.shard_map` that its leaves are split over.
      index: Per leaf its column, or those of its slices along the first dimension; None
        where there are none.
    """

    ids: np.ndarray
    axes: tuple[frozenset[str], ...]
    index: tuple[Any, ...]

    def by_axes(self) -> dict[frozenset[str], list[int]]:
        """Which columns vary over the same mesh axes."""
        found: dict[frozenset[str], list[int]] = {}
        for k, axes in enumerate(self.axes):
            found.setdefault(axes, []).append(k)
        return found

    def parts(
        self, rows: Sequence[jax.Array]
    ) -> list[tuple[frozenset[str], tuple[int, ...], jax.Array]]:
        """Powers `[outer loops..., M, 4, 2]` by mesh axes, in rows of groups."""
        return [
            (axes, tuple(self.ids[..., which].reshape(-1).tolist()),
             x.reshape(-1, *x.shape[-2:]))
            for x, (axes, which) in zip(rows, self.by_axes().items(), strict=True)
        ]  # fmt: skip

    def in_order(self, rows: Sequence[jax.Array]) -> jax.Array:
        """`[B, N, ...]` from `[B, M, ...]` by mesh axes."""
        order = [k for which in self.by_axes().values() for k in which]
        joined = rows[0] if len(rows) == 1 else jnp.concatenate(rows, 1)
        return picked(joined, np.argsort(order).tolist(), 1)

    def of_turn(self, values: jax.Array, ids: Any) -> jax.Array:
        """Of `[B, G]` what belongs to the columns of one turn, `[B, N]`.

        Args:
          values: By group.
          ids: `[N]`; None where they are the same in every turn.
        """
        if ids is None:
            return picked(values, self.ids.reshape(-1).tolist(), 1)
        number = jnp.arange(values.shape[1], dtype=ids.dtype)
        chosen = ids[None, :, None] == number[None, None]
        return jnp.where(chosen, values[:, None], 0).sum(-1)  # thresholds are infinite


def of_regions(
    plan: Plan, members: Groups, split: Sequence[frozenset[str]]
) -> dict[int, Columns]:
    """By region its columns.

    Args:
      plan: Decisions.
      members: Of the leaves.
      split: Per leaf the mesh axes of `jax.shard_map` that it is split over.
    """
    regions = plan.regions.items()
    return {n: _of_region(plan, region, members, split) for n, region in regions}


def _of_region(
    plan: Plan, region: Region, members: Groups, split: Sequence[frozenset[str]]
) -> Columns:
    numbers: dict[Any, int] = {}
    local: list[Any] = [None] * len(plan.uses)
    shape: tuple[int, ...] = ()

    def column(leaf: int, groups: np.ndarray) -> int:
        key = (tuple(groups.reshape(-1).tolist()), split[leaf])
        return numbers.setdefault(key, len(numbers))

    for leaf, places in enumerate(region.uses):
        index = members.index[leaf]
        inside = {site.number for site, _ in places}
        for site, part in plan.uses[leaf]:
            if site.number not in inside:
                continue
            outer = site.loops[: len(site.loops) - len(region.sites[site.number].loops)]
            shape = tuple(n for _, n in outer)
            loop, groups = groups_of(site, part, index)
            each = np.array(each_of(groups), np.int32)
            if loop is not None and loop < len(outer):
                each = each.reshape([-1 if k == loop else 1 for k in range(len(outer))])
                local[leaf] = column(leaf, np.broadcast_to(each, shape))
                continue
            mine = [column(leaf, np.full(shape, g, np.int32)) for g in each]
            found = slices_of(site, part) if isinstance(index, tuple) else None
            if found is None:
                (local[leaf],) = mine
                continue
            _, low, high = found
            known = local[leaf] or (None,) * len(index)
            local[leaf] = (*known[:low], *mine, *known[high:])
    ids = np.array([ids for ids, _ in numbers], np.int32).reshape(len(numbers), *shape)
    axes = tuple(axes for _, axes in numbers)
    return Columns(np.moveaxis(ids, 0, -1), axes, tuple(local))


def each_in_one_place(plan: Plan, columns: dict[int, Columns], members: Groups) -> bool:
    """Whether no group that is in a region is in another region, turn or column.

    Nor outside of them: then its norm is known within the backward pass.
    """
    inside = [i for x in columns.values() for i in x.ids.reshape(-1).tolist()]
    outside: set[int] = set()
    for leaf, index in enumerate(members.index):
        places = [(s, p) for s, p in plan.uses[leaf] if s.number in plan.sites]
        if leaf in plan.differentiated:
            outside.update(each_of(index))
        for site, part in places:
            _, groups = groups_of(site, part, index)
            outside.update(each_of(groups))
    return len(set(inside)) == len(inside) and not outside.intersection(inside)
