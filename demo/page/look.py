"""Look inside: which experts see which patch, and where the two pictures differ for each vision tower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from ..llava.generate import Llava, Stopped
from ..session import Demo, Stop, for_visitor
from ..visualize import Routing, as_seen, difference, difference_overlay, overlay, routing_of, shares_figure, strip
from . import html
from .compare import Compare

HELP = (
    "The two pictures of **Compare**, as the eyes see them. Each patch is tinted by its strongest expert; the stronger "
    "the tint, the larger that expert's part in the mixture."
)
DIFFERENCE_HELP = (
    "**Where the two pictures differ**, patch by patch, in what each eye hands to the language model (1 − cosine of "
    "the features). The redder, the more different. Each eye is measured against itself: 1.0 is as unlike as two "
    "patches taken from different places are on average."
)

Pair = tuple[Image.Image, Image.Image]
Looked = tuple[Pair, tuple[Routing, Routing]]
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
    inside = [looked, block, *overlays, *strips, *shares]
    fields = [compared.pair, *compared.pictures, whose, block], [progress_bar, *differences, numbers, *inside]
    for looked_at in (look.click, tab.select, whose.input):
        looked_at(for_visitor(demo, _look), *fields, show_progress="hidden")
    stop.click(demo.stopper("look"), None, None, show_progress="hidden")
    block.input(_at_block, [looked, block], overlays, show_progress="hidden", trigger_mode="always_last")


def _look(
    demo: Demo,
    session: str | None,
    index: int | None,
    first: str | None,
    second: str | None,
    name: str | None,
    at: float,
) -> Iterator[tuple[Any, ...]]:
    """Progress, what differs (3 fields), what the experts do (8 fields), step by step. name: of the LLaVA whose experts
    are shown. at: the slider's place."""
    pictures = demo.pictures(index, first, second)
    demo.warn_if_gone()
    outside, inside = [gr.skip()] * 3, [gr.skip()] * 8
    total = len(demo.llavas) + (name is not None)
    maps, seen_by = [], []
    with demo.stoppable("look", session) as stop, contextlib.suppress(Stopped):
        for number, llava in enumerate(demo.llavas):
            yield html.progress(number, total, f"{llava.name} looks at both pictures ..."), *outside, *inside
            (seen, a), (_, b) = _as_seen(llava, pictures)
            with llava.in_place(stop):
                maps.append(difference(llava.tower, a, b, relative=True))
            seen_by.append(seen)
        more = "" if name is None else html.progress(len(demo.llavas), total, f"which experts of {name} look ...")
        yield more, *_differences(demo, seen_by, maps), *inside
        if name is not None:
            experts = _experts(demo.llavas[demo.names.index(name)], pictures, at, stop)
            yield "", *outside, *experts
    if stop.is_set():
        yield html.note("Stopped."), *outside, *inside


def _differences(demo: Demo, seen_by: Sequence[Image.Image], maps: Sequence[np.ndarray]) -> tuple[Any, ...]:
    scale = max(1e-6, *(float(found.max()) for found in maps))
    heat = [difference_overlay(seen, found, scale) for seen, found in zip(seen_by, maps, strict=True)]
    means = [float(found.mean()) for found in maps]
    bars = zip(demo.names, means, ("", "right"), strict=True)
    rows = [(name, mean / max(1.0, *means), f"{mean:.2f}", kind) for name, mean, kind in bars]
    return *heat, html.bars("Mean difference (1.0: as unlike as any two places)", rows)


def _experts(llava: Llava, pictures: Pair, at: float, stop: Stop) -> tuple[Any, ...]:
    (seen_a, a), (seen_b, b) = _as_seen(llava, pictures)
    with llava.in_place(stop):
        routings = routing_of(llava.tower, a), routing_of(llava.tower, b)
    looked = (seen_a, seen_b), routings
    last = len(routings[0].blocks) - 1
    at = min(max(int(at), 0), last)
    slider = gr.Slider(0, last, value=at, label=f"Block (0 to {last} of those with experts)")
    return looked, slider, *_at_block(looked, at), *map(strip, *looked), *map(shares_figure, routings)


def _as_seen(llava: Llava, pictures: Pair) -> list[tuple[Image.Image, torch.Tensor]]:
    return [as_seen(picture, llava.tower.image_processor, llava.config.image_aspect_ratio) for picture in pictures]


def _at_block(looked: Looked | None, at: float) -> list[Image.Image | None]:
    """Both pictures' experts at the slider's block."""
    if looked is None:
        return [None, None]
    block = looked[1][0].blocks[int(at)]
    return [overlay(seen, routing, block) for seen, routing in zip(*looked, strict=True)]
