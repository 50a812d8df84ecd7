"""CSV, TSV and JSON: a row is what its writer meant, or the place is named. No row takes in another."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from data_files import colour, content, jsonl, source_of, write_images

pytest.importorskip("pyarrow", reason="needs the `train` extra")

from train_encoder.config import DataConfig
from train_encoder.data.columns import caption_texts, find_columns, visible
from train_encoder.data.pairs import DataError
from train_encoder.data.tables import csv_rows


def write(folder: Path, name: str, text: str) -> Path:
    """A table beside four pictures, `images/0.png` ... ."""
    write_images(folder, 4)
    (folder / name).write_bytes(text.encode())
    return folder / name


def captions(source) -> list[list[str]]:
    return [source.captions(i) for i in range(len(source))]


# --- quotes ---------------------------------------------------------------------------------------------------------

STRAY = [
    ('"Big one', '"Big two'),  # two stray quotes: the rows between them would be one cell
    ('"Big one', 'two"'),
    ('"Big one', "two"),
    ('17"" wide', '"small" two'),
]


@pytest.mark.parametrize(("first", "third"), STRAY)
def test_a_line_of_a_tsv_is_a_row_whatever_its_quotes(tmp_path, first, third):
    rows = ["image\tcaption", f"images/0.png\t{first}", "images/1.png\tmiddle", f"images/2.png\t{third}"]
    source = source_of(write(tmp_path, "a.tsv", "\n".join(rows) + "\n"))
    assert content(source) == [([first], colour(0)), (["middle"], colour(1)), ([third], colour(2))]


def test_a_tsv_cell_that_is_quoted_as_a_whole_is_taken_out_of_its_quotes(tmp_path):
    rows = ["image\tcaption", '"images/0.png"\t"a ""red"" cat"', 'images/1.png\t"" and ""', 'images/2.png\t""']
    source = source_of(write(tmp_path, "a.tsv", "\r\n".join(rows)))
    assert captions(source) == [['a "red" cat'], ['"" and ""']] and source.dropped_empty == 1


def test_a_caption_over_two_lines_of_a_tsv_is_refused(tmp_path):
    path = write(tmp_path, "a.tsv", 'image\tcaption\nimages/0.png\t"one\ntwo"\nimages/1.png\tx\n')
    with pytest.raises(DataError, match=r"a\.tsv, line 3 has 1 cells.*A quote opens in line 2.*a line is a row"):
        source_of(path)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('images/0.png,"Big one\nimages/1.png,middle\nimages/2.png,"Big two\n', "line 2.*',' expected after"),
        ('images/0.png,"Big one\nimages/1.png,middle\n', "line 2.*unexpected end of data"),
        ('images/0.png,"Big one\nimages/1.png,middle\nimages/2.png,two"\nimages/3.png,x\n', "line 2: a quote.*1.png"),
        ("images/0.png,one\nimages/1.png,two, three\n", "line 3 has 3 cells, but the header has 2"),
        ("images/0.png,one\nimages/1.png\n", "line 3 has 1 cells, but the header has 2"),
    ],
)
def test_a_csv_whose_quotes_do_not_fit_is_refused_with_the_line(tmp_path, text, where):
    with pytest.raises(DataError, match=rf"(?s)a\.csv, .*{where}"):
        source_of(write(tmp_path, "a.csv", "image,caption\n" + text))


def test_a_csv_cell_may_hold_separators_quotes_and_line_breaks(tmp_path):
    text = 'image,caption\nimages/0.png,"one, ""two""\nand, three.\r\nfour"\n\nimages/1.png,5" wide\n'
    assert captions(source_of(write(tmp_path, "a.csv", text))) == [['one, "two"\nand, three.\r\nfour'], ['5" wide']]


@pytest.mark.parametrize("header", [",image,caption", "image,caption,", "image,,caption,", "n,image,caption,n"])
def test_columns_without_a_name_and_unused_ones_called_alike_are_passed_over(tmp_path, header):
    cells = [{"image": "images/{i}.png", "caption": "number {i}"}.get(name, "{i}") for name in header.split(",")]
    rows = [",".join(cells).format(i=i) for i in range(3)]
    path = write(tmp_path, "a.csv", "\n".join([header, *rows]))
    assert content(source_of(path)) == [([f"number {i}"], colour(i)) for i in range(3)]


def test_a_carriage_return_alone_ends_no_line_where_others_do(tmp_path):
    for name in ("a.csv", "a.tsv"):
        tab = "\t" if name.endswith("tsv") else ","
        path = write(tmp_path, name, f"caption{tab}image\none\rtwo{tab}images/0.png\n")
        with pytest.raises(DataError, match=rf"{name}, the row of line 2, .*new-line character"):
            source_of(path)
    old = write(tmp_path, "mac.csv", 'image,caption\rimages/0.png,one\rimages/1.png,"two, three"\r')
    assert captions(source_of(old)) == [["one"], ["two, three"]]


def test_commas_after_the_last_cell_and_unneeded_cells_that_are_missing(tmp_path):
    path = write(tmp_path, "a.csv", "image,caption,note\nimages/0.png,x,y,,\nimages/1.png,z\n")
    assert captions(source_of(path)) == [["x"], ["z"]]


def test_a_long_header_and_long_cells(tmp_path):
    with pytest.raises(DataError, match=r"its columns are: x{57}\.\.\., caption\. Name"):
        source_of(write(tmp_path, "a.csv", "x" * 200_000 + ",caption\nimages/0.png,y\n"))
    assert (
        len(source_of(write(tmp_path, "b.csv", "image,caption\nimages/0.png," + "y" * 300_000)).captions(0)[0])
        == 300_000
    )


def test_two_columns_of_one_name_are_not_chosen_between(tmp_path):
    with pytest.raises(DataError, match="more than one column called 'caption': which one"):
        source_of(write(tmp_path, "a.csv", "image,caption,caption\nimages/0.png,a,b\n"))


def test_rows_keep_the_number_of_their_line_across_blank_lines_and_long_cells(tmp_path):
    path = write(tmp_path, "a.csv", 'image,caption\n\nimages/0.png,"a\nb"\n\nimages/1.png,x,y\n')
    with pytest.raises(DataError, match="line 6 has 3 cells"):
        list(csv_rows(path, DataConfig(source="a.csv")))


# --- JSON -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["lines", "list"])
def test_lists_of_one_image_are_read_and_lists_of_more_counted(tmp_path, layout, caplog):
    write_images(tmp_path, 4)
    cells = ["images/0.png", ["images/1.png"], ["images/2.png", "images/3.png"], [], None, {"path": "images/3.png"}]
    rows = [{"image": cell, "caption": f"row {i}"} for i, cell in enumerate(cells)]
    path = jsonl(tmp_path / "a.jsonl", rows) if layout == "lines" else tmp_path / "a.json"
    if layout == "list":
        path.write_text(json.dumps(rows))
    source = source_of(path)
    assert content(source) == [(["row 0"], colour(0)), (["row 1"], colour(1)), (["row 5"], colour(3))]
    assert (source.dropped_imageless, source.dropped_several) == (2, 1)
    assert "left out 2 rows without an image and 1 rows with several images" in caplog.text


def test_half_an_emoji_is_replaced_and_a_whole_one_stays(tmp_path):
    write_images(tmp_path, 1)
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"image": "images/0.png", "captions": ["half \ud83d here", "whole \ud83d\ude00", "\ude00"]}')
    assert source_of(path).captions(0) == ["half \ufffd here", "whole \U0001f600", "\ufffd"]


UNUSABLE = {
    "deep": ('{"image": "a.png", "caption": ' + "[" * 50_000 + "]" * 50_000 + "}", "after row 0: .*recursion"),
    "digits": ('{"image": "a.png", "caption": ' + "9" * 5000 + "}", "after row 0: "),
    "lists": (
        '[{"image": "a.png", "caption": "x"}]\n[{"image": "b.png", "caption": "y"}]',
        "after the end of the list",
    ),
    "third": ('{"image": "a.png", "caption": "x"}\n' * 2 + "{", "after row 2"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_json_is_refused_with_the_place(tmp_path, name):
    (tmp_path / "a.json").write_text(UNUSABLE[name][0])
    with pytest.raises(DataError, match=rf"(?s)a\.json is neither.*{UNUSABLE[name][1]}"):
        source_of(tmp_path / "a.json")


def test_a_caption_nested_too_deeply_is_refused_with_its_file(tmp_path):
    (tmp_path / "a.json").write_text('[{"image": "a.png", "caption": ' + "[" * 800 + '"x"' + "]" * 800 + "}]")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; other packages raise it for the whole process
    try:
        with pytest.raises(DataError, match=r"a\.json has a caption that is nested too deeply"):
            source_of(tmp_path / "a.json")
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        (math.nan, []),  # what pandas writes for a missing text
        ({"raw": "x", "tokens": ["y"]}, ["x"]),
        ([{"from": "human", "value": "q"}, "no turn", {"from": "gpt", "value": "a"}, {"from": "gpt"}], ["a"]),
        ([{"from": "human", "value": "q"}, "no turn"], []),
        ([{"from": "gpt"}], []),
        (["a", ["b", None]], ["a", "b"]),
        (7, ["7"]),
    ],
)
def test_captions_in_a_cell(cell, texts):
    assert caption_texts(cell) == texts


def test_names_that_are_no_utf8_are_shown_as_escapes():
    assert visible("caf\udce9.png") == "caf\\udce9.png" and visible("café.png") == "café.png"


def test_the_first_of_the_known_columns_is_taken_whatever_its_case():
    columns = find_columns(["ID", "Text", "Image", "caption"], DataConfig(source="x"))
    assert (columns.image, columns.captions, columns.key) == ("Image", ("caption",), "ID")
