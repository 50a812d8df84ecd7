"""Classes of the held-out emoji: the colour that covers most of each drawing."""

from __future__ import annotations

import json
import re
from pathlib import Path

_MAINLY = re.compile(r", (?:mostly|all) ([a-z ]+?)(?: with|[,;.])")
COLOUR_TEMPLATES = ("mostly {}", "it is mostly {}.", "an emoji, mostly {}")
"""What a classification by colour asks, `{}` for the colour."""


def main_colours(folder: Path) -> list[tuple[Path, str]]:
    """(picture, the colour that covers most of it) of the held-out drawings in `folder`; "light blue" counts as blue.

    The colour was measured on the pixels when the data set was built; the package of drawings has no groups of emoji.
    """
    found = []
    for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        if match := _MAINLY.search(row["description"]):
            found.append((folder / row["image"], match[1].split()[-1]))
    return found
