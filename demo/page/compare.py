"""Compare: two pictures; two statements that each eye matches to them; one question, four answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import gradio as gr

from ..llava.ask import ask_all
from ..session import NO_PAIRS, Demo, explain, for_visitor
from ..uploads import check_question
from . import html

HELP = "CLIP embeds both pictures as nearly the same point. Choose a mined pair, or drop two pictures of yours."
EYES = "#### What the eyes themselves say"
ASKED = (
    "#### What LLaVA says with each eye\nAn eye that gives the **same answer twice**, though the truth differs, is "
    "blind to the difference."
)
NEEDED = "Both pictures and a statement about each of them are needed."


class Compare(NamedTuple):
    """What other tabs need of this one."""

    pair: gr.State
    """Index of the chosen pair; None while uploaded pictures are compared."""
    pictures: tuple[gr.Image, gr.Image]
    picker: gr.Dropdown
    show_outputs: list[Any]
    """What `show` fills."""


def build(demo: Demo) -> Compare:
    """Draw the tab (inside a gr.Tab)."""
    some = bool(demo.pairs)
    gr.Markdown(HELP if some else f"{NO_PAIRS} Or upload two pictures.")
    pair = gr.State(demo.opening)
    choices = [
        (f"{i + 1} · {pair.difference or ' / '.join(pair.names)} · CLIP {pair.cosines['dense']:.3f}", i)
        for i, pair in enumerate(demo.pairs)
    ]
    with gr.Row(visible=some, equal_height=True):
        picker = gr.Dropdown(
            choices, value=demo.opening, show_label=False, scale=4, min_width=200, elem_id="pair-picker"
        )
        surprise = gr.Button("Another pair", scale=1, min_width=110, elem_id="another-pair")
    with gr.Row(elem_id="pictures"):
        pictures = _picture_input(1), _picture_input(2)
    matches, own, statements, match = _eyes()
    cosines = gr.HTML(elem_id="cosines")
    gr.Markdown(ASKED)
    known = gr.Radio([], label="Questions whose right answers differ", visible=False, elem_id="known-questions")
    with gr.Row(equal_height=True):
        what = "What do you want to know about both pictures?"
        question = gr.Textbox(
            label="Question", placeholder=what, scale=4, max_lines=4, min_width=220, elem_id="question"
        )
        ask = gr.Button("Ask both", variant="primary", scale=1, min_width=110, elem_id="ask")
        stop = gr.Button("Stop", scale=0, min_width=90, elem_id="stop")
    board = gr.HTML(elem_id="board")

    changed = gr.State()  # another value whenever there are other pictures, whichever event brought them
    section = [own, *statements, matches, changed]
    shown = [pair, *pictures, cosines, known, question, board, *section]
    picker.input(for_visitor(demo, show), picker, shown)
    surprise.click(for_visitor(demo, _another), pair, [picker, *shown])
    for number, picture in enumerate(pictures, start=1):
        filled = [picture, pair, cosines, known, board, *section]
        picture.upload(for_visitor(demo, partial(_uploaded, number=number)), [picture, pair], filled)
        picture.clear(for_visitor(demo, _cleared), pair, filled)
    gr.on(
        [changed.change, match.click, *(statement.submit for statement in statements)],
        for_visitor(demo, _match),
        [pair, *pictures, *statements],
        matches,
        show_progress="minimal",
        trigger_mode="always_last",
    )
    known.input(lambda text: text, known, question)
    for asked in (ask.click, question.submit):
        fields = [pair, *pictures, question], [board, cosines]
        asked(for_visitor(demo, _ask), *fields, show_progress="hidden", concurrency_limit=16)
    stop.click(demo.stopper("ask"), None, None, show_progress="hidden")
    return Compare(pair, pictures, picker, shown)


def _picture_input(number: int) -> gr.Image:
    """The place for picture 1 or 2: drop, choose or paste a file. PNG: what is shown back is what was read."""
    look = dict(label=f"Picture {number}", height=220, min_width=140, buttons=["fullscreen"])
    take = dict(type="filepath", format="png", sources=["upload", "clipboard"], elem_id=f"picture-{number}")
    picture = gr.Image(**look, **take)
    # The path that the visitor sent, unopened: Gradio itself would open it, wherever it leads. (On this one component,
    # not in a class of its own: Gradio writes a stub file beside every class that has events.)
    picture.preprocess = lambda payload: payload and payload.path
    return picture


def _eyes() -> tuple[gr.HTML, gr.Accordion, tuple[gr.Textbox, gr.Textbox], gr.Button]:
    """The section of what the eyes say: the result, and folded away two fields for other statements and a button."""
    gr.Markdown(EYES)
    matches = gr.HTML(elem_id="matches")
    with gr.Accordion("Change the statements", open=False, elem_id="own-statements") as own:
        with gr.Row(equal_height=True):
            look = dict(scale=4, max_lines=2, min_width=220)
            first, second = (gr.Textbox(label=f"Statement {n}", elem_id=f"statement-{n}", **look) for n in (1, 2))
            match = gr.Button("Match", scale=1, min_width=90, size="sm", elem_id="match")
    return matches, own, (first, second), match


def show(demo: Demo, session: str | None, index: int | None) -> tuple[Any, ...]:
    """Values of `show_outputs` for a mined pair. Drops a question that still runs: it is about other pictures."""
    demo.drop("ask", session)
    if index is None or not demo.pairs:
        return None, None, None, "", gr.Radio(visible=False), "", "", *_section(("", ""))
    pair = demo.pairs[index]
    texts = list(dict.fromkeys(q.question for q in pair.questions))
    first = texts[0] if texts else "What is in this picture?"
    known = gr.Radio(texts, value=first if texts else None, visible=bool(texts))
    return index, *demo.mined(index), html.cosines(pair.cosines), known, first, "", *_section(pair.statements)


def _section(statements: tuple[Any, Any]) -> tuple[Any, ...]:
    """Values of the eyes' section for other pictures: unfolded where the visitor has to write the statements."""
    return gr.Accordion(open=not all(statements)), *statements, "", random.random()


