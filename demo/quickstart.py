"""The pairs of `make demo`: held-out drawings of the LLaVA quick start, with the questions that both eyes learned."""

from __future__ import annotations

from pathlib import Path

from llava_clipmoe.files import read_json
from llava_clipmoe.towers import MODEL_TYPE

from .models import Models
from .pairs import ROWS

PER_IMAGE = 4
"""A few hundred drawings only: each may be in more pairs than usual."""


def quickstart_pairs(models: Models, folder: Path) -> Path | None:
    """Mine the pairs of a LLaVA quick start into `folder`, once; -> the folder, None where the models are others.

    Drawings that neither eye nor language model was trained on; mined anew when the quick start has run again.
    """
    run = models.left.resolve().parent
    heldout, results = run / "data" / "heldout.jsonl", run / "results.json"
    if models.right.resolve().parent != run or not (heldout.is_file() and results.is_file()):
        return None
    if (folder / ROWS).is_file() and (folder / ROWS).stat().st_mtime >= results.stat().st_mtime:
        return folder
    towers = _towers(models)
    if towers is None:
        return None
    from .mining import Settings, mine

    dense, moe = towers
    return mine(Settings(str(heldout), dense=dense, moe=moe, output_dir=folder, questions=heldout,
                         only_with_questions=True, per_image=PER_IMAGE, workers=0))  # fmt: skip


def _towers(models: Models) -> tuple[str, str] | None:
    """(dense, MoE) directories of the two LLaVAs' towers, whichever side they are on."""
    found = {}
    for directory in (models.left, models.right):
        tower = read_json(directory / "config.json")["mm_vision_tower"]
        config = Path(tower) / "config.json"
        if config.is_file():
            found[read_json(config).get("model_type") == MODEL_TYPE] = tower
    return (found[False], found[True]) if len(found) == 2 else None
