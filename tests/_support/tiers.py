"""Which cases of a test run by default, and which in `.ci/run` alone."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def in_tiers(
    cases: dict[str, Any] | Iterable[Any], usual: Container[Any] | int
) -> list[Any]:
    """Parameters of a test, of which the full tier alone runs those not usual.

    Args:
      cases: Parameters by name, or parameters that can be told apart.
      usual: Names or parameters; or n, for the first of every n cases.
    """
    cases = cases if isinstance(cases, dict) else {case: case for case in cases}
    usual = list(cases)[::usual] if isinstance(usual, int) else usual
    return [
        pytest.param(
            x,
            id=name if isinstance(name, str) else None,
            marks=() if name in usual else pytest.mark.full,
        )
        for name, x in cases.items()
    ]
