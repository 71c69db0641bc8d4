"""What `suggest` found as one page of HTML, its pictures inside, nothing to load."""

import base64
import html
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clipfx import plots
from clipfx.calibrate.replay import Replay, as_groups
from clipfx.calibrate.suggest import Suggestion

# In inches: in a window, and on a telephone, where letters stay as large.
_WIDTHS = {"wide": 9.6, "narrow": 4.6}
_ADAPTING = ("quantile_clip", "autoclip(90.0)", "zclip(max_norm")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6774; --line: #dde3e9;
  --card: #f6f8fa; --mark: #0072b2; --page: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4;
  --line: #36414c; --card: #1d252d; --mark: #58b4ea; --page: #13191f; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--page); max-width: 1000px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; line-height: 1.3; margin: 4px 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 6px; }
p { margin: 6px 0; }
.soft, figcaption, small { color: var(--soft); font-size: 14px;
  overflow-wrap: anywhere; }
code, pre { font: 0.9em ui-monospace, monospace; }
h1 code { color: var(--mark); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; margin: 14px 0; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(104px, 1fr));
  gap: 10px; margin: 22px 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 12px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; font-size: 21px; font-variant-numeric: tabular-nums; }
ul { padding-left: 20px; }
li { margin: 4px 0; }
.warn { border-left: 4px solid #d55e00; background: var(--card);
  padding: 8px 14px; border-radius: 0 8px 8px 0; margin: 8px 0; }
figure { margin: 10px 0 0; }
figure img { width: 100%; height: auto; display: block; background: #fff;
  border: 1px solid var(--line); border-radius: 8px; }
