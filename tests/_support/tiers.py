"""Which cases of a test run by default, and which in `.ci/run` alone."""

from collections.abc import Container, Iterable
from typing import Any

import pytest


def in_tiers(cases: dict[str, Any] | Iterable[str], usual: Container[str]) -> list[Any]:
    """Parameters of a test, of which the full tier alone runs those not usual."""
    named = cases if isinstance(cases, dict) else {name: name for name in cases}
    marks = lambda name: () if name in usual else pytest.mark.full
    return [pytest.param(x, id=name, marks=marks(name)) for name, x in named.items()]
