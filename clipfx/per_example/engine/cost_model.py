"""What the uses of a leaf allow together, and what its norm costs."""

import itertools
from typing import Any

from clipfx.per_example.engine import ghost_norm, target
from clipfx.per_example.engine.outer_products import by_element, key, sizes
from clipfx.per_example.engine.param_views import LeafSlice
from clipfx.per_example.engine.rules.site import IDS, Site, slices_of

# Multiplications in the time that it takes to move a word through memory three times: a
# gradient that is instantiated is written, read for its norm and read for the sum. Of
# two CPU cores, measured, and less where a batch of it stays in a core's cache; of
# others what makers of TPUs (v5e, v5p) and of the H100 say.
_WORDS, _WORDS_IN_CACHE, _WORDS_ELSEWHERE = 96, 32, 1024
_CACHE = 2**18  # words
BIAS_SUM = "bias sum"


def words(batch: int) -> int:
    """What to move a word of an instantiated gradient costs, in multiplications.

    Args:
      batch: How many words there are in one batch, which may be symbolic.
    """
    if not target.is_cpu():
        return _WORDS_ELSEWHERE
    few = isinstance(batch, int) and batch <= _CACHE
    return _WORDS_IN_CACHE if few else _WORDS


def unaligned(places: list[tuple[Site, LeafSlice]], outer: dict[int, int]) -> str:
    """Why several uses of a leaf cannot be measured together, empty if they can.

    Args:
      places: The uses.
      outer: By region, how many loops are around it.
    """
    for site, part in places:
        if site.region is not None:
            around = {loop for loop, _ in site.loops[: outer[site.region]]}
            if around - {loop for loop, _ in part.stack}:
                return "a loop around a rematerialized part"
    for (s1, p1), (s2, p2) in itertools.combinations(places, 2):
        if s1.region != s2.region and (
            p1.region is None or p2.region is None or not _apart(p1.region, p2.region)
        ):
            return "uses in different rematerialized parts"
        if p1.region is None or p2.region is None:
            return "several uses in different forms"
        if p1.region != p2.region:
            if not _apart(p1.region, p2.region):
                return "uses that overlap"
        elif by_element(s1, p1) or by_element(s2, p2):
            return "several uses, scaled by element"
        elif not _measured_together((s1, p1), (s2, p2)):
            return "several uses in different forms"
    return ""


def unsliced(places: list[tuple[Site, LeafSlice]], outer: dict[int, int]) -> str:
    """Why slices of a leaf cannot be measured by themselves, empty if they can.

    Args:
      places: The uses.
      outer: By region, how many loops are around it.
    """
    turns: dict[int, set] = {}
    for site, part in places:
        found = slices_of(site, part)
        if found is None:
            return "a group for each slice, of which several are used at a time"
        around = 0 if site.region is None else outer[site.region]
        if found[0] is not None and found[0] < around:
            turns.setdefault(site.region or 0, set()).add(part.region)
    if any(len(regions) > 1 for regions in turns.values()):
        return "a group for each slice, of which a turn uses several"
    return ""


def _measured_together(*places: tuple[Site, LeafSlice]) -> bool:
    keys = [key(site, part) for site, part in places]
    rows = all(site.rule.left == IDS for site, _ in places)
    same = ghost_norm.fits(keys) and (keys[0] == keys[1] or not rows)
    return same and len({site.adds for site, _ in places}) == 1


def _apart(a: tuple, b: tuple) -> bool:
    return any(x[1] <= y[0] or y[1] <= x[0] for x, y in zip(a, b, strict=True))


def by_region(
    places: list[tuple[Site, LeafSlice]],
) -> list[list[tuple[Site, LeafSlice]]]:
    """The uses of a leaf, together where they are of the same region of it."""
    groups: dict[Any, list] = {}
    for site, part in places:
        # That of a scalar is (), known and the same for all.
        region = site.number if part.region is None else part.region
        groups.setdefault(region, []).append((site, part))
    return list(groups.values())


def factored_cost(places: list[tuple[Site, LeafSlice]]) -> tuple[str, int]:
    """The method by outer products, and its cost in multiplications."""
    cost, method = 0, BIAS_SUM
    for region in by_region(places):
        if region[0][0].adds:
            continue
        method = "outer product" if method == BIAS_SUM else method
        each = [(site.rule, *sizes(site, part)) for site, part in region]
        _, s, _, k, n = each[0]
        dense = sum(t for rule, _, t, _, _ in each if rule.left != IDS)
        rows = sum(t for rule, _, t, _, _ in each if rule.left == IDS)
        cost += s * (dense + rows) * (k * (dense > 0) + n)
        if dense + rows > 1:
            method = "Gram" if dense else "segment sum"
            cost += s * (dense * dense * (k + n) // 2 + dense * rows * n + rows * n)
        if any(rule.copied for rule, *_ in each):
            cost += 2 * words(_CACHE + 1) * s * dense * k
    return method, cost


def costs_more(places: list[tuple[Site, LeafSlice]], formed: int) -> bool:
    """Whether outer products cost more than to form so many words for each example."""
    return factored_cost(places)[1] > formed * words(_CACHE + 1)


def only_formed(site: Site, part: LeafSlice) -> bool:
    """Whether norms at a site have to be those of the gradient itself."""
    return by_element(site, part) and sizes(site, part)[1] > 1
