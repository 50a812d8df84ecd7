"""Ask both eyes the same question about both pictures of a pair, and watch the four answers grow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from .models import Eye, Generation
from .turns import Stopped

REFRESH_SECONDS = 0.1
"""Between two states of the board: faster than one reads, slow enough for a browser on a phone."""

Place = tuple[int, int]
"""(eye, picture), each 0 or 1."""


@dataclass(frozen=True)
class Cell:
    """One answer of the board."""

    text: str = ""
    state: str = "waiting"
    """waiting, answering, done, stopped, or failed (then `text` says why)."""
    before: int = 0
    """Generations of others that come first."""
    first_seconds: float | None = None
    """From the start of the generation to the first text."""
    seconds: float = 0.0


Board = dict[Place, Cell]


def ask_all(
    eyes: Sequence[Eye], pictures: Sequence[Image.Image], question: str, how: Generation,
    stop: threading.Event | None = None, explain: Callable[[Exception], str] = str,
) -> Iterator[Board]:  # fmt: skip
    """Yields the board whenever it has changed, the last time when all four cells are done, stopped or failed.

    Eyes with a language model of their own answer side by side, one picture after the other. Setting `stop` ends all
    generations, and so does closing the iterator. `explain` turns an error into what the cell shows.
    """
    board: Board = {(e, p): Cell() for e in range(len(eyes)) for p in range(len(pictures))}
    news: queue.Queue[tuple[Place, Cell]] = queue.Queue()
    stop = stop or threading.Event()
    by_model: dict[int, list[Place]] = {}
    for place in board:
        by_model.setdefault(id(eyes[place[0]].llm), []).append(place)

    def work(places: Sequence[Place]) -> None:
        for place in places:
            eye, picture = eyes[place[0]], pictures[place[1]]
            for cell in _answer(
                eye, picture, question, how, stop, lambda cell, at=place: news.put((at, cell)), explain
            ):
                news.put((place, cell))

    threads = [threading.Thread(target=work, args=(places,), daemon=True) for places in by_model.values()]
    for thread in threads:
        thread.start()
    try:
        yield dict(board)
        while any(thread.is_alive() for thread in threads) or not news.empty():
            if _take(news, board):
                yield dict(board)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _take(news: queue.Queue[tuple[Place, Cell]], board: Board) -> bool:
    """Put what came in during REFRESH_SECONDS onto the board; False when nothing came."""
    try:
        place, cell = news.get(timeout=REFRESH_SECONDS)
    except queue.Empty:
        return False
    board[place] = cell
    end = time.monotonic() + REFRESH_SECONDS
    while (left := end - time.monotonic()) > 0:
        try:
            place, cell = news.get(timeout=left)
        except queue.Empty:
            break
        board[place] = cell
    return True


def _answer(
    eye: Eye, picture: Image.Image, question: str, how: Generation, stop: threading.Event,
    tell: Callable[[Cell], None], explain: Callable[[Exception], str],
) -> Iterator[Cell]:  # fmt: skip
    """The states of one cell."""
    cell, start = Cell(), 0.0
    try:
        for text in eye.stream(picture, question, how, stop, lambda before: tell(Cell(before=before))):
            if not cell.state == "answering":
                start = time.monotonic()  # its turn has come: what was waited before is not the model's time
                cell = Cell(state="answering")
            elif cell.first_seconds is None and text:
                cell = replace(cell, first_seconds=time.monotonic() - start)
            cell = replace(cell, text=text, seconds=time.monotonic() - start)
            yield cell
        yield replace(cell, state="stopped" if stop.is_set() else "done")
    except Stopped:
        yield replace(cell, state="stopped")
    except Exception as error:  # it is shown in its cell; the other answers go on
        yield replace(cell, text=explain(error), state="failed")
