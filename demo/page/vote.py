"""Blind vote: the same board without names, a verdict, and then the names."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from ..llava.ask import Board, ask_all
from ..session import NO_PAIRS, Demo, explain, for_visitor
from ..uploads import check_question
from ..votes import Vote, append_vote, draw_sides, read_votes, tally
from . import html

HELP = (
    "Two eyes, A and B, in an order drawn anew each time. Read their answers to both pictures, then say who was "
    "better: only then do you learn who was who. With the keyboard: Tab to a button, Enter."
)
CHOICES = {"a": "A is better", "b": "B is better", "tie": "Tie", "bad": "Both bad"}


@dataclass(frozen=True)
class Ballot:
    """One round, kept on the server: nobody is told before the vote which LLaVA is A."""

    pair: int
    question: str
    sides: tuple[int, int]
    """Numbers of the LLaVAs shown as A and B."""
    board: Board


def build(demo: Demo) -> None:
    gr.Markdown(HELP)
    if not demo.pairs:
        gr.Markdown(NO_PAIRS)
        return
    ballot = gr.State(None)
    with gr.Row():
        start = gr.Button("New round", variant="primary", elem_id="new-round", min_width=140)
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop-round")
    with gr.Row():
        look = dict(height=220, min_width=140, format="png", interactive=False, buttons=[])
        pictures = [gr.Image(label=f"Picture {n}", elem_id=f"vote-picture-{n}", **look) for n in (1, 2)]
    question = gr.Markdown(elem_id="vote-question")
    board = gr.HTML(elem_id="vote-board")
    with gr.Row():
        buttons = [
            gr.Button(text, interactive=False, min_width=120, elem_id=f"vote-{choice}")
            for choice, text in CHOICES.items()
        ]
    names = gr.Markdown(elem_id="vote-names")
    score = gr.HTML(value=lambda: _running_score(demo), elem_id="vote-score")

    shown = [ballot, *pictures, question, board, names, *buttons]
    start.click(for_visitor(demo, _round), None, shown, show_progress="hidden", concurrency_limit=16)
    stop.click(demo.stopper("vote"), None, None, show_progress="hidden")
    told = [ballot, board, names, score, *buttons]
    for choice, button in zip(CHOICES, buttons, strict=True):
        button.click(for_visitor(demo, partial(_vote, choice=choice)), ballot, told, show_progress="hidden")


def _buttons(*, open: bool) -> list[gr.Button]:
    return [gr.Button(interactive=open)] * len(CHOICES)


def _round(demo: Demo, session: str | None) -> Iterator[tuple[Any, ...]]:
    """A new pair, its question, and the answers; the vote opens when the last answer is there."""
    asked = [index for index, pair in enumerate(demo.pairs) if pair.questions]
    index = random.choice(asked or range(len(demo.pairs)))
    questions = [known.question for known in demo.pairs[index].questions] or ["What is in this picture?"]
    question = check_question(random.choice(questions))
    pictures, sides = demo.mined(index), draw_sides((0, 1))
    demo.warn_if_gone()
    shown = (*pictures, f"**{_plain(question)}**")
    with demo.stoppable("vote", session) as stop:
        for cells in ask_all([demo.llavas[i] for i in sides], pictures, question, demo.generation, stop, explain):
            yield None, *shown, html.board(cells, ("A", "B"), timing=False), "", *_buttons(open=False)
            shown = (gr.skip(), gr.skip(), gr.skip())
    ballot, told = None, "This round has no vote: not all answers came. Start a new one."
    if all(cell.state == "done" for cell in cells.values()):
        ballot, told = Ballot(index, question, sides, cells), "Who was better?"
    yield ballot, *shown, gr.skip(), told, *_buttons(open=ballot is not None)


def _plain(text: str) -> str:
    """A text for Markdown, with its special characters escaped."""
    return re.sub(r"([\\`*_{}\[\]<>()#+\-.!|~$])", r"\\\1", text)


def _vote(demo: Demo, session: str | None, ballot: Ballot | None, choice: str) -> tuple[Any, ...]:
    """Write the vote into the file, then show the names."""
    if ballot is None:
        raise ValueError("There is no open round: start a new one, and vote when all four answers are there.")
    names = [demo.names[side] for side in ballot.sides]
    answers = [[ballot.board[column, picture].text for picture in (0, 1)] for column in (0, 1)]
    pictures = list(demo.pairs[ballot.pair].names)
    append_vote(demo.folder / "votes.jsonl", Vote(pictures, ballot.question, *names, *answers, choice))
    a, b = names
    board = html.board(ballot.board, (f"A: {a}", f"B: {b}"), demo.truth(ballot.pair, ballot.question))
    told = f"**A** was **{_plain(a)}** and **B** was **{_plain(b)}**. You said: {CHOICES[choice]}."
    return None, board, told, _running_score(demo), *_buttons(open=False)


def _running_score(demo: Demo) -> str:
    """All votes so far between these two LLaVAs."""
    left, right = demo.names
    found = tally(read_votes(demo.folder / "votes.jsonl"), (right, left))
    if not found.votes:
        return html.note("No votes yet.")
    counts = {left: found.wins[1], right: found.wins[0], "tie": found.ties, "both bad": found.bad}
    rows = [(name, n / found.votes, str(n), "right" if name == right else "") for name, n in counts.items()]
    return html.bars(f"Votes so far: {found.votes}", rows) + html.note(str(found))
