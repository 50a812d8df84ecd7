"""Any image-caption data set -> `PairSource`: one row an image, with its captions, read by index.

`open_source(DataConfig(source=...))` is the way in. Captions are kept as flat arrow text (memory-mapped
where `datasets` maps it), images stay where they are and are read one at a time: nothing is unpacked or
copied. CSV, TSV, parquet columns and hub data sets are read through `datasets`. JSON is read here, one row
at a time, because `datasets` loads a JSON list whole and, before version 5, refuses the mixed types of LLaVA's
files. Tar shards, row groups and image folders are read here because there `datasets` either copies everything
into its cache or gives no access by index.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from train_encoder.config import DataConfig

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FILE_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
              ".parquet": "parquet", ".tar": "tar"}  # fmt: skip
# Looked for in this order, whatever their case. `conversations` is the shape of LLaVA and ShareGPT4V.
IMAGE_COLUMNS = ("image", "image_path", "img", "img_path", "filepath", "file_path", "filename", "file_name", "file",
                 "image_file", "image_name", "image_filepath", "path", "jpg", "jpeg", "png", "webp")  # fmt: skip
CAPTION_COLUMNS = ("conversations", "captions", "caption", "texts", "text", "sentences", "sentence", "raw", "txt",
                   "title", "description", "alt_text")  # fmt: skip
KEY_COLUMNS = ("key", "__key__", "image_id", "id")
CHUNK_ROWS = 10_000
# One random read decodes a row group: img2dataset writes 100 rows (about 3 MB). Above this, the arrow cache is faster.
LARGE_ROW_GROUP_BYTES = 128 * 2**20


class BadImage(Exception):
    """An image that is missing, corrupt or over-large; the message names the cause."""


class DataError(ValueError):
    """A data source that cannot be used; the message names the cause and what to do next."""


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_image(file: BinaryIO, max_pixels: int) -> Image.Image:
    """Decodes the first frame of an image file, upright and in RGB; transparent pixels lie on white.

    Raises BadImage when the header promises more than `max_pixels` (nothing is decoded then), or when the file is
    corrupt or cut short.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit comes next
            image = Image.open(file)
        width, height = image.size
        if width * height > max_pixels:
            raise BadImage(f"too large: {width} x {height} pixels in its header, over max_pixels={max_pixels}")
        image.load()
        return _to_rgb(_upright(image))
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: over max_pixels={max_pixels} by its header ({error})") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes; no worker may die of it
        raise BadImage(f"corrupt: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation (tag 0x0112). Damaged EXIF does not make the pixels wrong, so it is ignored."""
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(0x0112))
    except Exception:  # the same wide range of errors as above, and the same reason
        logger.debug("EXIF data of an image cannot be read; taken as upright")
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own convert() would clip to white
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


# --- where the images are: no store keeps a file open, so all of them can be forked, pickled and read by threads ---


class ImageStore(Protocol):
    def open(self, row: int, name: str) -> BinaryIO: ...


@dataclass
class FileStore:
    """Images as files; a relative name starts from `root`."""

    root: Path

    def open(self, row: int, name: str) -> BinaryIO:
        path = self.root / name
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise BadImage(f"missing: no file {path}") from error
        except (OSError, ValueError) as error:
            raise BadImage(f"unreadable: {error}") from error


@dataclass
class TarStore:
    """Images inside uncompressed tar shards, by shard, offset and size [rows]."""

    shards: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def open(self, row: int, name: str) -> BinaryIO:
        path, size = self.shards[self.shard[row]], int(self.size[row])
        try:
            with path.open("rb") as file:
                file.seek(int(self.offset[row]))
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"unreadable: {error}") from error
        if len(data) < size:
            raise BadImage(f"corrupt: {path} ends in the middle of this image")
        return io.BytesIO(data)


