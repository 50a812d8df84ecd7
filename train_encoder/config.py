"""Every setting of the encoder trainer, as nested dataclasses that `tyro` turns into flags.

The defaults are the paper's (CLIP-MoE, table of DESIGN section 5); a named instance in `recipes.py`
changes only what it must. `llava-clipmoe train-encoder RECIPE --help` prints this page as flags.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where image-caption pairs come from."""

    source: str = "openmoji"
    """`openmoji` (made on this machine, no download), or a CSV/TSV/JSON/JSONL file, a folder of images with
    .txt captions, a parquet file or folder, webdataset tar shards (a folder or `shards-{000..012}.tar`), or a
    hub dataset name."""
    split: str = "train"
    """Which split to read, where the source has several (hub data sets, openmoji)."""
    image_root: Path | None = None
    """Folder that relative image paths start from; the data file's own folder when absent."""
    image_column: str | None = None
    """Column of the image (a path, bytes, or a decoded image); found by name when absent."""
    caption_columns: tuple[str, ...] = ()
    """Columns of captions; a column may hold one caption or a list. Found by name when absent."""
    captions: Literal["random", "first", "longest"] = "random"
    """Which caption of an image a training step uses (`random` is seeded by image and epoch)."""
    limit: int | None = None
    """Use only the first N images."""
    max_bad_fraction: float = 0.01
    """Stop with an error when more than this share of the images is missing or corrupt."""
    max_pixels: int = 89_478_485
    """Images with more pixels than this in their header are skipped before decoding (Pillow's own limit)."""
    cache_images: bool = False
    """Keep decoded, resized images as one memory-mapped file (H*W*3 bytes an image): for small data sets
    that are read many times."""


