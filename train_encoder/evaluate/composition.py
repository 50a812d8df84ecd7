"""Captions that differ little: SugarCrepe, where an image has a right and a wrong one, and Winoground, where two images
have two captions of the same words.

    evaluate_composition(bundle, "sugarcrepe", "/data/sugarcrepe")   # {"overall": share, "pairs": n, "by_type": {...}}

SugarCrepe (Hsieh et al. 2023): right where the image is closer to its caption than to the negative; chance is 50%.
Winoground (Thrush et al. 2022): the text score asks each image for its caption, the image score each caption for its
image, and both answers must be right (25% by chance); the group score wants all four (16.7%). A tie is never right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json

from ..data.decode import ImageTransform, open_image
from ..features.encode import encode_images, encode_texts
from .benchmarks import BenchmarkNotFound, first_existing
from .judge import share
from .mmvp import right_statements
from .retrieval import TIE

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
"""Its kinds of wrong captions, a JSON file each."""


@dataclass(frozen=True)
class Item:
    """One question: the images and the captions among which is to be chosen. Number i belongs to number i."""

    type: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]


def evaluate_composition(
    bundle: ClipBundle, preset: str, folder: str | Path, *, workers: int = 0, batch_size: int = 64, **encoding: Any
) -> dict[str, Any]:
    """-> {"overall": share right, "pairs": n, "by_type": {type: {"accuracy": share, "pairs": n}}}, and of Winoground,
    whose `overall` is the group score, "text" and "image" too.

    encoding: device and precision, as `encode_images` takes them. Raises BenchmarkNotFound, BadImage, NotFinite.
    """
    items = PRESETS[preset](Path(folder).expanduser())
    encoding["batch_size"] = batch_size
    paths = list(dict.fromkeys(path for item in items for path in item.images))
    loader = DataLoader(_Files(paths, bundle.image_size), batch_size=batch_size, num_workers=workers)
    embedded = torch.cat([encode_images(bundle, pixels, **encoding) for pixels in loader])
    place = {path: number for number, path in enumerate(paths)}
    images = embedded[torch.tensor([[place[path] for path in item.images] for item in items])]  # [Q,I,P]
    texts = encode_texts(bundle, [caption for item in items for caption in item.captions], **encoding)
    texts = texts.view(len(items), 2, -1)
    if images.shape[1] == 1:
        right = right_captions(images[:, 0], texts)
        return _shares(items, right.tolist())
    text, image = right_statements(texts, images).all(1), right_statements(images, texts).all(1)
    found = _shares(items, (text & image).tolist())
    return {**found, "text": share(text.tolist()), "image": share(image.tolist())}


def right_captions(images: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
    """L2-normalised images [Q,P] and captions [Q,2,P], the right one first -> which images choose it, bool [Q]."""
    right, wrong = (captions @ images[:, :, None])[..., 0].unbind(1)
    return right - wrong > TIE


def _shares(items: Sequence[Item], right: Sequence[bool]) -> dict[str, Any]:
    by_type: dict[str, list[bool]] = {}
    for item, answer in zip(items, right, strict=True):
        by_type.setdefault(item.type, []).append(answer)
    kinds = {kind: {"accuracy": share(own), "pairs": len(own)} for kind, own in by_type.items()}
    return {"overall": share(right), "pairs": len(right), "by_type": kinds}


class _Files(Dataset):
    """A path's number -> pixels uint8 [3,size,size]."""

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.transform = paths, ImageTransform(size)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(open_image(self.paths[i]))


# --- the files ------------------------------------------------------------------------------------------------------


def open_composition(entry: str) -> tuple[str, Path]:
    """What `--evaluation.composition` names: `NAME=FOLDER`. Raises ValueError."""
    name, _, folder = entry.partition("=")
    if name not in PRESETS or not folder:
        raise ValueError(f"--evaluation.composition {entry}: write {' or '.join(f'{one}=FOLDER' for one in PRESETS)}.")
    return name, Path(folder)


def sugarcrepe(folder: Path) -> list[Item]:
    """Its seven JSON files ({number: {"filename", "caption", "negative_caption"}}), in the folder or its `data/`, and
    COCO's `val2017/` there or in `coco/`. Raises BenchmarkNotFound."""
    root = first_existing(*(place / f"{SUGARCREPE[0]}.json" for place in (folder, folder / "data")))
    images = first_existing(folder / "val2017", folder / "coco" / "val2017")
    if root is None or images is None:
        raise BenchmarkNotFound(
            f"SugarCrepe is not in {folder}. Looked for {SUGARCREPE[0]}.json (and six more, of its repository's data/) "
            "there and in data/, and for COCO's val2017/ there and in coco/."
        )
    if missing := [kind for kind in SUGARCREPE if not (root.parent / f"{kind}.json").exists()]:
        raise BenchmarkNotFound(f"{root.parent} lacks {', '.join(f'{kind}.json' for kind in missing)} of SugarCrepe.")
    items = []
    for kind in SUGARCREPE:
        file = root.parent / f"{kind}.json"
        for number, row in read_json(file).items():
            if not {"filename", "caption", "negative_caption"} <= row.keys():
                raise BenchmarkNotFound(f"{file}, entry {number}: filename, caption and negative_caption are needed.")
            items.append(Item(kind, (images / row["filename"],), (row["caption"], row["negative_caption"])))
    return _whole(items, "SugarCrepe")


def winoground(folder: Path) -> list[Item]:
    """`examples.jsonl` (image_0, image_1, caption_0, caption_1, collapsed_tag) and `images/`, in the folder or its
    `data/`. Raises BenchmarkNotFound."""
    table = first_existing(folder / "examples.jsonl", folder / "data" / "examples.jsonl")
    if table is None or not (table.parent / "images").is_dir():
        raise BenchmarkNotFound(
            f"Winoground is not in {folder}. Looked for examples.jsonl and images/, there and in data/: they are in "
            "the hub data set facebook/winoground (unpack images.zip)."
        )
    items = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if line.strip():
            row = json.loads(line)
            names, captions = ([row.get(f"{kind}_{i}") for i in (0, 1)] for kind in ("image", "caption"))
            if not all(names) or not all(captions):
                raise BenchmarkNotFound(f"{table}, line {number}: image_0, image_1, caption_0, caption_1 are needed.")
            images = tuple(table.parent / "images" / (f"{name}.png" if "." not in name else name) for name in names)
            items.append(Item(row.get("collapsed_tag") or "all", images, tuple(captions)))
    return _whole(items, "Winoground")


def _whole(items: list[Item], name: str) -> list[Item]:
    """Checks that every image is there, before anything is computed."""
    paths = dict.fromkeys(path for item in items for path in item.images)
    if not paths:
        raise BenchmarkNotFound(f"{name}'s files name no image.")
    if missing := [path for path in paths if not path.is_file()]:
        raise BenchmarkNotFound(
            f"{name}: {len(missing)} of {len(paths)} images are missing, the first is {missing[0]}."
        )
    return items


PRESETS: dict[str, Callable[[Path], list[Item]]] = {"sugarcrepe": sugarcrepe, "winoground": winoground}