@dataclass
class ParquetStore:
    """Image bytes in the row groups of parquet files; the row group read last is kept."""

    groups: list[tuple[Path, int]]
    starts: np.ndarray  # [groups + 1], the first row of each
    column: str
    root: Path
    _last: tuple[int, Any] | None = field(default=None, repr=False)

    def open(self, row: int, name: str) -> BinaryIO:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != group:
            path, index = self.groups[group]
            try:
                cells = pq.ParquetFile(path).read_row_group(index, columns=[self.column]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise BadImage(f"unreadable: row group {index} of {path}: {error}") from error
            last = self._last = (group, cells)
        return _open_cell(last[1][row - int(self.starts[group])].as_py(), row, self.root)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}


@dataclass
class DatasetStore:
    """Images in one column of a (memory-mapped) `datasets.Dataset`."""

    dataset: Any
    root: Path

    def open(self, row: int, name: str) -> BinaryIO:
        (cell,) = self.dataset[row].values()
        return _open_cell(cell, row, self.root)


def _open_cell(cell: Any, row: int, root: Path) -> BinaryIO:
    """A table's image cell is bytes, a path, or {"bytes", "path"} as `datasets` stores images."""
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    if cell is None and path:
        return FileStore(root).open(row, path)
    if not cell:
        raise BadImage("missing: no image bytes in this row")
    return FileStore(root).open(row, cell) if isinstance(cell, str) else io.BytesIO(cell)


# --- rows -----------------------------------------------------------------------------------------------------------


class _Rows:
    """What every reader fills: a name a row (null: no image), and flat captions with the row each belongs to."""

    def __init__(self) -> None:
        self.names: list[pa.Array] = []
        self.texts: list[pa.Array] = []
        self.text_rows: list[np.ndarray] = []
        self.count = 0

    def add(self, names: pa.Array, caption_columns: Sequence[pa.Array]) -> None:
        """Adds rows: names [rows], and caption columns [rows] of text, lists, or conversations."""
        for column in caption_columns:
            if pa.types.is_nested(column.type) or isinstance(column.type, pa.BaseExtensionType):
                values = column.to_pylist()
                if isinstance(column.type, pa.BaseExtensionType):  # `datasets` stores mixed types as JSON text
                    values = [json.loads(value) if isinstance(value, str) else value for value in values]
                lists = [caption_texts(value) for value in values]
                self.texts.append(pa.array(list(itertools.chain.from_iterable(lists)), pa.string()))
                rows = np.repeat(np.arange(len(lists)), [len(texts) for texts in lists])
            else:
                self.texts.append(column.cast(pa.string()))
                rows = np.arange(len(column))
            self.text_rows.append(rows + self.count)
        self.names.append(names.cast(pa.string()))
        self.count += len(names)


def caption_texts(value: Any) -> list[str]:
    """The captions in one cell: a text, a list of texts, {"raw": text}, or a conversation's first answer."""
    if value is None:
        return []
    if isinstance(value, dict):
        return next(([str(value[key])] for key in ("raw", "caption", "text", "value") if value.get(key)), [])
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            # Later answers of a LLaVA conversation reply to questions; only the first describes the image.
            return next((caption_texts(turn.get("value")) for turn in value if turn.get("from") == "gpt"), [])
        return [text for item in value for text in caption_texts(item)]
    return [str(value)]


