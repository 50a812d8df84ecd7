"""What `--evaluation.zero-shot` can name: presets, folders of classes, and the held-out emoji by their main colour."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from .evaluate.zero_shot import PRESETS, Classes, ImageFiles, open_classes
from .openmoji import build_openmoji

COLOURS = "openmoji-colours"
_MAINLY = re.compile(r", (?:mostly|all) ([a-z ]+?)(?: with|[,;.])")
Templates = tuple[str, ...] | None
"""Prompts with `{}` for the class; None for OpenAI's 80."""


def open_zero_shot(entry: str) -> tuple[str, tuple[Classes, Templates]]:
    """`NAME=FOLDER` -> (NAME, (labelled images, prompts)); NAME may be a preset's. `openmoji-colours` stands alone.

    Raises ValueError for an entry without a folder, BenchmarkNotFound when the folder is not what its name says.
    """
    if entry == COLOURS:
        return COLOURS, (openmoji_colours(build_openmoji()), ("mostly {}", "it is mostly {}.", "an emoji, mostly {}"))
    name, equals, folder = entry.partition("=")
    if not equals or not folder:
        raise ValueError(
            f"--evaluation.zero-shot {entry}: write NAME=FOLDER (imagenet=/data/imagenet, or any name for a folder "
            f"with one subfolder of images a class), or {COLOURS}."
        )
    return name, (open_classes(name if name in PRESETS else None, folder), None)


def openmoji_colours(folder: Path) -> Classes:
    """Held-out drawings into the colour that covers most of them ("light blue" counts as blue).

    The colour was measured on the pixels when the data set was built; the package of drawings has no groups of emoji.
    """
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n") if line]
    found = [_MAINLY.search(row["description"]) for row in rows]
    kept = [(folder / row["image"], match[1].split()[-1]) for row, match in zip(rows, found, strict=True) if match]
    names = sorted({colour for _, colour in kept})
    labels = np.array([names.index(colour) for _, colour in kept])
    return Classes(names, labels, ImageFiles([path for path, _ in kept]))
