"""Tables of text, row by row: CSV, TSV, JSON lists and JSON lines, and what their cells say.

Strict on purpose: a reader that guesses what a stray quote means would give pictures the captions of others, and nobody
would see it. So what is ambiguous is a DataError that names the line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_clipmoe.files import replace_surrogates
from train_encoder.config import DataConfig

from .decode import DataError
from .image_files import is_image_name

# Looked for in this order, whatever their case. `conversations` is the shape of LLaVA and ShareGPT4V.
IMAGE_COLUMNS = (
    "image image_path img img_path filepath file_path filename file_name file image_file image_name image_filepath "
    "path jpg jpeg png webp images image_paths"
).split()
CAPTION_COLUMNS = (
    "conversations captions caption texts text sentences sentence raw txt title description alt_text"
).split()
KEY_COLUMNS = ("key", "__key__", "image_id", "id")


@dataclass(frozen=True)
class Columns:
    image: str
    captions: tuple[str, ...]
    key: str | None
    status: str | None  # img2dataset's: failed downloads are rows too

    def wanted(self, by_name: bool) -> list[str]:
        """The columns to read besides images that are stored inside (by_name: the image column holds paths)."""
        names = [self.image if by_name else None, *self.captions, self.key, self.status]
        return list(dict.fromkeys(name for name in names if name))


def find_columns(available: Sequence[str], config: DataConfig) -> Columns:
    """The columns to read: those that `config` names, else those with a well-known name. Raises DataError."""
    by_lower = {name.lower(): name for name in reversed(available)}

    def first(names: Iterable[str]) -> str | None:
        return next((by_lower[name] for name in names if name in by_lower), None)

    missing = [name for name in (config.image_column, *config.caption_columns) if name and name not in available]
    image = config.image_column or first(IMAGE_COLUMNS)
    numbered = [name for name in available if re.fullmatch(r"(caption|text|sentence)s?_?\d+", name.lower())]
    captions = config.caption_columns or tuple([name for name in [first(CAPTION_COLUMNS)] if name] or numbered)
    if missing or image is None or not captions:
        unseen = f"no column that looks like {'an image' if image is None else 'a caption'}"
        what = f"no column {', '.join(map(repr, missing))}" if missing else unseen
        raise DataError(
            f"{config.source} has {what}; its columns are: {name_columns(available)}. "
            "Name them with data.image_column and data.caption_columns."
        )
    twice = [name for name in (image, *captions) if list(available).count(name) > 1]
    if twice:
        raise DataError(
            f"{config.source} has more than one column called {twice[0]!r}: which one is meant? "
            "Give them different names."
        )
    return Columns(image, tuple(captions), first(KEY_COLUMNS), first(["status"]))


def name_columns(columns: Sequence[str]) -> str:
    """The columns of a table as a message shows them."""
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in columns[:30]]
    return ", ".join(shown + ["..."] * (len(columns) > 30))


def caption_texts(value: Any) -> list[str]:
    """The captions in one cell: a text, a list of texts, {"raw": text}, or a conversation's first answer.

    Half a surrogate pair (of an emoji that was cut) becomes U+FFFD.
    """
    if value is None or value != value:  # NaN: pandas' missing text
        return []
    if isinstance(value, dict):
        texts = (caption_texts(value[key]) for key in ("raw", "caption", "text", "value") if value.get(key))
        return next(texts, [])
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            # Later answers of a LLaVA conversation reply to questions; only the first describes the image.
            answers = (turn for turn in value if isinstance(turn, dict) and turn.get("from") == "gpt")
            return next((caption_texts(turn.get("value")) for turn in answers), [])
        return [text for item in value for text in caption_texts(item)]
    return [replace_surrogates(str(value))]


SEVERAL = object()


def image_name(value: Any) -> Any:
    """The path in an image cell (a text, {"path": text}, or a list of one), None, or SEVERAL for a list of more."""
    if isinstance(value, list):
        return SEVERAL if len(value) > 1 else image_name(value[0]) if value else None
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) and value else None


def visible(name: str) -> str:
    """A file's name as text that can be stored and printed; bytes that are not UTF-8 as escapes ("caf\\udce9.png")."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")


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
