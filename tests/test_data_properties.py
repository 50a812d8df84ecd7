"""Any data set that a good writer can write is read as it was written: no row fewer, no caption of another picture.

Hypothesis makes the data sets: tables, folders, shards and parquet files of random shapes, with captions of any
characters. A picture is known by its colour, so what is read can be compared with what was meant, whatever names and
files lay between. Files that were damaged afterwards are read right as far as they are, or refused by name.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from data_files import source_of, write_tar
from PIL import Image

pa = pytest.importorskip("pyarrow", reason="needs the `train` extra")
hypothesis = pytest.importorskip("hypothesis", reason="needs the `dev` extra")
import pyarrow.parquet as pq  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from train_encoder.data.decode import BadImage  # noqa: E402
from train_encoder.data.pairs import DataError  # noqa: E402

# The same examples every time: a red run can be run again. More, and others: HYPOTHESIS_EXAMPLES=2000.
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))
PROPERTY = settings(
    max_examples=EXAMPLES or 60,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


# --- what is written ------------------------------------------------------------------------------------------------


def colour_of(number: int) -> tuple[int, int, int]:
    return (number % 7 * 40, number // 7 % 7 * 40, 200)


def picture_of(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), colour_of(number)).save(file, "PNG")
    return file.getvalue()


PIXELS = [picture_of(number) for number in range(49)]

# All that people write: quotes and separators more often than chance would have them, every script, controls, no half
# surrogates (those have a test of their own).
TEXT = st.text(
    st.one_of(
        st.sampled_from("\"',;|\t\n\r \\{}[]<>abc\ufeff\u2028\x85\x0c\0"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=12,
)
PLAIN = st.text(st.sampled_from("abc \"',;."), min_size=1, max_size=12)


@dataclass(frozen=True)
class Row:
    picture: int | None
    captions: tuple[str, ...]


ROWS = st.lists(
    st.builds(Row, st.one_of(st.none(), st.integers(0, 8)), st.lists(TEXT, max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


def seen(text: str) -> bool:
    """Whether a caption says anything: it has a character that is no space, separator or control."""
    return any(
        not letter.isspace() and unicodedata.category(letter)[0] != "Z" and unicodedata.category(letter) != "Cc"
        for letter in text
    )


def meant(rows: list[Row]) -> dict[int, list[str]]:
    """Pictures with captions -> those that say something, in order."""
    found = defaultdict(list)
    for row in rows:
        if row.picture is not None:
            found[row.picture] += [caption.strip() for caption in row.captions if seen(caption)]
    return {picture: captions for picture, captions in found.items() if captions}


def dropped(rows: list[Row]) -> tuple[int, int]:
    """Pictures without a caption, and rows without a picture."""
    named = {row.picture for row in rows if row.picture is not None}
    return len(named) - len(meant(rows)), sum(row.picture is None for row in rows)


def read(path: Path | str, **given) -> tuple[dict[int, list[str]], tuple[int, int]]:
    """What is read: captions by picture, and how many were dropped for want of a caption, of a picture."""
    source = source_of(path, **given)
    numbers = {colour_of(number): number for number in range(49)}
    pictures = [numbers[source.image(i).getpixel((0, 0))] for i in range(len(source))]
    assert len(set(pictures)) == len(pictures), "one picture, two rows"
    found = {picture: source.captions(i) for i, picture in enumerate(pictures)}
    return found, (source.dropped_empty, source.dropped_imageless)


def check(path: Path | str, rows: list[Row], **given) -> None:
    if not meant(rows):
        with pytest.raises(DataError, match=r"has no image with a caption|has no rows|holds no data"):
            read(path, **given)
        return
    found, left = read(path, **given)
    assert {picture: sorted(texts) for picture, texts in found.items()} == {
        picture: sorted(texts) for picture, texts in meant(rows).items()
    }
    assert left == dropped(rows)


class Folder:
    """A new folder for each example (a fixture would be one for all), with the pictures `0.png` ... where asked."""

    def __enter__(self) -> Path:
        self._held = tempfile.TemporaryDirectory()
        return Path(self._held.name)

    def __exit__(self, *_: object) -> None:
        self._held.cleanup()


def write_pictures(folder: Path, rows: list[Row]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in {row.picture for row in rows} - {None}:
        (folder / f"{number}.png").write_bytes(PIXELS[number])


def name(row: Row) -> str:
    return "" if row.picture is None else f"{row.picture}.png"


# --- tables ---------------------------------------------------------------------------------------------------------


def one_a_line(rows: list[Row]) -> list[Row]:
    """As a table of one caption a row has them."""
    return [Row(row.picture, (caption,)) for row in rows for caption in row.captions or ("",)]


def write_csv(path: Path, rows: list[Row], columns: list[str], bom: bool, end: str, **dialect) -> None:
    values = [{"image": name(row), "caption": row.captions[0]} for row in rows]
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=end, **dialect)
        writer.writerow(columns)
        writer.writerows(
            [str(i) if column not in value else value[column] for column in columns] for i, value in enumerate(values)
        )


ENDS = st.sampled_from(["\n", "\r\n"])
COLUMNS = st.permutations(["image", "caption", "", "note"]) | st.permutations(["image", "caption"])


@PROPERTY
@given(
    ROWS, COLUMNS, st.booleans(), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
)
def test_csv(rows, columns, bom, end, quoting):
    rows = one_a_line(rows)
    with Folder() as folder:
        write_pictures(folder, rows)
        write_csv(folder / "a.csv", rows, columns, bom, end, quoting=quoting)
        if end == "\n" and any("\r" in row.captions[0] for row in rows):  # Python's writer may leave it unquoted
            refused_or_right(folder / "a.csv", rows)
        else:
            check(folder / "a.csv", rows)


@PROPERTY
@given(ROWS, COLUMNS, st.booleans(), ENDS)
def test_tsv_written_with_quotes_is_read_or_refused(rows, columns, bom, end):
    """pandas' way: cells with a tab, quote or line break are quoted. In a TSV a line is a row, so those are refused.

    But for a cell with a line break AND a tab, whose lines may be good rows: only a reader that believes every quote
    could tell.
    """
    rows = [
        Row(row.picture, tuple(text.replace("\t", " ") if set(text) & set("\n\r") else text for text in row.captions))
        for row in one_a_line(rows)
    ]
    with Folder() as folder:
        write_pictures(folder, rows)
        write_csv(folder / "a.tsv", rows, columns, bom, end, delimiter="\t")
        if any(set(row.captions[0]) & set("\t\n\r") for row in rows):
            refused_or_right(folder / "a.tsv", rows)
        else:
            check(folder / "a.tsv", rows)


@PROPERTY
@given(ROWS)
def test_tsv_written_without_quotes(rows):
    rows = [Row(row.picture, (re.sub(r"[\t\n\r]", " ", row.captions[0]),)) for row in one_a_line(rows)]
    whole = re.compile(r'"(?:[^"]|"")*"')  # what a quoting writer would have written for something else
    rows = [row for row in rows if not whole.fullmatch(row.captions[0])] or [Row(0, ("a",))]
    with Folder() as folder:
        write_pictures(folder, rows)
        lines = ["image\tcaption", *(f"{name(row)}\t{row.captions[0]}" for row in rows)]
        (folder / "a.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
        check(folder / "a.tsv", rows)


def refused_or_right(path: Path, rows: list[Row]) -> None:
    """DataError that names the file, or everything as it was meant."""
    try:
        read(path)
    except DataError as error:
        assert path.name in str(error)
    else:
        check(path, rows)


SHAPES = st.sampled_from(["text", "list", "path", "null", "conversation"])


def json_row(row: Row, shape: str) -> dict:
    image = {
        "text": name(row),
        "list": [name(row)] if row.picture is not None else [],
        "path": {"path": name(row)},
        "null": name(row) or None,
    }
    if shape == "conversation":
        turns = [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": (row.captions or ("",))[0]},
            {"from": "human", "value": "And?"},
            {"from": "gpt", "value": "no caption"},
        ]
        return {"id": 7, "image": image["text"], "conversations": turns}
    return {"note": shape, "image": image[shape], "captions": list(row.captions)}


@PROPERTY
@given(ROWS, SHAPES, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 1]))
def test_json(rows, shape, lines, bom, ascii, indent):
    if shape == "conversation":
        rows = [Row(row.picture, row.captions[:1]) for row in rows]
    values = [json_row(row, shape) for row in rows]
    if lines:
        text = "".join(json.dumps(value, ensure_ascii=ascii) + "\n" for value in values)
    else:
        text = json.dumps(values, ensure_ascii=ascii, indent=indent)
    with Folder() as folder:
        write_pictures(folder, rows)
        path = folder / ("a.jsonl" if lines else "a.json")
        path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
        check(path, rows)


# --- files that were damaged ----------------------------------------------------------------------------------------


@PROPERTY
@given(st.lists(PLAIN, min_size=2, max_size=8), st.data(), st.sampled_from(["csv", "tsv"]))
def test_one_stray_quote_never_takes_in_another_row(captions, data, kind):
    """What a hand or a script did to one cell changes that row at most, or the file is refused by name."""
    rows = [Row(i, (caption,)) for i, caption in enumerate(captions)]
    with Folder() as folder:
        write_pictures(folder, rows)
        path = folder / f"a.{kind}"
        write_csv(path, rows, ["image", "caption"], False, "\n", delimiter="\t" if kind == "tsv" else ",")
        lines = path.read_text().split("\n")
        place = data.draw(st.integers(1, len(rows)))
        at = data.draw(st.integers(0, len(lines[place])))
        lines[place] = lines[place][:at] + '"' + lines[place][at:]
        path.write_text("\n".join(lines))
        try:
            source = source_of(path)
        except DataError as error:
            assert path.name in str(error)
            return
        found = {source.name(i): source.captions(i) for i in range(len(source))}
        others = {
            name(row): [row.captions[0].strip()]
            for i, row in enumerate(rows, start=1)
            if i != place and seen(row.captions[0])
        }
        assert {key: value for key, value in found.items() if key in others} == others
        assert len(found) + source.dropped_empty == len(rows)


@PROPERTY
@given(ROWS, st.data(), st.sampled_from(["csv", "tsv", "jsonl", "json", "parquet", "tar"]))
def test_a_file_that_was_cut_gives_rows_as_they_were_written_or_is_refused(rows, data, kind):
    rows = [row for row in one_a_line(rows) if row.picture is not None] or [Row(0, ("a",))]
    with Folder() as folder:
        write_pictures(folder, rows)
        path = folder / f"a.{kind}"
        if kind in ("csv", "tsv"):
            write_csv(path, rows, ["image", "caption"], False, "\n", delimiter="\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            pq.write_table(pa.table({"image": [name(r) for r in rows], "caption": [r.captions[0] for r in rows]}), path)
        elif kind == "tar":
            write_shard(path, dict(enumerate(rows)))
        else:
            values = [json_row(row, "text") for row in rows]
            text = json.dumps(values) if kind == "json" else "".join(json.dumps(value) + "\n" for value in values)
            path.write_text(text)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        try:
            source = source_of(path)
            numbers = {colour_of(number): number for number in range(49)}
            found = [(numbers[source.image(i).getpixel((0, 0))], source.captions(i)) for i in range(len(source))]
        except (DataError, BadImage) as error:
            assert path.name in str(error) or "ends in the middle" in str(error) or "missing" in str(error)
            return
        texts = defaultdict(list)
        for row in rows:
            texts[row.picture].append(row.captions[0])
        for picture, captions in found:
            for caption in captions:
                assert any(caption in text or caption in '"' + text.replace('"', '""') for text in texts[picture])


# --- parquet --------------------------------------------------------------------------------------------------------

TYPES = [pa.string(), pa.large_string(), *([pa.string_view()] if hasattr(pa, "string_view") else [])]


def image_column(rows: list[Row], form: str, text):
    data = [None if row.picture is None else PIXELS[row.picture] for row in rows]
    struct = pa.struct({"bytes": pa.binary(), "path": text})
    return {
        "names": lambda: pa.array([name(row) or None for row in rows], pa.string()).cast(text),
        "categories": lambda: pa.array([name(row) or None for row in rows], pa.string()).dictionary_encode(),
        "lists of names": lambda: pa.array([[name(r)] if name(r) else [] for r in rows], pa.list_(text)),
        "bytes": lambda: pa.array(data, pa.binary()),
        "structs": lambda: pa.array([{"bytes": d, "path": None} for d in data], struct),
        "paths": lambda: pa.array([{"bytes": None, "path": name(r)} for r in rows], struct),
        "lists": lambda: pa.array([[{"bytes": d, "path": None}] for d in data], pa.list_(struct)),
    }[form]()


FORMS = st.sampled_from(["names", "categories", "lists of names", "bytes", "structs", "paths", "lists"])


@PROPERTY
@given(ROWS, FORMS, st.sampled_from(TYPES), st.booleans(), st.integers(1, 4), st.integers(1, 3))
def test_parquet(rows, form, text, listed, group, files):
    inside = form in ("bytes", "structs", "paths", "lists")
    if inside:  # a row is an image there, and one without is bad, not left out
        rows = [Row(i, row.captions) for i, row in enumerate(rows)]
    if not listed:
        rows = [Row(row.picture, (row.captions or ("",))[:1]) for row in rows]
    nested = listed or form in ("structs", "paths", "lists", "lists of names")
    text = pa.large_string() if nested and text == TYPES[-1] else text  # pyarrow cannot write these of string_view
    with Folder() as folder:
        size = -(-len(rows) // files)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        for number, part in enumerate(parts):
            place = folder / str(number)  # each with its own pictures; `0.png` of one is not that of another
            write_pictures(place, part)
            captions = [list(row.captions) if listed else row.captions[0] for row in part]
            kind = pa.list_(text) if listed else text
            column = pa.array(captions, pa.list_(pa.string()) if listed else pa.string()).cast(kind)
            table = pa.table({"image": image_column(part, form, text), "caption": column})
            pq.write_table(table, place / "rows.parquet", row_group_size=group)
        if not inside and len(parts) > 1:
            return check_names_apart(folder, parts)
        check(folder, rows)


def check_names_apart(folder: Path, parts: list[list[Row]]) -> None:
    """Tables in folders: a name means its own folder's picture, so one picture may be a row in each."""
    if not any(map(meant, parts)):
        return
    source = source_of(folder)
    found = {source.name(i): (source.image(i).getpixel((0, 0)), sorted(source.captions(i))) for i in range(len(source))}
    assert found == {
        f"{number}/{picture}.png": (colour_of(picture), sorted(captions))
        for number, part in enumerate(parts)
        for picture, captions in meant(part).items()
    }


