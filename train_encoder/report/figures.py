"""Figures of a page: values in, one inline SVG (text) out.

The same values give the same bytes (fixed hash salt, no dates, no pixels), nothing outside the page is referred to, and
axes and text take the page's own text colour, so that one SVG reads well on a light and on a dark page.
"""

from __future__ import annotations

import contextlib
import io
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d9822b", "#3a9b6c", "#8d6fc0", "#cf5a5a", "#7d8590")  # mid-tones: readable on white and black
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
PERCENT = matplotlib.ticker.FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
Values = Mapping[str, Sequence[float]]
"""Recipe -> its values by seed."""
_INK = "#010203"  # replaced by the page's text colour
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "llava-clipmoe",
    "font.family": "DejaVu Sans",  # comes with matplotlib, so the layout is the same on every machine
    "font.size": 8.5,
    "text.parse_math": False,  # a "$" in a data set's name is a dollar
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": "#8b929b",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8b929b",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "xtick.color": "#8b929b",
    "ytick.color": "#8b929b",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def style() -> matplotlib.rc_context:
    """The look of every figure, as a context: matplotlib's own settings stay what they were."""
    return matplotlib.rc_context(_STYLE)


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Render as inline SVG. `name` (letters, digits) keeps ids apart on a page; `label`: what a screen reader says."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata=_NO_METADATA)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r"\s*<style type=\"text/css\">.*?</style>", "", svg, flags=re.S)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1system-ui, sans-serif", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    width, height = (72 * side for side in figure.get_size_inches())
    opening = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:{width * 1.35:.0f}px" stroke-linejoin="round">'
    )
    return re.sub(r"<svg.*?>", lambda _: opening, svg, count=1, flags=re.S).strip()


@contextlib.contextmanager
def panel(
    width: float, height: float, title: str = "", xlabel: str = "", ylabel: str = ""
) -> Iterator[tuple[Figure, Axes]]:
    """A figure and its axes in the look of all figures (width and height in inches); call `to_svg` in the `with`."""
    with style():
        figure = Figure(figsize=(width, height))
        axes = figure.add_subplot()
        axes.set_title(_short(title, 44), loc="left")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        yield figure, axes


def name_rows(axes: Axes, names: Sequence[object]) -> None:
    """A named row at every whole number of the y axis, the first one on top."""
    axes.set_yticks(np.arange(len(names)), [_short(name, 18) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()


def _short(text: object, length: int = 22) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1] + "…"


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Centred moving average over `window` points (fewer at the ends); a point that is not finite stays a gap."""
    x = np.asarray(values, dtype=np.float64)
    finite = np.isfinite(x)
    kernel = np.ones(min(window, len(x)))
    total = np.convolve(np.where(finite, x, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def curve(name: str, title: str, steps: Sequence[int], values: Sequence[float], ylabel: str, colour: int = 0) -> str:
    """One quantity over training: the logged values thin (500 of them at most), their moving average over a 20th of the
    curve bold."""
    keep = np.unique(np.linspace(0, len(values) - 1, min(len(values), 500)).round().astype(int))
    x, raw = np.asarray(steps)[keep], np.asarray(values, dtype=np.float64)[keep]
    even = smooth(values, max(3, len(values) // 20))[keep]
    with panel(4.0, 2.5, title, "step", ylabel) as (figure, axes):
        axes.plot(x, np.where(np.isfinite(raw), raw, np.nan), color=COLOURS[colour], alpha=0.5, linewidth=0.9)
        axes.plot(x, even, color=COLOURS[colour], linewidth=1.8, marker="o" if len(x) == 1 else None)
        return to_svg(figure, name, f"{ylabel} of {title} by step")


def cluster_sizes(name: str, title: str, sizes: Sequence[int], batch: int | None) -> str:
    """Sizes of a stage's clusters, largest first, on a log scale; the line is one global batch."""
    ordered = np.sort(np.asarray([size for size in sizes if size > 0]))[::-1]
    with panel(4.0, 2.5, title, "cluster, largest first", "images") as (figure, axes):
        axes.stairs(ordered, np.arange(len(ordered) + 1) + 0.5, fill=True, color=COLOURS[0], alpha=0.75, baseline=0.5)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_ylim(0.7, max(ordered.max(initial=1), batch or 1) * 2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        if batch:
            axes.axhline(batch, color=COLOURS[1], linewidth=1.4, linestyle="--")
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"one batch: {batch:,}", (1, batch), (-2, 2), va="bottom", **place)
        return to_svg(figure, name, f"cluster sizes of {title}")


def heatmap(
    name: str,
    title: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[object],
    columns: Sequence[object],
    limits: tuple[float, float],
    text: Callable[[float], str],
    label: str,
) -> str:
    """Values by block (rows, the first one on top) and expert (columns); colours reach over `limits`.

    text: what stands in a field. label: what a screen reader says.
    """
    low, high = limits
    colours = matplotlib.colormaps["viridis"]
    grid = np.asarray(values, dtype=np.float64)
    with panel(max(2.8, 0.65 * len(columns) + 1.4), 0.9 + 0.21 * len(rows), title, "expert", "block") as (figure, axes):
        axes.pcolormesh(grid, cmap=colours, vmin=low, vmax=high, edgecolors="none", rasterized=False)
        for (row, column), value in np.ndenumerate(grid):
            red, green, blue, _ = colours((value - low) / (high - low))
            ink = "#111111" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
            axes.text(column + 0.5, row + 0.5, text(value), ha="center", va="center", color=ink, fontsize=7.5)
        axes.set_xticks(np.arange(len(columns)) + 0.5, [str(column) for column in columns])
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_short(row, 18) for row in rows])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.invert_yaxis()
        return to_svg(figure, name, label)


