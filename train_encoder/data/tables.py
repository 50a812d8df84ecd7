"""Tables of text, row by row: CSV, TSV, JSON lists and JSON lines.

Strict on purpose: a reader that guesses what a stray quote means would give pictures the captions of others, and nobody
would see it. So what is ambiguous is a DataError that names the line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from train_encoder.config import DataConfig

from .columns import Columns, caption_texts, find_columns, image_name
from .decode import DataError
from .image_files import is_image_name


def csv_rows(path: Path, config: DataConfig) -> Iterator[tuple[str, list[str]]]:
    """Yields the image cell and the caption cells of each row, all as text. Raises DataError.

    In a CSV a quoted cell may hold separators and line breaks. In a TSV a line is a row, whatever its quotes; a cell
    that is quoted as a whole is taken out of its quotes, as spreadsheets and pandas put it in.
    """
    rows = _csv_lines(path)
    _, header = next(rows, (0, []))
    if not any(header):
        raise DataError(f"{path} is empty. Its first line must name the columns, such as image,caption.")
    columns = find_columns(header, config)
    image, captions = header.index(columns.image), [header.index(name) for name in columns.captions]
    width, needed, tabs = len(header), 1 + max(image, *captions), path.suffix.lower() == ".tsv"
    open_quote = 0
    for number, row in rows:
        if tabs:
            open_quote = open_quote or number * any(map(_opens_a_quote, row))
            row = [_unquoted(cell) for cell in row]
        elif any("\n" in cell or "\r" in cell for cell in row):
            _refuse_swallowed_rows(row, number, image, path)
        if len(row) > width and not any(row[width:]) and not open_quote:
            row = row[:width]  # commas after the last cell
        if not (width if open_quote else needed) <= len(row) <= width:
            raise _misfit(path, number, len(row), width, open_quote)
        yield row[image], [row[place] for place in captions]


def csv_header(path: Path) -> list[str]:
    """The names of a CSV's or TSV's columns. Raises DataError."""
    return next(_csv_lines(path), (0, []))[1]


def _csv_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of its first line and the cells of each row that has any."""
    tabs = path.suffix.lower() == ".tsv"
    csv.field_size_limit(2**31 - 1)  # a caption may be as long as it likes
    with path.open("rb") as file:
        start = file.read(1 << 20)
    # Where lines end in "\n", a lone "\r" in a cell ends no line: csv then refuses it instead of making two rows of it.
    newline = "" if b"\r" in start and b"\n" not in start else "\n"
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
            reader, before = csv.reader(file, **dialect), 0
            for row in reader:
                if row:
                    yield before + 1, row
                before = reader.line_num
    except (csv.Error, UnicodeDecodeError) as error:
        hint = "A quote inside a quoted cell is written twice. " if isinstance(error, csv.Error) else ""
        raise DataError(
            f"{path}, the row of line {before + 1}, cannot be read as {'tsv' if tabs else 'csv'} in UTF-8: "
            f"{error}. {hint}Repair it or save it again."
        ) from error


def _misfit(path: Path, number: int, cells: int, width: int, open_quote: int) -> DataError:
    why = "A cell with a separator or a line break in it must be quoted."
    if open_quote:
        why = f"A quote opens in line {open_quote} and does not close there: in a TSV a line is a row."
    return DataError(
        f"{path}, line {number} has {cells} cells, but the header has {width}: it cannot be read as "
        f"{path.suffix.lower()[1:]} in UTF-8. {why} Repair it or save it again."
    )


def _opens_a_quote(cell: str) -> bool:
    return cell.startswith('"') and cell.count('"') % 2 == 1


def _unquoted(cell: str) -> str:
    """A TSV cell without its quotes, if they enclose all of it and quotes inside are doubled."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', ""):
        return cell[1:-1].replace('""', '"')
    return cell


def _refuse_swallowed_rows(row: list[str], number: int, image: int, path: Path) -> None:
    """Raises DataError for a cell that a stray quote made of all the rows up to the next quote (still a valid CSV):
    its lines look like rows, with a picture's name where the table has its pictures."""
    for line in itertools.chain.from_iterable(re.split(r"\r\n|\r|\n", cell)[1:] for cell in row):
        cells = line.split(",")
        if len(cells) > max(image, 1) and is_image_name(cells[image].strip()):
            raise DataError(
                f"{path}, line {number}: a quote opens here and takes in the rows after it, such as {line[:60]!r}. If "
                "it belongs to the text, write it twice in a quoted cell; if that line is text, save the table as JSON "
                "lines."
            )


def json_rows(path: Path) -> Iterator[dict]:
    """Yields the rows of a JSON list or of JSON lines, one at a time: these files reach gigabytes."""
    count = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            for row in _list_items(file) if start == "[" else _line_items(file, start):
                count += 1
                if not isinstance(row, dict):
                    raise DataError(
                        f"{path}, row {count} holds {type(row).__name__} where a row such as "
                        '{"image": ..., "caption": ...} should be.'
                    )
                yield row
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of thousands of digits, too deep
        raise DataError(
            f"{path} is neither a JSON list of rows nor JSON lines in UTF-8 (after row {count}: {error}). "
            'Write one row a line, such as {"image": "a.jpg", "caption": "a cat"}.'
        ) from error


def json_pairs(rows: Iterable[dict], columns: Columns, path: Path) -> Iterator[tuple[Any, list[str]]]:
    """Yields the image (a path, None, or SEVERAL) and the captions of each row of `path`. Raises DataError."""
    for row in rows:
        try:
            captions = [text for name in columns.captions for text in caption_texts(row.get(name))]
        except RecursionError as error:
            raise DataError(f"{path} has a caption that is nested too deeply. Repair it.") from error
        yield image_name(row.get(columns.image)), captions


def _line_items(file: io.TextIOBase, start: str) -> Iterator[Any]:
    return (json.loads(line) for line in itertools.chain([start + file.readline()], file) if line.strip())


def _list_items(file: io.TextIOBase) -> Iterator[Any]:
    """Yields the items of a JSON list whose opening bracket has been read."""
    decoder, text, at, size = json.JSONDecoder(), "", 0, 1 << 20
    while True:
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if text[at : at + 1] == "]":
            if (text[at + 1 :] + file.read(1 << 16)).strip():  # another list: its rows would be lost
                raise ValueError("there is more after the end of the list")
            return
        try:
            item, at = decoder.raw_decode(text, at)
            size = 1 << 20
            yield item
        except json.JSONDecodeError:  # perhaps only the end of what was read so far
            more = file.read(size)
            if not more:
                raise
            text, at, size = text[at:] + more, 0, min(2 * size, 1 << 28)
