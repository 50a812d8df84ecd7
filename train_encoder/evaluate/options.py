"""Settings that `evaluate` and `compress` share: how a model runs, and how pairs of images and captions are read."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..config import DataConfig
from ..data.cache import RowImages, check_images
from ..data.decode import ImageTransform
from ..data.formats import open_source
from ..data.pairs import PairSource
from ..progress import Bar


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    device: str = "auto"
    """auto (the GPU where there is one), cpu, cuda, cuda:1, ..."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """bf16 is faster on a GPU and may move a result by a tenth of a point."""
    batch_size: int = 64
    """Images, or captions, that pass through the model at once. Lower it where memory runs out."""
    workers: int = 4
    """Processes that decode images; 0 decodes them in this one."""

    @property
    def encoding(self) -> dict[str, Any]:
        """How the model runs, as arguments of the functions that encode."""
        return {"device": self.device, "precision": self.precision, "batch_size": self.batch_size}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    image_root: Path | None = None
    """Folder that relative image paths start from; the data file's own folder when absent."""
    image_column: str | None = None
    """Column of the image (a path, bytes or a decoded image). Name it where it is not found by its usual names."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions, of one caption or a list each. Name them where they are not found by their usual names."""
    max_bad_fraction: float = 0.01
    """Stop with an error when more than this share of the images is missing or corrupt."""

    def open_source(self, data: DataConfig) -> PairSource:
        """Open `data` with these options in the place of its own. Raises DataError."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(SourceOptions)}
        return open_source(dataclasses.replace(data, **own))

    def readable_rows(self, source: PairSource, workers: int, title: str = "checking images") -> np.ndarray:
        """Rows whose image can be read. A warning names the file, in a temporary folder, that lists the others."""
        skipped = Path(tempfile.mkdtemp(prefix="llava-clipmoe-")) / "skipped.jsonl"
        with Bar(title, len(source)) as bar:
            good = check_images(
                source,
                workers=workers,
                max_bad_fraction=self.max_bad_fraction,
                skipped_path=skipped,
                bar=bar,
            )
        if good.all():
            shutil.rmtree(skipped.parent)
        return np.flatnonzero(good)


def readable_images(source: PairSource, rows: np.ndarray, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(row, pixels uint8 [3,size,size]) of those rows whose image can be read."""
    image = RowImages(source, ImageTransform(size))
    for row in rows.tolist():
        pixels, error = image(row)
        if error is None:
            yield row, pixels
