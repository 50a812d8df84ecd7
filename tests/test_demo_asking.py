"""Taking turns at a model, and the board of four answers: in order, stoppable, and one's error is only one's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from PIL import Image
from tiny.llavas import upstream_is_installed

pytest.importorskip("gradio", reason="the demo's packages are not installed")

from demo.llava.ask import Board, Cell, ask_all
from demo.llava.generate import Llava, QueueFull, Stopped, Turns
from demo.llava.settings import Generation

pytest_plugins = ["tiny.loaded_llavas"]

SECONDS = 30
"""Longest wait for another thread: far more than it takes, so that only what hangs fails."""


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


# --------------------------------------------------------------------------------------------------------------- turns


class Visitor:
    """A thread that takes one turn; `told` is what it was told about its place."""

    def __init__(self, turns: Turns, served: list[str], name: str = ""):
        self.told: list[int] = []
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.turns, self.served, self.name = turns, served, name
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            with self.turns.turn(self.told.append, self.stop):
                self.served.append(self.name)
        except (QueueFull, Stopped) as error:
            self.error = error

    def end(self) -> None:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


def line_up(turns: Turns, count: int) -> tuple[list[Visitor], list[str]]:
    """Visitors who came one after the other while somebody else has the turn."""
    served: list[str] = []
    visitors = []
    for number in range(count):
        visitors.append(Visitor(turns, served, str(number)))
        until(lambda: bool(visitors[-1].told))
    return visitors, served


def test_turns_come_in_the_order_of_arrival_and_everyone_knows_the_place():
    turns = Turns()
    with turns.turn():
        visitors, served = line_up(turns, 6)
        assert [visitor.told for visitor in visitors] == [[1], [2], [3], [4], [5], [6]]
        assert not served
    for visitor in visitors:
        visitor.end()
    assert served == list("012345")
    for number, visitor in enumerate(visitors):
        assert visitor.told[0] == number + 1
        assert visitor.told == sorted(visitor.told, reverse=True), "nobody is overtaken"


def test_only_one_has_the_turn():
    turns, inside, most = Turns(), [], []

    def visit() -> None:
        for _ in range(20):
            with turns.turn():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=visit) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(most) == 100 and max(most) == 1


def test_the_line_is_bounded_and_who_finds_it_full_is_told_at_once():
    turns = Turns(most_waiting=2)
    with turns.turn():
        visitors, served = line_up(turns, 2)
        gone = threading.Event()
        gone.set()  # without the bound it would wait here for ever: so it would be Stopped
        with pytest.raises(QueueFull, match="2 questions are waiting"):
            with turns.turn(stop=gone):
                pytest.fail("nobody may enter")
        visitors[0].stop.set()
        visitors[0].end()
        assert isinstance(visitors[0].error, Stopped)
        late = Visitor(turns, served, "late")  # the place that was given up is free again
        until(lambda: late.told == [2])
    for visitor in (visitors[1], late):
        visitor.end()
    assert served == ["1", "late"]


def test_those_behind_one_who_gives_up_move_on():
    turns = Turns()
    with turns.turn():
        visitors, served = line_up(turns, 3)
        visitors[0].stop.set()
        until(lambda: visitors[1].told == [2, 1] and visitors[2].told == [3, 2])
    for visitor in visitors:
        visitor.end()
    assert served == ["1", "2"]


def test_an_error_in_a_turn_frees_it():
    turns = Turns(most_waiting=0)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            with turns.turn():
                raise ZeroDivisionError


# --------------------------------------------------------------------------------------------------------------- board

needs_upstream = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")
QUESTION = "What colour is the square?"
PICTURES = [Image.new("RGB", (50, 30), (30, 170, 60)), Image.new("RGB", (40, 60), (240, 220, 40))]
HOW, LONG = Generation(max_new_tokens=16), Generation(max_new_tokens=300)
PLACES = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(params=["own", "shared"])
def llavas(request) -> tuple[Llava, Llava]:
    return request.getfixturevalue(request.param)


def states(board: Board) -> list[str]:
    return [board[place].state for place in PLACES]


def has_free_turn(llava: Llava) -> bool:
    """Whether one who would not wait gets in."""
    llava.llm.turns.most_waiting, before = 0, llava.llm.turns.most_waiting
    try:
        with llava.llm.turns.turn():
            return True
    except QueueFull:
        return False
    finally:
        llava.llm.turns.most_waiting = before


@needs_upstream
def test_four_answers_each_in_its_place(llavas):
    expected = {(e, p): list(llavas[e].stream(PICTURES[p], QUESTION, HOW))[-1] for e, p in PLACES}
    assert len(set(expected.values())) == 4, "answers must differ for this to show anything"
    boards = list(ask_all(llavas, PICTURES, QUESTION, HOW))
    assert states(boards[0]) == ["waiting"] * 4
    assert states(boards[-1]) == ["done"] * 4
    assert {place: cell.text for place, cell in boards[-1].items()} == expected
    for cell in boards[-1].values():
        assert 0 < cell.first_seconds <= cell.seconds < SECONDS


@needs_upstream
def test_boards_already_shown_do_not_change(own):
    """A reader may keep them: each is a copy."""
    boards = ask_all(own, PICTURES, QUESTION, HOW)
    first = next(boards)
    list(boards)
    assert states(first) == ["waiting"] * 4


class Watched:
    """Counts how many of the towers look at once, and makes each look last a while."""

    def __init__(self, llavas: tuple[Llava, Llava], monkeypatch, seconds: float):
        self.inside, self.most, self.order, self.lock = 0, 0, [], threading.Lock()
        for number, llava in enumerate(llavas):
            monkeypatch.setattr(llava.tower, "forward", self.slowed(llava.tower.forward, number, seconds))

    def slowed(self, forward, number: int, seconds: float):
        def look(pixels):
            with self.lock:
                self.inside += 1
                self.most = max(self.most, self.inside)
                self.order.append(number)
            time.sleep(seconds)
            with self.lock:
                self.inside -= 1
            return forward(pixels)

        return look


@needs_upstream
def test_llavas_with_language_models_of_their_own_answer_side_by_side(own, monkeypatch):
    watched = Watched(own, monkeypatch, 0.4)
    boards = list(ask_all(own, PICTURES, QUESTION, HOW))
    assert watched.most == 2
    answering = [{llava for llava, picture in PLACES if board[llava, picture].state == "answering"} for board in boards]
    assert {0, 1} in answering
    assert states(boards[-1]) == ["done"] * 4


@needs_upstream
def test_llavas_of_one_language_model_never_answer_at_the_same_time(shared, monkeypatch):
    watched = Watched(shared, monkeypatch, 0.15)
    boards = list(ask_all(shared, PICTURES, QUESTION, HOW))
    assert watched.most == 1 and watched.order == [0, 0, 1, 1]
    assert max(states(board).count("answering") for board in boards) == 1
    assert states(boards[-1]) == ["done"] * 4


@needs_upstream
def test_the_place_in_the_queue_is_shown_while_somebody_else_has_the_model(own):
    with own[1].llm.turns.turn():
        boards = ask_all(own, PICTURES, QUESTION, HOW)
        for board in boards:
            if board[1, 0].before == 1 and board[0, 0].state == "done":
                break  # the other LLaVA does not wait for this one
        assert board[1, 0] == Cell(before=1)
    last = list(boards)[-1]
    assert states(last) == ["done"] * 4
    assert last[1, 0].before == 0


@needs_upstream
def test_waiting_is_not_counted_as_the_models_time(own):
    started = time.monotonic()
    with own[1].llm.turns.turn():
        boards = ask_all(own, PICTURES, QUESTION, HOW)
        next(boards)
        time.sleep(1.5)
    last = list(boards)[-1]
    whole = time.monotonic() - started
    assert last[1, 0].seconds + last[1, 1].seconds <= whole - 1.4


@needs_upstream
def test_stop_leaves_what_was_said_and_asks_no_more(llavas, monkeypatch):
    watched = Watched(llavas, monkeypatch, 0)
    stop = threading.Event()
    for board in ask_all(llavas, PICTURES, QUESTION, LONG, stop):
        if board[0, 0].text:
            stop.set()
    assert board[0, 0].text and board[0, 0].state in ("stopped", "done")
    assert board[1, 1] == Cell(state="stopped")
    assert "waiting" not in states(board) and "answering" not in states(board)
    assert len(watched.order) <= 2, "a picture was read though the answer was not wanted any more"
    assert all(has_free_turn(llava) for llava in llavas)


@needs_upstream
def test_stop_in_the_queue(own):
    stop = threading.Event()
    with own[0].llm.turns.turn(), own[1].llm.turns.turn():
        for board in ask_all(own, PICTURES, QUESTION, HOW, stop):
            if board[0, 0].before and board[1, 0].before:
                stop.set()
        assert states(board) == ["stopped"] * 4
    assert all(has_free_turn(llava) for llava in own)


@needs_upstream
def test_an_llava_that_fails_spoils_only_its_own_cells(llavas, monkeypatch):
    def fail(pixels):
        raise RuntimeError("no memory")

    monkeypatch.setattr(llavas[0].tower, "forward", fail)
    board = list(ask_all(llavas, PICTURES, QUESTION, HOW, explain=lambda error: f"told: {error}"))[-1]
    assert states(board) == ["failed", "failed", "done", "done"]
    assert board[0, 0].text == board[0, 1].text == "told: no memory"
    assert board[1, 0].text
    monkeypatch.undo()
    assert states(list(ask_all(llavas, PICTURES, QUESTION, HOW))[-1]) == ["done"] * 4


@needs_upstream
def test_a_full_queue_is_said_in_the_cells(own):
    turns = own[0].llm.turns
    turns.most_waiting, before = 0, turns.most_waiting
    try:
        with turns.turn():
            board = list(ask_all(own, PICTURES, QUESTION, HOW))[-1]
    finally:
        turns.most_waiting = before
    assert states(board) == ["failed", "failed", "done", "done"]
    assert "questions are waiting for this model already" in board[0, 0].text


@needs_upstream
@pytest.mark.parametrize("after", [1, 3])
def test_closing_the_board_leaves_no_thread_and_no_turn(llavas, after, monkeypatch):
    """A visitor who leaves the page in mid-answer."""
    watched = Watched(llavas, monkeypatch, 0)
    before = set(threading.enumerate())
    boards = ask_all(llavas, PICTURES, QUESTION, LONG)
    for _ in range(after):
        next(boards)
    assert len(set(threading.enumerate()) - before) >= 1
    boards.close()
    assert not set(threading.enumerate()) - before
    assert len(watched.order) < 4, "it went on with nobody there"
    assert all(has_free_turn(llava) for llava in llavas)


@needs_upstream
def test_two_visitors_at_once_both_get_their_own_answers(shared):
    """Each thread its own pictures; one language model serves both in turn."""
    expected = [texts(list(ask_all(shared, pictures, QUESTION, HOW))[-1]) for pictures in both_orders()]
    found: list[list[str] | None] = [None, None]

    def visit(number: int) -> None:
        found[number] = texts(list(ask_all(shared, both_orders()[number], QUESTION, HOW))[-1])

    threads = [threading.Thread(target=visit, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found == expected and expected[0] != expected[1]


def both_orders() -> list[list[Image.Image]]:
    return [PICTURES, PICTURES[::-1]]


def texts(board: Board) -> list[str]:
    return [board[place].text for place in PLACES]
