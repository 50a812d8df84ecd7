"""What the reader of every data format collects: names of images and flat captions, as arrow columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import DataConfig
from .pairs import DataError, ImageStore, PairSource
from .stores import FileStore
from .tables import SEVERAL, Columns, caption_texts, image_name, visible


class Rows:
    """What a reader collects: one name a row (null: no image), and flat captions with the row of each."""

    def __init__(self, source: str) -> None:
        self.names: list[pa.Array] = []
        self.texts: list[pa.Array] = []
        self.text_rows: list[np.ndarray] = []
        self.count = self.several = 0
        self.true_names: dict[str, str] = {}
        self.origin = source

    def add(self, names: pa.Array, caption_columns: Sequence[pa.Array], folder: str = "") -> None:
        """Adds rows: names [rows], and caption columns [rows] of text, lists, or conversations.

        `folder`: where relative names start, below the store's root.
        """
        for column in caption_columns:
            texts, rows = _flat_captions(column, self.origin)
            self.texts.append(texts)
            self.text_rows.append(rows + self.count)
        names = strings(names, self.origin)
        blank = pc.equal(pc.utf8_trim_whitespace(names), "")
        names = pc.if_else(blank, pa.scalar(None, pa.string()), names)
        if folder:
            absolute = pc.match_substring_regex(names, r"^(/|[A-Za-z]:[/\\]|https?://)")
            names = pc.if_else(absolute, names, pc.binary_join_element_wise(pa.scalar(folder), names, "/"))
        self.names.append(names)
        self.count += len(names)

    def named(self, values: Iterable[Any]) -> pa.Array:
        """Names [rows] from image cells: a path each, None, or SEVERAL (counted)."""
        names: list[str | None] = []
        for value in values:
            self.several += value is SEVERAL
            name = visible(value) if isinstance(value, str) else None
            if name != value and name is not None:
                self.true_names[name] = value
            names.append(name)
        return pa.array(names, pa.string())

    def source(self, store: ImageStore, config: DataConfig, *, by_name: bool, size: int = 0) -> PairSource:
        if self.count == 0:
            raise DataError(f"{config.source} has no rows. Check data.source and data.split.")
        names, texts = pa.chunked_array(self.names), pa.chunked_array(self.texts, pa.string())
        return PairSource(
            names,
            texts,
            np.concatenate(self.text_rows),
            store,
            config,
            by_name=by_name,
            size=size,
            several=self.several,
        )

    def source_of_files(self, root: Path, config: DataConfig, size: int = 0) -> PairSource:
        """A source of rows that name image files below `root`."""
        first = next((array.drop_null()[0].as_py() for array in self.names if array.null_count < len(array)), "")
        if re.match(r"https?://", first):
            raise DataError(
                f"{config.source} names images by URL ({first}). Download them first, for example with "
                "img2dataset, and give its output as data.source."
            )
        return self.source(FileStore(root, self.true_names), config, by_name=True, size=size)


def _flat_captions(column: pa.Array, source: str) -> tuple[pa.Array, np.ndarray]:
    """A caption column -> its texts [captions] and the row of each."""
    if isinstance(column.type, pa.BaseExtensionType):  # `datasets` stores mixed types as JSON text
        values = [json.loads(v) if isinstance(v, str) else v for v in column.to_pylist()]
        column = pa.array([caption_texts(value) for value in values], pa.list_(pa.string()))
    elif pa.types.is_nested(column.type) and column.type != pa.list_(pa.string()):
        column = pa.array([caption_texts(value) for value in column.to_pylist()], pa.list_(pa.string()))
    rows = np.arange(len(column))
    if pa.types.is_nested(column.type):
        rows = np.repeat(rows, pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
        column = column.flatten()
    return strings(column, source), rows


def strings(column: pa.Array, source: str) -> pa.Array:
    """Text, numbers or dates as arrow's plain strings. Raises DataError for bytes that are not UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pa.string())
    except pa.ArrowNotImplementedError:  # string_view, in some versions
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    except pa.ArrowInvalid as error:
        raise DataError(
            f"{source} has a column of bytes where text in UTF-8 should be ({error}). Save that column as text."
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, in any of arrow's forms (pandas 3 and polars write large_string)."""
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    forms = ("is_string", "is_large_string", "is_string_view")  # the last is new in pyarrow 16
    return any(getattr(pa.types, form)(kind) for form in forms if hasattr(pa.types, form))


def _is_binary(kind: pa.DataType) -> bool:
    forms = ("is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, form)(kind) for form in forms if hasattr(pa.types, form))


def names_files(kind: pa.DataType, column: str, source: str) -> bool:
    """Whether an image column holds paths, in whatever form of text; else it holds the images themselves.

    Raises DataError for a column that can hold neither.
    """
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if _is_text(item):
        return True
    fields = [item.field(i) for i in range(item.num_fields)] if pa.types.is_struct(item) else []
    parts = [part.type for part in fields if part.name in ("bytes", "path")]  # as `datasets` stores images
    inside = all(_is_binary(part) or _is_text(part) or pa.types.is_null(part) for part in parts)
    if not (_is_binary(item) or (parts and inside)):
        raise DataError(
            f"{source}: the column {column!r} holds {kind}, where paths or bytes of images should be. Name "
            "the right one with data.image_column."
        )
    return False


def collect(rows: Rows, tables: Iterable[pa.Table], columns: Columns, by_name: bool, folder: str = "") -> None:
    """Gathers names and captions of arrow tables. Rows with the image inside are named by key, else by number."""
    for table in tables:
        name_column = columns.image if by_name else columns.key
        if name_column is None:
            names = pa.array([f"row {rows.count + i}" for i in range(len(table))])
        elif pa.types.is_nested(table[name_column].type):
            names = rows.named(map(image_name, table[name_column].to_pylist()))
        else:
            names = strings(table[name_column].combine_chunks(), rows.origin)
        if not by_name and columns.status:
            status = strings(table[columns.status].combine_chunks(), rows.origin)
            failed = pc.not_equal(status, "success").fill_null(False)
            names = pc.if_else(failed, pa.scalar(None, pa.string()), names)
        rows.add(names, [table[name].combine_chunks() for name in columns.captions], folder)


def data_size(paths: Iterable[Path]) -> int:
    """Bytes of the data files, for the fingerprint."""
    return sum(path.stat().st_size for path in paths)
