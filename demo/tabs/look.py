"""Look inside: which experts see which patch, and where the two pictures differ for each eye."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from .. import html
from ..context import Demo
from ..looking import Routing, as_seen, difference, difference_overlay, overlay, routing_of, shares_figure, strip
from ..messages import told
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


@dataclass(frozen=True)
class Looked:
    """What one look found, kept for the slider."""

    seen: tuple[Image.Image, Image.Image]
    routings: tuple[Routing, Routing]


def build(demo: Demo, compared: Compare, tab: gr.Tab) -> None:
    gr.Markdown(HELP)
    eye = next((eye for eye in reversed(demo.eyes) if eye.is_moe), None)
    looked = gr.State(None)
    with gr.Row(equal_height=True):
        look = gr.Button("Look again", variant="primary", min_width=120, scale=0, elem_id="look")
        block = gr.Slider(0, 1, value=0, step=1, label="Block", interactive=True, elem_id="block", min_width=220,
                          visible=eye is not None)  # fmt: skip
    picture = dict(format="png", interactive=False, buttons=["fullscreen"], min_width=140, height=380)
    with gr.Row(visible=eye is not None):
        overlays = [gr.Image(label=f"Picture {n}: experts", elem_id=f"experts-{n}", **picture) for n in (1, 2)]
    with gr.Accordion("All blocks at once", open=False, visible=eye is not None):
        strips = [gr.Image(label=f"Picture {n}: all blocks", elem_id=f"strip-{n}", **picture) for n in (1, 2)]
    with gr.Row(visible=eye is not None):
        shares = [
            gr.Plot(label=f"Picture {n}: each expert's share", show_label=False, elem_id=f"shares-{n}", min_width=280)
            for n in (1, 2)
        ]
    if eye is None:
        gr.Markdown("Neither of the two LLaVAs has a CLIP-MoE for its eye, so there are no experts to show.")
    gr.Markdown(DIFFERENCE_HELP)
    with gr.Row():
        differences = [
            gr.Image(label=name, elem_id=f"difference-{n}", **picture) for n, name in enumerate(demo.names, start=1)
        ]
    numbers = gr.HTML(elem_id="difference-numbers")

    def run(index, first, second, at):
        return _look(demo, eye, index, first, second, at)

    given = dict(fn=told(run), inputs=[compared.pair, *compared.pictures, block],
                 outputs=[looked, block, *overlays, *strips, *shares, *differences, numbers],
                 show_progress_on=overlays if eye else differences)  # fmt: skip
    look.click(**given)
    tab.select(**given)
    block.input(told(_at_block), [looked, block], overlays, show_progress="hidden", trigger_mode="always_last")


def _look(demo: Demo, eye: Any, index: int | None, first: str | None, second: str | None, at: float) -> tuple[Any, ...]:
    """Everything that the tab shows of the two pictures."""
    pictures = demo.pictures(index, first, second)
    demo.warn_if_gone()
    maps, seen_by = [], []
    for one in demo.eyes:
        (seen_a, a), (seen_b, b) = (as_seen(p, one.processor, one.config.image_aspect_ratio) for p in pictures)
        with one.in_place():
            maps.append(difference(one.tower, a, b, relative=True))
        seen_by.append((seen_a, seen_b))
    scale = max(1e-6, *(float(np.max(found)) for found in maps))
    heat = [difference_overlay(seen[0], found, scale) for seen, found in zip(seen_by, maps, strict=True)]
    numbers = _numbers(demo, maps)
    if eye is None:
        return None, gr.skip(), *[None] * 6, *heat, numbers
    (seen_a, a), (seen_b, b) = (as_seen(p, eye.processor, eye.config.image_aspect_ratio) for p in pictures)
    with eye.in_place():
        routings = routing_of(eye.tower, a), routing_of(eye.tower, b)
    found = Looked((seen_a, seen_b), routings)
    blocks = routings[0].blocks
    at = min(max(int(at), 0), len(blocks) - 1)
    slider = gr.Slider(0, len(blocks) - 1, value=at, label=f"Block (0 to {len(blocks) - 1} of those with experts)")
    sheets = [strip(seen, routing) for seen, routing in zip(found.seen, routings, strict=True)]
    return found, slider, *_at_block(found, at), *sheets, *map(shares_figure, routings), *heat, numbers


def _at_block(looked: Looked | None, at: float) -> list[Image.Image | None]:
    """Both pictures' experts at the slider's block."""
    if looked is None:
        return [None, None]
    block = looked.routings[0].blocks[int(at)]
    return [overlay(seen, routing, block) for seen, routing in zip(looked.seen, looked.routings, strict=True)]


def _numbers(demo: Demo, maps: list[np.ndarray]) -> str:
    means = [float(found.mean()) for found in maps]
    top = max(1.0, *means)
    found = zip(demo.names, means, ("", "right"), strict=True)
    rows = [html.bar_row(name, mean / top, f"{mean:.2f}", kind) for name, mean, kind in found]
    return html.bars("Mean difference (1.0: as unlike as any two places)", rows)