def lines_by_block(name: str, title: str, series: Mapping[str, tuple[Sequence, Sequence[float]]]) -> str:
    """Shares by block, a line a tower. `series`: tower -> (block numbers, values)."""
    with panel(4.0, 2.5, title, "block") as (figure, axes):
        for colour, (label, (blocks, values)) in zip(COLOURS, series.items(), strict=False):
            axes.plot(blocks, values, color=colour, marker="o", markersize=3, label=_short(label))
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.legend(loc="best")
        return to_svg(figure, name, title)


def stacked_bars(name: str, title: str, rows: Sequence[str], parts: Mapping[str, Sequence[float]], xlabel: str) -> str:
    """A horizontal bar a row, made of `parts`: what it is -> its value in every row."""
    legend = len(parts) > 1
    with panel(4.4, 1.1 + 0.27 * len(rows) + 0.25 * legend, title, xlabel) as (figure, axes):
        left = np.zeros(len(rows))
        for index, (label, values) in enumerate(parts.items()):
            colour = COLOURS[index % len(COLOURS)]
            axes.barh(np.arange(len(rows)), values, left=left, height=0.65, color=colour, label=_short(label))
            left += np.asarray(values, dtype=np.float64)
        name_rows(axes, rows)
        if legend:
            figure.legend(loc="outside lower center", ncols=min(3, len(parts)))
        return to_svg(figure, name, title)


def scores_with_errors(name: str, title: str, scores: Values) -> str:
    """Mean, spread and every seed of each recipe, a row each; the first recipe is the base."""
    rows, means = np.arange(len(scores)), list(map(statistics.mean, scores.values()))
    with panel(4.4, 0.9 + 0.3 * len(scores), title) as (figure, axes):
        spreads = list(map(_spread, scores.values()))
        axes.errorbar(means, rows, xerr=spreads, fmt="o", color=COLOURS[0], capsize=3, markersize=5)
        for row, values in zip(rows, scores.values(), strict=True):
            axes.scatter(values, [row] * len(values), s=7, color=COLOURS[1], zorder=3, alpha=0.8)
        axes.axvline(means[0], color=COLOURS[5], linewidth=1, linestyle="--")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.xaxis.set_major_formatter(PERCENT)
        name_rows(axes, list(scores))
        return to_svg(figure, name, f"{title}: mean and spread by recipe")


def cost_against_score(name: str, xlabel: str, costs: Values, scores: Values) -> str:
    """A mark a recipe."""
    with panel(4.4, 3.0 + 0.14 * len(costs), "score against cost", xlabel) as (figure, axes):
        for number, (recipe, x) in enumerate(costs.items()):
            y, colour = scores[recipe], COLOURS[number % len(COLOURS)]
            look = {"fmt": MARKS[number % len(MARKS)], "markersize": 6, "elinewidth": 0.9, "color": colour}
            spread = {"xerr": _spread(x), "yerr": _spread(y)}
            axes.errorbar(statistics.mean(x), statistics.mean(y), **spread, **look, label=recipe)
        axes.yaxis.set_major_formatter(PERCENT)
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        figure.legend(loc="outside lower center", ncols=3)
        return to_svg(figure, name, f"mean retrieval by {xlabel}, a mark a recipe")


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
