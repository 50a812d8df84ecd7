"""What `train_encoder.data` promises, on small files made here."""

from __future__ import annotations

import gzip
import io
import json
import logging
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_files import colour, content, encoded, jsonl, picture, png, source_of, write_images, write_tar
from PIL import Image
from torch.utils.data import DataLoader

datasets = pytest.importorskip("datasets", reason="needs the `train` extra")
open_clip = pytest.importorskip("open_clip", reason="CLIP's vocabulary comes from open_clip (`train` extra)")
pa = pytest.importorskip("pyarrow")

import pyarrow.parquet as pq  # noqa: E402

from train_encoder.data import cache, formats  # noqa: E402
from train_encoder.data.cache import build_image_cache, check_images  # noqa: E402
from train_encoder.data.dataset import EncoderDataset, collate  # noqa: E402
from train_encoder.data.decode import MAX_ASPECT, BadImage, ImageTransform, decode_image, normalise  # noqa: E402
from train_encoder.data.pairs import DataError, PairSource, choose_caption  # noqa: E402
from train_encoder.progress import Bar  # noqa: E402

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.exists(), reason="../shared/data (real photographs) is absent")
LIMIT = 1_000_000


# --- helpers --------------------------------------------------------------------------------------------------------


def small_source(folder: Path, count: int = 12, captions: int = 3):
    names = write_images(folder, count)
    rows = [
        {"image": n, "captions": [f"number {i} told {c} times" for c in range(captions)]} for i, n in enumerate(names)
    ]
    return source_of(jsonl(folder / "rows.jsonl", rows))


TWO = [(["red cat", "a cat"], colour(0)), (["blue dog"], colour(1))]


@pytest.fixture(scope="session")
def tokenizer():
    """OpenAI's tokenizer, built offline from the merges that open_clip ships."""
    import inspect

    from open_clip.tokenizer import bytes_to_unicode, default_bpe
    from transformers import CLIPTokenizer

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    if "vocab" not in inspect.signature(CLIPTokenizer.__init__).parameters:
        pytest.skip("this CLIPTokenizer is built from files (transformers 4)")
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


# --- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_csv_rows_of_one_image_are_one_row(tmp_path, suffix, separator):
    names = write_images(tmp_path, 2)
    lines = [("filepath", "caption"), (names[0], "red cat"), (names[1], " blue dog "), ("", "-")]
    lines.append((names[0], "a cat"))
    path = tmp_path / f"rows.{suffix}"
    path.write_text("\n".join(separator.join(line) for line in lines), encoding="utf-8-sig")
    source = source_of(path)
    assert content(source) == TWO
    assert source.name(1) == "images/1.png"
    assert source.dropped_imageless == 1


def test_csv_cells_stay_text(tmp_path):
    """pandas alone reads the name 007 as 7 and the captions NA and null as nothing."""
    (tmp_path / "007").write_bytes(png())
    (tmp_path / "rows.csv").write_text('image,text\n007,NA\n007,null\n007,"one, ""two""\nthree"\n')
    assert content(source_of(tmp_path / "rows.csv")) == [(["NA", "null", 'one, "two"\nthree'], colour(0))]


def test_a_folder_name_with_glob_characters_is_only_a_name(tmp_path):
    folder = tmp_path / "data[1]*{2}"
    names = write_images(folder, 1)
    (folder / "rows.csv").write_text(f"image,caption\n{names[0]},x\n")
    assert len(source_of(folder / "rows.csv")) == 1
    pq.write_table(pa.table({"jpg": [png(3)], "caption": ["three"]}), folder / "rows.parquet")
    assert content(source_of(folder / "rows.parquet")) == [(["three"], colour(3))]


@pytest.mark.parametrize("layout", ["lines", "list", "indented list"])
def test_json_takes_lists_of_captions_and_one_row_a_caption(tmp_path, layout):
    names = write_images(tmp_path, 2)
    rows = [
        {"id": 7, "image": names[0], "caption": ["red cat"]},
        {"id": "x", "image": names[1], "caption": "blue dog"},
        {"image": names[0], "caption": [{"raw": "a cat"}]},
    ]
    path = tmp_path / "rows.json"
    text = "\n".join(map(json.dumps, rows)) if layout == "lines" else json.dumps(rows, indent=2 * (layout[0] == "i"))
    path.write_text(text)
    assert content(source_of(path)) == TWO


def test_a_long_json_list_is_read_across_buffers(tmp_path, monkeypatch):
    rows = [{"image": f"{i}.png", "caption": f"{i} " + "x" * (i % 700)} for i in range(8000)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))  # 3 MB: several reads of 1 MB
    source = source_of(tmp_path / "rows.json")
    assert len(source) == 8000
    assert all(source.captions(i) == [rows[i]["caption"].strip()] for i in range(8000))


