"""Pairs of emoji that differ in one visible attribute, in the layout of MMVP-VLM.

MMVP-VLM (Tong et al. 2024, github.com/tsb0601/MMVP, scripts/evaluate_vlm.py) keeps `Questions.csv` with rows
(id, type, statement), where consecutive rows are a pair and the odd id is its first picture, beside
`MMVP_VLM_Images/TYPE/ID.jpg`. We add a fourth column `split`: the side of the concept split that the picture's
concept is on. A pair of training pictures is no leak of its kind: attributes are tested here, not concepts.

`pairs.tsv` is the table; every statement was checked against the drawings of OpenMoji 17.0.0 (not against the names:
some drawings differ from theirs).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

TABLE = Path(__file__).with_name("pairs.tsv")


@dataclass(frozen=True)
class AttributePair:
    """Two emoji, by name, and what each of them shows and the other does not."""

    type: str
    names: tuple[str, str]
    statements: tuple[str, str]


def attribute_pairs(table: Path = TABLE) -> list[AttributePair]:
    """The pairs of the table in order. Raises ValueError for a line that is not five fields."""
    pairs = []
    for line in table.read_text(encoding="utf-8").split("\n")[1:]:
        fields = line.split("\t")
        if line and (len(fields) != 5 or fields[2] == fields[4]):
            raise ValueError(f"{table}: a pair needs a type and two emoji with two different statements, got {line!r}")
        if line:
            kind, first, first_shows, second, second_shows = fields
            pairs.append(AttributePair(kind, (first, second), (first_shows, second_shows)))
    return pairs


def write_attribute_pairs(folder: Path, pictures: Mapping[str, tuple[str, str]]) -> int:
    """Write `folder/attribute_pairs` from the pictures that are there; returns the number of pairs.

    `pictures`: name -> (picture's path relative to `folder`, split). A pair is left out when one of its emoji
    is not among them. Beside the questions, `summary.json` counts pairs by type and pictures by split.
    """
    out = folder / "attribute_pairs"
    out.mkdir()
    pairs = [pair for pair in attribute_pairs() if all(name in pictures for name in pair.names)]
    by_split: Counter[str] = Counter()
    with (out / "Questions.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "type", "statement", "split"))
        for i, pair in enumerate(pairs):
            for j in range(2):
                number, (image, split) = 2 * i + j + 1, pictures[pair.names[j]]
                writer.writerow((number, pair.type, pair.statements[j], split))
                by_split[split] += 1
                target = out / "MMVP_VLM_Images" / pair.type / f"{number}.jpg"
                target.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(folder / image) as picture:
                    picture.save(target, quality=95, subsampling=0)  # full colour: thin coloured lines matter here
    summary = {"pairs": len(pairs), "pairs_by_type": Counter(p.type for p in pairs), "images_by_split": by_split}
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return len(pairs)