figcaption { margin-top: 6px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px;
  font-variant-numeric: tabular-nums; margin-top: 8px; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size: 13px;
  vertical-align: bottom; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
.bar { display: block; height: 4px; margin-top: 3px; border-radius: 2px;
  background: linear-gradient(to right, var(--mark) var(--share), var(--line) 0); }
tr.begin td { background: var(--card); }
.methods td:first-child { padding-left: 8px; }
@media (max-width: 640px) {
  body { padding: 14px 14px 48px; }
  h1 { font-size: 22px; }
  .methods thead { display: none; }
  .methods tr { display: grid; grid-template-columns: 1fr 1fr; gap: 0 16px;
    padding: 10px 8px; border-bottom: 1px solid var(--line); }
  .methods td { border: 0; padding: 2px 0; text-align: left; }
  .methods td:first-child, .methods td:last-child { grid-column: 1 / -1; padding: 0; }
  .methods td[data-name]::before { content: attr(data-name) " "; color: var(--soft);
    font-size: 13px; }
  tr.begin { background: var(--card); }
}
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{begin}: {source}</title>
<style>{style}</style></head>
<body>
<p class="soft">Gradient norms of {source}</p>
<h1>Begin with <code>{begin}</code></h1>
<p>{why}</p>
<pre>tx = optax.chain(clipfx.{begin}, optimizer)</pre>
{warnings}
{facts}
{pictures}
<h2>Thresholds</h2>
<p class="soft">The norm that so many of the steps exceed.</p>
{thresholds}
{per_layer}
<h2>Methods on these norms</h2>
<p class="soft">Each ran over the norms as they were recorded. A run that is clipped has
other parameters, and other norms, from the first clip on: look at its metrics too.</p>
{methods}
</body></html>
"""


def page(
    source: str,
    norms: Mapping[str, np.ndarray],
    found: Suggestion,
    replays: Mapping[str, Replay],
    notes: Sequence[str] = (),
) -> str:
    """The page, of norms `[T]` by group and what each method did on them."""
    say = html.escape
    warnings = (*notes, *found.warnings)
    why = found.advice.removeprefix(f"{found.begin}: ")
    return _PAGE.format(
        style=_STYLE,
        source=say(source),
        begin=say(found.begin),
        why=say(why[:1].upper() + why[1:]),
        warnings="\n".join(f'<p class="warn">{say(x)}</p>' for x in warnings),
        facts=_facts(found),
        pictures=_pictures(norms, found, replays),
        thresholds=_thresholds(found),
        per_layer=_per_layer(found),
        methods=_methods(found),
    )


def _facts(found: Suggestion) -> str:
    whole = found.stats[-1]
    facts = {
        "steps": f"{whole.steps:,}",
        "median norm": f"{whole.median:.3g}",
        "spread": f"{whole.spread:.2f}",
        "tail index": f"{whole.tail_index:.1f}",
        "drift": f"x {whole.drift:.2g}",
        "spikes": f"{len(whole.spikes)}",
        "not finite": f"{whole.nonfinite}",
    }
    boxes = (f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return (
        f"<dl>{''.join(boxes)}</dl>\n"
        '<p class="soft">spread: deviation of the logarithm of norms from their recent '
        "median, 0.1 is quiet, 1 wild; tail index: below 2 the variance is infinite; "
        "drift: last quarter over first; spikes: far above the 50 steps before.</p>"
    )


# ------------------------------------------------------------------------------ tables


def _thresholds(found: Suggestion) -> str:
    head = ("norm of", "median", "spread", "spikes",
            *(f"{100 * rate:g}%" for rate in found.rates))  # fmt: skip
    rows = [
        (s.group, f"{s.median:.4g}", f"{s.spread:.2f}", f"{len(s.spikes)}",
         *(f"{limit:.4g}" for limit in found.thresholds[s.group]))
        for s in found.stats
    ]  # fmt: skip
    kind = lambda k: " class=number" * (k > 0)
    line = lambda tag, row: "".join(
        f"<{tag}{kind(k)}>{html.escape(x)}</{tag}>" for k, x in enumerate(row)
    )
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{line("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _per_layer(found: Suggestion) -> str:
    lines = found.per_layer()
    if not lines:
        return ""
    return f"<p>A threshold for each:</p>\n<pre>{html.escape(lines)}</pre>"


def _methods(found: Suggestion) -> str:
    rows = []
    for setting in found.settings:
        more = f"<br><small>{html.escape(setting.warning)}</small>"
        rows.append(
            f"<tr{' class=begin' * (setting.method == found.begin)}>"
            f"<td><code>{html.escape(setting.name)}</code></td>"
            f'<td class=number data-name="clips">{setting.clip_rate:.1%}'
            f'<span class=bar style="--share: {100 * setting.clip_rate:.1f}%"></span>'
            f'</td><td class=number data-name="mean factor">{setting.mean_factor:.3g}'
            f"</td><td>{html.escape(setting.advice)}{more * bool(setting.warning)}</td>"
            "</tr>"
        )
    head = (
        "<th>setting<th class=number>clips<th class=number>mean<br>factor<th>for what"
    )
    return (
        f'<table class="methods"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


# ---------------------------------------------------------------------------- pictures


def _pictures(
    norms: Mapping[str, np.ndarray], found: Suggestion, replays: Mapping[str, Replay]
) -> str:
    """Those that there are, or a sentence without Matplotlib."""
    try:
        drawn = [
            f"<h2>{title}</h2>\n<figure>{_twice(draw, title)}"
            f"<figcaption>{caption}</figcaption></figure>"
            for title, caption, draw in _drawings(norms, found, replays)
        ]
    except ImportError as error:
        return f'<p class="warn">No pictures: {html.escape(str(error))}</p>'
    return "\n".join(drawn)


def _drawings(
    norms: Mapping[str, np.ndarray], found: Suggestion, replays: Mapping[str, Replay]
) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Title, caption, and what draws."""
    columns = as_groups(norms)
    whole = np.sqrt(sum(x.astype(np.float64) ** 2 for x in columns.values()))
    begin = replays[found.begin]
    limit = begin.threshold[:, 0] if begin.threshold.shape[1] == 1 else None
    clipped = begin.clipped.any(axis=1)
    yield (
        "Norms over the steps",
        "Dots are steps that the setting above would have clipped, crosses steps that "
        "were not finite.",
        lambda: plots.norms(whole, limit, clipped=clipped, log=True, legend=False),
    )
    yield (
        "How many steps have which norm",
        "Strokes at the lower edge are the largest norms.",
        lambda: plots.histogram(whole, limit, log=True, legend=False),
    )
    if len(columns) > 1:
        yield (
            "Groups",
            "A cell has the largest norm of its steps.",
            lambda: plots.heat_map(columns),
        )
    adapting = [name for name in replays if name.startswith(_ADAPTING)]
    limits = {name: replays[name].threshold[:, 0] for name in adapting}
    unbounded = dict.fromkeys(adapting, np.inf)  # the thresholds are what to compare
    yield (
        "Thresholds that adapt",
        "The norm is grey; the lines are what each method would have allowed.",
        lambda: plots.compare(whole, unbounded, limits, log=True, legend=False),
    )


def _twice(draw: Callable[[], Any], title: str) -> str:
    """For a window, and for a narrow one; a picture each, in the page itself."""
    data = {}
    for name, width in _WIDTHS.items():
        ax = draw()
        figure = ax.figure
        figure.set_size_inches(width, figure.get_figheight())
        handles, labels = ax.get_legend_handles_labels()
        if handles and ax.get_legend() is None:
            wide = name == "wide"
            place = "outside right upper" if wide else "outside lower center"
            figure.legend(handles, labels, loc=place, ncols=2 - wide, fontsize=8)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        data[name] = base64.b64encode(file.getvalue()).decode()
    uri = "data:image/svg+xml;base64,"
    return (
        f'<picture><source media="(max-width: 640px)" srcset="{uri}{data["narrow"]}">'
        f'<img alt="{html.escape(title)}" src="{uri}{data["wide"]}"></picture>'
    )
