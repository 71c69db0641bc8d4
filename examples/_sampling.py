"""Poisson samples, for examples that are private."""

from collections.abc import Iterator

import numpy as np


def draw_indices(
    count: int, batch: float, steps: int, multiple: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Batches that each of `count` examples joins with probability batch over count.

    They differ in size, and are padded with -1 to multiples of a number, so that few
    steps have to be compiled; one that nobody joined is all padding. None is cut: the
    accounting is of samples that are whole.

    Raises:
      ValueError: If jax_privacy is not installed.
    """
    try:
        from jax_privacy import batch_selection
    except ImportError:
        raise ValueError("batches need jax_privacy: pip install jax-privacy.") from None
    sampling = batch_selection.CyclicPoissonSampling(batch / count, iterations=steps)

    def draw():
        for index in sampling.batch_iterator(count, rng):
            index = batch_selection.pad_to_multiple_of(index, multiple)
            yield index if len(index) else np.full(multiple, -1)

    return draw()


def size_for(count: int, batch: float) -> int:
    """A size that hardly any batch exceeds."""
    return int(np.ceil(batch + 5 * np.sqrt(batch * (1 - batch / count))))
