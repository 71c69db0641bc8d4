"""What `suggest` found as one page of HTML, its pictures inside, nothing to load."""

import html
from collections.abc import Mapping, Sequence

import numpy as np

from clipfx.calibrate.suggest import Suggestion

_WIDTH, _HEIGHT, _LEFT, _EDGE = 860, 260, 62, 22
_POINTS = 2000  # in a picture; of longer runs the largest norm of each stretch
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 880px; margin: 2em auto; }}
svg {{ width: 100%; }}
svg text {{ font-size: 12px; fill: currentColor; }}
.norm {{ fill: none; stroke: #3b7dd8; }}
.at {{ stroke: #d9822b; stroke-dasharray: 6 4; }}
.bad {{ fill: #d13d3d; }}
.grid {{ stroke: currentColor; opacity: 0.15; }}
pre {{ overflow-x: auto; font-size: 12px; }}
</style>
<h1>{title}</h1>
<p><strong>Begin with</strong> {advice}</p>
{notes}
{pictures}
<pre>{table}</pre>
</html>
"""


def page(
    title: str,
    norms: Mapping[str, np.ndarray],
    found: Suggestion,
    notes: Sequence[str] = (),
) -> str:
    """A page with a picture of each group's norms `[T]` and its thresholds."""
    said = (*notes, *found.warnings)
    return _PAGE.format(
        title=html.escape(title),
        advice=html.escape(found.advice),
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in said),
        pictures="\n".join(
            f"<h2>{html.escape(group)}</h2>\n"
            + _picture(column, found.thresholds[group], found.rates)
            for group, column in norms.items()
        ),
        table=html.escape(str(found)),
    )


def _picture(
    norms: np.ndarray, thresholds: Sequence[float], rates: Sequence[float]
) -> str:
    """Norms over steps on a logarithmic scale; dots on top for what is not finite."""
    usable = np.isfinite(norms) & (norms > 0) & (norms < np.finfo(np.float32).max)
    logs = np.log10(norms[usable])
    low, high = np.floor(logs.min() * 4) / 4, np.ceil(logs.max() * 4) / 4
    high = max(high, low + 0.25)
    last = max(len(norms) - 1, 1)
    x = lambda step: _LEFT + step / last * (_WIDTH - _LEFT - _EDGE)
    y = lambda log: _EDGE + (high - log) / (high - low) * (_HEIGHT - 2 * _EDGE)
    parts = []
    for tick in np.linspace(low, high, 5):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _EDGE}" '
            f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
            f'<text x="4" y="{y(tick) + 4:.1f}">{10**tick:.3g}</text>'
        )
    steps = np.flatnonzero(usable)
    places = _thinned(logs)
    points = " ".join(f"{x(steps[k]):.1f},{y(logs[k]):.1f}" for k in places)
    parts.append(f'<polyline class="norm" points="{points}"/>')
    for limit, rate in zip(thresholds, rates, strict=True):
        if limit > 0:
            at = y(np.log10(limit))
            parts.append(
                f'<line class="at" x1="{_LEFT}" x2="{_WIDTH - _EDGE}" '
                f'y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{_WIDTH - _EDGE}" y="{at - 3:.1f}" text-anchor="end">'
                f"{100 * rate:g}%: {limit:.4g}</text>"
            )
    for step in np.flatnonzero(~usable & (norms != 0))[:_POINTS]:
        parts.append(f'<circle class="bad" cx="{x(step):.1f}" cy="10" r="3"/>')
    parts.append(f'<text x="{_LEFT}" y="{_HEIGHT - 4}">step 0</text>')
    parts.append(
        f'<text x="{_WIDTH - _EDGE}" y="{_HEIGHT - 4}" text-anchor="end">{last}</text>'
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}">{"".join(parts)}</svg>'


def _thinned(logs: np.ndarray) -> np.ndarray:
    """Places to draw, the largest of each stretch, so that no spike is lost."""
    if len(logs) <= _POINTS:
        return np.arange(len(logs))
    stretches = np.array_split(np.arange(len(logs)), _POINTS)
    return np.array([part[np.argmax(logs[part])] for part in stretches])
