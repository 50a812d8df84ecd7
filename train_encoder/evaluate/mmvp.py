"""Pairs of images that differ in one attribute: MMVP-VLM, and anything in its layout.

    evaluate_mmvp(bundle, "/data/MMVP_VLM")     # {"overall": share, "pairs": 135, "by_type": {...}}

The layout (github.com/tsb0601/MMVP, scripts/evaluate_vlm.py): `Questions.csv` with an id, a type and a statement a row;
two consecutive rows are a pair, one id odd and one even; the picture is `MLLM_VLM Images/TYPE/ID.jpg` (some copies
call the folder `MMVP_VLM_Images`).

What counts, as upstream: each of the two STATEMENTS chooses between the two images, and is right when its own image has
the higher score. The pair is right when both statements are: chance is 25%. (Asking for the better statement of each
image would be another measure.) Where both images have the same score, upstream counts one of the two statements as
right; here both are wrong.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_clipmoe.bundle import ClipBundle

from ..data.decode import ImageTransform, open_image
from ..features.encode import encode_images, encode_texts
from ..openmoji.build import build_openmoji
from .benchmarks import BenchmarkNotFound, first_existing
from .judge import pairs_right, share
from .retrieval import TIE

OPENMOJI = "openmoji"
PROMPT = "a photo of "
IMAGE_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images", "MMVP_VLM Images")
SUFFIXES = (".jpg", ".jpeg", ".png")
ID_COLUMNS = ("id", "question id", "index")


@dataclass(frozen=True)
class Pair:
    """Two pictures and their statements; the picture with the odd id comes first."""

    type: str
    images: tuple[Path, Path]
    statements: tuple[str, str]


def evaluate_mmvp(
    bundle: ClipBundle, folder: str | Path, prompt: str | None = None, *, split: str | None = None, **encoding: Any
) -> dict[str, Any]:
    """-> {"overall": share of right pairs, "pairs": n, "by_type": {type: {"accuracy": share, "pairs": n}}}.

    folder, split: as in `read_pairs`. prompt: before every statement; "a photo of ", as upstream, when absent, and
    nothing where the pairs are `openmoji`'s. encoding: device, precision and batch size, as `encode_images` takes them.
    Raises BenchmarkNotFound, ValueError, BadImage, NotFinite.
    """
    if prompt is None:
        prompt = "" if str(folder) == OPENMOJI else PROMPT
    pairs, transform = read_pairs(folder, split), ImageTransform(bundle.image_size)
    pixels = torch.stack([transform(open_image(path)) for pair in pairs for path in pair.images])
    prompts = [prompt + statement for pair in pairs for statement in pair.statements]
    images = encode_images(bundle, pixels, **encoding).view(len(pairs), 2, -1)
    statements = encode_texts(bundle, prompts, **encoding).view(len(pairs), 2, -1)
    right = right_pairs(images, statements)
    by_type: dict[str, list[bool]] = {}
    for pair, answer in zip(pairs, right, strict=True):
        by_type.setdefault(pair.type, []).append(answer)
    return {
        "overall": share(right),
        "pairs": len(right),
        "by_type": {kind: {"accuracy": share(own), "pairs": len(own)} for kind, own in by_type.items()},
    }


def right_pairs(images: torch.Tensor, statements: torch.Tensor) -> list[bool]:
    """L2-normalised images [Q,2,P] and statements [Q,2,P] -> which of the Q pairs are right."""
    return pairs_right(right_statements(images, statements).flatten().tolist())


def right_statements(images: torch.Tensor, statements: torch.Tensor) -> torch.Tensor:
    """L2-normalised images [Q,2,P] and statements [Q,2,P] -> which statements choose their own image, bool [Q,2]."""
    scores = statements @ images.transpose(1, 2)  # [Q, statement, image]
    own, other = scores.diagonal(dim1=1, dim2=2), scores.flip(2).diagonal(dim1=1, dim2=2)
    return own - other > TIE


# --- the files ------------------------------------------------------------------------------------------------------


def read_pairs(folder: str | Path, split: str | None = None) -> list[Pair]:
    """The pairs of a folder in MMVP-VLM's layout, or those of `openmoji`, which are made on this machine.

    split: only the pairs whose two rows have it in a column of that name. Raises BenchmarkNotFound (files that are
    missing) and ValueError (rows that make no pair).
    """
    folder = build_openmoji() / "attribute_pairs" if str(folder) == OPENMOJI else Path(folder).expanduser()
    table = folder / "Questions.csv"
    pictures = first_existing(*(folder / name for name in IMAGE_FOLDERS))
    if not table.exists() or pictures is None:
        raise BenchmarkNotFound(
            f"{folder} does not have MMVP-VLM's layout: looked for Questions.csv and a folder of images called "
            f"{' or '.join(IMAGE_FOLDERS[:2])}. It is the data set MMVP/MMVP_VLM on the Hugging Face hub."
        )
    rows = list(_rows(table))
    if len(rows) % 2 or not rows:
        raise ValueError(
            f"{table} has {len(rows)} rows: two consecutive rows make a pair, so there must be an even number."
        )
    pairs = []
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        if split is not None and {first.get("split"), second.get("split")} != {split}:
            continue
        odd, even = sorted((first, second), key=lambda row: row["number"] % 2 == 0)
        if odd["number"] % 2 == 0 or even["number"] % 2 == 1 or odd["type"] != even["type"]:
            raise ValueError(
                f"{table}: rows {odd['number']} and {even['number']} are no pair: a pair has one odd and one even id, "
                "and one type."
            )
        images = tuple(_picture(pictures, row["type"], row["number"]) for row in (odd, even))
        pairs.append(Pair(odd["type"], images, (odd["statement"], even["statement"])))
    if not pairs:
        raise ValueError(f"{table} has no pair whose two rows are of the split {split!r}.")
    return pairs


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    """Rows by their column names in lower case, and the id as `number`."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="")
        names = list(reader.fieldnames or ())
        reader.fieldnames = [name.strip().lower() for name in names]
        number = next((name for name in ID_COLUMNS if name in reader.fieldnames), None)
        if number is None or not {"type", "statement"} <= set(reader.fieldnames):
            raise ValueError(
                f"{table} needs the columns id (or Question ID), type and statement; it has "
                f"{', '.join(names) or 'none'}."
            )
        for row in reader:
            row = {name: row[name].strip() for name in reader.fieldnames}
            if not row[number].isdigit() or not row["statement"]:
                raise ValueError(f"{table}, line {reader.line_num}: an id (a number) and a statement are needed.")
            yield {**row, "number": int(row[number])}


def _picture(root: Path, kind: str, number: int) -> Path:
    """`root/TYPE/ID.jpg`. Folder names of the published copies differ from the types in spelling, and ids are unique
    over all types: so a picture that is not under its type is looked for in the other folders."""
    places = [root / kind, *sorted(path for path in root.iterdir() if path.is_dir())]
    found = first_existing(*(place / f"{number}{suffix}" for place in places for suffix in SUFFIXES))
    if found is None:
        place = root / kind / f"{number}.jpg"
        raise BenchmarkNotFound(f"picture {number} is missing: looked for {place} (or .jpeg, .png).")
    return found
