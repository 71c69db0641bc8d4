"""What the examples share: text, tables, pictures, files of metrics."""

import json
import logging
import math
import pathlib
import zipfile
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


def load_digits(path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, P]` of P pixels in [-1, 1], and their labels `[N]` from 0 to 9.

    Args:
      path: An `.npz` file of `images [N, ...]`, in numbers of any range, and whole
        `labels [N]`; by default the 1797 digits of scikit-learn, 8 pixels by 8.

    Raises:
      ValueError: If that is not what the file has, or scikit-learn is not installed.
    """
    if path is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            lacks = "the digits are missing: pip install scikit-learn."
            raise ValueError(lacks) from None
        images, labels = load_digits(return_X_y=True)
    else:
        images, labels = _read_images(path)
    images = np.asarray(images, np.float32).reshape(len(images), -1)
    low, high = images.min(), images.max()
    return 2 * ((images - low) / (high - low)) - 1, np.asarray(labels, np.int32)


def _read_images(path: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as file:
            images, labels = file["images"], file["labels"]
    except OSError as error:
        raise ValueError(f"cannot read {path!r}: {error.strerror or error}.") from None
    except (EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        wanted = "is no .npz file with arrays named images and labels"
        raise ValueError(f"{path!r} {wanted}.") from None
    if images.ndim < 2 or labels.shape != images.shape[:1] or len(labels) < 100:
        raise ValueError(
            f"{path!r} must have images [N, ...] and labels [N], 100 or more, got "
            f"{list(images.shape)} and {list(labels.shape)}."
        )
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"the labels of {path!r} must be whole numbers from 0 to 9.")
    with np.errstate(all="ignore"):
        real = images.dtype.kind in "biuf" and 0 < np.ptp(np.float32(images)) < math.inf
    if not real:
        raise ValueError(f"the images of {path!r} must be numbers, and not all alike.")
    return images, labels


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


def plot_band(
    axes: Axes, x: Any, y: np.ndarray, color: str, spread: str = "range", **style: Any
) -> None:
    """Draws the mean over the last axis of `[x, seeds]`, and its range or deviation."""
    mean = y.mean(1)
    low, high = y.min(1), y.max(1)
    if spread == "deviation":
        low, high = np.maximum(mean - y.std(1), 0), mean + y.std(1)
    axes.plot(x, mean, color=color, lw=1.2, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)


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
