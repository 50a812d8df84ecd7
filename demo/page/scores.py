"""Scores: pair accuracy of both LLaVAs on all loaded pairs, shown while it grows."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from llava_clipmoe.files import write_json

from ..scores import score
from ..session import Demo, for_visitor
from . import html

HELP = (
    "Every question of every loaded pair, asked about both pictures. A pair counts only when **both** pictures are "
    "answered right: who cannot tell the two apart gives one answer twice and scores nothing."
)


def build(demo: Demo) -> None:
    gr.Markdown(HELP)
    with gr.Row():
        start = gr.Button("Score both eyes", variant="primary", elem_id="score", min_width=140)
        cancel = gr.Button("Cancel", scale=0, min_width=100, elem_id="cancel-score")
    running = gr.HTML(elem_id="score-progress")
    table = gr.HTML(elem_id="scores")

    start.click(for_visitor(demo, _run), None, [running, table], show_progress="hidden", concurrency_limit=16)
    cancel.click(demo.stopper("score"), None, None, show_progress="hidden")


def _run(demo: Demo, session: str | None) -> Iterator[tuple[str, str]]:
    demo.warn_if_gone()
    with demo.stoppable("score", session) as stop:
        for found in score(demo.llavas, demo.pairs, stop):
            text = f"{found.done} of {found.total} answers"
            if found.done:
                left = found.seconds / found.done * (found.total - found.done)
                text += f", about {_time(left)} left"
            yield html.progress(found.done, found.total, text), html.scores(found)
    if found.done < found.total:
        note = f"Cancelled after {found.done} of {found.total} answers."
    else:
        write_json(demo.folder / "scores.json", found.as_json())
        note = f"{found.total} answers in {_time(found.seconds)}. Written to scores.json."
    yield html.note(note), html.scores(found)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
