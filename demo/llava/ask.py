"""Ask both LLaVAs the same question about both pictures of a pair, and watch the four answers grow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from .generate import Llava
from .settings import Generation
from .turns import Stopped

REFRESH_SECONDS = 0.1
"""Between two states of the board: faster than one reads, slow enough for a browser on a phone."""

Place = tuple[int, int]
"""(LLaVA, picture), each 0 or 1."""


@dataclass(frozen=True)
class Cell:
    """One answer of the board."""

    text: str = ""
    state: str = "waiting"
    """waiting, answering, done, stopped, or failed (then `text` says why)."""
    before: int = 0
    """Other questions that come first."""
    first_seconds: float | None = None
    """From the start of the generation to the first text."""
    seconds: float = 0.0
    """From the start of the generation until now."""


Board = dict[Place, Cell]


@dataclass(frozen=True)
class _Asking:
    """One question to all: what every cell's thread needs."""

    llavas: Sequence[Llava]
    pictures: Sequence[Image.Image]
    question: str
    how: Generation
    stop: threading.Event
    explain: Callable[[Exception], str]
    news: queue.Queue[tuple[Place, Cell]]

    def answer(self, places: Sequence[Place]) -> None:
        """Answer in these places, one after the other; every new state goes into `news`."""
        for place in places:
            for cell in self._cells(place):
                self.news.put((place, cell))

    def _cells(self, place: Place) -> Iterator[Cell]:
        """The states of one cell."""
        cell, start = Cell(), 0.0
        llava, picture = self.llavas[place[0]], self.pictures[place[1]]

        def waiting(before: int) -> None:
            self.news.put((place, Cell(before=before)))

        try:
            for text in llava.stream(picture, self.question, self.how, self.stop, waiting):
                if cell.state != "answering":
                    start = time.monotonic()  # the time in the queue is not the model's
                    cell = Cell(state="answering")
                elif cell.first_seconds is None and text:
                    cell = replace(cell, first_seconds=time.monotonic() - start)
                cell = replace(cell, text=text, seconds=time.monotonic() - start)
                yield cell
            yield replace(cell, state="stopped" if self.stop.is_set() else "done")
        except Stopped:
            yield replace(cell, state="stopped")
        except Exception as error:  # shown in its cell; the other answers go on
            yield replace(cell, text=self.explain(error), state="failed")


def ask_all(
    llavas: Sequence[Llava],
    pictures: Sequence[Image.Image],
    question: str,
    how: Generation,
    stop: threading.Event | None = None,
    explain: Callable[[Exception], str] = str,
) -> Iterator[Board]:
    """Yields the board whenever it has changed, the last time when all four cells are done, stopped or failed.

    LLaVAs with language models of their own answer side by side, each one picture after the other. Setting `stop` ends
    all generations, and so does closing the iterator. `explain` turns an error into what its cell shows.
    """
    stop = stop or threading.Event()
    asking = _Asking(llavas, pictures, question, how, stop, explain, queue.Queue())
    board: Board = {(i, p): Cell() for i in range(len(llavas)) for p in range(len(pictures))}
    by_model: dict[int, list[Place]] = {}
    for place in board:
        by_model.setdefault(id(llavas[place[0]].llm), []).append(place)
    threads = [threading.Thread(target=asking.answer, args=(places,), daemon=True) for places in by_model.values()]
    for thread in threads:
        thread.start()
    try:
        yield dict(board)
        while any(thread.is_alive() for thread in threads) or not asking.news.empty():
            if _take(asking.news, board):
                yield dict(board)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _take(news: queue.Queue[tuple[Place, Cell]], board: Board) -> bool:
    """Put onto the board what comes in during REFRESH_SECONDS; False when nothing comes."""
    changed, end = False, time.monotonic() + REFRESH_SECONDS
    while (left := end - time.monotonic()) > 0:
        try:
            place, cell = news.get(timeout=left)
        except queue.Empty:
            break
        board[place] = cell
        changed = True
    return changed
