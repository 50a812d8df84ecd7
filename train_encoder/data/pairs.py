"""Rows of images and captions, whatever they are read from (`formats.open_source` opens them)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from ..config import DataConfig
from ..saved_settings import digest
from .decode import DataError, decode_image
from .rows import Rows
from .stores import FileStore

logger = logging.getLogger(__name__)


class ImageStore(Protocol):
    def open(self, row: int, name: str) -> BinaryIO: ...


class PairSource:
    """Image-caption rows, one row an image; all captions of the same image path belong to one row.

    `fingerprint` names the data (source, sizes, first and last rows): a run resumes only on the same data.
    Left out: `dropped_empty` images without a caption, `dropped_imageless` rows that name no image, `dropped_several`
    rows that name more than one.
    """

    def __init__(self, rows: Rows, store: ImageStore, *, by_name: bool, files: Iterable[Path] = ()) -> None:
        """by_name: rows of one name are one image. files: those of the data. Raises DataError when no image has a
        caption."""
        config = rows.config
        if rows.count == 0:
            raise DataError(f"{config.source} has no rows. Check data.source and data.split.")
        self._names, self._texts, self._store = pa.chunked_array(rows.names), pa.chunked_array(rows.texts), store
        image_of_row, row_of_image = _images_of_rows(self._names, by_name)
        image_of_text = image_of_row[np.concatenate(rows.text_rows)]
        # A text is blank unless it has a character that str.strip keeps; this needs no trimmed copy of all texts.
        filled = pc.match_substring_regex(self._texts, r"[^\s\p{Z}\p{Cc}]").fill_null(False).to_numpy()
        kept = np.flatnonzero(filled & (image_of_text >= 0))
        counts = np.bincount(image_of_text[kept], minlength=len(row_of_image))
        self._order = kept[np.argsort(image_of_text[kept], kind="stable")]  # texts, image by image
        stop = None if config.limit is None else config.limit + 1
        self._offsets = np.concatenate([[0], np.cumsum(counts[counts > 0])])[:stop]
        self._row_of_image = row_of_image[counts > 0][: config.limit]
        self.max_pixels = config.max_pixels
        self.dropped_empty, self.dropped_several = int((counts == 0).sum()), rows.several
        self.dropped_imageless = int(self._names.null_count) - rows.several
        self._report_dropped(config)
        ends = [(self.name(i), self.captions(i)) for i in (0, len(self) - 1)]
        size = sum(file.stat().st_size for file in files)
        # Only the last part of the source's path counts: a data folder that was moved is still the same data.
        facts = Path(config.source).name, config.split, size, len(self), int(self._offsets[-1])
        self.fingerprint = digest(*facts, ends)

    @classmethod
    def of_files(cls, rows: Rows, root: Path, files: Iterable[Path] = ()) -> PairSource:
        """A source of rows that name image files below `root`."""
        first = next((array.drop_null()[0].as_py() for array in rows.names if array.null_count < len(array)), "")
        if re.match(r"https?://", first):
            raise DataError(
                f"{rows.config.source} names images by URL ({first}). Download them first, for example with "
                "img2dataset, and give its output as data.source."
            )
        return cls(rows, FileStore(root, rows.true_names), by_name=True, files=files)

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
    """The short caption of Long-CLIP and CLIP-FMoE: the text up to its first line's end or full stop that a space
    follows (Long-CLIP's rule)."""
    return re.split(r"(?<=\S)\.\s|\n", caption.strip(), maxsplit=1)[0].strip()
