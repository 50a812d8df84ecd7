"""What the page shows as HTML: the board of answers, cosines, tables with bars. Every text is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from train_llava.quickstart import says_rather

from .asking import Board, Cell

BLIND = "the same answer for both pictures, though the truth differs"
SAME = "the same answer for both pictures"


def board(cells: Board, columns: Sequence[str], truth: tuple[str, str] | None = None, *, timing: bool = True) -> str:
    """The 2x2 grid: a column an eye, a row a picture; ticks where the truth is known; a badge on a blind eye.

    timing: seconds under each answer. (Not while a vote is blind: the slower one could be told.)
    """
    parts = ['<div class="board" role="table" aria-label="answers">', '<div class="corner" role="presentation"></div>']
    for column, name in enumerate(columns):
        badge = _badge([cells[column, picture] for picture in (0, 1)], truth)
        parts.append(f'<div class="eye" role="columnheader">{escape(name)}{badge}</div>')
    for picture in (0, 1):
        right = f"<small>{escape(truth[picture])}</small>" if truth else ""
        parts.append(f'<div class="which" role="rowheader">Picture {picture + 1}{right}</div>')
        for column in range(len(columns)):
            answers = None if truth is None else (truth[picture], truth[1 - picture])
            parts.append(_cell(cells[column, picture], answers, timing))
    return "".join([*parts, "</div>"])


def _cell(cell: Cell, answers: tuple[str, str] | None, timing: bool) -> str:
    mark = ""
    if answers and cell.state == "done":
        right = says_rather(cell.text, *answers)
        mark = f'<span class="mark {"right" if right else "wrong"}">{"✓ right" if right else "✗ wrong"}</span>'
    text = escape(cell.text) if cell.text else f'<span class="faint">{_waiting(cell)}</span>'
    times = f'<div class="times">{_times(cell)}</div>' if timing else ""
    return (
        f'<div class="cell {cell.state}" role="cell" aria-live="polite" aria-busy="{_busy(cell)}">'
        f'<div class="answer">{text}</div><div class="under">{mark}{times}</div></div>'
    )


def _busy(cell: Cell) -> str:
    return "true" if cell.state in ("waiting", "answering") else "false"


def _waiting(cell: Cell) -> str:
    if cell.state == "answering":
        return "looking …"
    if cell.state in ("done", "stopped"):
        return "(no answer)" if cell.state == "done" else "(stopped)"
    return f"in the queue: {cell.before} before this one" if cell.before else "waiting …"


def _times(cell: Cell) -> str:
    if cell.state == "stopped" and cell.text:
        return "stopped"
    if cell.first_seconds is None:
        return ""
    return f"first word {cell.first_seconds:.1f} s · {cell.seconds:.1f} s"


def same_answer(first: str, second: str) -> bool:
    """Equal but for case, spaces and a full stop."""
    one, two = (" ".join(text.lower().split()).rstrip(".") for text in (first, second))
    return one == two


def _badge(cells: Sequence[Cell], truth: tuple[str, str] | None) -> str:
    if any(cell.state != "done" for cell in cells) or not same_answer(cells[0].text, cells[1].text):
        return ""
    differs = truth is not None and not same_answer(*truth)
    name, text = ("blind", BLIND) if differs else ("same", SAME)
    return f'<span class="badge {name}">{text}</span>'


def cosines(values: Mapping[str, float], names: Mapping[str, str]) -> str:
    """How alike each eye finds the pair: a bar from 0 to 1 each. names: what to call a key of `values`."""
    if not values:
        return ""
    rows = [bar_row(names.get(key, key), value, f"{value:.3f}") for key, value in values.items()]
    return bars("How alike each eye finds the two (cosine)", rows)


def bars(title: str, rows: Sequence[str]) -> str:
    """Rows of `bar_row` under a title."""
    return f'<div class="bars"><div class="bars-title">{escape(title)}</div>{"".join(rows)}</div>'


def bar_row(label: str, share: float, value: str, kind: str = "") -> str:
    width = 100 * min(1.0, max(0.0, share))
    return (
        f'<div class="bar-row"><span class="bar-label">{escape(label)}</span><span class="bar"><i class="{kind}" '
        f'style="width:{width:.1f}%"></i></span><span class="bar-value">{escape(value)}</span></div>'
    )


def progress(done: int, total: int, text: str) -> str:
    """A progress bar that assistive technology reads."""
    return (
        f'<div class="running" role="status"><progress value="{done}" max="{max(1, total)}"></progress> '
        f"<span>{escape(text)}</span></div>"
    )


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
