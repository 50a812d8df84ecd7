"""Scores of both towers' answers: results.json, and the table that is printed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from train_encoder.evaluate.judge import is_answer, pairs_right, share
from train_llava.eval.answers import read_jsonl

from .conversations import ANSWERS
from .run import TowerRun
from .steps import TOWERS

BLIND = "blind"


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right answers by attribute, and "overall": over all questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        right[row["attribute"]].append(is_answer(row["text"], row["answer"]))
    every = [value for values in right.values() for value in values]
    return {**{attribute: share(values) for attribute, values in right.items()}, "overall": share(every)}


def pair_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of right pairs, of right single pictures, of right pairs of nouns that are new; and pairs by type."""
    rows = sorted(rows, key=lambda row: row["pair"])
    right = [is_answer(row["text"], row["answer"]) for row in rows]
    both = pairs_right(right)
    new: list[bool] = []
    types: dict[str, list[bool]] = defaultdict(list)
    for one, two, pair_is_right in zip(rows[::2], rows[1::2], both, strict=True):
        types[one["type"]].append(pair_is_right)
        if one["split"] == "nouns":
            new.append(pair_is_right)
    return {
        "pairs": share(both),
        "pictures": share(right),
        "pairs of new nouns": share(new),
        "by type": {kind: share(values) for kind, values in types.items()},
        "counts": {"pairs": len(both), "pairs of new nouns": len(new)},
    }


def collect(runs: Sequence[TowerRun]) -> dict[str, Any]:
    """What goes into results.json."""
    results: dict[str, Any] = {"heldout": {}, BLIND: {}, "pairs": {}, "seconds": {}}
    for run in runs:
        name, folder = run.job["name"], Path(run.job["answers"])
        heldout = read_jsonl(folder / "heldout.jsonl")
        results["heldout"][name] = accuracy(heldout)
        results[BLIND][name] = accuracy(read_jsonl(folder / "blind.jsonl"))
        results["pairs"][name] = pair_accuracy(read_jsonl(folder / "pairs.jsonl"))
        results["seconds"][name] = run.seconds
    counts = {attribute: sum(row["attribute"] == attribute for row in heldout) for attribute in ANSWERS}
    chance = {attribute: 1 / len(answers) for attribute, answers in ANSWERS.items() if counts[attribute]}
    chance["overall"] = sum(chance[attribute] * counts[attribute] for attribute in chance) / len(heldout)
    return {**results, "chance": {**chance, "pairs": 0.25}, "questions": {**counts, "overall": len(heldout)}}


def table_of(results: Mapping[str, Any]) -> Table:
    """Accuracy by attribute: both towers, each one blind, chance."""
    names = (*TOWERS, *(f"{name} {BLIND}" for name in TOWERS), "chance", "questions")
    columns = [Column(name, justify="right") for name in names]
    table = Table("attribute", *columns, box=box.SIMPLE_HEAD, title="right answers to held-out questions, %")
    for attribute in [*ANSWERS, "overall"]:
        if attribute in results["chance"]:
            scores = [results[part][name][attribute] for part in ("heldout", BLIND) for name in TOWERS]
            numbers = [f"{100 * score:.1f}" for score in (*scores, results["chance"][attribute])]
            last = attribute in (list(ANSWERS)[-1], "overall")
            table.add_row(attribute, *numbers, str(results["questions"][attribute]), end_section=last)
    pairs = [results["pairs"][name] for name in TOWERS]
    for kind, label in (("pairs", "pairs"), ("pairs of new nouns", "pairs, new nouns")):
        numbers = [f"{100 * scores[kind]:.1f}" for scores in pairs]
        table.add_row(label, *numbers, "0.0", "0.0", "25.0", str(pairs[0]["counts"][kind]))
    return table
