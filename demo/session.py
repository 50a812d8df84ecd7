"""What every tab of the page works with: the two LLaVAs, the pairs, the folder of votes and scores, what is running;
and its event handlers, whose errors become messages for the visitor, never stack traces."""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image

from llava_clipmoe.cli import raised_by_us

from .llava.generate import Llava
from .llava.settings import Generation
from .llava.similarity import Similarity
from .mining.pairs import BlindPair, opening_pair
from .uploads import BadUpload, Uploads, read_picture

logger = logging.getLogger(__name__)
NO_PAIRS = (
    "No mined pairs are loaded. `llava-clipmoe mine-pairs IMAGES --output-dir FOLDER` finds pairs in any folder of "
    "pictures; start the demo with `--pairs FOLDER`."
)


class Stop(threading.Event):
    """Set when a visitor's action is to end."""

    dropped = False
    """Whether its results so far are not to be shown any more either."""


@dataclass
class Demo:
    """One running page. Everything in it is shared by all visitors."""

    llavas: tuple[Llava, Llava]
    pairs: list[BlindPair]
    folder: Path
    """votes.jsonl and scores.json are written there."""
    uploads: Uploads
    generation: Generation = field(default_factory=Generation)
    told: Collection[frozenset[str]] = ()
    """Pairs, by their pictures' names, that are known to be told apart through the CLIP-MoE alone."""

    def __post_init__(self) -> None:
        self.names = self.llavas[0].name, self.llavas[1].name
        self.similarity = Similarity(self.llavas)
        self.opening = opening_pair(self.pairs, self.told)
        """Index of the pair that Compare opens on."""
        self._stops: dict[tuple[str, str | None], Stop] = {}

    def mined(self, pair: int) -> tuple[Image.Image, Image.Image]:
        """The pictures of a mined pair. Raises BadUpload."""
        first, second = self.pairs[pair].images
        limits = self.uploads.limits
        return read_picture(first, limits).image, read_picture(second, limits).image

    def pictures(self, pair: int | None, first: str | None, second: str | None) -> tuple[Image.Image, Image.Image]:
        """The chosen pair's pictures, else the two uploaded ones. Raises BadUpload."""
        if pair is not None:
            return self.mined(pair)
        for number, path in ((1, first), (2, second)):
            if not path:
                raise BadUpload(f"Picture {number} is missing. Upload it, or choose a mined pair.")
        return self.uploads.open(first), self.uploads.open(second)

    def truth(self, pair: int | None, question: str) -> tuple[str, str] | None:
        """The right answers, where the question is one of the pair's own (but for case and spaces)."""
        for known in () if pair is None else self.pairs[pair].questions:
            if known.question.lower().split() == question.lower().split():
                return known.answers
        return None

    def warn_if_gone(self) -> None:
        """A message on the page for every model directory that has vanished; answers go on from memory."""
        for llava in self.llavas:
            if not (llava.directory / "config.json").is_file():
                told = (
                    f"The folder of {llava.name} ({llava.directory.name}) is no longer there. Answers still come from "
                )
                told += "memory, but the page cannot be started again without it."
                gr.Warning(told, title="A model's folder is gone")

    @contextmanager
    def stoppable(self, action: str, session: str | None) -> Iterator[Stop]:
        """An event that the visitor's stop button for this action sets. Starting the action again sets it too."""
        key = action, session
        self._stop(action, session)
        event = self._stops[key] = Stop()
        try:
            yield event
        finally:
            if self._stops.get(key) is event:
                del self._stops[key]

    def stopper(self, action: str) -> Callable[[gr.Request], None]:
        """The handler of a stop button."""

        def stop(request: gr.Request) -> None:
            self._stop(action, request.session_hash)

        return stop

    def drop(self, action: str, session: str | None) -> None:
        """End the visitor's action without showing more of it: the page shows other pictures by now."""
        self._stop(action, session, dropped=True)

    def _stop(self, action: str, session: str | None, dropped: bool = False) -> None:
        if event := self._stops.get((action, session)):
            event.dropped |= dropped
            event.set()


def explain(error: Exception) -> str:
    """The message for an error. One that nobody foresaw is logged whole to the terminal; the page names its kind."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "The GPU has too little memory for this. Close other programs on it, or start the demo with --bits 8."
    if isinstance(error, FileNotFoundError) and error.filename:
        name = str(error.filename).rpartition("/")[2]
        return f"A file that this needs is gone ({name}). Put it back, or start the demo again with what is there."
    if isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError)) and raised_by_us(error):
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
