"""Names of states in programs that `jax.export` has written."""

from collections.abc import Callable
from typing import Any, TypeVar

from jax import export

_T = TypeVar("_T", bound=type[Any])


def exportable(name: str) -> Callable[[_T], _T]:
    """Lets `jax.export` write a NamedTuple, under a name that never changes.

    Args:
      name: Unique, like `"clipfx.ClipState"`; it outlives the class's own.
    """

    def register(cls: _T) -> _T:
        export.register_namedtuple_serialization(cls, serialized_name=name)
        return cls

    return register
