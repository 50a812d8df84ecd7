"""Event handlers of the page: errors become messages for the visitor, never stack traces."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch

from llava_clipmoe.cli import raised_by_us

from ..session import Demo

logger = logging.getLogger(__name__)


def explain(error: Exception) -> str:
    """The message for an error. One that nobody foresaw is logged whole to the terminal; the page names its kind."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "The GPU has too little memory for this. Close other programs on it, or start the demo with --bits 8."
    if isinstance(error, FileNotFoundError) and error.filename:
        name = str(error.filename).rpartition("/")[2]
        return f"A file that this needs is gone ({name}). Put it back, or start the demo again with what is there."
    if isinstance(error, (ValueError, FileNotFoundError)) and raised_by_us(error):
        return str(error)
    logger.error("unforeseen error in the demo", exc_info=error)
    return f"Something went wrong that was not foreseen ({type(error).__name__}). The terminal shows where."


def for_visitor(demo: Demo, function: Callable[..., Any]) -> Callable[..., Any]:
    """The event handler that calls `function(demo, session, *values)`, where `session` is the visitor's; `function` may
    be a generator. Its errors appear as messages on the page."""

    def generate(request: gr.Request, *values: Any):
        with _errors_as_messages():
            yield from function(demo, request.session_hash, *values)

    def call(request: gr.Request, *values: Any):
        with _errors_as_messages():
            return function(demo, request.session_hash, *values)

    return generate if inspect.isgeneratorfunction(function) else call


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise gr.Error(explain(error), title="That did not work", duration=15, print_exception=False) from error
