"""What every tab of the page works with: the two LLaVAs, the pairs, the folder of votes and scores, what is running."""

from __future__ import annotations

import random
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
from .mining.pairs import BlindPair, Question
from .uploads import BadUpload, Limits, Uploads, read_picture


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
    question_limit: int = 2000
    """Characters."""

    def __post_init__(self) -> None:
        self.similarity = Similarity(self.llavas)
        self._stops: dict[tuple[str, str | None], Stop] = {}

    @property
    def names(self) -> tuple[str, str]:
        return self.llavas[0].name, self.llavas[1].name

    @property
    def limits(self) -> Limits:
        return self.uploads.limits

    def choices(self) -> list[tuple[str, int]]:
        """(a line about it, its index) of every pair: what differs, and how close the dense CLIP finds it."""
        lines = [
            f"{pair.difference or ' / '.join(pair.names)} · CLIP {pair.cosines['dense']:.3f}" for pair in self.pairs
        ]
        return [(f"{index + 1} · {line}", index) for index, line in enumerate(lines)]

    def pictures(self, pair: int | None, first: str | None, second: str | None) -> tuple[Image.Image, Image.Image]:
        """The chosen pair's pictures, else the two uploaded ones. Raises BadUpload."""
        if pair is not None:
            return tuple(read_picture(path, self.limits).image for path in self.pairs[pair].images)
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

    def any_pair(self, rng: random.Random) -> tuple[int, Question | None]:
        """A random pair (one with a question, where there are such), and one of its questions."""
        if not self.pairs:
            raise BadUpload("There are no mined pairs. Make some with `llava-clipmoe mine-pairs IMAGES`.")
        asked = [i for i, pair in enumerate(self.pairs) if pair.questions]
        index = rng.choice(asked or range(len(self.pairs)))
        questions = self.pairs[index].questions
        return index, rng.choice(questions) if questions else None

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
        if before := self._stops.get(key):
            before.set()
        event = self._stops[key] = Stop()
        try:
            yield event
        finally:
            if self._stops.get(key) is event:
                del self._stops[key]

    def stopper(self, action: str) -> Callable[[gr.Request], None]:
        """The handler of a stop button."""

        def stop(request: gr.Request) -> None:
            if event := self._stops.get((action, request.session_hash)):
                event.set()

        return stop

    def drop(self, action: str, session: str | None) -> None:
        """End the visitor's action without showing more of it: the page shows other pictures by now."""
        if event := self._stops.get((action, session)):
            event.dropped = True
            event.set()