class PairSource:
    """Image-caption rows, one row an image; all captions of the same image path belong to one row.

    `fingerprint` names the data (source, sizes, first and last rows): a run resumes only on the same data.
    `dropped_empty` counts the images left out because all their captions were blank, `dropped_imageless` the table
    rows that name no image.
    """

    def __init__(self, rows: _Rows, store: ImageStore, config: DataConfig, *, by_name: bool, size: int = 0) -> None:
        """`by_name`: rows of the same name are the same image. `size`: bytes of the data files, for the fingerprint."""
        if rows.count == 0:
            raise DataError(f"{config.source} has no rows. Check data.source and data.split.")
        names = pa.chunked_array(rows.names)
        self._texts = pa.chunked_array(rows.texts, pa.string())
        image_of_row, first_row = _images_of_rows(names, by_name)
        image_of_text = image_of_row[np.concatenate(rows.text_rows)]
        filled = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(self._texts)), 0).fill_null(False).to_numpy()
        kept = np.flatnonzero(filled & (image_of_text >= 0))
        counts = np.bincount(image_of_text[kept], minlength=len(first_row))
        self._order = kept[np.argsort(image_of_text[kept], kind="stable")]  # texts, image by image
        self._offsets = np.concatenate([[0], np.cumsum(counts[counts > 0])])[: config.limit and config.limit + 1]
        self._first_row = first_row[counts > 0][: config.limit]
        self._names, self._store, self._max_pixels = names, store, config.max_pixels
        self.dropped_empty = int((counts == 0).sum())
        self.dropped_imageless = int(names.null_count)
        self._report_dropped(config)
        self.fingerprint = self._fingerprint(config, size)

    def _report_dropped(self, config: DataConfig) -> None:
        dropped = {"images without a caption": self.dropped_empty, "rows without an image": self.dropped_imageless}
        text = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
        if len(self) == 0:
            raise DataError(f"{config.source} has no image with a caption ({text or 'it is empty'}). Check "
                            "data.image_column, data.caption_columns and data.limit.")  # fmt: skip
        if text:
            logger.warning("%s: left out %s", config.source, text)

    def _fingerprint(self, config: DataConfig, size: int) -> str:
        ends = [(self.name(i), self.captions(i)) for i in (0, len(self) - 1)]
        # The source's last part only: a data folder that was moved is still the same data.
        what = [Path(config.source).name, config.split, size, len(self), int(self._offsets[-1]), ends]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._first_row)

    def name(self, i: int) -> str:
        """Path or key of image i."""
        return self._names[int(self._first_row[i])].as_py()

    def captions(self, i: int) -> list[str]:
        """All captions of image i: at least one, none blank, stripped."""
        return [self._texts[int(t)].as_py().strip() for t in self._order[self._offsets[i] : self._offsets[i + 1]]]

    def image(self, i: int) -> Image.Image:
        """Image i in RGB, read and decoded now. Raises BadImage."""
        with self._store.open(int(self._first_row[i]), self.name(i)) as file:
            return decode_image(file, self._max_pixels)

    @property
    def image_root(self) -> Path | None:
        """Folder of relative image paths, for error messages; None when the images lie inside the data files."""
        return self._store.root if isinstance(self._store, FileStore) else None


