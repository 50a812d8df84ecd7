"""One document, three ways out: terminal, Markdown and HTML say the same, and nothing of the data becomes markup."""

from __future__ import annotations

import io
import re

from rich.console import Console

from train_encoder.report.document import Code, Document, Figure, Section, Table
from train_encoder.report.numbers import Score, duration, score

EVIL = "<script>&|[bold]"
TABLE = Table(["variant", EVIL], [["base", score(0.5, n=100)], [EVIL, score(0.5625, best=0.5625, base=0.5)]], EVIL, "n")
PAGE = Document(
    EVIL, "A **lead** of `code`.", [Section("a", EVIL, [f"**{EVIL}**", TABLE, Figure(["<svg/>"], EVIL), Code(EVIL)])]
)


def test_html_escapes_all_but_the_figures_and_knows_bold_and_code():
    page = PAGE.html()
    assert "<script" not in page and page.count("<svg/>") == 1
    assert "A <b>lead</b> of <code>code</code>." in page and "<b>&lt;script&gt;&amp;|[bold]</b>" in page
    assert re.search(r"<td>50\.0\s*<small>±5\.0</small>", page)
    assert re.search(r'<td><b>56\.2</b>\s*<br><small class="up">\+6\.2</small>', page)
    assert '<a href="#a">' in page and '<section id="a">' in page and "{%" not in page and "{{" not in page


def test_markdown_has_the_same_cells_and_a_bar_in_one_splits_no_row():
    lines = PAGE.markdown().splitlines()
    assert "| base | 50.0 ±5.0 |" in lines and "| <script>&\\|[bold] | **56.2** (+6.2) |" in lines
    assert f"**{EVIL}** (n)" in lines and lines[0] == f"# {EVIL}" and "<svg/>" not in lines


def test_the_terminal_shows_text_as_it_is_and_the_best_in_bold():
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    console.print(TABLE)
    text = console.file.getvalue()
    assert EVIL in text and re.search(r"\x1b\[1m *56\.2", text) and not re.search(r"\x1b\[1m *50\.0", text)


def test_a_change_is_up_down_or_none_as_it_is_printed():
    changes = {value: score(value, base=0.5) for value in (0.5004, 0.4996, 0.501, 0.499)}
    assert [one.direction for one in changes.values()] == ["same", "same", "up", "down"]
    assert [one.change for one in changes.values()] == ["+0.0", "−0.0", "+0.1", "−0.1"]
    assert score(None, best=1.0, base=0.5) == Score("–")


def test_durations_are_read_at_a_glance():
    assert [duration(seconds) for seconds in (3.25, 89.6, 7260)] == ["3.2 s", "1 min 30 s", "2 h 01 min"]
