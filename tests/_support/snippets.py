"""Blocks of a page of docs/, by their headings, and what they define when pasted."""

import pathlib
import re

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def text_of(page):
    return (DOCS / f"{page}.md").read_text()


def block(page, heading):
    """The first block of code below a heading."""
    below = re.split(rf"^#+ {re.escape(heading)}\n", text_of(page), flags=re.M)[1]
    return re.findall(r"^```python\n(.*?)^```", below, re.DOTALL | re.M)[0]


def run(page, *headings, names=None):
    """Runs their blocks one behind the other, as pasted; gives what they define."""
    names = {} if names is None else {**names}
    exec("import clipfx, jax, jax.numpy as jnp, optax", names)
    for heading in headings:
        exec(compile(block(page, heading), f"{page}: {heading}", "exec"), names)
    return names
