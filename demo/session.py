"""What every tab of the page works with: the two LLaVAs, the pairs, the folder of votes and scores, what is running."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from PIL import Image

from .llava.generate import Llava, ModelGone
from .llava.settings import Generation
from .llava.similarity import Similarity
from .mining.pairs import BlindPair
from .uploads import BadUpload, Uploads, read_picture


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

    def __post_init__(self) -> None:
        self.names = self.llavas[0].name, self.llavas[1].name
        self.similarity = Similarity(self.llavas)
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
            try:
                llava.check_files()
            except ModelGone as gone:
                gr.Warning(str(gone), title="A model's folder is gone")

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
