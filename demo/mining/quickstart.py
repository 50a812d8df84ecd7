"""The pairs of `make demo`: held-out scenes of the LLaVA quick start that differ in one attribute each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava_clipmoe.files import read_json
from llava_clipmoe.tower_registry import MODEL_TYPE
from train_llava.eval.answers import read_jsonl
from train_llava.quickstart.steps import TOWERS

from .command import Settings, mine
from .pairs import ROWS

CHOICE = {"top": 1000, "per_image": 1, "reference_threshold": 1.0, "duplicate_colour": -1}
"""All pairs that the dense eye finds alike, whatever the CLIP-MoE finds: what that one sees is counted on them. A scene
is in one pair, and its partner is no near duplicate, however small the difference."""


def _files_of_run(left: Path, right: Path) -> tuple[Path, Path] | None:
    """The questions about pairs, and the results, of the LLaVA quick start that made both; None where none has, or it
    has not ended."""
    run = left.resolve().parent
    asked, results = run / "data" / "pairs.jsonl", run / "results.json"
    finished = right.resolve().parent == run and asked.is_file() and results.is_file()
    return (asked, results) if finished else None


def told_apart(left: Path, right: Path) -> set[frozenset[str]]:
    """The pairs (names of both pictures) of which, when the LLaVA quick start asked its two LLaVAs, the one with the
    CLIP-MoE knew both answers and the other did not. Empty where `left` and `right` are not a finished quick start's.
    """
    files = _files_of_run(left, right)
    if files is None:
        return set()
    asked, results = files
    answered = read_json(results).get("pairs", {})
    dense, moe = (answered.get(name, {}).get("right") for name in TOWERS)
    if dense is None or moe is None:  # an older version's
        return set()
    only_moe = {number for number, (one, other) in enumerate(zip(dense, moe, strict=True)) if other and not one}
    names = defaultdict(set)
    for row in read_jsonl(asked):
        names[row["pair"]].add(Path(row["image"]).name)
    return {frozenset(names[number]) for number in only_moe}


def quickstart_pairs(left: Path, right: Path, folder: Path) -> Path | None:
    """Mine the pairs of the LLaVA quick start that made `left` and `right` into `folder`; -> the folder.

    They are of scenes that neither tower nor language model was trained on. Mined once, and again after the quick start
    has run again. None where the two LLaVAs are not a finished quick start's.
    """
    files = _files_of_run(left, right)
    if files is None:
        return None
    asked, results = files
    if (folder / ROWS).is_file() and (folder / ROWS).stat().st_mtime >= results.stat().st_mtime:
        return folder
    towers = {}
    for directory in (left, right):
        tower = read_json(directory / "config.json")["mm_vision_tower"]
        config = Path(tower) / "config.json"
        if config.is_file():
            towers["moe" if read_json(config).get("model_type") == MODEL_TYPE else "dense"] = tower
    if len(towers) < 2:
        return None
    how = {"questions": asked, "only_with_questions": True, "workers": 0}
    return mine(Settings(str(asked), output_dir=folder, **towers, **how, **CHOICE))