def test_conversations_of_llava_and_sharegpt4v(tmp_path):
    names = write_images(tmp_path / "pictures", 2)

    def row(image, *answers):
        turns = [[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": a}] for a in answers]
        return {"id": "1", "image": image, "conversations": [turn for pair in turns for turn in pair]}

    rows = [row(names[0], "red cat", "Yes."), row(names[1], "blue dog"), row(names[0], "a cat")]
    text_only = {"id": 2, "conversations": row("", "No picture.")["conversations"]}  # LLaVA's instruction data has some
    (tmp_path / "chat.json").write_text(json.dumps([*rows, text_only]))
    source = source_of(tmp_path / "chat.json", image_root=tmp_path / "pictures")
    assert content(source) == TWO
    assert source.dropped_imageless == 1


def test_image_folder_with_text_files(tmp_path):
    names = write_images(tmp_path, 3)
    (tmp_path / "images" / "deep").mkdir()
    (tmp_path / names[2]).rename(tmp_path / "images" / "deep" / "0.png")
    (tmp_path / "images" / "0.txt").write_text("red cat\n\n a cat \n")
    (tmp_path / "images" / "deep" / "0.txt").write_text("blue dog")
    source = source_of(tmp_path)  # images/1.png has no text
    assert content(source) == [TWO[0], (["blue dog"], colour(2))]
    assert source.name(1) == "images/deep/0.png"
    assert source.dropped_empty == 1


def test_parquet_of_img2dataset(tmp_path):
    schema = pa.schema([("key", pa.string()), ("jpg", pa.binary()), ("caption", pa.string()), ("status", pa.string())])
    for shard in range(2):
        keys = [f"{shard}{i}" for i in range(5)]
        images = [png(5 * shard + i) for i in range(4)] + [None]
        states = ["success"] * 4 + ["failed_to_download"]
        table = pa.table([keys, images, [f"caption {k}" for k in keys[:4]] + [None], states], schema=schema)
        pq.write_table(table, tmp_path / f"0000{shard}.parquet", row_group_size=2)
    source = source_of(tmp_path)
    assert content(source) == [([f"caption {s}{i}"], colour(5 * s + i)) for s in range(2) for i in range(4)]
    assert source.name(5) == "11"
    assert source.image(6).getpixel((0, 0)) == colour(7)  # backwards and across files
    assert source.image(1).getpixel((0, 0)) == colour(1)
    assert pickle.loads(pickle.dumps(source))._store._last is None  # a spawned worker gets no row group along
    assert source.dropped_imageless == 2


def test_parquet_of_bytes_and_path_structs_and_of_paths(tmp_path):
    cells = [{"bytes": png(0), "path": "x.png"}, {"bytes": png(1), "path": None}]
    pq.write_table(pa.table({"image": cells, "text": ["a", "b"]}), tmp_path / "inside.parquet")
    assert content(source_of(tmp_path / "inside.parquet")) == [(["a"], colour(0)), (["b"], colour(1))]
    names = write_images(tmp_path, 2)
    rows = {"image_path": [names[0], names[1], names[0]], "captions": [["red cat"], ["blue dog"], ["a cat"]]}
    pq.write_table(pa.table(rows), tmp_path / "paths.parquet")
    assert content(source_of(tmp_path / "paths.parquet")) == TWO


def test_parquet_with_large_row_groups_goes_through_the_arrow_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(formats, "LARGE_ROW_GROUP_BYTES", 10)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pq.write_table(pa.table({"jpg": [png(0), png(1)], "caption": ["a", "b"]}), tmp_path / "rows.parquet")
    assert content(source_of(tmp_path / "rows.parquet")) == [(["a"], colour(0)), (["b"], colour(1))]
    assert "row groups" in caplog.text


def shard(path: Path, keys: range) -> Path:
    members = []
    for i in keys:
        members += [
            (f"{i:05}.png", png(i)),
            (f"{i:05}.txt", f"caption {i}\nwith two lines".encode()),
            (f"{i:05}.json", json.dumps({"caption": f"json {i}", "recap": f"recap {i}"}).encode()),
        ]
    return write_tar(path, members)


def test_webdataset_shards_by_folder_and_by_braces(tmp_path):
    for s in range(3):
        shard(tmp_path / f"shard-{s:03}.tar", range(4 * s, 4 * s + 4))
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / "00000.parquet")  # img2dataset's log
    folder = source_of(tmp_path)
    assert content(folder) == [([f"caption {i}\nwith two lines"], colour(i)) for i in range(12)]
    assert folder.name(5) == "shard-001.tar/00005"
    braces = source_of(tmp_path / "shard-{000..001}.tar", caption_columns=("recap", "caption"))
    assert [braces.captions(i) for i in range(8)] == [[f"recap {i}", f"json {i}"] for i in range(8)]
    words = source_of(tmp_path / "shard-{000,002}.tar")
    assert words.image(7).getpixel((0, 0)) == colour(11)


def test_tar_members_are_read_in_place(tmp_path, monkeypatch):
    source = source_of(shard(tmp_path / "a.tar", range(6)))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(tarfile, "open", lambda *a, **k: pytest.fail("the index was made once, at opening"))
    copy = pickle.loads(pickle.dumps(source))  # as a spawned worker gets it
    for i in (5, 0, 3, 3):
        assert copy.image(i).getpixel((0, 0)) == colour(i)
    assert sorted(tmp_path.iterdir()) == before


def test_tar_captions_from_json_and_bad_members(tmp_path, caplog):
    members = [
        ("a/1.png", png(1)),
        ("a/1.json", b'{"caption": "one"}'),
        ("a/2.png", png(2)),
        ("a/2.json", b"{broken"),
        ("a/3.txt", b"no image"),
        ("a/4.seg.png", png(4)),
        ("a/4.txt", b"a mask, not the image"),
    ]
    source = source_of(write_tar(tmp_path / "a.tar", members))
    assert content(source) == [(["one"], colour(1))]
    assert (source.dropped_empty, source.dropped_imageless) == (1, 2)


def test_folder_of_jsonl_keeps_to_the_split(tmp_path):
    names = write_images(tmp_path, 3)
    for i, file in enumerate(["train-0.jsonl", "train-1.jsonl", "dev.jsonl"]):
        jsonl(tmp_path / file, [{"image": names[i], "caption": f"row {i}"}])
    assert [source_of(tmp_path).captions(i) for i in range(2)] == [["row 0"], ["row 1"]]
    assert content(source_of(tmp_path, split="dev")) == [(["row 2"], colour(2))]
    with pytest.raises(DataError, match=r"no files of split 'test'; it has: dev, train\. Set data\.split"):
        source_of(tmp_path, split="test")


def hub_dataset():
    rows = {"image": [{"bytes": png(0), "path": None}, {"bytes": png(1), "path": None}], "sentence": ["a", "b"]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_saved_datasets_folders(tmp_path):
    expected = [(["a"], colour(0)), (["b"], colour(1))]
    hub_dataset().save_to_disk(str(tmp_path / "one"))
    assert content(source_of(tmp_path / "one")) == expected
    datasets.DatasetDict(train=hub_dataset(), test=hub_dataset().select([1])).save_to_disk(str(tmp_path / "two"))
    assert content(source_of(tmp_path / "two")) == expected
    assert content(source_of(tmp_path / "two", split="test")) == expected[1:]
    with pytest.raises(DataError, match="no split 'dev'; it has: train, test"):
        source_of(tmp_path / "two", split="dev")


def test_a_column_of_mixed_types_in_a_hub_dataset(tmp_path):
    """`datasets` 5 keeps such a column as JSON text; older versions refuse it."""
    path = jsonl(tmp_path / "mixed.jsonl", [{"image": "a", "captions": ["x"]}, {"image": "b", "captions": "y"}])
    try:
        mixed = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    except datasets.exceptions.DatasetGenerationError:
        pytest.skip("this version of `datasets` refuses mixed types")
    mixed.save_to_disk(str(tmp_path / "saved"))
    source = source_of(tmp_path / "saved")
    assert [source.captions(i) for i in range(2)] == [["x"], ["y"]]


def test_hub_names(monkeypatch):
    asked = []
    answer = {"image": ["x.png"], "caption_0": ["a"], "caption_1": ["b"]}

    def load_dataset(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_dict(answer)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = source_of("someone/pictures:large", split="val", image_root=Path("/pictures"))
    assert asked == [("someone/pictures", "large", "val")]
    assert source.captions(0) == ["a", "b"]
    with pytest.raises(BadImage, match=r"missing: no file /pictures/x\.png"):
        source.image(0)


def test_openmoji_is_read_like_any_jsonl(tmp_path, monkeypatch):
    names = write_images(tmp_path, 2)
    jsonl(tmp_path / "test.jsonl", [{"image": names[1], "captions": ["a clock"], "text": "other", "key": "1F550"}])
    monkeypatch.setattr(formats, "build_openmoji", lambda: tmp_path)
    assert content(source_of("openmoji", split="test")) == [(["a clock"], colour(1))]


# --- rows -----------------------------------------------------------------------------------------------------------


def test_blank_captions_are_dropped_and_counted(tmp_path, caplog):
    names = write_images(tmp_path, 4)
    rows = [
        {"image": names[0], "captions": ["", "  ", "kept "]},
        {"image": names[1], "captions": ["", " \n", "\u00a0\u3000\x1f"]},
        {"image": names[2], "captions": []},
        {"image": names[3], "captions": None},
        {"image": None, "captions": ["no image"]},
    ]
    with caplog.at_level(logging.WARNING):
        source = source_of(jsonl(tmp_path / "rows.jsonl", rows))
    assert [source.captions(i) for i in range(len(source))] == [["kept"]]
    assert source.dropped_empty == 3
    assert "left out 3 images without a caption and 1 rows without an image" in caplog.text


def test_limit_keeps_the_first_images_whole(tmp_path):
    rows = [{"image": f"{i % 5}.png", "caption": f"{i}"} for i in range(15)]
    source = source_of(jsonl(tmp_path / "rows.jsonl", rows), limit=2)
    assert [source.captions(i) for i in range(len(source))] == [["0", "5", "10"], ["1", "6", "11"]]


def test_fingerprint_changes_with_the_data_and_not_with_its_place(tmp_path):
    rows = [{"image": f"{i}.png", "caption": "same"} for i in range(5)]
    for folder in "abc":
        (tmp_path / folder).mkdir()
    one = source_of(jsonl(tmp_path / "a" / "rows.jsonl", rows)).fingerprint
    assert one == source_of(jsonl(tmp_path / "b" / "rows.jsonl", rows)).fingerprint
    assert one != source_of(jsonl(tmp_path / "c" / "rows.jsonl", rows[:4])).fingerprint
    assert one != source_of(tmp_path / "a" / "rows.jsonl", limit=4).fingerprint
    rows[4]["caption"] = "Same"  # as many bytes
    assert one != source_of(jsonl(tmp_path / "c" / "rows.jsonl", rows)).fingerprint
    rows[2]["caption"] = ["a", "b"]
    two = source_of(jsonl(tmp_path / "c" / "rows.jsonl", rows)).fingerprint
    rows[2]["caption"] = ["a    b"]  # as many bytes, one caption less
    assert two != source_of(jsonl(tmp_path / "c" / "rows.jsonl", rows)).fingerprint


def test_explicit_columns_win(tmp_path):
    names = write_images(tmp_path, 2)
    row = {"image": "wrong.png", "caption": "wrong", "Photo": names[1], "short": "a", "long": ["b", "c"]}
    path = jsonl(tmp_path / "rows.jsonl", [row])
    source = source_of(path, image_column="Photo", caption_columns=("short", "long"))
    assert content(source) == [(["a", "b", "c"], colour(1))]


# --- DataError ------------------------------------------------------------------------------------------------------


def test_missing_columns_are_answered_with_those_there_are(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("photo,words\na.png,x\n")
    with pytest.raises(DataError, match=r"no column that looks like an image; its columns are: photo, words\. Name"):
        source_of(path)
    with pytest.raises(DataError, match="no column that looks like a caption; its columns are: photo, words"):
        source_of(path, image_column="photo")
    with pytest.raises(DataError, match="no column 'picture', 'alt'; its columns are: photo, words"):
        source_of(path, image_column="picture", caption_columns=("alt", "words"))
    assert len(source_of(path, image_column="photo", caption_columns=("words",))) == 1


UNUSABLE = {
    "empty.csv": (b"", "is empty. Its first line must name the columns"),
    "header.csv": (b"image,caption\n", "has no rows. Check data.source"),
    "latin.csv": ("image,caption\na.png,caf\xe9\n".encode("latin-1"), "cannot be read as csv in UTF-8.*save it again"),
    "ragged.csv": (b"image,caption\na,b\na,b,c,d\n", "cannot be read as csv in UTF-8.*Repair it"),
    "blank.jsonl": (b'{"image": "a.png", "caption": " "}\n', "has no image with a caption .1 images without"),
    "empty.json": (b"[]", "has no rows"),
    "nothing.jsonl": (b"", "has no rows"),
    "cut.json": (b'[{"image": "a.png", "caption": "x"}, {"image": "b', "neither a JSON list of rows nor JSON lines"),
    "object.json": (b'{\n "images": [],\n "annotations": []}', "neither a JSON list of rows nor JSON lines.*one row a"),
    "latin.jsonl": ('{"image": "a", "caption": "caf\xe9"}'.encode("latin-1"), "JSON lines in UTF-8.*one row a"),
    "strings.json": (b'["a.png"]', "holds str where a row such as"),
    "urls.jsonl": (b'{"image": "https://x.org/a.png", "caption": "x"}', "names images by URL.*img2dataset"),
    "damaged.parquet": (b"PAR1 no", "damaged parquet file.*Download it again"),
    "packed.tar": (gzip.compress(b"x" * 2000), "not a complete, uncompressed tar file.*unpack"),
    "notes.docx": (b"", "is of no known format. data.source may be a .csv, .tsv"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_say_why_and_what_next(tmp_path, name):
    (tmp_path / name).write_bytes(UNUSABLE[name][0])
    with pytest.raises(DataError, match=f"(?s){name}.*{UNUSABLE[name][1]}"):
        source_of(tmp_path / name)


@pytest.mark.parametrize("where", ["in data", "in a header", "damaged"])
def test_a_shard_cut_short_is_refused(tmp_path, where):
    whole = shard(tmp_path / "whole.tar", range(6)).read_bytes()
    damaged = bytearray(whole)
    damaged[5120:5200] = b"x" * 80  # a header; tarfile alone would take it for the end, as it does a half one
    path = tmp_path / "a.tar"
    path.write_bytes({"in data": whole[:4700], "in a header": whole[:5200], "damaged": bytes(damaged)}[where])
    with pytest.raises(DataError, match=r"a\.tar is not a complete, uncompressed tar file .*Download it again"):
        source_of(path)


def test_sources_that_do_not_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"nowhere\.csv: 1 of 1 files do not exist, .*Check data\.source"):
        source_of(tmp_path / "nowhere.csv")
    shard(tmp_path / "s-0.tar", range(1))
    with pytest.raises(DataError, match=r"2 of 3 files do not exist, among them \S+s-1\.tar, \S+s-2\.tar"):
        source_of(tmp_path / "s-{0..2}.tar")
    with pytest.raises(DataError, match=r"(?s)neither a file or folder of that name nor a hub data set.*the network"):
        source_of("nobody/no-such-data-set")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no data that can be read: no tar, .*Check data\.source"):
        source_of(tmp_path / "empty")


# --- decoding -------------------------------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds none."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "limit"), [(30_000, 89_478_485), (10_000, 89_478_485), (30, 899), (30_000, 10**8)])
def test_too_many_pixels_are_refused_by_the_header(monkeypatch, side, limit):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back afterwards
    with pytest.raises(BadImage, match=f"too large: .*max_pixels={limit}"):
        decode_image(io.BytesIO(png_header(side, side)), limit)


def test_max_pixels_may_exceed_pillows_own_limit(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode_image(io.BytesIO(png()), 10_000).size == (24, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_corrupt_and_truncated_images(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))
    whole = encoded(noise, kind)
    assert decode_image(io.BytesIO(whole), LIMIT).mode == "RGB"
    for damaged in (b"", b"not an image", whole[:30], whole[: len(whole) // 2]):
        with pytest.raises(BadImage, match="corrupt: "):
            decode_image(io.BytesIO(damaged), LIMIT)


def test_no_damage_raises_anything_but_bad_image():
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP"):
        whole = np.frombuffer(encoded(picture(3), kind), np.uint8)
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 4)] = rng.integers(0, 256, 4)
            try:
                decode_image(io.BytesIO(damaged.tobytes()), LIMIT)
            except BadImage:
                pass


def test_every_mode_becomes_rgb():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    deep = Image.fromarray(np.full((4, 4), 0x8080, np.uint16))
    cases = {
        "transparent": (encoded(clear), (255, 255, 255)),
        "half": (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128))), (127, 127, 127)),
        "grey and alpha": (encoded(Image.new("LA", (4, 4), (9, 0))), (255, 255, 255)),
        "palette": (encoded(palette), (10, 200, 30)),
        "transparent palette": (encoded(palette, transparency=1), (255, 255, 255)),
        "grey": (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        "bits": (encoded(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        "16 bit": (encoded(deep), (128, 128, 128)),
        "16 bit tiff": (encoded(Image.fromarray(np.full((4, 4), 0xFFFF, np.uint16)), "TIFF"), (255, 255, 255)),
        "cmyk": (encoded(Image.new("CMYK", (4, 4), (255, 0, 255, 0)), "TIFF"), (0, 255, 0)),
    }
    for name, (file, expected) in cases.items():
        image = decode_image(io.BytesIO(file), LIMIT)
        assert (image.mode, image.getpixel((1, 1))) == ("RGB", expected), name


def test_first_frame_of_an_animation():
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    file = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert decode_image(io.BytesIO(file), LIMIT).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    from PIL import ImageOps

    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(image, exif=exif)
    upright = decode_image(io.BytesIO(file), LIMIT)
    assert np.array_equal(upright, ImageOps.exif_transpose(Image.open(io.BytesIO(file))))


def test_damaged_exif_does_not_lose_the_picture():
    file = encoded(picture(2), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF header")
    assert decode_image(io.BytesIO(file), LIMIT).size == (24, 16)


def test_bad_images_name_their_cause(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "big.png").write_bytes(png_header(30_000, 30_000))
    rows = [{"image": name, "caption": "x"} for name in ("gone.png", "text.png", "big.png", "images", "nul\0.png")]
    source = source_of(jsonl(tmp_path / "rows.jsonl", rows))
    causes = ["missing: no file .*gone.png", "corrupt: ", "too large: ", "unreadable: ", "unreadable: "]
    for i, cause in enumerate(causes):
        with pytest.raises(BadImage, match=cause):
            source.image(i)
    table = pa.table({"jpg": pa.array([None, png()], pa.binary()), "caption": ["a", "b"]})
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(BadImage, match="missing: no image bytes"):
        source_of(tmp_path / "p.parquet").image(0)
    path = shard(tmp_path / "a.tar", range(3))
    source = source_of(path)
    path.write_bytes(path.read_bytes()[:600])  # cut after it was indexed
    with pytest.raises(BadImage, match="ends in the middle"):
        source.image(2)


# --- pixels, tokens, batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(37, 24), (24, 37), (24, 27), (27, 24), (24, 24), (100, 31), (9, 200), (8, 8)])
def test_transform_equals_torchvisions_clip_preprocessing(size):
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))
    bicubic = transforms.InterpolationMode.BICUBIC
    clip = transforms.Compose([transforms.Resize(24, bicubic), transforms.CenterCrop(24), transforms.PILToTensor()])
    pixels = ImageTransform(24)(image)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, clip(image))


def test_a_strip_is_not_blown_up(monkeypatch):
    seen = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: seen.append(size) or resize(self, size, *a))
    assert ImageTransform(32)(Image.new("RGB", (1, 50_000), "red")).shape == (3, 32, 32)
    assert max(seen[0]) <= 32 * MAX_ASPECT


def test_normalise_is_by_channel():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    out = normalise(pixels, mean=(0.5, 0.1, 0.0), std=(0.5, 0.1, 2.0))
    assert torch.allclose(out.flatten(), torch.tensor([-1.0, 1.0, 0.5]))


def test_caption_choice_is_a_fixed_function_of_seed_row_and_epoch():
    words = ["a", "bbb", "cc"]
    picks = [choose_caption(words, "random", 1, row, epoch) for epoch in range(3) for row in range(100)]
    assert picks == [choose_caption(words, "random", 1, row, epoch) for epoch in range(3) for row in range(100)]
    assert "".join(picks[:8]) == PINNED_PICKS  # a resumed run on another machine sees the same captions
    assert min(picks.count(word) for word in words) > 70
    assert picks[:100] != picks[100:200]
    assert picks[:100] != [choose_caption(words, "random", 2, row, 0) for row in range(100)]
    assert choose_caption(words, "first", 1, 5, 5) == "a"
    assert choose_caption(words, "longest", 1, 5, 5) == "bbb"


PINNED_PICKS = "aaaaabbbacc"


def test_rows_do_not_depend_on_workers_or_order(tmp_path, tokenizer):
    source = small_source(tmp_path)
    dataset = EncoderDataset(source, tokenizer, ImageTransform(8), 77, "random", seed=3)
    keys = [(row, epoch) for epoch in range(2) for row in range(len(source))]

    def rows(workers: int, order: list) -> dict:
        batches = [order[i : i + 5] for i in range(0, len(order), 5)]
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
        answers = [(row["tokens"], row["pixels"]) for batch in loader for row in batch]
        return dict(zip(order, answers, strict=True))

    alone, parallel = rows(0, keys), rows(2, keys[::-1])
    for key in keys:
        assert alone[key][0] == parallel[key][0]
        assert torch.equal(alone[key][1], parallel[key][1])
    assert dataset[4]["tokens"] == dataset[(4, 0)]["tokens"]


def test_long_captions_are_cut_with_eot_kept_last(tmp_path, tokenizer):
    names = write_images(tmp_path, 2)
    rows = [{"image": names[0], "captions": ["cat " * 50]}, {"image": names[1], "captions": ["one two three four"]}]
    source = source_of(jsonl(tmp_path / "rows.jsonl", rows))
    dataset = EncoderDataset(source, tokenizer, ImageTransform(8), 6, "first", seed=0)
    cat = tokenizer("cat")["input_ids"][1]
    long, fits = dataset[0], dataset[1]
    assert long["tokens"] == [tokenizer.bos_token_id, cat, cat, cat, cat, tokenizer.eos_token_id] and long["truncated"]
    assert len(fits["tokens"]) == 6 and fits["tokens"] == tokenizer("one two three four")["input_ids"]
    assert not fits["truncated"]
    assert collate([long, fits]).truncated == 1


def test_batches_are_padded_with_eot_to_their_longest_caption(tmp_path, tokenizer):
    names = write_images(tmp_path, 2)
    rows = [{"image": names[0], "captions": ["cat"]}, {"image": names[1], "captions": ["a small cat"]}]
    source = source_of(jsonl(tmp_path / "rows.jsonl", rows))
    dataset = EncoderDataset(source, tokenizer, ImageTransform(8), 77, "first", seed=0)
    batch = collate([dataset[1], dataset[0]])
    assert batch.pixel_values.shape == (2, 3, 8, 8) and batch.pixel_values.dtype == torch.uint8
    assert batch.rows.tolist() == [1, 0] and batch.rows.dtype == batch.input_ids.dtype == torch.int64
    assert batch.input_ids[0].tolist() == tokenizer("a small cat")["input_ids"]
    assert batch.input_ids[1].tolist() == tokenizer("cat")["input_ids"] + [tokenizer.eos_token_id] * 2
    assert (batch.bad, batch.truncated) == ([], 0)


def test_a_bad_image_leaves_the_batch_and_is_reported(tmp_path, tokenizer):
    source = small_source(tmp_path, 3)
    (tmp_path / source.name(1)).write_bytes(b"went bad later")
    dataset = EncoderDataset(source, tokenizer, ImageTransform(8), 77, "first", seed=0)
    (batch,) = DataLoader(dataset, batch_size=3, num_workers=1, collate_fn=collate)
    assert batch.rows.tolist() == [0, 2] and len(batch.pixel_values) == len(batch.input_ids) == 2
    ((row, error),) = batch.bad
    assert row == 1 and error.startswith("corrupt: ")
    empty = collate([dataset[1]])
    assert len(empty.rows) == len(empty.input_ids) == len(empty.pixel_values) == 0 and len(empty.bad) == 1


# --- checking and caching -------------------------------------------------------------------------------------------


def spoiled_source(folder: Path, count: int, bad: list[int]):
    source = small_source(folder, count, captions=1)
    for i in bad:
        (folder / source.name(i)).unlink()
    return source


def test_check_lists_bad_images_and_remembers(tmp_path, monkeypatch, caplog):
    source = spoiled_source(tmp_path, 100, [40])
    skipped = tmp_path / "run" / "skipped.jsonl"
    bar = Bar("checking", 100)
    good = check_images(source, workers=2, max_bad_fraction=0.01, skipped_path=skipped, bar=bar)
    assert np.flatnonzero(~good).tolist() == [40] and good.dtype == bool and len(good) == 100
    (row,) = map(json.loads, skipped.read_text().splitlines())
    assert row["row"] == 40 and row["image"] == "images/40.png" and row["error"].startswith("missing: ")
    assert bar.done == 100
    assert "1 of 100 images (1.0%) are bad" in caplog.text
    assert sorted(p.name for p in skipped.parent.iterdir()) == ["skipped.jsonl", "skipped.npz"]  # no temporary files

    monkeypatch.setattr(PairSource, "image", lambda self, i: pytest.fail("decoded again"))
    again = check_images(source, workers=0, max_bad_fraction=0.01, skipped_path=skipped)
    assert np.array_equal(again, good)
    with pytest.raises(DataError, match=r"1 of 100 images \(1\.0%\)"):  # a stored result does not lift the rule
        check_images(source, workers=0, max_bad_fraction=0.0, skipped_path=skipped)


def test_more_than_the_allowed_share_of_bad_images_stops(tmp_path):
    source = spoiled_source(tmp_path, 100, [3, 5, 8, 13])
    skipped = tmp_path / "skipped.jsonl"
    with pytest.raises(DataError) as caught:
        check_images(source, workers=0, max_bad_fraction=0.01, skipped_path=skipped)
    message = str(caught.value)
    for part in (
        "4 of 100 images (4.0%)",
        "images/3.png, images/5.png, images/8.png",
        str(skipped),
        "data.max_bad_fraction (now 0.01)",
        "data.image_root",
        "missing: no file",
    ):
        assert part in message
    assert "images/13.png" not in message
    assert len(skipped.read_text().splitlines()) == 4


def test_a_check_of_other_data_or_another_limit_is_made_again(tmp_path):
    skipped = tmp_path / "skipped.jsonl"
    check = dict(workers=0, max_bad_fraction=1.0, skipped_path=skipped)
    source = small_source(tmp_path / "a", 3)
    assert check_images(source, **check).all()
    assert not check_images(source_of(tmp_path / "a" / "rows.jsonl", max_pixels=10), **check).any()
    assert check_images(spoiled_source(tmp_path / "b", 5, [4]), **check).tolist() == [True] * 4 + [False]
    skipped.with_suffix(".npz").write_bytes(b"damaged")
    assert check_images(source, **check).all()


def test_check_leaves_torchs_random_numbers_alone(tmp_path):
    source = small_source(tmp_path, 2)
    state = torch.get_rng_state()
    check_images(source, workers=0, max_bad_fraction=0.0, skipped_path=tmp_path / "skipped.jsonl")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_pixels_equal_decoded_ones_bit_for_bit(tmp_path, tokenizer, workers, monkeypatch):
    names = write_images(tmp_path, 7)
    rng = np.random.default_rng(0)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (31, 45, 3), np.uint8)).save(tmp_path / name)
    source = source_of(jsonl(tmp_path / "rows.jsonl", [{"image": n, "caption": n} for n in names]))
    (tmp_path / names[3]).write_bytes(b"bad")
    transform, cache = ImageTransform(16), tmp_path / "cache" / "images.npy"
    decoded = []
    image = PairSource.image
    monkeypatch.setattr(PairSource, "image", lambda self, i: decoded.append(i) or image(self, i))
    check = dict(
        workers=workers, max_bad_fraction=0.5, skipped_path=tmp_path / "skipped.jsonl", transform=transform, cache=cache
    )
    good = check_images(source, **check)
    assert np.flatnonzero(~good).tolist() == [3]
    assert workers or decoded == list(range(7))  # checked and cached in one pass (workers count in their own memory)
    plain = EncoderDataset(source, tokenizer, transform, 77, "first", seed=0)
    cached = EncoderDataset(source, tokenizer, transform, 77, "first", seed=0, cache=cache)
    for i in np.flatnonzero(good):
        assert torch.equal(cached[i]["pixels"], plain[i]["pixels"])
    assert cached[3]["pixels"] is None and "not in the image cache" in cached[3]["error"]
    decoded.clear()
    copy = pickle.loads(pickle.dumps(cached))  # as a spawned worker gets it
    assert torch.equal(copy[0]["pixels"], cached[0]["pixels"])
    assert len(pickle.dumps(copy.image)) < len(pickle.dumps(source)) + 2000  # without the pixels of its map
    assert np.array_equal(check_images(source, **check), good) and decoded == []  # both results are read back


def test_a_cache_is_built_though_the_check_was_made_without_one(tmp_path):
    source, cache = small_source(tmp_path, 3), tmp_path / "images.npy"
    check = dict(workers=0, max_bad_fraction=0.0, skipped_path=tmp_path / "skipped.jsonl")
    check_images(source, **check)
    for size in (8, 16):  # of another size, it is built anew
        check_images(source, **check, transform=ImageTransform(size), cache=cache)
        assert np.load(cache, mmap_mode="r").shape == (3, 3, size, size)


def test_a_cache_that_does_not_fit_the_data_is_refused(tmp_path, tokenizer):
    source, cache = small_source(tmp_path / "a", 4), tmp_path / "images.npy"
    arguments = (tokenizer, ImageTransform(8), 77, "first", 0)
    with pytest.raises(DataError, match=r"not a complete image cache of this data at 8 pixels\. Delete it"):
        EncoderDataset(source, *arguments, cache=cache)
    build_image_cache(source, ImageTransform(8), cache, workers=0)
    EncoderDataset(source, *arguments, cache=cache)
    with pytest.raises(DataError, match="not a complete image cache"):
        EncoderDataset(small_source(tmp_path / "b", 5), *arguments, cache=cache)
    with pytest.raises(DataError, match="at 16 pixels"):
        EncoderDataset(source, tokenizer, ImageTransform(16), 77, "first", 0, cache=cache)


def test_an_interrupted_cache_leaves_nothing_behind(tmp_path, monkeypatch):
    source, cache = small_source(tmp_path / "a", 4), tmp_path / "cache" / "images.npy"

    class Interrupted(Bar):
        def advance(self, *_) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_image_cache(source, ImageTransform(8), cache, workers=0, bar=Interrupted("caching", 4))
    assert list(cache.parent.iterdir()) == []


def test_a_cache_needs_room_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(DataError, match=r"needs 0\.0 GB, but 0\.0 GB are free.*without data\.cache_images"):
        build_image_cache(small_source(tmp_path, 4), ImageTransform(8), tmp_path / "c.npy", workers=0)


# --- real files -----------------------------------------------------------------------------------------------------


@needs_real_data
def test_real_flickr8k_and_llava_files(tmp_path):
    flickr = source_of(REAL / "flickr8k" / "train.csv")
    assert len(flickr) == 2500 and all(len(flickr.captions(i)) == 5 for i in range(0, 2500, 250))
    assert flickr.image(2499).mode == "RGB"
    assert len(source_of(REAL / "flickr8k", split="dev")) == 500
    folder = REAL / "llava_pretrain"
    llava = source_of(folder / "blip_laion_cc_sbu_2k.json", image_root=folder / "images", limit=200)
    assert llava.captions(0) == ["the bunk room"]
    assert check_images(llava, workers=0, max_bad_fraction=0.0, skipped_path=tmp_path / "skipped.jsonl").all()
