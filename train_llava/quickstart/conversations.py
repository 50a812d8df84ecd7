"""Questions about the scenes of OpenMoji drawings, in LLaVA's data format; every answer is known from the scene.

    build_conversations("runs/llava-quickstart/data", build_openmoji())

The split is the encoder's own: neither tower nor language model saw a held-out combination. The folder holds

    stage1.json          one caption a picture (LLaVA's pre-training format, version "plain")
    stage2.json          one conversation a picture: every attribute once, in random order
    words.jsonl          {image, words}: what there is in each training picture, a word an attribute
    heldout.jsonl        {image, attribute, question, answer, answers}: every answer of an attribute equally often, so
                         that a model that does not see gets one in len(answers) right, whatever its habits
    pairs.jsonl          the attribute pairs: {image, attribute, type, statement, question, answer, other, answers,
                         pair, split}; both pictures of a pair get the same question
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_clipmoe.files import atomic_directory, read_json, write_json
from train_encoder.openmoji.scenes import ATTRIBUTES, Scene, answer_of
from train_llava.eval.answers import read_jsonl, write_jsonl

FORMAT = 3
"""Raise it whenever the questions change: a folder of another format is built anew."""
IMAGE_TOKEN = "<image>"
ANSWERS = {name: attribute.answers for name, attribute in ATTRIBUTES.items()}
"""The possible answers to the question about each attribute."""


def build_conversations(folder: str | Path, openmoji: Path, *, seed: int = 0, most: int = 12) -> Path:
    """Write the folder that the module's docstring describes; a whole one of this format and seed is kept.

    `openmoji`: what `build_openmoji` returned. `most`: held-out questions for each answer of an attribute.
    """
    folder, openmoji = Path(folder), Path(openmoji).resolve()
    facts: dict[str, Any] = {"format": FORMAT, "seed": seed, "most": most, "openmoji": str(openmoji)}
    done = folder / "facts.json"
    if done.exists() and {k: v for k, v in read_json(done).items() if k in facts} == facts:
        return folder
    rng = random.Random(seed)
    train, heldout = (
        [{**row, "image": str(openmoji / row["image"])} for row in read_jsonl(openmoji / f"{split}.jsonl")]
        for split in ("train", "heldout")
    )
    pairs, asked = pair_questions(openmoji), balanced(heldout, most, rng)
    with atomic_directory(folder) as building:
        write_json(building / "stage1.json", [as_llava(row["image"], [("", row["long"])]) for row in train])
        write_json(building / "stage2.json", [as_llava(row["image"], conversation(row["scene"], rng)) for row in train])
        write_jsonl(building / "words.jsonl", [{"image": r["image"], "words": words_of(r["scene"])} for r in train])
        write_jsonl(building / "heldout.jsonl", asked)
        write_jsonl(building / "pairs.jsonl", pairs)
        counts = Counter(row["attribute"] for row in asked)
        write_json(building / "facts.json", facts | {"train": len(train), "heldout": counts, "pairs": len(pairs) // 2})
    return folder


def conversation(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """(question, answer) of every attribute, in random order: no answer tells a later one."""
    turns = [(attribute.question, answer_of(scene[name])) for name, attribute in ATTRIBUTES.items()]
    rng.shuffle(turns)
    return turns


def words_of(scene: Scene) -> list[str]:
    """The answer about each attribute, in words."""
    return [answer_of(value) for value in scene.values()]


def as_llava(image: str, turns: Sequence[tuple[str, str]]) -> dict:
    """One row of LLaVA's format; the image token stands before the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": f"{IMAGE_TOKEN}\n{question}" if i == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": Path(image).stem, "image": image, "conversations": messages}


def balanced(rows: Sequence[Mapping[str, Any]], most: int, rng: random.Random) -> list[dict]:
    """Questions about held-out scenes: of each attribute every answer equally often, at most `most` times."""
    questions = []
    for name, attribute in ATTRIBUTES.items():
        showing = {value: [row for row in rows if row["scene"][name] == value] for value in attribute.values}
        count = min(most, *map(len, showing.values()))
        for value, found in showing.items():
            asked = {"question": attribute.question, "answer": answer_of(value), "answers": ANSWERS[name]}
            drawn = rng.sample(found, count)
            questions += [{"image": row["image"], "attribute": name, **asked} for row in drawn]
    return questions


def pair_questions(openmoji: Path) -> list[dict]:
    """The data set's attribute pairs: each picture is asked for the attribute in which the two differ."""
    folder = openmoji / "attribute_pairs"
    with (folder / "Questions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    questions = []
    for number, pair in enumerate(zip(rows[::2], rows[1::2], strict=True)):
        for row, other in (pair, pair[::-1]):
            attribute = ATTRIBUTES[row["attribute"]]
            questions.append(
                {
                    "image": str(folder / "MMVP_VLM_Images" / row["type"] / f"{row['id']}.png"),
                    "attribute": row["attribute"],
                    "type": row["type"],
                    "statement": row["statement"],
                    "question": attribute.question,
                    "answer": answer_of(row["value"]),
                    "other": answer_of(other["value"]),
                    "answers": ANSWERS[row["attribute"]],
                    "pair": number,
                    "split": row["split"],
                }
            )
    return questions
