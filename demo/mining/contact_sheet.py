"""One picture of the best pairs: both pictures side by side, their cosines by encoder, and their questions."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure, SubFigure

from llava_clipmoe.files import atomic_file

from .pairs import BlindPair

PAIRS, COLUMNS = 20, 2
WIDTH, HEIGHT = 7.2, 2.3
"""Inches of one pair."""
NAME, LINE = 28, 42
"""Characters that fit under a picture, and beside it."""


def draw_contact_sheet(pairs: Sequence[BlindPair], path: Path, title: str) -> None:
    """Write the first PAIRS pairs to `path` (PNG). Raises SaveError."""
    pairs = pairs[:PAIRS]
    rows = -(-len(pairs) // COLUMNS)
    figure = Figure(figsize=(WIDTH * COLUMNS, HEIGHT * rows + 0.6), dpi=100)
    top, sheet = figure.subfigures(2, 1, height_ratios=[0.6, HEIGHT * rows])
    top.text(0.02, 0.5, title, fontsize=13, va="center", parse_math=False)
    cells = sheet.subfigures(rows, COLUMNS, squeeze=False).flat
    for number, (cell, pair) in enumerate(zip(cells, pairs, strict=False), start=1):
        _draw_pair(cell, pair, number)
    with atomic_file(path) as temporary, warnings.catch_warnings():
        # A file's name may be in a script that the font does not have: boxes then, not a page of warnings.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png")


def _draw_pair(cell: SubFigure, pair: BlindPair, number: int) -> None:
    grid = {"left": 0.03, "right": 1, "top": 0.98, "bottom": 0.22, "wspace": 0.05}
    *pictures, words = cell.subplots(1, 3, width_ratios=[1, 1, 1.9], gridspec_kw=grid)
    for axes, letter, image, name in zip(pictures, "AB", pair.images, pair.names, strict=True):
        axes.imshow(matplotlib.image.imread(image, format="png"), interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
        axes.set_xlabel(f"{letter}: {_short(name)}", fontsize=8, labelpad=3, parse_math=False)
    lines = [f"{number}.  gap {pair.gap:.3f}{'' if pair.passed else '  (below the thresholds)'}"]
    lines += [f"{encoder:<9} {cosine:7.4f}" for encoder, cosine in pair.cosines.items()]
    for question in pair.questions[:2]:
        lines += ["", *textwrap.wrap(question.question, LINE, max_lines=2)]
        lines += textwrap.wrap(f"A: {question.answers[0]}   B: {question.answers[1]}", LINE, max_lines=1)
    if len(pair.questions) > 2:
        lines.append(f"and {len(pair.questions) - 2} more questions")
    words.axis("off")
    style = {"fontsize": 8.5, "family": "monospace", "va": "top", "linespacing": 1.25, "parse_math": False}
    words.text(0, 1, "\n".join(lines), transform=words.transAxes, **style)


def _short(name: str) -> str:
    """At most NAME characters: a name's first words; a path's end, which says more than its start."""
    if len(name) <= NAME:
        return name
    return textwrap.shorten(name, NAME, placeholder="…") if " " in name[:NAME] else "…" + name[1 - NAME :]
