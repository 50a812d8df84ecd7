"""Zero-shot classification of labelled images (classes.py).

data = open_classes("imagenet", "/data/imagenet")
evaluate_zero_shot(bundle, data)      # {"top1": share, "top5": share, "mean_per_class": share, ...}
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.bundle import ClipBundle

from ..data.decode import ImageTransform
from ..features.encode import encode_images, encode_texts
from ..openmoji.build import build_openmoji
from ..openmoji.scenes import COLOUR_TEMPLATES, NOUN_TEMPLATES
from ..progress import Bar
from .classes import Classes, named_classes, openmoji_classes
from .retrieval import TIE, full_precision

Templates = Sequence[str | Callable[[str], str]] | None
"""Prompts: a text with `{}` for the class, or a function of its name. None for OpenAI's 80."""


OPENMOJI = {"openmoji-nouns": ("noun", NOUN_TEMPLATES), "openmoji-colours": ("colour", COLOUR_TEMPLATES)}
"""Classifications of the scenes that this package makes: name -> (attribute, prompts)."""


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

    NAME may be a preset's (`named_classes`); `openmoji-nouns` and `openmoji-colours` stand alone. Raises ValueError
    for an entry without a folder, BenchmarkNotFound when the folder is not what its name says.
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
    return name, (named_classes(name, folder), None)
