"""What is known of each primitive's gradient, one file a family."""

from clipfx.per_example.engine.rules.custom import Rule
from clipfx.per_example.engine.rules.registry import (
    RULES,
    evaluate,
    find,
    register_rule,
    why_not,
)
from clipfx.per_example.engine.rules.site import Site, SiteRule

__all__ = [
    "RULES",
    "Rule",
    "Site",
    "SiteRule",
    "evaluate",
    "find",
    "register_rule",
    "why_not",
]
