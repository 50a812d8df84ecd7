"""One model for every page: a run's report, a comparison, a compression. A document is built once, then printed (its
tables by rich), written as Markdown, or written as one HTML file that needs nothing else.

    Document("A run", "What it is.", [Section("scores", "Scores", ["Some prose.", Table(["variant", "R@1"], rows)])])

Prose knows **bold** and `code`, as in Markdown. Everything is escaped on its way to the page, but for figures (SVG).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from rich.table import Table as RichTable
from rich.text import Text

from .numbers import Score


@dataclass(frozen=True)
class Table:
    """Rows of text or `Score`s; the first column names the row. A `title` and a `note` stand above it."""

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str | Score]]
    title: str = ""
    note: str = ""
    folded: str = ""
    """HTML: the table is hidden behind this line until it is clicked."""
    tiles: Sequence[tuple[str, str]] = ()
    """HTML: (what it is, the figure) of the few that are shown large above the table."""

    def markdown(self) -> str:
        lines = [f"**{self.title}**{f' ({self.note})' if self.note else ''}\n"] if self.title else []
        for number, row in enumerate([self.head, *self.rows]):
            cells = [cell.markdown() if isinstance(cell, Score) else cell for cell in row]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            if number == 0:
                lines.append("|---" * len(row) + "|")
        return "\n".join(lines)

    def __rich__(self) -> RichTable:
        view = RichTable(title=Text(self.title, "table.title") if self.title else None)
        for number, name in enumerate(self.head):
            view.add_column(Text(name), justify="right" if number else "left", no_wrap=not number)
        for row in self.rows:
            cells = [cell if isinstance(cell, Score) else Score(cell) for cell in row]
            view.add_row(*(Text(cell.text, style="bold" if cell.best else "") for cell in cells))
        return view


@dataclass(frozen=True)
class Figure:
    """Panels (SVG, from figures.py) and how to read them. Markdown has no figures."""

    kind: ClassVar[str] = "figure"
    panels: Sequence[str]
    how_to_read: str

    def markdown(self) -> str:
        return ""


@dataclass(frozen=True)
class Code:
    """Lines to copy."""

    kind: ClassVar[str] = "code"
    text: str

    def markdown(self) -> str:
        return f"```\n{self.text}\n```"


Block = str | Table | Figure | Code
"""A part of a section; a plain string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    anchor: str
    title: str
    blocks: Sequence[Block]

    @property
    def tables(self) -> list[Table]:
        return [block for block in self.blocks if isinstance(block, Table)]

    def markdown(self) -> str:
        parts = [block if isinstance(block, str) else block.markdown() for block in self.blocks]
        return "\n\n".join([f"## {self.title}", *filter(None, parts)])


@dataclass(frozen=True)
class Document:
    """A whole page."""

    title: str
    lead: str
    sections: Sequence[Section]
    points: Sequence[str] = field(default_factory=list)
    """Sentences in a box at the top."""
    points_title: str = ""
    window_title: str = ""
    """What a browser's tab says; the title when absent."""

    def markdown(self) -> str:
        points = "\n".join(f"- {point}" for point in self.points)
        parts = [f"# {self.title}", self.lead, self.points_title, points, *(one.markdown() for one in self.sections)]
        return "\n\n".join(filter(None, parts)) + "\n"

    def html(self) -> str:
        """The whole file; the same document gives the same bytes."""
        return _TEMPLATES.get_template("page.html.j2").render(page=self)


def _inline(text: str) -> Markup:
    """Prose with Markdown's **bold** and `code` -> HTML; all else is escaped."""
    bold = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", bold))


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["inline"] = _inline
