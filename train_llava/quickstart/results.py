"""Scores of both towers' answers: results.json, and the table that is printed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Column, Table

from train_encoder.evaluate.judge import is_answer, mcnemar_p, pairs_right, share
from train_llava.eval.answers import read_jsonl

from .conversations import ANSWERS
from .run import TowerRun
from .steps import TOWERS

BLIND = "blind"
NEW_NOUNS = "pairs of new nouns"


def accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Share of right answers by attribute, and "overall": over all questions."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        right[row["attribute"]].append(is_answer(row["text"], row["answer"]))
    every = [value for values in right.values() for value in values]
    return {**{attribute: share(values) for attribute, values in right.items()}, "overall": share(every)}


def pair_accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of pairs, of which both pictures must be right: which are (by number), and their share, also of new nouns and by
    type; and the share of single pictures that are right."""
    rows = sorted(rows, key=lambda row: row["pair"])
    right = [is_answer(row["text"], row["answer"]) for row in rows]
    both = pairs_right(right)
    types: dict[str, list[bool]] = defaultdict(list)
    for row, pair_is_right in zip(rows[::2], both, strict=True):
        types[row["type"]].append(pair_is_right)
    new = [pair_is_right for row, pair_is_right in zip(rows[::2], both, strict=True) if row["split"] == "nouns"]
    return {
        "pairs": share(both),
        "pictures": share(right),
        NEW_NOUNS: share(new),
        "by type": {kind: share(values) for kind, values in types.items()},
        "counts": {"pairs": len(both), NEW_NOUNS: len(new)},
        "right": both,
    }


def collect(runs: Sequence[TowerRun]) -> dict[str, Any]:
    """What goes into results.json."""
    results: dict[str, Any] = {"heldout": {}, BLIND: {}, "pairs": {}, "seconds": {}}
    for run in runs:
        name, folder = run.job["name"], Path(run.job["answers"])
        asked, pairs = read_jsonl(folder / "heldout.jsonl"), read_jsonl(folder / "pairs.jsonl")
        results["heldout"][name] = accuracy(asked)
        results[BLIND][name] = accuracy(read_jsonl(folder / "blind.jsonl"))
        results["pairs"][name] = pair_accuracy(pairs)
        results["seconds"][name] = run.seconds
    counts = Counter(row["attribute"] for row in asked)
    chance = {attribute: 1 / len(ANSWERS[attribute]) for attribute in ANSWERS if counts[attribute]}
    chance["overall"] = share([1 / len(row["answers"]) for row in asked])
    chance["pairs"] = share([len(row["answers"]) ** -2 for row in pairs])
    p = mcnemar_p(*(results["pairs"][name]["right"] for name in TOWERS))
    return {**results, "chance": chance, "questions": {**counts, "overall": len(asked)}, "mcnemar_p": p}


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
    pairs, chance = [results["pairs"][name] for name in TOWERS], f"{100 * results['chance']['pairs']:.1f}"
    for kind, label in (("pairs", "pairs"), (NEW_NOUNS, "pairs, new nouns")):
        numbers = [f"{100 * scores[kind]:.1f}" for scores in pairs]
        table.add_row(label, *numbers, "0.0", "0.0", chance, str(pairs[0]["counts"][kind]))
    return table
