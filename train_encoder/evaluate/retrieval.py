"""Recall@k between images and captions.

embeddings = encode_source(bundle, source, folder, captions="all", dtype="float32")
recalls(embeddings.image, embeddings.text, embeddings.text_image)     # {"i2t_r1": 0.56, ..., "t2i_r10": 0.87}
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llava_clipmoe.bundle import ClipBundle

from ..data.pairs import PairSource
from ..features.encode import Captions, NotFinite, Precision, encode_source, pick_device
from .benchmarks import ImageList

RANKS = (1, 5, 10)
TIE = 2e-6
"""Cosines closer than this are equal: fp32 products of the same vectors differ by less, from block to block."""


def evaluate_retrieval(
    bundle: ClipBundle,
    source: PairSource | ImageList,
    *,
    captions: Captions = "all",
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    **encoding: Any,
) -> dict[str, float | int]:
    """Encode `source` and measure recall: {"i2t_r1": share, ..., "t2i_r10": share, "images": n, "captions": m}.

    encoding: what else `encode_source` takes (rows, batch_size, workers, progress). Raises what `encode_source` and
    `recalls` raise.
    """
    settings = {"captions": captions, "device": device, "precision": precision, **encoding}
    with tempfile.TemporaryDirectory(prefix="retrieval-") as folder:
        found = encode_source(bundle, source, folder, dtype="float32", **settings)
        measured = recalls(found.image, found.text, found.text_image, device=device)
        return {**measured, "images": len(found.image), "captions": len(found.text)}


def recalls(
    image: np.ndarray,
    text: np.ndarray,
    text_image: np.ndarray,
    *,
    device: str | torch.device = "cpu",
    block: int = 2048,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 as shares, both ways.

    image [N,P] and text [M,P], L2-normalised; text_image [M]: the image of each caption; every image needs one.
    `i2t`: ANY own caption is among the first k captions. `t2i`: the own image is among the first k images.
    A wrong item that ties with the right one counts as before it, so embeddings that collapsed to one point score 0
    and not 100%. At no time is more than a [block, block] piece of the N x M similarities in memory.
    Raises NotFinite, ValueError (an image without a caption).
    """
    with_caption = len(np.unique(text_image))
    if with_caption != len(image):
        raise ValueError(f"{len(image)} images, but {with_caption} of them have a caption: all need one.")
    with torch.inference_mode(), full_precision():
        before_image, before_text = _wrong_before(image, text, np.array(text_image), pick_device(device), block)
    found = {f"i2t_r{k}": (before_image < k).double().mean().item() for k in RANKS}
    return {**found, **{f"t2i_r{k}": (before_text < k).double().mean().item() for k in RANKS}}


def _wrong_before(
    image: np.ndarray, text: np.ndarray, text_image: np.ndarray, device: torch.device, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> for every image [N] the wrong captions before its best own one; for every caption [M] the wrong images
    before its own."""
    n, m = len(image), len(text)
    owner = torch.from_numpy(text_image).to(device)
    own = torch.empty(m, device=device)  # the score of each caption with its own image
    for j in range(0, m, block):
        images_of = image[text_image[j : j + block]]
        own[j : j + block] = (_on(device, text[j : j + block]) * _on(device, images_of)).sum(-1)
    best = torch.full((n,), -torch.inf, device=device).scatter_reduce_(0, owner, own, "amax")
    before_image = torch.zeros(n, dtype=torch.int64, device=device)
    before_text = torch.zeros(m, dtype=torch.int64, device=device)
    for i in range(0, n, block):
        rows, numbers = _on(device, image[i : i + block]), torch.arange(i, min(i + block, n), device=device)
        for j in range(0, m, block):
            similarity = rows @ _on(device, text[j : j + block]).T
            wrong = owner[j : j + block] != numbers[:, None]
            before_image[i : i + block] += (wrong & (similarity >= best[i : i + block, None] - TIE)).sum(1)
            before_text[j : j + block] += (wrong & (similarity >= own[j : j + block] - TIE)).sum(0)
    return before_image, before_text


def _on(device: torch.device, rows: np.ndarray) -> torch.Tensor:
    """Rows of an array, perhaps memory-mapped, as fp32 on a device. Raises NotFinite."""
    part = torch.from_numpy(np.array(rows)).to(device, torch.float32)
    if not part.isfinite().all():  # NaN loses every comparison, so it would count as a hit
        raise NotFinite("the embeddings hold NaN or infinite values, so there is no recall to measure.")
    return part


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Products in fp32 and not in TF32, which a trainer may have switched on: ranks depend on small differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
