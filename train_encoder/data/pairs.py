"""Rows of images and captions, whatever they are read from (`formats.open_source` opens them)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..config import DataConfig, digest
from .decode import decode_image

logger = logging.getLogger(__name__)


class DataError(ValueError):
    """A data source that cannot be used; the message names the cause and what to do next."""


class ImageStore(Protocol):
    def open(self, row: int, name: str) -> BinaryIO: ...


class PairSource:
    """Image-caption rows, one row an image; all captions of the same image path belong to one row.

    `fingerprint` names the data (source, sizes, first and last rows): a run resumes only on the same data.
    Left out: `dropped_empty` images without a caption, `dropped_imageless` rows that name no image, `dropped_several`
    rows that name more than one.
    """

    def __init__(
        self,
        names: pa.ChunkedArray,
        texts: pa.ChunkedArray,
        text_rows: np.ndarray,
        store: ImageStore,
        config: DataConfig,
        *,
        by_name: bool,
        size: int = 0,
        several: int = 0,
    ) -> None:
        """names [rows] (null: no image); texts [captions], and text_rows [captions]: the row of each.

        by_name: rows of one name are one image. size: bytes of the data files, for the fingerprint. several: how many
        of the rows without a name have more than one image. Raises DataError when no image has a caption.
        """
        image_of_row, row_of_image = _images_of_rows(names, by_name)
        image_of_text = image_of_row[text_rows]
        # A text is blank unless it has a character that str.strip keeps; this needs no trimmed copy of all texts.
        filled = pc.match_substring_regex(texts, r"[^\s\p{Z}\p{Cc}]").fill_null(False).to_numpy()
        kept = np.flatnonzero(filled & (image_of_text >= 0))
        counts = np.bincount(image_of_text[kept], minlength=len(row_of_image))
        self._order = kept[np.argsort(image_of_text[kept], kind="stable")]  # texts, image by image
        stop = None if config.limit is None else config.limit + 1
        self._offsets = np.concatenate([[0], np.cumsum(counts[counts > 0])])[:stop]
        self._row_of_image = row_of_image[counts > 0][: config.limit]
        self._names, self._texts, self._store = names, texts, store
        self.max_pixels = config.max_pixels
        self.dropped_empty = int((counts == 0).sum())
        self.dropped_imageless, self.dropped_several = int(names.null_count) - several, several
        self._report_dropped(config)
        ends = [(self.name(i), self.captions(i)) for i in (0, len(self) - 1)]
        # Only the last part of the source's path counts: a data folder that was moved is still the same data.
        facts = Path(config.source).name, config.split, size, len(self), int(self._offsets[-1])
        self.fingerprint = digest(*facts, ends)

    def _report_dropped(self, config: DataConfig) -> None:
        dropped = {
            "images without a caption": self.dropped_empty,
            "rows without an image": self.dropped_imageless,
            "rows with several images": self.dropped_several,
        }
        text = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
        if len(self) == 0:
            raise DataError(
                f"{config.source} has no image with a caption ({text or 'it is empty'}). "
                "Check data.image_column, data.caption_columns and data.limit."
            )
        if text:
            logger.warning("%s: left out %s", config.source, text)

    @property
    def images_fingerprint(self) -> str:
        """Names the images and their order, whatever their captions."""
        some = range(0, len(self), max(1, len(self) // 1000))
        return digest(len(self), [self.name(i) for i in some])

    def __len__(self) -> int:
        return len(self._row_of_image)

    def name(self, i: int) -> str:
        """Path or key of image i."""
        return self._names[int(self._row_of_image[i])].as_py()

    def captions(self, i: int) -> list[str]:
        """All captions of image i: at least one, none blank, stripped."""
        return [self._texts[int(t)].as_py().strip() for t in self._order[self._offsets[i] : self._offsets[i + 1]]]

    def image(self, i: int) -> Image.Image:
        """Image i in RGB, read and decoded now. Raises BadImage."""
        with self._store.open(int(self._row_of_image[i]), self.name(i)) as file:
            return decode_image(file, self.max_pixels)


def _images_of_rows(names: pa.ChunkedArray, by_name: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the images in order of appearance -> (the image of each row [rows], -1 for none; a row of each image)."""
    present = names.is_valid().to_numpy()
    image_of_row = np.where(present, np.cumsum(present) - 1, -1)
    if by_name:
        codes = names.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if codes.max(initial=-1) < image_of_row.max():  # else every path is unique and there is nothing to group
            image_of_row = codes.astype(np.int64)
    row_of_image = np.zeros(image_of_row.max() + 1, np.int64)
    rows = np.flatnonzero(present)
    row_of_image[image_of_row[rows]] = rows
    return image_of_row, row_of_image


def choose_caption(captions: Sequence[str], how: str, seed: int, row: int, epoch: int) -> str:
    """The caption of a row in an epoch (`how`: DataConfig.captions); every process chooses the same."""
    if how == "first":
        return captions[0]
    if how == "longest":
        return max(captions, key=len)
    return captions[int(np.random.SeedSequence([seed, row, epoch]).generate_state(1)[0]) % len(captions)]


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence: the short caption of Long-CLIP and CLIP-FMoE.

    Long-CLIP's rule (the text before the first full stop that a space follows), and a line's end.
    """
    return re.split(r"(?<=\S)\.\s|\n", caption.strip(), maxsplit=1)[0].strip()
