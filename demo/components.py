"""Gradio components with our own behaviour."""

from __future__ import annotations

from typing import Any

import gradio as gr


def picture_input(number: int) -> gr.Image:
    """The place for picture 1 or 2: drop, choose or paste a file. PNG: what is shown back is what was read."""
    picture = gr.Image(
        label=f"Picture {number}", type="filepath", format="png", sources=["upload", "clipboard"], height=260,
        min_width=140, buttons=["fullscreen"], elem_id=f"picture-{number}",
    )  # fmt: skip
    # On this one component, not in a class of its own: Gradio writes a stub file beside every class that has events.
    picture.preprocess = _path_only
    return picture


def _path_only(payload: Any) -> str | None:
    """The path that the visitor sent, unopened. Gradio itself would open it with Pillow, wherever it leads; here
    `Uploads` decides what is opened."""
    return None if payload is None or payload.path is None else str(payload.path)
