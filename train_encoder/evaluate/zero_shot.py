"""Zero-shot classification: ImageNet, CIFAR-10/100, or any folder with one subfolder of images per class.

data = open_classes("imagenet", "/data/imagenet")
evaluate_zero_shot(bundle, data)      # {"top1": share, "top5": share, "mean_per_class": share, ...}
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.bundle import ClipBundle

from ..data.decode import ImageTransform, open_image
from ..data.image_files import image_files
from ..features.encode import encode_images, encode_texts
from ..openmoji.build import build_openmoji
from ..openmoji.scenes import COLOUR_TEMPLATES, NOUN_TEMPLATES
from ..progress import Bar
from .benchmarks import BenchmarkNotFound, first_existing
from .retrieval import TIE, full_precision

Templates = Sequence[str | Callable[[str], str]] | None
"""Prompts: a text with `{}` for the class, or a function of its name. None for OpenAI's 80."""


OPENMOJI = {"openmoji-nouns": ("noun", NOUN_TEMPLATES), "openmoji-colours": ("colour", COLOUR_TEMPLATES)}
"""Classifications of the scenes that this package makes: name -> (attribute, prompts)."""


@dataclass(frozen=True)
class Classes:
    """Labelled images: `read(i)` gives image i, labels [N] index into `names`."""

    names: list[str]
    labels: np.ndarray
    read: Callable[[int], Image.Image]


# --- the classifier -------------------------------------------------------------------------------------------------


def evaluate_zero_shot(
    bundle: ClipBundle,
    data: Classes,
    *,
    templates: Templates = None,
    batch_size: int = 128,
    workers: int = 0,
    progress: Bar | None = None,
    **encoding: Any,
) -> dict[str, Any]:
    """-> {"top1", "top5", "mean_per_class": shares, "classes": n, "images": n, "by_class": {name: share}}.

    A wrong class that ties with the right one counts as before it. encoding: device and precision, as `encode_images`
    takes them. Raises BadImage, NotFinite.
    """
    encoding["batch_size"] = batch_size
    classifier = text_classifier(bundle, data.names, templates, **encoding)
    pictures = _Pictures(data, ImageTransform(bundle.image_size))
    loader = DataLoader(pictures, batch_size=batch_size, num_workers=workers, generator=torch.Generator())
    before = []
    with progress or contextlib.nullcontext() as bar, full_precision():
        for pixels, labels in loader:
            scores = encode_images(bundle, pixels, **encoding) @ classifier.T
            own = scores.gather(1, labels[:, None])
            before.append((scores >= own - TIE).sum(1) - 1)  # its own score is among them
            if bar is not None:
                bar.advance(len(labels))
    return _accuracies(torch.cat(before).numpy(), data)


def text_classifier(
    bundle: ClipBundle, names: Sequence[str], templates: Templates = None, **encoding: Any
) -> torch.Tensor:
    """[C,P] fp32: the L2-normalised mean of each class name's embeddings over the templates (CLIP paper, 3.1.4)."""
    if templates is None:
        from open_clip import OPENAI_IMAGENET_TEMPLATES as templates
    prompts = [t.format(name) if isinstance(t, str) else t(name) for name in names for t in templates]
    embeddings = encode_texts(bundle, prompts, **encoding).view(len(names), len(templates), -1)
    return torch.nn.functional.normalize(embeddings.mean(1), dim=-1)


def _accuracies(before: np.ndarray, data: Classes) -> dict[str, Any]:
    """before [N]: how many wrong classes come before the right one of each image."""
    first = before < 1
    per_class = {label: float(first[data.labels == label].mean()) for label in np.unique(data.labels)}
    return {
        "top1": float(first.mean()),
        "top5": float((before < 5).mean()),
        "mean_per_class": float(np.mean(list(per_class.values()))),
        "classes": len(data.names),
        "images": len(before),
        "by_class": {data.names[label]: share for label, share in per_class.items()},
    }


class _Pictures(Dataset):
    def __init__(self, data: Classes, transform: ImageTransform) -> None:
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.data.read(i)), int(self.data.labels[i])


# --- data sets ------------------------------------------------------------------------------------------------------


def open_zero_shot(entry: str) -> tuple[str, tuple[Classes, Templates]]:
    """What `--evaluation.zero-shot` names: `NAME=FOLDER` -> (NAME, (labelled images, prompts)).

    NAME may be a preset's; `openmoji-nouns` and `openmoji-colours` stand alone. Raises ValueError for an entry
    without a folder, BenchmarkNotFound when the folder is not what its name says.
    """
    if entry in OPENMOJI:
        attribute, templates = OPENMOJI[entry]
        return entry, (openmoji_classes(build_openmoji(), attribute), templates)
    name, _, folder = entry.partition("=")
    if not folder:
        raise ValueError(
            f"--evaluation.zero-shot {entry}: write NAME=FOLDER (imagenet=/data/imagenet, or any name for a folder "
            f"with one subfolder of images a class), or {' or '.join(OPENMOJI)}."
        )
    return name, (open_classes(name if name in PRESETS else None, folder), None)


