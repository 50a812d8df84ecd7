"""What the reader of every data format collects: names of images and flat captions, as arrow columns."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import DataConfig
from .columns import SEVERAL, Columns, caption_texts, image_name, visible
from .decode import DataError

TEXTS = pa.list_(pa.string())
TEXT_FORMS = {"string", "large_string", "string_view"}  # pandas 3 and polars write large_string
BINARY_FORMS = {"binary", "large_binary", "binary_view"}


class Rows:
    """What a reader collects: one name a row (null: no image), and flat captions with the row of each."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.names: list[pa.Array] = []
        self.texts: list[pa.Array] = []
        self.text_rows: list[np.ndarray] = []
        self.count = self.several = 0
        self.true_names: dict[str, str] = {}

    def add(self, names: pa.Array, caption_columns: Iterable[pa.Array], folder: str = "") -> None:
        """Add rows: names [rows], and caption columns [rows] of text, lists, or conversations.

        folder: where relative names start, below the store's root.
        """
        for column in caption_columns:
            texts, rows = self._flat_captions(column)
            self.texts.append(texts)
            self.text_rows.append(rows + self.count)
        names = self._strings(names)
        blank = pc.equal(pc.utf8_trim_whitespace(names), "")
        names = pc.if_else(blank, pa.scalar(None, pa.string()), names)
        if folder:
            absolute = pc.match_substring_regex(names, r"^(/|[A-Za-z]:[/\\]|https?://)")
            names = pc.if_else(absolute, names, pc.binary_join_element_wise(pa.scalar(folder), names, "/"))
        self.names.append(names)
        self.count += len(names)

    def add_pairs(self, pairs: Sequence[tuple[Any, list[str]]], folder: str = "") -> None:
        """Add rows of an image cell (its name, None, or SEVERAL, which is counted) and its captions."""
        names = self._named([name for name, _ in pairs])
        self.add(names, [pa.array([texts for _, texts in pairs], TEXTS)], folder)

    def add_tables(self, tables: Iterable[pa.Table], columns: Columns, by_name: bool, folder: str = "") -> None:
        """Add the rows of arrow tables. Rows with the image inside are named by their key, else by their number."""
        name_column = columns.image if by_name else columns.key
        for table in tables:
            if name_column is None:
                names = pa.array([f"row {self.count + i}" for i in range(len(table))])
            elif pa.types.is_nested(table[name_column].type):
                names = self._named(map(image_name, table[name_column].to_pylist()))
            else:
                names = self._strings(table[name_column].combine_chunks())
            if not by_name and columns.status:
                status = self._strings(table[columns.status].combine_chunks())
                failed = pc.not_equal(status, "success").fill_null(False)
                names = pc.if_else(failed, pa.scalar(None, pa.string()), names)
            self.add(names, [table[name].combine_chunks() for name in columns.captions], folder)

    def _named(self, cells: Iterable[Any]) -> pa.Array:
        names: list[str | None] = []
        for cell in cells:
            self.several += cell is SEVERAL
            name = visible(cell) if isinstance(cell, str) else None
            if name is not None and name != cell:
                self.true_names[name] = cell
            names.append(name)
        return pa.array(names, pa.string())

    def _strings(self, column: pa.Array) -> pa.Array:
        """Text, numbers or dates as arrow's plain strings. Raises DataError for bytes that are not UTF-8."""
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        try:
            return column.cast(pa.string())
        except pa.ArrowNotImplementedError:  # string_view, in some versions
            return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{self.config.source} has a column of bytes where text in UTF-8 should be ({error}). "
                "Save that column as text."
            ) from error

    def _flat_captions(self, column: pa.Array) -> tuple[pa.Array, np.ndarray]:
        """A caption column -> its texts [captions] and the row of each."""
        mixed = isinstance(column.type, pa.BaseExtensionType)  # `datasets` stores mixed types as JSON text
        if mixed or (pa.types.is_nested(column.type) and column.type != TEXTS):
            cells = [json.loads(v) if mixed and isinstance(v, str) else v for v in column.to_pylist()]
            column = pa.array(list(map(caption_texts, cells)), TEXTS)
        rows = np.arange(len(column))
        if pa.types.is_nested(column.type):
            rows = np.repeat(rows, pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
            column = column.flatten()
        return self._strings(column), rows


def names_files(kind: pa.DataType, column: str, source: str) -> bool:
    """Whether an image column holds paths, in whatever form of text; else it holds the images themselves.

    Raises DataError for a column that can hold neither.
    """
    item = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if _form(item) in TEXT_FORMS:
        return True
    fields = [item.field(i) for i in range(item.num_fields)] if pa.types.is_struct(item) else []
    parts = {_form(field.type) for field in fields if field.name in ("bytes", "path")}  # as `datasets` stores images
    if _form(item) not in BINARY_FORMS and (not parts or parts - TEXT_FORMS - BINARY_FORMS - {"null"}):
        raise DataError(
            f"{source}: the column {column!r} holds {kind}, where paths or bytes of images should be. "
            "Name the right one with data.image_column."
        )
    return False


def _form(kind: pa.DataType) -> str:
    """A type's name; of a column that is stored as a dictionary, that of its values."""
    return str(kind.value_type if pa.types.is_dictionary(kind) else kind)
