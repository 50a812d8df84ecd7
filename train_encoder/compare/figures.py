"""Figures of a comparison: what the recipes score, and what they cost for it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..report.figures import COLOURS, name_rows, panel, to_svg

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
Values = Mapping[str, Sequence[float]]
"""Recipe -> its values by seed."""


def scores_with_errors(name: str, title: str, scores: Values) -> str:
    """Mean, spread and every seed of each recipe, a row each; the first recipe is the base."""
    rows, means = np.arange(len(scores)), list(map(statistics.mean, scores.values()))
    with panel(4.4, 0.9 + 0.3 * len(scores), title) as (figure, axes):
        spreads = list(map(_spread, scores.values()))
        axes.errorbar(means, rows, xerr=spreads, fmt="o", color=COLOURS[0], capsize=3, markersize=5)
        for row, values in zip(rows, scores.values(), strict=True):
            axes.scatter(values, [row] * len(values), s=7, color=COLOURS[1], zorder=3, alpha=0.8)
        axes.axvline(means[0], color=COLOURS[5], linewidth=1, linestyle="--")
        axes.xaxis.set_major_locator(MaxNLocator(5))
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
