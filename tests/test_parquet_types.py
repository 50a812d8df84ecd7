"""Parquet columns in every form that writers give text, captions and images; and those that hold neither."""

from __future__ import annotations

import pytest
from data_files import colour, content, png, source_of, write_images

pa = pytest.importorskip("pyarrow", reason="needs the `train` extra")
datasets = pytest.importorskip("datasets", reason="needs the `train` extra")
import pyarrow.parquet as pq  # noqa: E402

from train_encoder.data.decode import BadImage  # noqa: E402
from train_encoder.data.pairs import DataError  # noqa: E402

TEXTS = {
    "string": pa.string(),
    "large_string": pa.large_string(),  # pandas 3 and polars
    "string_view": getattr(pa, "string_view", pa.string)(),
    "categorical": pa.dictionary(pa.int32(), pa.string()),
    "large categorical": pa.dictionary(pa.int8(), pa.large_string()),
}
WANTED = [(["red cat", "a cat"], colour(0)), (["blue dog"], colour(1))]


def text(values: list, form: str):
    kind = TEXTS[form]
    if pa.types.is_dictionary(kind):
        return pa.array(values, kind.value_type).dictionary_encode()
    return pa.array(values, pa.string()).cast(kind)


@pytest.mark.parametrize("form", TEXTS)
def test_every_form_of_text_is_text(tmp_path, form):
    one, two = write_images(tmp_path, 2)
    table = pa.table({"image": text([one, two, one], form), "caption": text(["red cat", "blue dog", "a cat"], form)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert content(source_of(tmp_path / "a.parquet")) == WANTED


@pytest.mark.parametrize("form", ["string", "large_string"])
def test_in_a_saved_data_set_too(tmp_path, form):
    one, two = write_images(tmp_path, 2)
    rows = pa.table({"image": text([one, two, one], form), "caption": text(["red cat", "blue dog", "a cat"], form)})
    datasets.Dataset(rows).save_to_disk(str(tmp_path / "saved"))
    assert content(source_of(tmp_path / "saved", image_root=tmp_path)) == WANTED


@pytest.mark.parametrize("form", TEXTS)
def test_urls_are_refused_in_every_form(tmp_path, form):
    table = pa.table({"image": text(["https://x.org/a.png"], form), "caption": text(["x"], form)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"names images by URL.*img2dataset"):
        source_of(tmp_path / "a.parquet")


LISTS = {
    "of large_string": pa.list_(pa.large_string()),
    "large": pa.large_list(pa.string()),
    "of two": pa.list_(pa.string(), 2),
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_captions(tmp_path, form):
    write_images(tmp_path, 2)
    cells = pa.array([["red cat", "a cat"], ["blue dog", ""]], LISTS[form])
    pq.write_table(pa.table({"image": ["images/0.png", "images/1.png"], "captions": cells}), tmp_path / "a.parquet")
    assert content(source_of(tmp_path / "a.parquet")) == WANTED


STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})
IMAGES = {
    "bytes": (pa.binary(), png),
    "large bytes": (pa.large_binary(), png),
    "struct": (STRUCT, lambda i: {"bytes": png(i), "path": None}),
    "list of bytes": (pa.list_(pa.binary()), lambda i: [png(i)]),
    "list of structs": (pa.list_(STRUCT), lambda i: [{"bytes": png(i), "path": "x"}]),
    "large list of structs": (pa.large_list(STRUCT), lambda i: [{"bytes": png(i), "path": "x"}]),
}


@pytest.mark.parametrize("form", IMAGES)
def test_every_form_of_image(tmp_path, form):
    kind, cell = IMAGES[form]
    table = pa.table({"images": pa.array([cell(0), cell(1)], kind), "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert content(source_of(tmp_path / "a.parquet")) == [(["a"], colour(0)), (["b"], colour(1))]
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    assert content(source_of(tmp_path / "saved")) == [(["a"], colour(0)), (["b"], colour(1))]


def test_lists_of_several_images_are_named_and_lists_of_paths_counted(tmp_path):
    cells = [[png(0), png(1)], [png(2)], []]
    pq.write_table(pa.table({"images": cells, "caption": ["a", "b", "c"]}), tmp_path / "bytes.parquet")
    source = source_of(tmp_path / "bytes.parquet")
    for i, cause in ((0, "several: 2 images in this row"), (2, "missing: no image bytes")):
        with pytest.raises(BadImage, match=cause):
            source.image(i)
    assert source.image(1).getpixel((0, 0)) == colour(2)
    one, two = write_images(tmp_path, 2)
    pq.write_table(pa.table({"images": [[one, two], [two], []], "caption": ["a", "b", "c"]}), tmp_path / "p.parquet")
    source = source_of(tmp_path / "p.parquet")
    assert content(source) == [(["b"], colour(1))] and (source.dropped_imageless, source.dropped_several) == (1, 1)


STRUCTS = [{"bytes": 5, "path": 7}] * 2


@pytest.mark.parametrize(
    "cells", [[1, 2], [1.5, 2.5], [True, False], [{"x": 1}, {"x": 2}], [[1], [2]], [None, None], STRUCTS]
)
def test_a_column_that_can_hold_no_image_is_refused_with_its_type(tmp_path, cells):
    pq.write_table(pa.table({"image": pa.array(cells), "caption": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: the column 'image' holds .*data\.image_column"):
        source_of(tmp_path / "a.parquet")


def test_captions_of_bytes_are_read_as_utf8_or_refused(tmp_path):
    write_images(tmp_path, 1)
    for name, cell in (("good", "café".encode()), ("bad", b"\xff\xfe")):
        table = pa.table({"image": ["images/0.png"], "caption": pa.array([cell], pa.binary())})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert source_of(tmp_path / "good.parquet").captions(0) == ["café"]
    with pytest.raises(DataError, match=r"bad\.parquet has a column of bytes where text in UTF-8 should be"):
        source_of(tmp_path / "bad.parquet")


def test_keys_and_status_of_any_type(tmp_path):
    table = pa.table({"jpg": [png(0), png(1)], "caption": ["a", "b"], "key": [7, 8], "status": ["success", "failed"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = source_of(tmp_path / "a.parquet")
    assert content(source) == [(["a"], colour(0))] and source.name(0) == "7" and source.dropped_imageless == 1
    pq.write_table(table.set_column(3, "status", pa.array([3, 4])), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no image with a caption .2 rows without an image"):
        source_of(tmp_path / "b.parquet")


def test_pandas_index_and_a_damaged_file(tmp_path):
    pandas = pytest.importorskip("pandas")
    one, two = write_images(tmp_path, 2)
    frame = pandas.DataFrame({"image": [one, two, one], "caption": ["red cat", "blue dog", "a cat"]}, index=[5, 6, 7])
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv")
    frame.to_csv(tmp_path / "a.tsv", sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    for name in ("a.parquet", "a.csv", "a.tsv", "a.jsonl"):
        assert content(source_of(tmp_path / name)) == WANTED, name
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[4:60] = b"x" * 56  # the pages; the footer is whole
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"(?s)a\.parquet is damaged: .*Download it again"):
        source_of(tmp_path / "a.parquet")
