"""Programs are for one device, as most are, though tests have eight.

There gradients are added up row by row, as only large ones are outside of tests.
"""

import re

import pytest

from clipfx._core import reductions
from clipfx.per_example.engine import row_sums


@pytest.fixture(autouse=True)
def device_of_programs(request, monkeypatch):
    if not re.search("mesh|shard|device", request.node.nodeid):
        monkeypatch.setattr(reductions, "forced_device", "one")
        monkeypatch.setattr(row_sums, "_SMALL", 0)
