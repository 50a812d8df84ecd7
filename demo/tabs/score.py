"""Scores: pair accuracy of both eyes on all loaded pairs, while one watches."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from .. import html
from ..context import Demo
from ..messages import told
from ..scoring import Scores, interval, save, score, verdict

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

    def run(request: gr.Request) -> Iterator[tuple[str, str]]:
        yield from _run(demo, request.session_hash)

    start.click(told(run), None, [running, table], show_progress="hidden", concurrency_limit=16)

    cancel.click(demo.stopper("score"), None, None, show_progress="hidden")


def _run(demo: Demo, session: str | None) -> Iterator[tuple[str, str]]:
    demo.warn_if_gone()
    with demo.stoppable("score", session) as stop:
        for found in score(demo.eyes, demo.pairs, stop):
            yield html.progress(found.done, found.total, _left(found)), as_table(found)
        stopped = stop.is_set() and found.done < found.total
    if stopped:
        yield html.note(f"Cancelled after {found.done} of {found.total} answers."), as_table(found)
        return
    save(found, demo.folder / "scores.json")
    yield html.note(f"{found.total} answers in {_minutes(found.seconds)}. Written to scores.json."), as_table(found)


def _left(found: Scores) -> str:
    if not found.done:
        return f"0 of {found.total} answers"
    left = found.seconds / found.done * (found.total - found.done)
    return f"{found.done} of {found.total} answers, about {_minutes(left)} left"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def as_table(found: Scores) -> str:
    """Pair accuracy by attribute, both eyes, with bars; and what the difference says."""
    right = [found.right(eye) for eye in (0, 1)]
    count = min(map(len, right))
    if not count:
        return ""
    attributes = ["all", *dict.fromkeys(item.attribute for item in found.items[:count])]
    rows = []
    for attribute in attributes:
        which = [i for i in range(count) if attribute in ("all", found.items[i].attribute)]
        cells = "".join(_cell([right[eye][i] for i in which], kind) for eye, kind in ((0, ""), (1, "right")))
        rows.append(
            f"<tr><th scope='row'>{html.escape(attribute)}</th>{cells}<td class='number'>{len(which)}</td></tr>"
        )
    same = " · ".join(
        f"{name}: {found.same(eye)} of {len(found.texts[eye]) // 2}" for eye, name in enumerate(found.names)
    )
    head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in found.names)
    return (
        f"<div class='wide'><table class='scores'><thead><tr><th scope='col'>what differs</th>{head}"
        f"<th scope='col'>questions</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{html.note(verdict(found))}"
        f"{html.note('One answer given for both pictures (blind to the difference): ' + same)}"
    )


def _cell(right: list[bool], kind: str) -> str:
    share = sum(right) / len(right)
    low, high = interval(sum(right), len(right))
    text = f"{share:.0%} ({100 * low:.0f}–{100 * high:.0f})"
    return f"<td>{html.bar_row(text, share, '', kind)}</td>"
