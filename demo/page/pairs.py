"""Pairs: all mined pairs, sorted and filtered."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from train_encoder.config import DataConfig
from train_encoder.data.decode import decode_image

from ..mining.pairs import EYES, BlindPair, clearest_first, right_by_attribute
from ..session import NO_PAIRS, Demo, for_visitor
from ..uploads import FORMATS
from . import html
from .compare import Compare, show

THUMBNAIL = 160
"""Pixels of one picture of a pair in the gallery."""
ANY = "any"
CLEAREST = "clearest first"
ORDERS = {
    "widest gap first": lambda pair: -pair.gap,
    "closest for CLIP first": lambda pair: -pair.cosines["dense"],
    "farthest for the reference first": lambda pair: pair.cosines["dense"] - pair.gap,
}
"""The reference's cosine is the dense one minus the gap."""


def build(demo: Demo, compared: Compare, tabs: gr.Tabs, page: gr.Blocks) -> None:
    if not demo.pairs:
        gr.Markdown(NO_PAIRS)
        return
    gr.Markdown(_summary(demo))
    by_attribute = right_by_attribute(demo.pairs)
    gr.HTML(html.right_by_attribute(by_attribute), visible=bool(by_attribute), elem_id="pair-counts")
    gaps = [pair.gap for pair in demo.pairs]
    lowest, highest = (math.floor(100 * gap) / 100 for gap in (min(gaps), max(gaps) + 0.01))
    attributes = sorted({name for pair in demo.pairs for name in pair.attributes})
    with gr.Row():
        attribute = gr.Dropdown([ANY, *attributes], value=ANY, label="What differs", min_width=150, elem_id="attribute")
        orders = [CLEAREST, *ORDERS] if by_attribute else list(ORDERS)
        order = gr.Dropdown(orders, value=orders[0], label="Order", min_width=190, elem_id="order")
        limits = dict(minimum=lowest, maximum=highest, value=lowest, step=0.01)
        least = gr.Slider(**limits, min_width=190, label="Gap of at least", elem_id="least-gap")
    shown = gr.State(list(range(len(demo.pairs))))
    thumbnails = [_thumbnail(pair.images) for pair in demo.pairs]
    captions, clearest = [_caption(pair) for pair in demo.pairs], clearest_first(demo.pairs)
    gallery = gr.Gallery(
        label="Pairs", columns=3, object_fit="contain", allow_preview=False, height=560, buttons=[], elem_id="gallery"
    )
    count = gr.Markdown(elem_id="pair-count")
    chosen = gr.State(None)
    details = gr.HTML(elem_id="pair-details")
    compare = gr.Button("Compare this pair", visible=False, variant="primary", elem_id="compare-pair")

    def select(demo: Demo, session: str | None, name: str, by: str, gap: float) -> tuple[Any, ...]:
        fitting = [
            index
            for index in clearest
            if demo.pairs[index].gap >= gap - 1e-9 and (name == ANY or name in demo.pairs[index].attributes)
        ]
        if by != CLEAREST:
            fitting.sort(key=lambda index: (ORDERS[by](demo.pairs[index]), index))
        items = [(thumbnails[index], captions[index]) for index in fitting]
        text = f"{len(fitting)} of {len(demo.pairs)} pairs"
        return gr.Gallery(items, selected_index=None), fitting, text, None, "", gr.Button(visible=False)

    def picked(indices: list[int], event: gr.SelectData) -> tuple[Any, ...]:
        index = indices[event.index]
        pair = demo.pairs[index]
        return index, html.pair(pair.names, pair.questions) + html.cosines(pair.cosines), gr.Button(visible=True)

    controls, outputs = [attribute, order, least], [gallery, shown, count, chosen, details, compare]
    for control in controls:
        control.change(for_visitor(demo, select), controls, outputs, trigger_mode="always_last")
    page.load(for_visitor(demo, select), controls, outputs, show_progress="hidden")
    gallery.select(picked, shown, [chosen, details, compare])
    compare.click(for_visitor(demo, _compare), chosen, [tabs, compared.picker, *compared.show_outputs])


def _compare(demo: Demo, session: str | None, index: int) -> tuple[Any, ...]:
    """Open the Compare tab with a pair."""
    return gr.Tabs(selected="compare"), index, *show(demo, session, index)


def _summary(demo: Demo) -> str:
    passed = sum(pair.passed for pair in demo.pairs)
    rest = "" if passed == len(demo.pairs) else f" {passed} pass both thresholds; the others are the widest gaps found."
    return (
        f"**{len(demo.pairs)} pairs** that the dense CLIP finds alike. The gap is how much less alike "
        f"*{demo.pairs[0].reference}* finds them (difference of the two cosines).{rest} Choose one to see all cosines."
    )


def _caption(pair: BlindPair) -> str:
    """What differs, and how many of the two statements each eye matches right; without those, how alike the pair is."""
    if pair.right is None:
        numbers = f"CLIP {pair.cosines['dense']:.3f}, gap {pair.gap:.3f}"
    else:
        numbers = " · ".join(f"{html.COSINE_NAMES[eye]} {pair.right[eye]}/2" for eye in EYES)
    return f"{pair.difference} · {numbers}" if pair.difference else numbers


def _thumbnail(paths: tuple[Path, Path]) -> Image.Image:
    """Both pictures side by side."""
    sheet = Image.new("RGB", (2 * THUMBNAIL + 8, THUMBNAIL), "white")
    for number, path in enumerate(paths):
        with path.open("rb") as file:
            small = decode_image(file, DataConfig.max_pixels, FORMATS)  # a folder of pairs may be a stranger's
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        left = number * (THUMBNAIL + 8) + (THUMBNAIL - small.width) // 2
        sheet.paste(small, (left, (THUMBNAIL - small.height) // 2))
    return sheet
