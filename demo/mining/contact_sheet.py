"""One picture of the best pairs: both pictures side by side, their cosines by encoder, and their questions."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure

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
    height = HEIGHT * rows + 0.6
    figure = Figure(figsize=(WIDTH * COLUMNS, height), dpi=100)
    figure.text(0.02, 1 - 0.3 / height, title, fontsize=13, va="center", parse_math=False)
    for number, pair in enumerate(pairs):
        left, top = number % COLUMNS / COLUMNS, 1 - (0.6 + HEIGHT * (number // COLUMNS)) / height
        _draw_pair(figure, pair, number + 1, left, top, height)
    with atomic_file(path) as temporary, warnings.catch_warnings():
        # A file's name may be in a script that the font does not have: boxes then, not a page of warnings.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, format="png")


def _draw_pair(figure: Figure, pair: BlindPair, number: int, left: float, top: float, height: float) -> None:
    """One pair in its cell, whose upper left corner is (left, top) in parts of the figure."""
    width, side = WIDTH * COLUMNS, 1.75  # inches
    for position, (image, name) in enumerate(zip(pair.images, pair.names, strict=True)):
        x = left + (0.25 + position * (side + 0.1)) / width
        axes = figure.add_axes((x, top - (side + 0.05) / height, side / width, side / height))
        axes.imshow(matplotlib.image.imread(image, format="png"), interpolation="antialiased")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#cccccc")
        label = f"{'AB'[position]}: {_short(name)}"
        axes.set_xlabel(label, fontsize=8, labelpad=3, parse_math=False)
    x = left + (0.25 + 2 * (side + 0.1) + 0.05) / width
    lines = [f"{number}.  gap {pair.gap:.3f}{'' if pair.passed else '  (below the thresholds)'}"]
    lines += [f"{encoder:<9} {cosine:7.4f}" for encoder, cosine in pair.cosines.items()]
    for question in pair.questions[:2]:
        lines += ["", *textwrap.wrap(question.question, LINE, max_lines=2)]
        lines += textwrap.wrap(f"A: {question.answers[0]}   B: {question.answers[1]}", LINE, max_lines=1)
    if len(pair.questions) > 2:
        lines.append(f"and {len(pair.questions) - 2} more questions")
    text = {"fontsize": 8.5, "family": "monospace", "va": "top", "linespacing": 1.25, "parse_math": False}
    figure.text(x, top - 0.05 / height, "\n".join(lines), **text)


def _short(name: str) -> str:
    """At most NAME characters: a name's first words; a path's end, which says more than its start."""
    if len(name) <= NAME:
        return name
    return textwrap.shorten(name, NAME, placeholder="…") if " " in name[:NAME] else "…" + name[1 - NAME :]
