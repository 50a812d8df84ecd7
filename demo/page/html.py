"""The parts of the page that Gradio has no component for: the board of answers, bars, the table of scores.

Their HTML is in parts.html.j2, where every text is escaped; here is what goes into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from train_encoder.evaluate.judge import names_answer, same_answer

from ..llava.ask import Board
from ..llava.similarity import Match
from ..mining.pairs import EYES
from ..scores import Scores, verdict
from ..votes import interval

BLIND = "the same answer for both pictures, though the truth differs"
SAME = "the same answer for both pictures"
COSINE_NAMES = {"dense": "CLIP", "clip-moe": "CLIP-MoE", "dinov2": "DINOv2"}
COSINE_NAMES |= {f"expert{i}": f"expert {i}" for i in range(64)}
"""What the page calls the keys of a pair's cosines."""
ALL = "all"
CHANCE = "Share of pairs of which both statements choose their own picture (95% interval); chance is 25%."
VERDICTS = ("matches none", "matches one", "matches both")
"""By the number of statements that choose their own picture."""

_environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
_parts = _environment.get_template("parts.html.j2").module


def _part(name: str, *values: Any) -> str:
    return str(getattr(_parts, name)(*values))


bars, progress, note, pair = (partial(_part, name) for name in ("bars", "progress", "note", "pair"))


def board(cells: Board, columns: Sequence[str], truth: tuple[str, str] | None = None, *, timing: bool = True) -> str:
    """The four answers: a column for each LLaVA, a row for each picture; ticks where the truth is known.

    A badge marks a column with one answer for both pictures. timing: show seconds under each answer (not while a vote
    is blind: the slower one could be told by them).
    """
    heads = []
    for i, name in enumerate(columns):
        first, second = cells[i, 0], cells[i, 1]
        badge = None
        if first.state == second.state == "done" and same_answer(first.text, second.text):
            badge = ("same", SAME) if truth is None or same_answer(*truth) else ("blind", BLIND)
        heads.append((name, badge))
    rows = []
    for picture in (0, 1):
        row = []
        for i in range(len(columns)):
            cell, right = cells[i, picture], None
            if truth is not None and cell.state == "done":
                right = names_answer(cell.text, truth[picture], truth[1 - picture])
            row.append((cell, right))
        rows.append(row)
    return _part("board", heads, truth, rows, timing)


def cosines(values: Mapping[str, float], names: Mapping[str, str] = COSINE_NAMES) -> str:
    """How alike each tower finds the pair: a bar from 0 to 1 each. names: what to call a key of `values`."""
    rows = [(names.get(key, key), value, f"{value:.3f}") for key, value in values.items()]
    return bars("How alike each eye finds the two (cosine)", rows) if rows else ""


def matches(names: Sequence[str], statements: Sequence[str], found: Sequence[Match | str]) -> str:
    """Both statements, and for each eye a table of cosines: a row for each statement, a column for each picture, and
    how many match. A text in place of a Match says why there is none."""
    return _part("matches", marked(*statements), list(zip(names, found, strict=True)), VERDICTS)


Parts = list[tuple[str, bool]]
"""A text in parts: (words, whether they are marked)."""


def marked(first: str, second: str) -> tuple[Parts, Parts]:
    """Both texts, those words marked that the other one does not have there. Nothing is marked where the two have no
    word in common."""
    one, two = first.split(), second.split()
    steps = SequenceMatcher(None, one, two, autojunk=False).get_opcodes()
    some = any(step == "equal" for step, *_ in steps)
    parts: tuple[Parts, Parts] = [], []
    for step, a, b, c, d in steps:
        for words, own in zip((one[a:b], two[c:d]), parts, strict=True):
            if words:
                own.append((" ".join(words), some and step != "equal"))
    return parts


def right_by_attribute(table: Mapping[str, Mapping[str, int]]) -> str:
    """The table of `mining.pairs.right_by_attribute`, with bars; "" where no pair has scores."""
    if not table:
        return ""
    rows = [
        (attribute, [_share(counts[eye], counts["pairs"]) for eye in EYES], counts["pairs"])
        for attribute, counts in table.items()
    ]
    return _part("scores", [COSINE_NAMES[eye] for eye in EYES], rows, [CHANCE], "pairs")


def scores(found: Scores) -> str:
    """Pair accuracy by attribute, both LLaVAs, with bars; and what the difference says. "" before the first item."""
    right = [found.right(llava) for llava in (0, 1)]
    count = min(map(len, right))
    if not count:
        return ""
    rows = []
    for attribute in (ALL, *dict.fromkeys(item.attribute for item in found.items[:count])):
        which = [i for i in range(count) if attribute in (ALL, found.items[i].attribute)]
        rows.append((attribute, [_share(sum(values[i] for i in which), len(which)) for values in right], len(which)))
    same = [f"{name}: {found.same(i)} of {len(found.both(i))}" for i, name in enumerate(found.names)]
    notes = [verdict(found), "One answer given for both pictures (blind to the difference): " + " · ".join(same)]
    return _part("scores", found.names, rows, notes, "questions")


def _share(right: int, count: int) -> tuple[float, str]:
    """(share, the share with its interval in per cent)."""
    share = right / count
    low, high = interval(right, count)
    return share, f"{share:.0%} ({100 * low:.0f}–{100 * high:.0f})"
