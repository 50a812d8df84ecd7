"""How many of a pair's two statements a CLIP matches to their own picture, by MMVP's rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from train_encoder.evaluate.mmvp import right_statements
from train_encoder.features.encode import Precision, pick_device

from .encoders import ClipTower
from .search import Found


def match_statements(
    clips: Sequence[ClipTower],
    embeddings: Mapping[str, np.ndarray],
    found: Found,
    statements: Sequence[tuple[str, str] | None],
    device: str = "auto",
    precision: Precision = "fp32",
) -> list[dict[str, int] | None]:
    """-> for each of the n pairs {a CLIP's encoder ("dense", "clip-moe"): 0, 1 or 2}; None where it has no statements.

    embeddings: of all pictures, [N,P] by encoder; a CLIP-MoE's experts are not asked one by one.
    Raises ReadsNoTexts, NotFinite.
    """
    told = [number for number, texts in enumerate(statements) if texts is not None]
    right: list[dict[str, int] | None] = [None] * len(statements)
    if not told:
        return right
    texts = [text for number in told for text in statements[number]]
    pictures = np.stack([found.first[told], found.second[told]], axis=1)  # [Q,2]
    for number in told:
        right[number] = {}
    for clip in clips:
        name = clip.encoders[0]
        images = F.normalize(torch.from_numpy(embeddings[name][pictures].astype(np.float32)), dim=-1)
        words = clip.encode_texts(texts, pick_device(device), precision).view(len(told), 2, -1)
        for number, count in zip(told, right_statements(images, words).sum(1).tolist(), strict=True):
            right[number][name] = count
    return right
