"""Pictures of norms, thresholds and responses, with Matplotlib where it is installed.

Every function draws on the `ax` it is given, or on a figure of its own, and returns the
Axes: `ax.figure.savefig("norms.png")`. None shows a window or changes settings of
Matplotlib. Arrays are NumPy's or what it can convert, never traced.

Curves of many steps are drawn from the smallest and the largest value of each of some
2,000 columns, so that no spike is lost. Beyond 2,000 steps, or 100 of more than eight
curves, they are pale, and their median over each hundredth of the steps, ten or more,
stands out.

An axis is logarithmic where positive values span more than two decades; zeros are
marked at its lower edge then. Numbers that are infinite, NaN or the largest float32, as
which `ClipMetrics` keep them, are not finite: such norms are marked at the upper edge,
such thresholds are none.

The first eight
curves differ in colour, all of 32 in colour, dashes and markers together; the colours
are for the most part those of Okabe and Ito, which colour-blind people tell apart.

>>> import numpy as np
>>> grads = np.array([1.0, 2.0, 9.0, 1.0])
>>> ax = norms({"zclip": grads}, {"zclip": 3.0})
"""

from clipfx.plots.curves import compare, lines, norms, response_curves
from clipfx.plots.rows import by_clip
from clipfx.plots.spread import heat_map, histogram

__all__ = [
    "by_clip",
    "compare",
    "heat_map",
    "histogram",
    "lines",
    "norms",
    "response_curves",
]
