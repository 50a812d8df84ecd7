"""What every tab of the page works with: the two eyes, the pairs, where votes and scores are kept."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from PIL import Image

from .models import Eye, Generation, ModelGone
from .pairs import BlindPair, Question
from .similarity import Similarity
from .uploads import BadUpload, Limits, Uploads, read_picture


class Stop(threading.Event):
    """Set when a visitor's action is to end."""

    dropped = False
    """Whether what it has found so far is of no use any more either."""


@dataclass
class Demo:
    """One running page. Everything in it is shared by all visitors."""

    eyes: tuple[Eye, Eye]
    pairs: list[BlindPair]
    folder: Path
    """votes.jsonl and scores.json are written there."""
    uploads: Uploads
    how: Generation = field(default_factory=Generation)
    question_limit: int = 2000
    """Characters."""

    def __post_init__(self) -> None:
        self.similarity = Similarity(self.eyes)
        self._stops: dict[tuple[str, str | None], Stop] = {}

    @property
    def names(self) -> tuple[str, str]:
        return self.eyes[0].name, self.eyes[1].name

    @property
    def cosine_names(self) -> dict[str, str]:
        """What the page calls the keys of a pair's cosines."""
        return {"dense": "CLIP", "clip-moe": "CLIP-MoE", "dinov2": "DINOv2"} | {
            f"expert{i}": f"expert {i}" for i in range(64)
        }

    @property
    def limits(self) -> Limits:
        return self.uploads.limits

    # ----------------------------------------------------------------------------------------------- pairs and pictures

    def label(self, index: int) -> str:
        """A pair in one line: what differs, and how close the dense eye finds it."""
        pair = self.pairs[index]
        what = pair.names if not pair.questions else (" / ".join(pair.questions[0].answers),)
        attribute = f"{pair.questions[0].attribute}: " if pair.questions else ""
        return f"{index + 1} · {attribute}{' / '.join(what)} · CLIP {pair.cosines['dense']:.3f}"

    def choices(self) -> list[tuple[str, int]]:
        return [(self.label(index), index) for index in range(len(self.pairs))]

    def pictures(self, pair: int | None, first: str | None, second: str | None) -> tuple[Image.Image, Image.Image]:
        """The chosen pair's pictures, else the two uploaded ones. Raises BadUpload."""
        if pair is not None:
            return tuple(read_picture(path, self.limits).image for path in self.pairs[pair].images)
        for number, path in ((1, first), (2, second)):
            if not path:
                raise BadUpload(f"Picture {number} is missing. Upload it, or choose a mined pair.")
        return self.uploads.open(first), self.uploads.open(second)

    def truth(self, pair: int | None, question: str) -> tuple[str, str] | None:
        """The right answers, where the question is one of the pair's own."""
        if pair is None:
            return None
        wanted = " ".join(question.lower().split())
        found = (q for q in self.pairs[pair].questions if " ".join(q.question.lower().split()) == wanted)
        return next((q.answers for q in found), None)

    def any_pair(self, rng: random.Random) -> tuple[int, Question | None]:
        """A pair by chance, one with a question where there is one."""
        if not self.pairs:
            raise BadUpload("There are no mined pairs. Make some with `llava-clipmoe mine-pairs IMAGES`.")
        asked = [i for i, pair in enumerate(self.pairs) if pair.questions]
        index = rng.choice(asked or range(len(self.pairs)))
        questions = self.pairs[index].questions
        return index, rng.choice(questions) if questions else None

    # --------------------------------------------------------------------------------------------------- running things

    def warn_if_gone(self) -> None:
        """A message on the page for every model directory that has vanished; answers go on from memory."""
        for eye in self.eyes:
            try:
                eye.check_files()
            except ModelGone as gone:
                gr.Warning(str(gone), title="A model's folder is gone")

    @contextmanager
    def stoppable(self, action: str, session: str | None) -> Iterator[Stop]:
        """An event that the visitor's stop button for this action sets; starting the action anew sets it too."""
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
        """End the visitor's action, which then shows nothing: the page is about something else by now."""
        if event := self._stops.get((action, session)):
            event.dropped = True
            event.set()
