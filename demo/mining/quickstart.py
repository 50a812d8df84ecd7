"""The pairs of `make demo`: held-out drawings of the LLaVA quick start, with the questions that both were taught."""

from __future__ import annotations

from pathlib import Path

from llava_clipmoe.files import read_json
from llava_clipmoe.tower_registry import MODEL_TYPE

from .command import Settings, mine
from .pairs import ROWS

PER_IMAGE = 4
"""There are a few hundred drawings only: each may be in more pairs than usual."""


def quickstart_pairs(left: Path, right: Path, folder: Path) -> Path | None:
    """Mine the pairs of the LLaVA quick start that made `left` and `right` into `folder`; -> the folder.

    They are of drawings that neither tower nor language model was trained on. Mined once, and again after the quick
    start has run again. None where the two LLaVAs are not a finished quick start's.
    """
    run = left.resolve().parent
    heldout, results = run / "data" / "heldout.jsonl", run / "results.json"
    if right.resolve().parent != run or not (heldout.is_file() and results.is_file()):
        return None
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
    how = {"questions": heldout, "only_with_questions": True, "per_image": PER_IMAGE, "workers": 0}
    return mine(Settings(str(heldout), output_dir=folder, **towers, **how))
