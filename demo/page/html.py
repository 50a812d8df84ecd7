"""The parts of the page that Gradio has no component for: the board of answers, bars, the table of scores.

Their HTML is in parts.html.j2, where every text is escaped; here is what goes into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train_encoder.evaluate.judge import names_answer, same_answer

from ..llava.ask import Board, Cell
from ..mining.pairs import Question
from ..scores import Scores, interval, verdict

BLIND = "the same answer for both pictures, though the truth differs"
SAME = "the same answer for both pictures"
COSINE_NAMES = {"dense": "CLIP", "clip-moe": "CLIP-MoE", "dinov2": "DINOv2"}
COSINE_NAMES |= {f"expert{i}": f"expert {i}" for i in range(64)}
"""What the page calls the keys of a pair's cosines."""
ALL = "all"

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, auto_reload=False
)


def _render(macro: str, *values: Any) -> str:
    return str(getattr(_environment.get_template("parts.html.j2").module, macro)(*values))


def board(cells: Board, columns: Sequence[str], truth: tuple[str, str] | None = None, *, timing: bool = True) -> str:
    """The four answers: a column for each LLaVA, a row for each picture; ticks where the truth is known.

    A badge marks a column with one answer for both pictures. timing: show seconds under each answer (not while a vote
    is blind: the slower one could be told by them).
    """
    both = range(len(columns))
    heads = [(name, _badge([cells[i, 0], cells[i, 1]], truth)) for i, name in enumerate(columns)]
    rows = [[(cells[i, picture], _is_right(cells[i, picture], picture, truth)) for i in both] for picture in (0, 1)]
    return _render("board", heads, truth, rows, timing)


def _is_right(cell: Cell, picture: int, truth: tuple[str, str] | None) -> bool | None:
    """None for an answer that is not known to be right or wrong."""
    if truth is None or cell.state != "done":
        return None
    return names_answer(cell.text, truth[picture], truth[1 - picture])


def _badge(cells: Sequence[Cell], truth: tuple[str, str] | None) -> tuple[str, str] | None:
    """(kind, text) for one answer given twice."""
    if any(cell.state != "done" for cell in cells) or not same_answer(cells[0].text, cells[1].text):
        return None
    return ("same", SAME) if truth is None or same_answer(*truth) else ("blind", BLIND)


def cosines(values: Mapping[str, float], names: Mapping[str, str] = COSINE_NAMES) -> str:
    """How alike each tower finds the pair: a bar from 0 to 1 each. names: what to call a key of `values`."""
    if not values:
        return ""
    rows = [(names.get(key, key), value, f"{value:.3f}") for key, value in values.items()]
    return bars("How alike each eye finds the two (cosine)", rows)


def bars(title: str, rows: Sequence[tuple[str, float, str] | tuple[str, float, str, str]]) -> str:
    """Rows of (label, share, value) under a title; share: the bar's length, 0 to 1. A fourth part: the bar's class."""
    return _render("bars", title, [(*row, "")[:4] for row in rows])


def progress(done: int, total: int, text: str) -> str:
    """A progress bar that assistive technology reads."""
    return _render("progress", done, total, text)


def note(text: str) -> str:
    return _render("note", text)


def pair(names: Sequence[str], questions: Sequence[Question]) -> str:
    """The names of a pair's pictures, and its questions with both right answers."""
    return _render("pair", names, questions)


def scores(found: Scores) -> str:
    """Pair accuracy by attribute, both LLaVAs, with bars; and what the difference says. "" before the first item."""
    right = [found.right(llava) for llava in (0, 1)]
    count = min(map(len, right))
    if not count:
        return ""
    rows = []
    for attribute in (ALL, *dict.fromkeys(item.attribute for item in found.items[:count])):
        which = [i for i in range(count) if attribute in (ALL, found.items[i].attribute)]
        rows.append((attribute, [_share([values[i] for i in which]) for values in right], len(which)))
    same = [f"{name}: {found.same(i)} of {len(found.texts[i]) // 2}" for i, name in enumerate(found.names)]
    notes = [verdict(found), "One answer given for both pictures (blind to the difference): " + " · ".join(same)]
    return _render("scores", found.names, rows, notes)


def _share(right: Sequence[bool]) -> tuple[float, str]:
    """(share, the share with its interval in per cent)."""
    share = sum(right) / len(right)
    low, high = interval(sum(right), len(right))
    return share, f"{share:.0%} ({100 * low:.0f}–{100 * high:.0f})"
