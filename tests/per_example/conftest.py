"""Programs are for one device, as most are, though tests have eight."""

import re

import pytest

from clipfx._core import reductions


@pytest.fixture(autouse=True)
def device_of_programs(request, monkeypatch):
    if not re.search("mesh|shard|device", request.node.nodeid):
        monkeypatch.setattr(reductions, "forced_device", "one")
