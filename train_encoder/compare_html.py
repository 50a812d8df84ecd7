"""The page of a comparison as one self-contained HTML file: the tables of the Markdown page, and figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from . import figures
from .compare_cells import Cells
from .compare_page import Page
from .compare_tables import Scores, Section, Table, retrieval, routing_shares
from .page import CSS, Html, figure, html, join, paragraph, table

MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


def html_page(page: Page) -> str:
    """The whole file; the same comparison gives the same bytes."""
    contents = "".join(f'<a href="#{section.anchor}">{html(section.title)}</a>' for section in page.sections)
    body = "".join(
        f'<section id="{section.anchor}"><h2>{html(section.title)}</h2>{_section(section, page.cells)}</section>'
        for section in page.sections
    )
    points = "".join(f"<li>{_inline(sentence)}</li>" for sentence in page.summary)
    said = f'<div class="note"><ul>{points}</ul></div>' if points else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html(page.title)}</title><style>{CSS}</style></head><body><header><h1>{html(page.title)}</h1>"
        f'<p class="lead">{html(page.lead)}</p>{said}<nav aria-label="Contents">{contents}</nav></header>'
        f"<main>{body}<section><h2>Reproduce</h2><pre>{html(page.command)}</pre></section></main></body></html>\n"
    )


def _section(section: Section, cells: Cells) -> Html:
    parts = [paragraph(_inline(section.intro))] if section.intro else []
    for one in section.tables:
        if one.title:
            parts += [Html(f"<h3>{html(one.title)}</h3>"), *([paragraph(one.note)] if one.note else [])]
        parts.append(_table(one, one.title or section.title))
    if section.after:
        parts.append(paragraph(_inline(section.after)))
    return join(*parts, *_figures(section, cells))


def _table(one: Table, name: str) -> Html:
    return table([_inline(cell) for cell in one.head], [[_inline(cell) for cell in row] for row in one.rows], name)


def _inline(text: str) -> Html:
    """`**bold**` and `code` of Markdown."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    return Html(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))


# ------------------------------------------------------------------------------------------------------------ figures


def _figures(section: Section, cells: Cells) -> list[Html]:
    """What is drawn below a section's tables; nothing where there is nothing to draw."""
    name, of_recipes = section.anchor, [one for one in section.tables if set(cells) & set(one.scores)]
    if name in ("retrieval", "classification", "attributes"):
        panels = [
            scores_with_errors(f"{name}{i}", one.title or section.title, {r: one.scores[r] for r in cells})
            for i, one in enumerate(of_recipes)
        ]
        how = (
            "A dot is the mean over seeds, small dots are the seeds, the line is ± one standard deviation; the dashed "
            "line is the base."
        )
        return [figure(panels, how)] if panels else []
    if name == "routing":
        shares = routing_shares(cells)
        most = max(map(len, shares.values()))
        parts = {f"expert {e}": [statistics.mean(of[e]) if e < len(of) else 0.0 for of in shares.values()]
                 for e in range(most)}  # fmt: skip
        bars = figures.stacked_bars("routing", "first choices", list(shares), parts, "share of tokens")
        return [figure([bars], "Even routing gives every expert the same length.")]
    if name == "cost":
        panels = cost_panels(cells)
        how = (
            "Up and to the left is better: a higher mean of all retrieval scores, for less. Bars: ± one standard "
            "deviation over seeds."
        )
        return [figure(panels, how)] if panels else []
    return []


def scores_with_errors(name: str, title: str, scores: Mapping[str, Sequence[float]]) -> str:
    """Mean, spread and every seed of each recipe, a row each; the first recipe is the base."""
    rows = np.arange(len(scores))
    means = [statistics.mean(values) for values in scores.values()]
    spreads = [_spread(values) for values in scores.values()]
    with figures.style():
        drawn = Figure(figsize=(4.4, 0.9 + 0.3 * len(scores)))
        axes = drawn.add_subplot()
        axes.set_title(title, loc="left")
        axes.errorbar(means, rows, xerr=spreads, fmt="o", color=figures.COLOURS[0], capsize=3, markersize=5)
        for row, values in zip(rows, scores.values(), strict=True):
            axes.scatter(values, [row] * len(values), s=7, color=figures.COLOURS[1], zorder=3, alpha=0.8)
        axes.axvline(means[0], color=figures.COLOURS[5], linewidth=1, linestyle="--")
        axes.set_yticks(rows, list(scores))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(_percent))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        return figures.to_svg(drawn, name, f"{title}: mean and spread by recipe")


def cost_panels(cells: Cells) -> list[str]:
    """Score against time and against operations, both after the base."""
    scores = mean_retrieval(cells)
    if not scores:
        return []
    minutes = {recipe: [cell.cost.seconds / 60 for cell in run] for recipe, run in cells.items()}
    operations = {recipe: [cell.flops / 1e12 for cell in run] for recipe, run in cells.items()}
    return [
        cost_against_score("cost-time", "minutes after the base", minutes, scores),
        cost_against_score("cost-flops", "TFLOPs after the base", operations, scores),
    ]


def mean_retrieval(cells: Cells) -> Scores:
    """The mean of all retrieval scores of the tables, by seed; empty where nothing was retrieved."""
    section = retrieval(cells)
    if section is None:
        return {}
    return {
        recipe: [statistics.mean(values) for values in zip(*(t.scores[recipe] for t in section.tables), strict=True)]
        for recipe in cells
    }


def cost_against_score(name: str, xlabel: str, costs: Scores, scores: Scores) -> str:
    """A mark a recipe."""
    with figures.style():
        drawn = Figure(figsize=(4.4, 3.0 + 0.14 * len(costs)))
        axes = drawn.add_subplot()
        axes.set_title("score against cost", loc="left")
        axes.set_xlabel(xlabel)
        for number, recipe in enumerate(costs):
            x, y = costs[recipe], scores[recipe]
            axes.errorbar(
                statistics.mean(x), statistics.mean(y), xerr=_spread(x), yerr=_spread(y), markersize=6,
                fmt=MARKS[number % len(MARKS)], color=figures.COLOURS[number % len(figures.COLOURS)],
                label=recipe, elinewidth=0.9,
            )  # fmt: skip
        axes.yaxis.set_major_formatter(FuncFormatter(_percent))
        axes.set_xlim(left=min(0, axes.get_xlim()[0]))
        drawn.legend(loc="outside lower center", ncols=3)
        return figures.to_svg(drawn, name, f"mean retrieval by {xlabel}, a mark a recipe")


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.3g}%"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
