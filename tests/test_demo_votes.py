"""demo/votes.py: a vote that was given is on the disk, whatever happens around it, and the score says what it can."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections import Counter
from datetime import datetime, timedelta, timezone
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import demo.votes
from demo.votes import Vote, append_vote, draw_sides, read_votes, tally
from llava_clipmoe.files import SaveError

MOE, CLIP = "CLIP-MoE", "CLIP"


def vote(choice: str = "a", question: str = "Which way?", a: str = MOE, b: str = CLIP) -> Vote:
    return Vote(["1.png", "2.png"], question, a, b, ["left", "right"], ["left", "left"], choice)


# ------------------------------------------------------------------------------------------------------------- the file


def test_votes_are_read_back_as_they_were_given(tmp_path):
    given = [vote("a"), vote("tie", 'Zeile\nzwei "日本" \u2028 \x85?'), vote("bad"), vote("b")]
    for one in given:
        append_vote(tmp_path / "new folder" / "votes.jsonl", one)
    assert read_votes(tmp_path / "new folder" / "votes.jsonl") == given


def test_a_vote_is_one_json_object_a_line_with_its_time_in_utc(tmp_path):
    append_vote(tmp_path / "votes.jsonl", vote(question="a\nb"))
    (line,) = (tmp_path / "votes.jsonl").read_bytes().splitlines()
    row = json.loads(line)
    assert row["choice"] == "a" and row["model_a"] == MOE and row["answers_b"] == ["left", "left"]
    time = datetime.fromisoformat(row["time"])
    assert time.utcoffset() == timedelta(0) and abs(time - datetime.now(timezone.utc)) < timedelta(minutes=1)


def test_no_file_is_no_votes(tmp_path):
    assert read_votes(tmp_path / "votes.jsonl") == []


def test_a_lone_surrogate_does_not_stop_a_vote(tmp_path):
    append_vote(tmp_path / "votes.jsonl", vote(question="odd \udc00 letter"))
    append_vote(tmp_path / "votes.jsonl", vote())
    assert len(read_votes(tmp_path / "votes.jsonl")) == 2


@pytest.mark.parametrize("cut", [1, 2, 30, 10_000])
def test_a_torn_last_line_costs_no_other_vote(tmp_path, caplog, cut):
    path, given = tmp_path / "votes.jsonl", [vote(question=f"question {i}") for i in range(3)]
    for one in given:
        append_vote(path, one)
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    path.write_bytes(whole[: max(last + 1, len(whole) - cut)])  # cut 1: only the line end is missing
    append_vote(path, vote(question="after the crash"))
    kept = given if cut == 1 else given[:2]
    assert [v.question for v in read_votes(path)] == [v.question for v in kept] + ["after the crash"]
    assert ("skipped 1 damaged" in caplog.text) == (cut != 1)


def test_damaged_and_foreign_lines_are_skipped_and_counted(tmp_path, caplog):
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote())
    good = path.read_text(encoding="utf-8")
    bad = ["", "[]", "3", "{}", "\x00\xff", good.replace('"a"', '"x"', 1), good.replace('["left", "left"]', '"left"')]
    path.write_bytes("\n".join([*bad, good]).encode("latin-1"))
    assert len(read_votes(path)) == 1
    assert "skipped 6 damaged" in caplog.text


def test_a_field_of_a_newer_version_does_not_hide_a_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote())
    path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 3}) + "\n")
    assert read_votes(path)[0].choice == "a"


@pytest.mark.parametrize("fields", [{"choice": "c"}, {"b": MOE}, {"question": 3}])
def test_what_is_no_vote_cannot_be_made(fields):
    with pytest.raises(ValueError, match="vote"):
        vote(**fields)


def _add(path: Path, who: int, count: int, ready: Event | None = None) -> None:
    if ready is not None:
        ready.set()
    for i in range(count):
        append_vote(path, vote(question=f"{who} {i} " + "x" * 5000))


def _questions(path: Path) -> list[str]:
    return sorted(v.question[:6].strip(" x") for v in read_votes(path))


def test_threads_lose_no_vote(tmp_path):
    path = tmp_path / "votes.jsonl"
    threads = [threading.Thread(target=_add, args=(path, who, 10)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _questions(path) == sorted(f"{who} {i}" for who in range(4) for i in range(10))


@pytest.mark.skipif(demo.votes.fcntl is None, reason="no fcntl here: processes cannot lock a file")
def test_a_vote_waits_for_another_process_that_is_writing(tmp_path):
    """The lock is held as another process would hold it: through a file description of its own."""
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote(question="0 0"))
    fd = os.open(path, os.O_RDWR)
    demo.votes.fcntl.flock(fd, demo.votes.fcntl.LOCK_EX)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_add, args=(path, 1, 1, ready))
    process.start()
    assert ready.wait(timeout=120)
    started = path.stat().st_size
    os.lseek(fd, 0, os.SEEK_END)
    os.write(fd, b'{"half": ')  # nobody may write between the two halves
    process.join(timeout=1)
    assert process.is_alive() and path.stat().st_size == started + 9
    os.write(fd, b"1}\n")
    os.close(fd)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert path.read_bytes().count(b"\n") == 3 and _questions(path) == ["0 0", "1 0"]


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "votes.jsonl"
    append_vote(path, vote())
    before, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:20]))
    with pytest.raises(SaveError, match="No earlier vote was lost"):
        append_vote(path, vote("b"))
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_vote_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.fstat(fd).st_size), fsync(fd)))
    append_vote(tmp_path / "votes.jsonl", vote())
    assert flushed == [(tmp_path / "votes.jsonl").stat().st_size]


# ------------------------------------------------------------------------------------------------------------ the score


def votes(moe: int, clip: int, ties: int = 0, bad: int = 0) -> list[Vote]:
    """Each side wins as often as A as it wins as B."""
    made = []
    for count, winner, loser in ((moe, MOE, CLIP), (clip, CLIP, MOE)):
        for i in range(count):
            made.append(vote("a", a=winner, b=loser) if i % 2 else vote("b", a=loser, b=winner))
    return made + [vote("tie")] * ties + [vote("bad")] * bad


def test_wins_are_counted_whichever_side_a_model_was_on():
    score = tally(votes(moe=7, clip=3, ties=2, bad=1), (MOE, CLIP))
    assert (score.wins, score.ties, score.bad, score.decided, score.votes) == ((7, 3), 2, 1, 10, 13)
    other = tally(votes(moe=7, clip=3), (CLIP, MOE))
    assert other.wins == (3, 7) and other.share == pytest.approx(0.3)


def test_the_interval_is_wilsons():
    score = tally(votes(moe=7, clip=3), (MOE, CLIP))
    z, n, p = 1.959964, 10, 0.7  # Wilson 1927, written out
    middle, half = (p + z * z / 2 / n), z * (p * (1 - p) / n + z * z / 4 / n / n) ** 0.5
    expected = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    assert score.interval == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "wins, sentence",
    [
        ((0, 0, 0, 0), "No decided votes yet."),
        ((0, 0, 1, 2), "No decided votes yet (1 tied, 2 both bad)."),
        ((7, 3, 0, 0), "7 of 10 decided votes: 70% (95% interval 40–89%), too few to tell."),
        ((1, 0, 2, 0), "1 of 1 decided votes (2 tied): 100% (95% interval 21–100%), too few to tell."),
        ((60, 20, 0, 0), "60 of 80 decided votes: 75% (95% interval 65–83%), enough to prefer CLIP-MoE."),
        ((20, 60, 0, 0), "20 of 80 decided votes: 25% (95% interval 17–35%), enough to prefer CLIP."),
        ((300, 300, 0, 0), "300 of 600 decided votes: 50% (95% interval 46–54%), no clear preference."),
    ],
)
def test_the_score_in_one_honest_sentence(wins, sentence):
    start = "CLIP-MoE preferred in " if wins[0] else ""
    assert str(tally(votes(*wins), (MOE, CLIP))) == start + sentence


def test_votes_about_other_models_do_not_count():
    mixed = [*votes(2, 1), vote("a", a=MOE, b="another"), vote("b", a="another", b="third")]
    assert tally(mixed, (MOE, CLIP)).votes == 3


# ------------------------------------------------------------------------------------------------------------ the sides


def test_each_model_is_on_each_side_half_of_the_time():
    sides = Counter(draw_sides((MOE, CLIP)) for _ in range(400))
    assert set(sides) == {(MOE, CLIP), (CLIP, MOE)}
    assert 120 < sides[MOE, CLIP] < 280  # beyond 8 standard deviations


def test_a_seed_of_pythons_random_does_not_foretell_the_sides():
    def drawn() -> list:
        random.seed(0)
        return [draw_sides((1, 2)) for _ in range(64)]

    assert drawn() != drawn()
    rngs = random.Random(3), random.Random(3)
    assert [draw_sides((1, 2), rngs[0]) for _ in range(20)] == [draw_sides((1, 2), rngs[1]) for _ in range(20)]
