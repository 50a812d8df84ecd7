"""Pairs of images that differ in one attribute: MMVP-VLM, and anything in its layout.

    evaluate_mmvp(bundle, "/data/MMVP_VLM")     # {"overall": share, "pairs": 135, "by_type": {...}}

The layout (github.com/tsb0601/MMVP, scripts/evaluate_vlm.py): `Questions.csv` with an id, a type and a statement a row;
two consecutive rows are a pair, one id odd and one even; the picture is `MLLM_VLM Images/TYPE/ID.jpg` (some copies
call the folder `MMVP_VLM_Images`).

What counts, as upstream: for each of the two STATEMENTS a softmax over the two images; the statement is right when its
own image has more than one half. The pair is right when both statements are: chance is 25%. (Asking for the better
statement of each image would be another measure.) Upstream compares in one direction only, so that images embedded as
the same point get one statement of the two; here a tie is wrong, and such a pair has no right statement at all.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.transformer_clipmoe import only_expert

from ..data.decode import ImageTransform, open_image
from ..features.encode import Precision, encode_images, encode_texts
from .benchmarks import BenchmarkNotFound, first_existing
from .retrieval import TIE

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


def read_pairs(folder: str | Path, split: str | None = None) -> list[Pair]:
    """The pairs of a folder in MMVP-VLM's layout; with `split` those whose two rows have it in a column of that name.

    Raises BenchmarkNotFound (files that are missing) and ValueError (rows that make no pair).
    """
    folder = Path(folder).expanduser()
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
        first, second = sorted((first, second), key=lambda row: row["number"] % 2 == 0)
        if first["number"] % 2 == 0 or second["number"] % 2 == 1 or first["type"] != second["type"]:
            raise ValueError(
                f"{table}: rows {first['number']} and {second['number']} are no pair: a pair has one odd "
                "and one even id, and one type."
            )
        images = tuple(_picture(pictures, row["type"], row["number"]) for row in (first, second))
        pairs.append(Pair(first["type"], images, (first["statement"], second["statement"])))
    if not pairs:
        raise ValueError(f"{table} has no pair whose two rows are of the split {split!r}.")
    return pairs


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
        number = next((columns[name] for name in ID_COLUMNS if name in columns), None)
        if number is None or "type" not in columns or "statement" not in columns:
            raise ValueError(
                f"{table} needs the columns id (or Question ID), type and statement; it has "
                f"{', '.join(reader.fieldnames or ()) or 'none'}."
            )
        for row in reader:
            if not (row[number] or "").strip().isdigit() or not row[columns["statement"]]:
                raise ValueError(f"{table}, line {reader.line_num}: an id (a number) and a statement are needed.")
            yield {
                "number": int(row[number]),
                "type": row[columns["type"]].strip(),
                "statement": row[columns["statement"]].strip(),
                "split": (row[columns["split"]] or "").strip() if "split" in columns else None,
            }


def _picture(root: Path, kind: str, number: int) -> Path:
    """`root/TYPE/ID.jpg`. Folder names of the published copies differ from the types in spelling, and ids are unique
    over all types: so a picture that is not under its type is looked for in the other folders."""
    places = [root / kind, root / kind.replace(" ", "_"), *sorted(path for path in root.iterdir() if path.is_dir())]
    found = first_existing(*(place / f"{number}{suffix}" for place in places for suffix in SUFFIXES))
    if found is None:
        place = root / kind / f"{number}.jpg"
        raise BenchmarkNotFound(f"picture {number} is missing: looked for {place} (or .jpeg, .png).")
    return found


def evaluate_mmvp(
    bundle: ClipBundle,
    folder: str | Path,
    prompt: str = PROMPT,
    *,
    split: str | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """-> {"overall": share of right pairs, "pairs": n, "by_type": {type: {"accuracy": share, "pairs": n}}}.

    Raises BenchmarkNotFound, ValueError, BadImage, NotFinite.
    """
    encoding: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
    return _evaluate(bundle, *_load(bundle, folder, split), prompt, encoding)


def evaluate_experts(
    bundle: ClipBundle,
    folder: str | Path,
    prompt: str = PROMPT,
    *,
    split: str | None = None,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
) -> dict[str, dict[str, Any]]:
    """The same for each expert alone ("expert0" is the base) and for the mixture ("clip-moe"), in this order.

    A dense model gives {"clip": ...}.
    """
    encoding: dict[str, Any] = {"device": device, "precision": precision, "batch_size": batch_size}
    pairs, pixels = _load(bundle, folder, split)
    if bundle.model.config.is_dense:
        return {"clip": _evaluate(bundle, pairs, pixels, prompt, encoding)}
    found = {}
    for expert in range(bundle.model.config.num_experts):
        with only_expert(bundle.model, expert):
            found[f"expert{expert}"] = _evaluate(bundle, pairs, pixels, prompt, encoding)
    return {**found, "clip-moe": _evaluate(bundle, pairs, pixels, prompt, encoding)}


def _load(bundle: ClipBundle, folder: str | Path, split: str | None) -> tuple[list[Pair], torch.Tensor]:
    """Pairs, and their pixels uint8 [2 * pairs, 3, R, R]."""
    pairs, transform = read_pairs(folder, split), ImageTransform(bundle.image_size)
    return pairs, torch.stack([transform(open_image(path)) for pair in pairs for path in pair.images])


def _evaluate(
    bundle: ClipBundle, pairs: list[Pair], pixels: torch.Tensor, prompt: str, encoding: dict[str, Any]
) -> dict[str, Any]:
    images = encode_images(bundle, pixels, **encoding).view(len(pairs), 2, -1)
    prompts = [prompt + statement for pair in pairs for statement in pair.statements]
    right = right_pairs(images, encode_texts(bundle, prompts, **encoding).view(len(pairs), 2, -1)).tolist()
    by_type: dict[str, list[bool]] = {}
    for pair, answer in zip(pairs, right, strict=True):
        by_type.setdefault(pair.type, []).append(answer)
    return {
        "overall": sum(right) / len(right),
        "pairs": len(right),
        "by_type": {kind: {"accuracy": sum(a) / len(a), "pairs": len(a)} for kind, a in by_type.items()},
    }


def right_pairs(images: torch.Tensor, statements: torch.Tensor) -> torch.Tensor:
    """L2-normalised images [Q,2,P] and statements [Q,2,P] -> which of the Q pairs are right, bool [Q].

    A softmax over two scores exceeds one half exactly when its score is the larger one, whatever the temperature.
    """
    scores = statements @ images.transpose(1, 2)  # [Q, statement, image]
    margin_1, margin_2 = scores[:, 0, 0] - scores[:, 0, 1], scores[:, 1, 1] - scores[:, 1, 0]
    return (margin_1 > TIE) & (margin_2 > TIE)
