"""What a training step reads: pixels and tokens of rows, and the batches that they make.

Decoding and tokenising happen in the loader's workers. Which caption a row shows depends only on (seed, row, epoch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from .cache import RowImages
from .decode import ImageTransform
from .pairs import PairSource, choose_caption, first_sentence


class EncoderDataset(Dataset):
    """Rows as a training step reads them."""

    def __init__(
        self,
        source: PairSource,
        tokenizer: Any,
        transform: ImageTransform,
        context_length: int,
        captions: Literal["random", "first", "longest"],
        seed: int,
        cache: Path | None = None,
        short: bool = False,
    ) -> None:
        """cache: a file of `build_image_cache` to read pixels from (DataError when it is of other data). short: give
        the first sentence of each caption too."""
        self.source, self.tokenizer, self.image = source, tokenizer, RowImages(source, transform, cache)
        self.context_length, self.captions, self.seed, self.short = context_length, captions, seed, short

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """key: a row, or (row, epoch). Gives row, pixels (uint8 [3,S,S]; None for a bad image, whose cause is in
        `error`), tokens (BOS .. EOT) and truncated. A bad image does not raise."""
        row, epoch = (int(k) for k in key) if isinstance(key, (tuple, list)) else (int(key), 0)
        pixels, error = self.image(row)
        caption = choose_caption(self.source.captions(row), self.captions, self.seed, row, epoch)
        tokens, truncated = self.tokens(caption)
        found = {"row": row, "pixels": pixels, "tokens": tokens, "truncated": truncated, "error": error}
        return found | {"short": self.tokens(first_sentence(caption))[0]} if self.short else found

    def tokens(self, caption: str) -> tuple[list[int], bool]:
        """-> (BOS, the caption and EOT, at most context_length tokens, the last always EOT; whether text was cut)."""
        ids = self.tokenizer(caption, verbose=False)["input_ids"]  # not verbose: length is our business
        if len(ids) <= self.context_length:
            return ids, False
        return [*ids[: self.context_length - 1], ids[-1]], True


@dataclass
class Batch:
    """B rows, T tokens of the longest caption, S pixels a side. B is smaller than asked for when images were bad."""

    pixel_values: torch.Tensor  # uint8 [B,3,S,S]
    input_ids: torch.Tensor  # int64 [B,T], padded with EOT as CLIP does
    rows: torch.Tensor  # int64 [B]
    bad: list[tuple[int, str]]  # (row, error) of images that could not be read
    truncated: int  # captions of this batch that were cut to the context length
    short_ids: torch.Tensor | None = None  # int64 [B,T'], the captions' first sentences, where they are asked for

    @property
    def texts(self) -> list[torch.Tensor]:
        """Ids of every caption an image has: the whole one, then its first sentence."""
        return [self.input_ids] if self.short_ids is None else [self.input_ids, self.short_ids]

    def pin_memory(self) -> Batch:  # DataLoader(pin_memory=True) looks for this name
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in values.items()})


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    """Rows of EncoderDataset -> Batch. A bad image's row is left out, not replaced: a second copy of another row
    would be a false negative. `len(batch.rows)` may be 0."""
    good = [row for row in rows if row["pixels"] is not None]
    short = [row["short"] for row in good if "short" in row]
    return Batch(
        pixel_values=torch.stack([row["pixels"] for row in good]) if good else torch.empty(0, 3, 0, 0).byte(),
        input_ids=padded([row["tokens"] for row in good]),
        rows=torch.tensor([row["row"] for row in good], dtype=torch.int64),
        bad=[(row["row"], row["error"]) for row in rows if row["pixels"] is None],
        truncated=sum(row["truncated"] for row in good),
        short_ids=padded(short) if short else None,
    )


def padded(captions: Sequence[list[int]]) -> torch.Tensor:
    """Token lists -> ids [B,T] int64, T of the longest, each padded with its own last token (EOT)."""
    longest = max(map(len, captions), default=0)
    rows = [ids + ids[-1:] * (longest - len(ids)) for ids in captions]
    return torch.tensor(rows, dtype=torch.int64).view(len(captions), longest)