def _images_of_rows(names: pa.ChunkedArray, by_name: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the images in order of appearance: image of each row [rows] (-1: none), first row of each image."""
    present = names.is_valid().to_numpy()
    image_of_row = np.where(present, np.cumsum(present) - 1, -1)
    if by_name:
        codes = names.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if codes.max(initial=-1) < image_of_row.max():  # else every path is unique and there is nothing to group
            image_of_row = codes.astype(np.int64)
    first_row = np.zeros(image_of_row.max() + 1, np.int64)
    backwards = np.flatnonzero(present)[::-1]
    first_row[image_of_row[backwards]] = backwards  # the last write, so the first row, stays
    return image_of_row, first_row


# --- columns --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: tuple[str, ...]
    key: str | None
    status: str | None  # img2dataset's: failed downloads are rows too


def _find_columns(available: Sequence[str], config: DataConfig) -> _Columns:
    by_lower = {name.lower(): name for name in reversed(available)}

    def first(names: Iterable[str]) -> str | None:
        return next((by_lower[name] for name in names if name in by_lower), None)

    missing = [name for name in (config.image_column, *config.caption_columns) if name and name not in available]
    image = config.image_column or first(IMAGE_COLUMNS)
    numbered = [name for name in available if re.fullmatch(r"(caption|text|sentence)s?_?\d+", name.lower())]
    captions = config.caption_columns or tuple([name for name in [first(CAPTION_COLUMNS)] if name] or numbered)
    if missing or image is None or not captions:
        what = f"no column {', '.join(map(repr, missing))}" if missing else (
            "no column that looks like an image" if image is None else "no column that looks like a caption")  # fmt: skip
        raise DataError(f"{config.source} has {what}; its columns are: {', '.join(available)}. Name them with "
                        "data.image_column and data.caption_columns.")  # fmt: skip
    return _Columns(image, tuple(captions), first(KEY_COLUMNS), first(["status"]))


def _collect(tables: Iterable[pa.Table], columns: _Columns, by_name: bool) -> _Rows:
    """Gathers names and captions of arrow tables. Rows with the image inside are named by key, else by number."""
    rows = _Rows()
    for table in tables:
        name_column = columns.image if by_name else columns.key
        if name_column:
            names = table[name_column].combine_chunks()
        else:
            names = pa.array([f"row {rows.count + i}" for i in range(len(table))])
        if not by_name and columns.status:
            failed = pc.not_equal(table[columns.status].combine_chunks(), "success").fill_null(False)
            names = pc.if_else(failed, pa.scalar(None, names.type), names)
        rows.add(names, [table[name].combine_chunks() for name in columns.captions])
    return rows


# --- formats --------------------------------------------------------------------------------------------------------


def _open_csv(paths: list[Path], config: DataConfig) -> PairSource:
    import datasets

    tables: list[Iterable[pa.Table]] = []
    columns = None
    for path in paths:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        if not header:
            raise DataError(f"{path} is empty. Its first line must name the columns, such as image,caption.")
        columns = _find_columns(header, config)
        # All text: pandas would read the name "007" as 7 and the caption "NA" as no caption.
        stream = datasets.load_dataset(
            "csv", data_files=[_literal(path)], split="train", streaming=True, sep=separator, keep_default_na=False,
            features=datasets.Features({name: datasets.Value("string") for name in header}))  # fmt: skip
        tables.append(stream.select_columns([columns.image, *columns.captions]).with_format("arrow").iter(CHUNK_ROWS))
    return _paths_source(_collect(itertools.chain.from_iterable(tables), columns, by_name=True), paths, config)


def _open_json(paths: list[Path], config: DataConfig) -> PairSource:
    rows, columns = _Rows(), None
    for path in paths:
        stream = _json_rows(path)
        while chunk := list(itertools.islice(stream, CHUNK_ROWS)):
            if columns is None:
                columns = _find_columns(list(dict.fromkeys(key for row in chunk for key in row)), config)
            names = [row.get(columns.image) for row in chunk]
            lists = [[t for name in columns.captions for t in caption_texts(row.get(name))] for row in chunk]
            names = [name if isinstance(name, str) and name else None for name in names]
            rows.add(pa.array(names, pa.string()), [pa.array(lists, pa.list_(pa.string()))])
    return _paths_source(rows, paths, config)


def _json_rows(path: Path) -> Iterator[dict]:
    """Yields the rows of a JSON list or of JSON lines, one at a time: these files reach gigabytes."""
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(1)
        while start.isspace():
            start = file.read(1)
        parts = _list_items(file) if start == "[" else _line_items(file, start)
        try:
            for row in parts:
                if not isinstance(row, dict):
                    raise DataError(f"{path} holds {type(row).__name__} where a row such as "
                                    '{"image": ..., "caption": ...} should be.')  # fmt: skip
                yield row
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is neither a JSON list of rows nor JSON lines ({error}). Write one row a line, "
                            'such as {"image": "a.jpg", "caption": "a cat"}.') from error  # fmt: skip


def _line_items(file: io.TextIOBase, start: str) -> Iterator[Any]:
    return (json.loads(line) for line in itertools.chain([start + file.readline()], file) if line.strip())


def _list_items(file: io.TextIOBase) -> Iterator[Any]:
    """Yields the items of a JSON list whose opening bracket has been read."""
    decoder, text, at, size = json.JSONDecoder(), "", 0, 1 << 20
    while True:
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
            yield item
        except json.JSONDecodeError:  # perhaps only the end of what was read so far
            more = file.read(size)
            if not more:
                raise
            text, at, size = text[at:] + more, 0, min(2 * size, 1 << 28)

