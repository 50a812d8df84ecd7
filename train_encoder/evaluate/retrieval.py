"""Recall@k between images and captions.

embeddings = encode_source(bundle, source, folder, captions="all", dtype="float32")
recalls(embeddings.image, embeddings.text, embeddings.text_image)     # {"i2t_r1": 0.56, ..., "t2i_r10": 0.87}
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from llava_clipmoe.bundle import ClipBundle

from ..data.pairs import PairSource
from ..features.encode import Captions, NotFinite, Precision, encode_source, pick_device
from ..progress import Bar
from .benchmarks import ImageList

RANKS = (1, 5, 10)
TIE = 2e-6
"""Cosines closer than this are equal: fp32 products of the same vectors differ by less, from block to block."""


def recalls(
    image: np.ndarray | torch.Tensor,
    text: np.ndarray | torch.Tensor,
    text_image: np.ndarray | torch.Tensor,
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
    device = pick_device(device)
    owner = torch.as_tensor(np.array(text_image), device=device)
    if len(torch.unique(owner)) != len(image):
        raise ValueError(f"{len(image)} images, but {len(torch.unique(owner))} of them have a caption: all need one.")
    with torch.inference_mode(), full_precision():
        before_image, before_text = _wrong_before(_Rows(image, device), _Rows(text, device), owner, block)
    found = {f"i2t_r{k}": (before_image < k).double().mean().item() for k in RANKS}
    return {**found, **{f"t2i_r{k}": (before_text < k).double().mean().item() for k in RANKS}}


def _wrong_before(image: _Rows, text: _Rows, owner: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> for every image [N] the wrong captions before its best own one; for every caption [M] the wrong images
    before its own."""
    n, m = len(image), len(text)
    own = torch.cat([(text[b : b + block] * image[owner[b : b + block]]).sum(-1) for b in range(0, m, block)])
    best = torch.full((n,), -torch.inf, device=own.device).scatter_reduce_(0, owner, own, "amax")
    before_image = torch.zeros(n, dtype=torch.int64, device=own.device)
    before_text = torch.zeros(m, dtype=torch.int64, device=own.device)
    for i in range(0, n, block):
        rows, numbers = image[i : i + block], torch.arange(i, min(i + block, n), device=own.device)
        for j in range(0, m, block):
            similarity = rows @ text[j : j + block].T
            wrong = owner[j : j + block] != numbers[:, None]
            before_image[i : i + block] += (wrong & (similarity >= best[i : i + block, None] - TIE)).sum(1)
            before_text[j : j + block] += (wrong & (similarity >= own[j : j + block] - TIE)).sum(0)
    return before_image, before_text


class _Rows:
    """Rows of an array (perhaps memory-mapped) as fp32 on a device, a block at a time. Raises NotFinite."""

    def __init__(self, array: np.ndarray | torch.Tensor, device: torch.device) -> None:
        self.array, self.device = array, device

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(self.array, np.ndarray):
            part = torch.from_numpy(np.array(self.array[index if isinstance(index, slice) else index.cpu().numpy()]))
        else:
            part = self.array[index.cpu() if torch.is_tensor(index) else index]
        part = part.to(self.device, torch.float32)
        if not part.isfinite().all():  # NaN loses every comparison, so it would count as a hit
            raise NotFinite("the embeddings hold NaN or infinite values, so there is no recall to measure.")
        return part


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32 and not in TF32, which a trainer may have switched on: ranks hang on small differences."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def evaluate_retrieval(
    bundle: ClipBundle,
    source: PairSource | ImageList,
    *,
    folder: Path | None = None,
    rows: np.ndarray | None = None,
    captions: Captions = "all",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    precision: Precision = "fp32",
    workers: int = 0,
    progress: Bar | None = None,
) -> dict[str, float | int]:
    """Encode `source` and measure recall: {"i2t_r1": share, ..., "t2i_r10": share, "images": n, "captions": m}.

    Embeddings are kept in `folder` when it is given (a killed evaluation then goes on there), else thrown away.
    `rows`: the images to use, where some are bad. Raises what `encode_source` and `recalls` raise.
    """
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="retrieval-")))
        found = encode_source(
            bundle,
            source,
            folder,
            captions=captions,
            batch_size=batch_size,
            device=device,
            precision=precision,
            workers=workers,
            progress=progress,
            rows=rows,
            dtype="float32",
        )
        measured = recalls(found.image, found.text, found.text_image, device=device)
        return {**measured, "images": len(found.image), "captions": len(found.text)}
