"""What `mine-pairs` takes for pictures: everything in a folder, and every path in a table."""

from __future__ import annotations

import os

import pytest
from data_files import colour, encoded, jsonl, picture, png

pytest.importorskip("imagehash", reason="needs the `demo` extra")

from demo.mining.images import open_pictures
from train_encoder.data.pairs import DataError


def colours(pictures) -> list[tuple[int, ...]]:
    return [pictures.image(i).getpixel((3, 3)) for i in range(len(pictures))]


def test_a_folder_with_links_and_every_suffix(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(png(0))
    (tmp_path / "photos" / "b.apng").write_bytes(png(1))
    (tmp_path / "photos" / "c.tga").write_bytes(encoded(picture(2), "TGA"))
    (tmp_path / "photos" / ".hidden.png").write_bytes(png(9))
    (tmp_path / "elsewhere" / "d.png").write_bytes(png(3))
    if hasattr(os, "symlink"):
        (tmp_path / "photos" / "linked").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "up").symlink_to(tmp_path / "photos")
    found = open_pictures(str(tmp_path / "photos"))
    assert found.names == ["a.png", "b.apng", "c.tga", "linked/d.png"][: len(found)] and len(found) >= 3
    assert colours(found) == [colour(i) for i in range(len(found))]


@pytest.mark.parametrize("text", [",image,caption\n0,a.png,x\n1,b.png,y\n", "\ufeffimage,,\na.png,,\nb.png,,\n"])
def test_a_table_as_pandas_and_spreadsheets_write_it(tmp_path, text):
    for i, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(i))
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    found = open_pictures(str(tmp_path / "rows.csv"))
    assert found.names == ["a.png", "b.png"] and colours(found) == [colour(0), colour(1)]


def test_json_lines_with_lists_of_one(tmp_path):
    for i, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(i))
    found = open_pictures(str(jsonl(tmp_path / "rows.jsonl", [{"image": ["a.png"]}, {"image": "b.png"}])))
    assert colours(found) == [colour(0), colour(1)]


def test_a_table_without_a_column_of_pictures_names_its_columns(tmp_path):
    (tmp_path / "rows.csv").write_text("x" * 500 + ",caption\n1,2\n")
    with pytest.raises(DataError, match=r"no column that looks like an image; its columns are: x{57}\.\.\., caption"):
        open_pictures(str(tmp_path / "rows.csv"))
