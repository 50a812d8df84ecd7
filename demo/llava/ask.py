"""Ask both LLaVAs the same question about both pictures of a pair, and watch the four answers grow."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from PIL import Image

from .generate import Llava, Stopped
from .settings import Generation

REFRESH_SECONDS = 0.1
"""Between two states of the board: faster than one reads, slow enough for a browser on a phone."""


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


Board = dict[tuple[int, int], Cell]
"""By (LLaVA, picture), each 0 or 1."""


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
    news: queue.Queue[tuple[tuple[int, int], Cell]] = queue.Queue()
    board: Board = {(i, p): Cell() for i in range(len(llavas)) for p in range(len(pictures))}

    def answer(llm: object) -> None:
        """Answer, one after the other, in the cells of the LLaVAs with this language model."""
        for place in board:
            llava, picture = llavas[place[0]], pictures[place[1]]
            if llava.llm is llm:
                _answer(llava, picture, question, how, stop, explain, lambda cell, place=place: news.put((place, cell)))

    models = {id(llava.llm): llava.llm for llava in llavas}.values()
    threads = [threading.Thread(target=answer, args=(llm,), daemon=True) for llm in models]
    for thread in threads:
        thread.start()
    try:
        yield dict(board)
        while any(thread.is_alive() for thread in threads) or not news.empty():
            changed, end = False, time.monotonic() + REFRESH_SECONDS
            while (left := end - time.monotonic()) > 0:
                try:
                    place, cell = news.get(timeout=left)
                except queue.Empty:
                    break
                board[place] = cell
                changed = True
            if changed:
                yield dict(board)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _answer(
    llava: Llava,
    picture: Image.Image,
    question: str,
    how: Generation,
    stop: threading.Event,
    explain: Callable[[Exception], str],
    tell: Callable[[Cell], None],
) -> None:
    """Tell every state of one cell, the last one done, stopped or failed."""
    cell, start = Cell(), 0.0
    try:
        for text in llava.stream(picture, question, how, stop, lambda before: tell(Cell(before=before))):
            if cell.state != "answering":
                start = time.monotonic()  # the time in the queue is not the model's
                cell = Cell(state="answering")
            elif cell.first_seconds is None and text:
                cell = replace(cell, first_seconds=time.monotonic() - start)
            cell = replace(cell, text=text, seconds=time.monotonic() - start)
            tell(cell)
        tell(replace(cell, state="stopped" if stop.is_set() else "done"))
    except Stopped:
        tell(replace(cell, state="stopped"))
    except Exception as error:  # shown in its cell; the other answers go on
        tell(replace(cell, text=explain(error), state="failed"))
