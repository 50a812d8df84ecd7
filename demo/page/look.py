"""Look inside: which experts see which patch, and where the two pictures differ for each eye."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import torch
from PIL import Image

from ..llava.generate import Llava
from ..session import Demo
from ..visualize import Routing, as_seen, difference, difference_overlay, overlay, routing_of, shares_figure, strip
from . import html
from .compare import Compare
from .errors import for_visitor

HELP = (
    "The two pictures of **Compare**, as the eyes see them. Each patch is tinted by its strongest expert; the stronger "
    "the tint, the larger that expert's part in the mixture."
)
DIFFERENCE_HELP = (
    "**Where the two pictures differ**, patch by patch, in what each eye hands to the language model (1 − cosine of "
    "the features). The redder, the more different. Each eye is measured against itself: 1.0 is as unlike as two "
    "patches taken from different places are on average."
)

NOTHING, INSIDE, OUTSIDE = "nothing", "inside", "outside"
"""Which of the tab's fields a step fills: none, those about experts, those about differences."""
Looked = tuple[tuple[Image.Image, Image.Image], tuple[Routing, Routing]]
"""Both pictures as the CLIP-MoE saw them and where their patches went: kept for the slider."""


def build(demo: Demo, compared: Compare, tab: gr.Tab) -> None:
    gr.Markdown(HELP)
    moe = [llava.name for llava in demo.llavas if llava.is_moe]
    looked = gr.State(None)
    with gr.Row(equal_height=True):
        look = gr.Button("Look again", variant="primary", min_width=110, scale=0, elem_id="look")
        stop = gr.Button("Stop", min_width=80, scale=0, elem_id="stop-look")
        block = gr.Slider(
            0, 1, value=0, step=1, label="Block", interactive=True, elem_id="block", min_width=220, visible=bool(moe)
        )
    whose = gr.Radio(moe, value=moe[-1] if moe else None, label="Whose experts", visible=len(moe) > 1, elem_id="whose")
    progress_bar = gr.HTML(elem_id="look-progress")
    picture = dict(format="png", interactive=False, buttons=["fullscreen"], min_width=140, height=380)
    with gr.Row(visible=bool(moe)):
        overlays = [gr.Image(label=f"Picture {n}: experts", elem_id=f"experts-{n}", **picture) for n in (1, 2)]
    with gr.Accordion("All blocks at once", open=False, visible=bool(moe)):
        strips = [gr.Image(label=f"Picture {n}: all blocks", elem_id=f"strip-{n}", **picture) for n in (1, 2)]
    with gr.Row(visible=bool(moe)):
        shares = [gr.Plot(show_label=False, elem_id=f"shares-{n}", min_width=280) for n in (1, 2)]
    if not moe:
        gr.Markdown("Neither of the two LLaVAs has a CLIP-MoE for its eye, so there are no experts to show.")
    gr.Markdown(DIFFERENCE_HELP)
    with gr.Row():
        differences = [
            gr.Image(label=name, elem_id=f"difference-{n}", **picture) for n, name in enumerate(demo.names, start=1)
        ]
    numbers = gr.HTML(elem_id="difference-numbers")
    places = {NOTHING: [], INSIDE: [looked, block, *overlays, *strips, *shares], OUTSIDE: [*differences, numbers]}

    def run(demo: Demo, session: str | None, *values: Any) -> Iterator[dict[Any, Any]]:
        with demo.stoppable("look", session) as stopped:
            for text, fields, shown in _look(demo, *values):
                if stopped.is_set():
                    yield {progress_bar: html.note("Stopped.")}
                    return
                yield {progress_bar: text, **dict(zip(places[fields], shown, strict=True))}

    fields = [compared.pair, *compared.pictures, whose, block], [progress_bar, *places[INSIDE], *places[OUTSIDE]]
    for looked_at in (look.click, tab.select, whose.input):
        looked_at(for_visitor(demo, run), *fields, show_progress="hidden")
    stop.click(demo.stopper("look"), None, None, show_progress="hidden")
    block.input(_at_block, [looked, block], overlays, show_progress="hidden", trigger_mode="always_last")


def _look(
    demo: Demo, index: int | None, first: str | None, second: str | None, name: str | None, at: float
) -> Iterator[tuple[str, str, Sequence[Any]]]:
    """What the tab shows of the two pictures, step by step: (progress, which fields, their values).

    name: of the LLaVA whose experts are shown. at: the slider's place.
    """
    pictures = demo.pictures(index, first, second)
    demo.warn_if_gone()
    total = len(demo.llavas) + (name is not None)
    maps, seen_by = [], []
    for number, llava in enumerate(demo.llavas):
        yield html.progress(number, total, f"{llava.name} looks at both pictures ..."), NOTHING, ()
        (seen, a), (_, b) = _as_seen(llava, pictures)
        with llava.in_place():
            maps.append(difference(llava.tower, a, b, relative=True))
        seen_by.append(seen)
    scale = max(1e-6, *(float(found.max()) for found in maps))
    heat = [difference_overlay(seen, found, scale) for seen, found in zip(seen_by, maps, strict=True)]
    means = [float(found.mean()) for found in maps]
    bars = zip(demo.names, means, ("", "right"), strict=True)
    rows = [(eye, mean / max(1.0, *means), f"{mean:.2f}", kind) for eye, mean, kind in bars]
    numbers = html.bars("Mean difference (1.0: as unlike as any two places)", rows)
    more = "" if name is None else html.progress(len(demo.llavas), total, f"which experts of {name} look ...")
    yield more, OUTSIDE, (*heat, numbers)
    if name is not None:
        yield "", INSIDE, _experts(demo.llavas[demo.names.index(name)], pictures, at)


def _experts(llava: Llava, pictures: tuple[Image.Image, Image.Image], at: float) -> tuple[Any, ...]:
    (seen_a, a), (seen_b, b) = _as_seen(llava, pictures)
    with llava.in_place():
        routings = routing_of(llava.tower, a), routing_of(llava.tower, b)
    looked = (seen_a, seen_b), routings
    last = len(routings[0].blocks) - 1
    at = min(max(int(at), 0), last)
    slider = gr.Slider(0, last, value=at, label=f"Block (0 to {last} of those with experts)")
    return looked, slider, *_at_block(looked, at), *map(strip, *looked), *map(shares_figure, routings)


def _as_seen(llava: Llava, pictures: tuple[Image.Image, Image.Image]) -> list[tuple[Image.Image, torch.Tensor]]:
    return [as_seen(picture, llava.processor, llava.config.image_aspect_ratio) for picture in pictures]


def _at_block(looked: Looked | None, at: float) -> list[Image.Image | None]:
    """Both pictures' experts at the slider's block."""
    if looked is None:
        return [None, None]
    block = looked[1][0].blocks[int(at)]
    return [overlay(seen, routing, block) for seen, routing in zip(*looked, strict=True)]
