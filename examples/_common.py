"""What the examples share: text, tables, pictures, files of metrics."""

import json
import logging
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

# Absl shows what JAX tells at level INFO: that there is no TPU, wherever there is none.
if logging.getLogger("jax").level == logging.NOTSET:
    logging.getLogger("jax").setLevel(logging.WARNING)


def make_dir(path: str) -> pathlib.Path:
    """A directory for results; what an earlier run left there is overwritten.

    Raises:
      ValueError: If there can be no such directory.
    """
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {path!r}: {error.strerror}.") from None
    return pathlib.Path(path)


def load_text(path: str | None = None) -> str:
    """A UTF-8 file, or Python's manual, some 465 kB; `ValueError` if not readable."""
    if path is None:
        return "\n".join(topics.values())
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path!r} is not UTF-8 text: byte {error.start} cannot be decoded."
        ) from None


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's digits `[1797, 64]` in [-1, 1], and their labels.

    Raises:
      ValueError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the digits are missing: pip install scikit-learn.") from None
    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, np.float32) / 8 - 1, np.asarray(labels, np.int32)


def encode(text: str) -> tuple[str, np.ndarray]:
    """The alphabet of a text, and the text as places in that alphabet."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, ids = np.unique(codes, return_inverse=True)
    return "".join(map(chr, alphabet)), ids.astype(np.int32)


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each row under a line of names, the first column to the left."""
    cells = [list(rows[0]), *([_show(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        )
        for line in cells
    )


def plain_ticks(axes: Axes) -> None:
    """Labels a logarithmic axis that spans little with 2, 5, 10, 20."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def write_jsonl(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line; null for what is not finite, which JSON cannot say."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(map(json_line, rows))


def json_line(row: Mapping[str, Any]) -> str:
    """A row as one line of JSON."""
    plain = {k: None if _beyond_json(v) else v for k, v in row.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _beyond_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
