"""Data in several files and folders: every row gets the picture of its own file, and a split only its own rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import colour, content, jsonl, png, source_of, write_tar

pa = pytest.importorskip("pyarrow", reason="needs the `train` extra")
import pyarrow.parquet as pq  # noqa: E402

from train_encoder.data.decode import BadImage  # noqa: E402
from train_encoder.data.pairs import DataError  # noqa: E402

NAMES = ("a.png", "b.png")


def expected(start: int) -> list[tuple[list[str], tuple[int, ...]]]:
    return [([f"number {start + i}"], colour(start + i)) for i in range(2)]


def pictures(folder: Path, start: int) -> list[dict]:
    """`a.png` and `b.png` in a folder, in the colours `start` and `start + 1`; -> a row for each."""
    folder.mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(png(start + i))
    return [{"image": name, "caption": f"number {start + i}"} for i, name in enumerate(NAMES)]


def write_jsonl(folder: Path, start: int) -> None:
    jsonl(folder / "metadata.jsonl", pictures(folder, start))


def write_csv(folder: Path, start: int) -> None:
    rows = pictures(folder, start)
    (folder / "rows.csv").write_text("image,caption\n" + "".join(f"{r['image']},{r['caption']}\n" for r in rows))


def write_names(folder: Path, start: int) -> None:
    pq.write_table(pa.Table.from_pylist(pictures(folder, start)), folder / "0000.parquet")


def write_paths(folder: Path, start: int) -> None:
    """As `datasets` writes images that it left where they are."""
    rows = [row | {"image": {"bytes": None, "path": row["image"]}} for row in pictures(folder, start)]
    kind = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "caption": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, kind), folder / "0000.parquet")


def write_bytes(folder: Path, start: int) -> None:
    folder.mkdir(parents=True)
    rows = [{"image": png(start + i), "caption": f"number {start + i}"} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "0000.parquet")


def write_shard(folder: Path, start: int) -> None:
    folder.mkdir(parents=True)
    members = [
        (f"{i}.{kind}", data)
        for i in range(2)
        for kind, data in (("png", png(start + i)), ("txt", f"number {start + i}".encode()))
    ]
    write_tar(folder / "0000.tar", members)


def write_pairs(folder: Path, start: int) -> None:
    for row in pictures(folder, start):
        (folder / row["image"]).with_suffix(".txt").write_text(row["caption"])


WRITERS = [write_jsonl, write_csv, write_names, write_paths, write_bytes, write_shard, write_pairs]


@pytest.mark.parametrize("write", WRITERS)
def test_splits_in_folders_whose_files_are_called_alike(tmp_path, write):
    write(tmp_path / "default" / "train", 0)
    write(tmp_path / "default" / "validation", 4)
    assert content(source_of(tmp_path)) == expected(0)
    assert content(source_of(tmp_path, split="validation")) == expected(4)
    assert content(source_of(tmp_path, split="dev")) == expected(4)  # another word for it
    with pytest.raises(DataError, match=r"no files of split 'nosuch'; it has: train, validation\. Set data\.split"):
        source_of(tmp_path, split="nosuch")


@pytest.mark.parametrize("write", WRITERS)
def test_folders_that_are_no_splits_are_read_together_each_with_its_own_pictures(tmp_path, write):
    write(tmp_path / "one", 0)
    write(tmp_path / "two", 4)
    assert content(source_of(tmp_path)) == expected(0) + expected(4)


@pytest.mark.parametrize(("write", "name"), [(write_jsonl, "metadata.jsonl"), (write_csv, "rows.csv")])
def test_a_pattern_over_folders(tmp_path, write, name):
    write(tmp_path / "one", 0)
    write(tmp_path / "two", 4)
    source = source_of(tmp_path / "{one,two}" / name)
    assert content(source) == expected(0) + expected(4)
    assert [source.name(i) for i in range(4)] == ["one/a.png", "one/b.png", "two/a.png", "two/b.png"]


def test_an_image_root_holds_for_all_files(tmp_path):
    write_jsonl(tmp_path / "one", 0)
    jsonl(tmp_path / "rows.jsonl", [{"image": "b.png", "caption": "again"}])
    source = source_of(tmp_path, image_root=tmp_path / "one")
    assert content(source) == [(["again", "number 1"], colour(1)), (["number 0"], colour(0))]


def test_absolute_names_stay_what_they_are(tmp_path):
    rows = pictures(tmp_path / "pictures", 0)
    for folder, row in zip(("one", "two"), rows, strict=True):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "rows.jsonl", [row | {"image": str(tmp_path / "pictures" / row["image"])}])
    assert content(source_of(tmp_path)) == expected(0)


def test_a_split_may_have_any_name(tmp_path):
    write_jsonl(tmp_path / "train", 0)
    write_jsonl(tmp_path / "heldout", 4)
    assert content(source_of(tmp_path, split="heldout")) == expected(4)


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("my-train", "my_test"), ("Training", "Testing")])
def test_splits_as_data_sets_spell_them(tmp_path, names):
    for start, name in enumerate(names):
        write_jsonl(tmp_path / name, 4 * start)
    assert content(source_of(tmp_path)) == expected(0)


def test_files_that_name_no_split_beside_some_that_do_are_said_to_be_left_out(tmp_path, caplog):
    write_jsonl(tmp_path / "train", 0)
    write_jsonl(tmp_path / "more", 4)
    assert content(source_of(tmp_path)) == expected(0)
    assert "left out 1 files that name no split, such as more/metadata.jsonl" in caplog.text


def test_a_folder_of_trains_beside_one_of_buses_is_no_split(tmp_path):
    write_pairs(tmp_path / "bus", 0)
    write_pairs(tmp_path / "train", 4)
    assert content(source_of(tmp_path)) == expected(0) + expected(4)
    with pytest.raises(DataError, match="no files of split 'test'; it has: train"):
        source_of(tmp_path, split="test")


def test_the_files_of_another_format_are_said_to_be_left_out(tmp_path, caplog):
    write_csv(tmp_path / "one", 0)
    write_jsonl(tmp_path / "two", 4)
    (tmp_path / "notes.json").write_text(json.dumps({"about": "anything"}))
    assert content(source_of(tmp_path)) == expected(4)
    assert "its .jsonl files are read; left out 1 others, such as" in caplog.text and "rows.csv" in caplog.text


def test_parquet_files_that_disagree_about_the_image_are_refused(tmp_path):
    write_names(tmp_path / "one", 0)
    write_bytes(tmp_path / "two", 4)
    with pytest.raises(DataError, match="do not have the same kind of image column"):
        source_of(tmp_path)


def test_a_picture_that_its_own_folder_lacks_is_not_taken_from_another(tmp_path):
    write_jsonl(tmp_path / "one", 0)
    write_jsonl(tmp_path / "two", 4)
    (tmp_path / "two" / "a.png").unlink()
    source = source_of(tmp_path)
    with pytest.raises(BadImage, match=r"missing: no file .*two/a\.png"):
        source.image(2)
    assert source.image(0).getpixel((0, 0)) == colour(0)