def open_classes(preset: str | None, folder: str | Path) -> Classes:
    """The labelled images in `folder`: a preset's (`PRESETS`), or one subfolder a class. Raises BenchmarkNotFound."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise BenchmarkNotFound(f"{folder} is not a folder on this machine.")
    return (image_folder if preset is None else PRESETS[preset])(folder)


def _read_file(paths: Sequence[Path], i: int) -> Image.Image:
    return open_image(paths[i])


def _read_pixels(images: np.ndarray, i: int) -> Image.Image:
    """images: uint8 [N,3,32,32]."""
    return Image.fromarray(np.ascontiguousarray(images[i].transpose(1, 2, 0)))


def openmoji_classes(folder: Path, attribute: str) -> Classes:
    """Held-out scenes of `build_openmoji`'s folder; their classes are the values of an attribute."""
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    names, labels = np.unique([row["scene"][attribute] for row in rows], return_inverse=True)
    return Classes(names.tolist(), labels, partial(_read_file, [folder / row["image"] for row in rows]))


def image_folder(folder: Path) -> Classes:
    """One subfolder of images per class, in sorted order. Names come from `classes.txt` (one a line, in that order) or
    else from the subfolders, `_` read as a space. Raises BenchmarkNotFound."""
    folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [sorted(image_files(place)) for place in folders]
    if not any(found):
        raise BenchmarkNotFound(f"{folder} has no images in subfolders. Make one subfolder per class.")
    if empty := [place.name for place, paths in zip(folders, found, strict=True) if not paths]:
        raise BenchmarkNotFound(
            f"{folder} has no image that can be read in {len(empty)} of its {len(folders)} "
            f"subfolders, such as {empty[0]}: that class would not be measured. Add its images, or "
            "remove the subfolder."
        )
    names = [place.name.replace("_", " ") for place in folders]
    listed = folder / "classes.txt"
    if listed.exists():
        names = _lines(listed)
        if len(names) != len(folders):
            raise BenchmarkNotFound(f"{listed} names {len(names)} classes, but {folder} has {len(folders)} subfolders.")
    labels = np.repeat(np.arange(len(folders)), [len(paths) for paths in found])
    return Classes(names, labels, partial(_read_file, [path for paths in found for path in paths]))


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises BenchmarkNotFound."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BenchmarkNotFound(f"{path} is not UTF-8 text ({error}). Save it in UTF-8.") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def imagenet(folder: Path) -> Classes:
    """ImageNet-1k's validation set: `val/` (or the folder itself) with 1,000 subfolders named by WordNet id.

    The sorted ids are the classes 0 to 999, as in torchvision's ImageFolder and open_clip's list of names.
    Raises BenchmarkNotFound.
    """
    from open_clip import IMAGENET_CLASSNAMES

    root = first_existing(folder / "val", folder / "ILSVRC2012_img_val") or folder
    ids = [path.name for path in root.iterdir() if path.is_dir() and re.fullmatch(r"n\d{8}", path.name)]
    if len(ids) != 1000:
        raise BenchmarkNotFound(
            f"{root} has {len(ids)} subfolders named by WordNet id (such as n01440764); ImageNet's validation set has "
            "1,000. If its images lie in one folder, sort them into one folder per id first."
        )
    found = image_folder(root)
    if more := len(found.names) - 1000:
        raise BenchmarkNotFound(f"{root} has {more} subfolders that are not named by WordNet id: remove them.")
    return dataclasses.replace(found, names=list(IMAGENET_CLASSNAMES))


def cifar10(folder: Path) -> Classes:
    """CIFAR-10's test images from the binary version (`cifar-10-batches-bin`). Raises BenchmarkNotFound."""
    return _cifar(folder, "cifar-10-batches-bin", "test_batch.bin", "batches.meta.txt", label_bytes=1)


def cifar100(folder: Path) -> Classes:
    """CIFAR-100's test images, fine labels, from the binary version (`cifar-100-binary`). Raises BenchmarkNotFound."""
    return _cifar(folder, "cifar-100-binary", "test.bin", "fine_label_names.txt", label_bytes=2)


def _cifar(folder: Path, archive: str, images: str, names: str, label_bytes: int) -> Classes:
    """A record is `label_bytes` labels (the last is the fine one), then 32x32 pixels of red, of green, of blue."""
    root = folder / archive if (folder / archive).is_dir() else folder
    if not (root / images).exists() or not (root / names).exists():
        raise BenchmarkNotFound(
            f"{folder} has no {archive}/{images} with {names}. Download the BINARY version of CIFAR "
            f"({archive}; cs.toronto.edu/~kriz/cifar.html) and unpack it there. The Python version is pickled: reading "
            "it could run code, so it is not read."
        )
    records = np.fromfile(root / images, np.uint8)
    if not len(records) or len(records) % (label_bytes + 3072):
        raise BenchmarkNotFound(f"{root / images} is cut short: unpack the archive again.")
    records = records.reshape(-1, label_bytes + 3072)
    classes = [line.replace("_", " ") for line in _lines(root / names)]
    labels = records[:, label_bytes - 1].astype(np.int64)
    if labels.max() >= len(classes):
        raise BenchmarkNotFound(f"{root / names} names {len(classes)} classes, but there is a label {labels.max()}.")
    return Classes(classes, labels, partial(_read_pixels, records[:, label_bytes:].reshape(-1, 3, 32, 32)))


PRESETS: dict[str, Callable[[Path], Classes]] = {"imagenet": imagenet, "cifar10": cifar10, "cifar100": cifar100}