def _another(demo: Demo, session: str | None, now: int | None) -> tuple[Any, ...]:
    index = random.choice([index for index in range(len(demo.pairs)) if index != now] or [0])
    return index, *show(demo, session, index)


def _uploaded(demo: Demo, session: str | None, path: str | None, index: int | None, number: int = 0) -> tuple[Any, ...]:
    """A picture was uploaded (None: removed). One that is refused leaves the place empty and says why. A mined pair's
    statements go with it; those that the visitor wrote about uploaded pictures stay."""
    demo.drop("ask", session)
    found = None
    try:
        if path:
            found, note = demo.uploads.find(path)
            if note:
                gr.Info(note, title=f"Picture {number}")
    except ValueError as error:
        gr.Warning(explain(error), title=f"Picture {number} was not taken", duration=15)
    kept = gr.skip() if index is None else ""
    section = gr.Accordion(open=True), kept, kept, "", random.random()
    return found, None, "", gr.Radio(visible=False), "", *section


def _cleared(demo: Demo, session: str | None, index: int | None) -> tuple[Any, ...]:
    return _uploaded(demo, session, None, index)


def _match(
    demo: Demo, session: str | None, index: int | None, first: str | None, second: str | None, *written: str | None
) -> str:
    missing = index is None and None in (first, second)
    if missing or not all(text and text.strip() for text in written):
        return html.note(NEEDED)
    statements = [check_question(text, what="statement") for text in written]
    found = demo.similarity.matches(demo.pictures(index, first, second), statements, explain)
    return html.matches(demo.names, statements, found)


def _ask(
    demo: Demo, session: str | None, index: int | None, first: str | None, second: str | None, text: str
) -> Iterator[tuple[Any, ...]]:
    question = check_question(text)
    pictures = demo.pictures(index, first, second)
    truth = demo.truth(index, question)
    demo.warn_if_gone()
    with demo.stoppable("ask", session) as stop:
        for cells in ask_all(demo.llavas, pictures, question, demo.generation, stop, explain):
            yield "" if stop.dropped else html.board(cells, demo.names, truth), gr.skip()
        cosines = gr.skip()
        if index is None and not stop.dropped:
            try:
                cosines = html.cosines(demo.similarity.cosines(*pictures), {})
            except (ValueError, OSError) as error:  # the answers stand; only the cosines are missing
                gr.Warning(explain(error), title="No cosines")
        yield ("", gr.skip()) if stop.dropped else (gr.skip(), cosines)