# --- folders and shards ---------------------------------------------------------------------------------------------

# Any bytes that a file's name may have on this system; `train` and `test` are the folders of splits below.
STEMS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=8),
    st.binary(min_size=1, max_size=6).map(os.fsdecode),
).filter(lambda stem: "/" not in stem and "\0" not in stem and not stem.startswith("."))
LINES = st.lists(TEXT.map(lambda text: re.sub(r"[\n\r]", " ", text)), max_size=3).map(tuple)
PLACES = st.sampled_from(["", "a", "a/b", "c d"])


def files_can_be_called(folder: Path, stem: str) -> bool:
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            (Path(place) / f"{stem}.png").write_bytes(b"")
    except (OSError, ValueError):
        return False
    return True


@PROPERTY
@given(
    st.dictionaries(st.tuples(PLACES, STEMS), LINES, min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from([".png", ".PNG", ".apng"]),
    st.sampled_from([".txt", ".TXT"]),
    st.data(),
)
def test_folders_of_pictures_and_texts(named, bom, suffix, text_suffix, data):
    splits = data.draw(st.sampled_from([None, ("train", "test"), ("training", "val2017")]))
    with Folder() as folder:
        rows: dict[str, list[Row]] = defaultdict(list)
        for number, ((place, stem), captions) in enumerate(named.items()):
            if not files_can_be_called(folder, stem):
                continue
            split = "" if splits is None else splits[number % 2]
            target = folder / split / place
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{stem}{suffix}").write_bytes(PIXELS[number])
            text = "\n".join(captions).encode("utf-8-sig" if bom else "utf-8")
            (target / f"{stem}{text_suffix}").write_bytes(text)
            rows[split].append(Row(number, captions))
        for split, some in rows.items():
            if len(rows) == 2 or not split:
                check(folder, some, **({"split": split} if split else {}))


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/.\0"), min_size=1, max_size=8)


def write_shard(path: Path, samples: dict, in_json: bool = False, text_first: bool = False) -> None:
    members = []
    for key, row in samples.items():
        caption = (row.captions or ("",))[0]
        text = (
            (f"{key}.json", json.dumps({"caption": caption}).encode()) if in_json else (f"{key}.txt", caption.encode())
        )
        image = [] if row.picture is None else [(f"{key}.png", PIXELS[row.picture])]
        members += [text, *image] if text_first else [*image, text]
    write_tar(path, members)


@PROPERTY
@given(st.dictionaries(KEYS, LINES, min_size=1, max_size=8), st.booleans(), st.booleans(), st.integers(1, 3), st.data())
def test_shards(named, in_json, text_first, files, data):
    rows = [
        Row(None if data.draw(st.integers(0, 6)) == 0 else i, captions[:1] or ("",))
        for i, captions in enumerate(named.values())
    ]
    rows = [Row(row.picture, tuple(text.removeprefix("\ufeff") for text in row.captions)) for row in rows]
    with Folder() as folder:
        size = -(-len(rows) // files)
        keys = list(named)
        for start in range(0, len(rows), size):
            some = dict(zip(keys[start : start + size], rows[start : start + size], strict=True))
            write_shard(folder / f"{start:04}.tar", some, in_json, text_first)
        check(folder, rows)


@PROPERTY
@given(st.lists(LINES, min_size=1, max_size=6))
def test_a_key_that_comes_again_is_another_row(captions):
    """Shards that were put together may call two samples alike; webdataset stops there, and nothing is lost here."""
    rows = [Row(i, texts[:1] or ("",)) for i, texts in enumerate(captions)]
    rows = [Row(row.picture, tuple(text.removeprefix("\ufeff") for text in row.captions)) for row in rows]
    with Folder() as folder:
        members = [
            part for row in rows for part in (("same.png", PIXELS[row.picture]), ("same.txt", row.captions[0].encode()))
        ]
        write_tar(folder / "a.tar", members)
        check(folder / "a.tar", rows)
