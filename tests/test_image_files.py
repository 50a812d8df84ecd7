"""Which files in a folder are pictures, and that none is passed over without a word."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from data_files import colour, content, encoded, picture, png, source_of, write_tar
from PIL import Image, PngImagePlugin, features

pytest.importorskip("pyarrow", reason="needs the `train` extra")

from train_encoder.data.decode import BadImage, decode_image
from train_encoder.data.image_files import image_files, image_suffixes, is_image_name, readable_formats

SUFFIXES = {
    ".jpg": "JPEG",
    ".JPG": "JPEG",
    ".jfif": "JPEG",
    ".jpe": "JPEG",
    ".PNG": "PNG",
    ".webp": "WEBP",
    ".jp2": "JPEG2000",
    ".tga": "TGA",
    ".ppm": "PPM",
    ".avif": "AVIF",
}
LINKS = hasattr(os, "symlink")


@pytest.fixture(params=[suffix for suffix in SUFFIXES if suffix != ".avif" or features.check("avif")])
def suffix(request) -> str:
    return request.param


def near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return all(abs(a - b) < 12 for a, b in zip(one, other, strict=True))


def test_every_suffix_that_pillow_decodes_is_read_in_folders_and_tars(tmp_path, suffix):
    data = encoded(picture(3), SUFFIXES[suffix])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"x{suffix}").write_bytes(data)
    (tmp_path / "folder" / "x.TXT").write_text("the third")
    write_tar(tmp_path / "a.tar", [(f"x{suffix}", data), ("x.txt", b"the third")])
    for source in (source_of(tmp_path / "folder"), source_of(tmp_path / "a.tar")):
        ((captions, pixel),) = content(source)
        assert captions == ["the third"] and near(pixel, colour(3))


def test_what_pillow_would_start_a_program_for_is_no_picture(tmp_path, monkeypatch):
    """EPS is read by Ghostscript, whatever the file is called."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(BadImage, match="corrupt: no picture of a format that is read here"):
        decode_image(io.BytesIO(eps), 10**6)
    assert not started.exists() and ".eps" not in image_suffixes() and "EPS" not in readable_formats()


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", ".b.png", "._a.png", ".hidden/c.png", "open/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    assert [path.relative_to(tmp_path).as_posix() for path in image_files(tmp_path)] == ["a.png", "open/d.png"]
    assert is_image_name("a.b.JPEG") and not is_image_name("a.txt") and not is_image_name("png")


@pytest.mark.skipif(not LINKS, reason="this system has no links")
def test_linked_folders_are_followed_once_and_circles_end(tmp_path):
    for i, place in enumerate(("data/here", "elsewhere/more")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / f"{i}.png").write_bytes(png(i))
        (tmp_path / place / f"{i}.txt").write_text(f"number {i}")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "elsewhere" / "more" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "nowhere")
    assert sorted(content(source_of(tmp_path / "data"))) == [(["number 0"], colour(0)), (["number 1"], colour(1))]


def test_the_folder_of_the_results_is_left_out(tmp_path):
    for name in ("a.png", "results/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(0))
    assert [path.name for path in image_files(tmp_path, tmp_path / "results")] == ["a.png"]
    assert [path.name for path in image_files(tmp_path, tmp_path)] == ["a.png", "b.png"]  # what was asked for


def test_a_name_that_is_no_utf8_is_read_and_shown_as_text(tmp_path):
    try:
        for i, name in enumerate((b"caf\xe9", b"plain", b"caf\xe8")):
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name + b".png"))).write_bytes(png(i))
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name + b".txt"))).write_text(f"number {i}")
    except OSError:
        pytest.skip("this file system takes no such names")
    source = source_of(tmp_path)
    assert sorted(content(source)) == [([f"number {i}"], colour(i)) for i in range(3)]
    assert sorted(source.name(i) for i in range(3)) == ["caf\\udce8.png", "caf\\udce9.png", "plain.png"]
    write_tar(tmp_path / "a.tar", [("caf\udce9.png", png(5)), ("caf\udce9.txt", b"in a shard")])
    assert content(source_of(tmp_path / "a.tar")) == [(["in a shard"], colour(5))]


def test_captions_without_a_picture_are_counted(tmp_path, caplog):
    for name in ("a.png", "a.txt", "b.heic", "b.txt"):
        (tmp_path / name).write_bytes(png(0) if name.endswith("png") else b"text")
    assert len(source_of(tmp_path)) == 1
    assert (
        "1 .txt files have no picture beside them that can be read, such as" in caplog.text and "b.txt" in caplog.text
    )


def test_only_line_feeds_end_a_caption(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("\ufeffone\u2028still one\x0cand\x85on\r\ntwo\n\n", encoding="utf-8", newline="")
    assert source_of(tmp_path).captions(0) == ["one\u2028still one\x0cand\x85on", "two"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_does_not_stop_the_reader_for_ever(tmp_path):
    for name in ("a.png", "a.txt", "b.png", "b.txt"):
        (tmp_path / name).write_bytes(png(1) if name.endswith("png") else b"text")
    os.unlink(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "a.txt")
    source = source_of(tmp_path)
    assert source.dropped_empty == 1 and len(source) == 1
    os.unlink(tmp_path / "b.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(BadImage, match="is a pipe"):
        source.image(0)


# --- pictures that were called damaged, or became black -------------------------------------------------------------


def test_an_intact_png_with_much_text_or_a_large_colour_profile_is_read():
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "word " * 500_000, zip=True)
    for file in (encoded(picture(4), pnginfo=text), encoded(picture(4), icc_profile=b"profile " * 400_000)):
        assert decode_image(io.BytesIO(file), 10**6).getpixel((3, 3)) == colour(4)


def test_a_bomb_in_a_pngs_text_is_still_refused():
    text = PngImagePlugin.PngInfo()
    text.add_text("notes", "a" * 80_000_000, zip=True)
    with pytest.raises(BadImage, match="corrupt"):
        decode_image(io.BytesIO(encoded(picture(4), pnginfo=text)), 10**6)


@pytest.mark.parametrize(("white", "grey"), [(1.0, 0.5), (255.0, 127.5)])
def test_floats_from_0_to_1_do_not_become_black(white, grey):
    image = Image.new("F", (8, 8), grey)
    image.putpixel((0, 0), white)
    decoded = decode_image(io.BytesIO(encoded(image, "TIFF")), 10**6)
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((4, 4))[0] in (127, 128)
