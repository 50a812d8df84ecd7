"""One loaded LLaVA: asked one question at a time, its answer read as a stream or in batches."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import TextIteratorStreamer

from llava_clipmoe.vision_tower import CLIPMoEVisionTower
from train_llava.eval.batched import Prompts, answer, prompt_of

from .settings import Generation

NEXT_TEXT_SECONDS = 600.0
"""Longest wait for the next piece of text: a 7B model on a slow CPU reads a picture for minutes."""


class QueueFull(ValueError):
    """The queue has its full length already."""


class Stopped(Exception):
    """The turn was given up before it came."""


class Turns:
    """A queue of bounded length in front of a model that serves one at a time, in the order of arrival."""

    def __init__(self, most_waiting: int = 16):
        self.most_waiting = most_waiting
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def turn(self, waiting: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> Iterator[None]:
        """Wait for a turn and have it while the block runs.

        `waiting` is called with the number of those that come first, whenever it changes. Setting `stop` gives up the
        place. Raises QueueFull at once when `most_waiting` wait already, Stopped when `stop` is set before the turn.
        """
        me, reported = object(), 0
        with self._changed:
            if len(self._line) > self.most_waiting:
                raise QueueFull(
                    f"{self.most_waiting} questions are waiting for this model already. Try again in a minute."
                )
            self._line.append(me)
        try:
            with self._changed:
                while before := self._line.index(me):
                    if waiting is not None and before != reported:
                        waiting(reported := before)
                    if stop is not None and stop.is_set():
                        break
                    self._changed.wait(timeout=0.2)  # seconds: setting `stop` wakes nobody, so it is polled
            if stop is not None and stop.is_set():
                raise Stopped
            yield
        finally:
            with self._changed:
                self._line.remove(me)
                self._changed.notify_all()


@dataclass
class LanguageModel:
    """A loaded language model (as upstream's LLaVA class), and the queue that lets in one generation at a time."""

    model: Any
    tokenizer: Any
    conversation: str
    """Name of upstream's conversation template."""
    turns: Turns = field(default_factory=Turns)


@dataclass
class Llava:
    """A vision tower and a projector in front of a language model, which another Llava may share."""

    name: str
    directory: Path
    llm: LanguageModel
    tower: Any
    projector: Any
    config: Any
    newline: Any = None
    """What stands after each row of patches where pictures are cut into tiles."""

    @property
    def is_moe(self) -> bool:
        return isinstance(self.tower, CLIPMoEVisionTower)

    @property
    def tower_source(self) -> str:
        """Directory or hub id of the whole CLIP that the tower was read from."""
        return str(self.tower.directory) if self.is_moe else self.tower.vision_tower_name

    @contextmanager
    def in_place(
        self, stop: threading.Event | None = None, waiting: Callable[[int], None] | None = None
    ) -> Iterator[Any]:
        """Take a turn at the language model, with this tower and projector in front of it; -> upstream's model.

        `stop` and `waiting` as in `Turns.turn`, which raises QueueFull and Stopped.
        """
        with self.llm.turns.turn(waiting, stop):
            inner, model = self.llm.model.get_model(), self.llm.model
            if inner.vision_tower is not self.tower:
                inner.vision_tower, inner.mm_projector = self.tower, self.projector
                inner.image_newline = self.newline
                model.config = inner.config = self.config
            yield model

    def inputs(self, picture: Image.Image, question: str) -> dict[str, Any]:
        """Arguments of upstream's `generate`: ids [1,T] with one image token, pixels, and the picture's size."""
        from llava.mm_utils import process_images, tokenizer_image_token  # upstream: there where a LLaVA is loaded

        pixels = process_images([picture], self.tower.image_processor, self.config)
        prompt = prompt_of(question, self.config, self.llm.conversation)
        ids = tokenizer_image_token(prompt, self.llm.tokenizer, return_tensors="pt")
        device, dtype = self.llm.model.device, self.llm.model.dtype
        return {"inputs": ids[None].to(device), "images": pixels.to(device, dtype), "image_sizes": [picture.size]}

    def stream(
        self,
        picture: Image.Image,
        question: str,
        how: Generation,
        stop: threading.Event | None = None,
        waiting: Callable[[int], None] | None = None,
    ) -> Iterator[str]:
        """Yields the answer so far: an empty text when the turn has come, then the whole text each time it has grown.

        Setting `stop` ends it early, and so does closing the iterator. `waiting` is called with the number of
        questions that come first. Raises what the generation raised (out of memory, for instance), QueueFull, Stopped.
        """
        closed = threading.Event()  # set when nobody reads on; `stop` belongs to the caller and may end other answers
        stops = [closed] if stop is None else [closed, stop]
        with self.in_place(stop, waiting) as model:
            yield ""
            streamer = TextIteratorStreamer(
                self.llm.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=NEXT_TEXT_SECONDS
            )
            failed: list[BaseException] = []

            def stopped(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                return torch.full((len(ids),), any(stop.is_set() for stop in stops), device=ids.device)

            def generate() -> None:
                try:
                    with torch.inference_mode():
                        model.generate(**arguments)
                except BaseException as error:
                    failed.append(error)
                    streamer.end()

            arguments = {
                **self.inputs(picture, question),
                "streamer": streamer,
                "use_cache": True,
                "do_sample": how.temperature > 0,
                "max_new_tokens": how.max_new_tokens,
                "stopping_criteria": [stopped],
                "pad_token_id": self.llm.tokenizer.eos_token_id,
            }
            if how.temperature > 0:
                arguments["temperature"] = how.temperature
            thread = threading.Thread(target=generate, daemon=True)
            thread.start()
            try:
                yield from _growing(streamer, stops, separator_of(self.llm.conversation))
            finally:
                closed.set()
                thread.join()  # the turn is given back only when the model is idle
        if failed:
            raise failed[0]

    def answer_files(
        self,
        pictures: Sequence[Path],
        questions: Sequence[str],
        batch_size: int,
        max_new_tokens: int = 32,
        stop: threading.Event | None = None,
    ) -> Iterator[list[str]]:
        """Greedy answers to one question for each picture file, a batch at a time; others get turns in between."""
        for start in range(0, len(pictures), batch_size):
            part = slice(start, start + batch_size)
            asked = enumerate(zip(pictures[part], questions[part], strict=True))
            rows = [{"question_id": i, "text": text, "image": str(picture)} for i, (picture, text) in asked]
            with self.in_place(stop) as model:
                tokenizer, processor = self.llm.tokenizer, self.tower.image_processor
                prompts = Prompts(rows, Path(), tokenizer, processor, self.config, self.llm.conversation)
                texts = next(answer(model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens))
            yield texts  # after the turn: the reader may take any time before it asks for the next batch


def _growing(streamer: Iterator[str], stops: Sequence[threading.Event], separator: str) -> Iterator[str]:
    """Pieces of text -> the answer so far, up to the template's separator."""
    text = ""
    for piece in streamer:
        text += piece
        before, found, _ = text.partition(separator)
        if piece:
            yield before.strip()
        if found or any(stop.is_set() for stop in stops):
            return


def separator_of(conversation: str) -> str:
    """What ends an answer in this template: in the text after it the model talks to itself."""
    from llava.conversation import SeparatorStyle, conv_templates  # upstream

    template = conv_templates[conversation]
    if template.sep_style == SeparatorStyle.TWO or not template.sep:  # Mistral's has only the second
        return template.sep2
    return template.sep
