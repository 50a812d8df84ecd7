"""demo/uploads.py: whatever a stranger uploads becomes an upright RGB picture or a message that a person can act on."""

from __future__ import annotations

import io
import os
import re
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.uploads import BadUpload, Limits, Uploads, check_question, read_picture

RED, BLUE, WHITE = (220, 30, 30), (40, 60, 220), (255, 255, 255)
LIMITS = Limits()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Left half red, right half blue."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str, **more) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds next to none of them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def upload(tmp_path):
    """Writes a file as an upload and reads it: `upload(data, limits)`."""

    def read(data: bytes, limits: Limits = LIMITS, name: str = "secret-folder-name.png"):
        (tmp_path / name).write_bytes(data)
        return read_picture(tmp_path / name, limits)

    return read


@pytest.fixture
def refused(upload, tmp_path):
    """-> the message of a refused upload, which must be fit for the person at the page."""

    def message(data: bytes, limits: Limits = LIMITS) -> str:
        with pytest.raises(BadUpload) as raised:
            upload(data, limits)
        text = str(raised.value)
        assert str(tmp_path) not in text and "secret-folder-name" not in text
        assert not re.search(r"Error|Traceback|0x[0-9a-f]{4}|BytesIO", text)
        assert re.search(r"upload|Upload|Cut out", text), "it says what to do next"
        return text

    return message


# ------------------------------------------------------------------------------------------------------------- let in


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_allowed_format_is_read(upload, kind):
    picture = upload(encoded(halves(), kind))
    assert (picture.image.mode, picture.image.size, picture.note) == ("RGB", (40, 30), "")
    assert np.abs(np.subtract(picture.image.getpixel((3, 15)), RED)).max() < 12
    assert np.abs(np.subtract(picture.image.getpixel((36, 15)), BLUE)).max() < 12


def test_the_name_says_nothing_about_the_content(upload):
    assert upload(encoded(halves(), "JPEG"), name="picture.txt").image.size == (40, 30)


@pytest.mark.parametrize(
    "kind, word", [("GIF", "animated"), ("WEBP", "animated"), ("PNG", "animated"), ("TIFF", "pages")]
)
def test_of_several_frames_the_first_is_read_and_that_is_said(upload, kind, word):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE, WHITE)]
    picture = upload(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert np.abs(np.subtract(picture.image.getpixel((10, 10)), RED)).max() < 12
    assert word in picture.note and "first" in picture.note


def test_a_phone_picture_with_a_preview_has_no_note(upload):
    data = encoded(halves(), "MPO", save_all=True, append_images=[halves(size=(20, 15))])
    assert upload(data).note == "" and upload(data).image.size == (40, 30)


def test_orientation_is_applied(upload):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = upload(encoded(halves(), "JPEG", exif=exif, quality=95)).image
    assert image.size == (30, 40)
    assert image.getpixel((15, 3))[0] > 180 and image.getpixel((15, 36))[2] > 180  # left is now at the top


def test_transparency_lies_on_white(upload):
    assert upload(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")).image.getpixel((4, 4)) == WHITE


def test_16_bits_are_scaled_and_cmyk_is_converted(upload):
    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    assert upload(encoded(grey, "PNG")).image.getpixel((4, 4)) == (128, 128, 128)
    cmyk = upload(encoded(halves("CMYK"), "JPEG", quality=95)).image.getpixel((3, 15))
    assert np.abs(np.subtract(cmyk, RED)).max() < 20


# ------------------------------------------------------------------------------------------------------------ refused


def test_an_empty_file(refused):
    assert "empty" in refused(b"")


def test_a_file_that_is_gone(tmp_path):
    with pytest.raises(BadUpload, match="not there any more"):
        read_picture(tmp_path / "gone.png")


def test_too_many_bytes(refused, upload):
    data = encoded(halves(), "BMP")
    assert "3,653 bytes" in refused(data, Limits(max_bytes=len(data) - 1))
    assert "20 MB" in refused(b"x" * (20 * 2**20 + 1))
    assert upload(data, Limits(max_bytes=len(data))).image.size == (40, 30)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"Just some text.\n" * 20, "holds text"),
        ("Über Käse".encode(), "holds text"),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0isom", "video"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3", "PDF"),
        (bytes(range(256)) * 4, "not a picture"),
        (encoded(halves(), "PPM"), "not a picture"),
        (encoded(halves(), "TGA"), "not a picture"),
        (encoded(halves("P"), "PCX"), "not a picture"),
        (encoded(halves(), "EPS"), "not"),
        (
            encoded(halves(), "ICNS") if Image.registered_extensions().get(".icns") in Image.SAVE else b"icns\0\0\0\0",
            "not",
        ),
    ],
    ids=["text", "umlauts", "svg", "heic", "video", "pdf", "noise", "ppm", "tga", "pcx", "eps", "icns"],
)
def test_what_is_not_on_the_list(refused, data, words):
    text = refused(data)
    assert words in text and "PNG, JPEG" in text


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
def test_a_picture_cut_short(refused, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    assert re.search("cut short|damaged", refused(data[: len(data) // 2]))
    assert re.search("cut short|damaged", refused(data[:20]))


@pytest.mark.parametrize("side", [30_000, 8_000])  # beyond Pillow's own limit, and beyond ours only
def test_too_many_pixels_are_refused_by_the_header(refused, monkeypatch, side):
    monkeypatch.setattr("demo.uploads.decode_image", lambda *_: pytest.fail("it was decoded"))
    text = refused(png_header(side, side))
    assert "too large" in text and "At most 50 million pixels" in text


def test_the_pixel_limit_is_a_setting(upload, refused):
    data = encoded(halves(size=(100, 100)), "PNG")
    assert "100 x 100" in refused(data, Limits(max_pixels=9_999))
    assert upload(data, Limits(max_pixels=10_000)).image.size == (100, 100)


def test_nothing_and_nearly_nothing_in_it(refused, upload):
    assert re.search("nothing in it|damaged", refused(png_header(0, 10)))
    assert "thin line" in refused(encoded(Image.new("RGB", (510, 10)), "PNG"))
    assert "thin line" in refused(encoded(Image.new("RGB", (1, 51)), "PNG"))
    assert upload(encoded(Image.new("RGB", (500, 10)), "PNG")).image.size == (500, 10)


# ----------------------------------------------------------------------------------------------------------- the folder


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "served", Limits(max_bytes=100_000))


def files_of(uploads: Uploads) -> set[Path]:
    return set(uploads.folder.rglob("*"))


def test_an_upload_is_kept_under_a_name_of_its_own_and_opened_again(uploads):
    first, second = (uploads.take(encoded(halves(), "PNG")) for _ in range(2))
    assert files_of(uploads) == {Path(first), Path(second)} and first != second
    assert re.fullmatch("[0-9a-f]{32}.png", Path(first).name)
    assert uploads.find(first) == (Path(first), "")
    assert np.array_equal(uploads.open(first), halves())


def test_what_is_to_be_told_of_an_upload_is_told_when_it_is_asked_for(uploads):
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, BLUE)]
    animated = uploads.take(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert "first frame" in uploads.find(animated)[1]
    for data, words in ((b"Just some text.", "holds text"), (b"", "empty"), (b"x" * 100_001, "too large")):
        path = uploads.take(data)
        with pytest.raises(BadUpload, match=words):
            uploads.open(path)
    assert files_of(uploads) == {Path(animated)}


def test_messages_of_long_ago_are_forgotten(uploads, monkeypatch):
    monkeypatch.setattr(Uploads, "REMEMBERED", 3)
    paths = [uploads.take(b"Just some text.") for _ in range(5)]
    for path, words in zip(paths, 2 * ["not there any more"] + 3 * ["holds text"], strict=True):
        with pytest.raises(BadUpload, match=words):
            uploads.find(path)


def test_uploads_of_the_day_before_are_deleted(uploads):
    old, new = (uploads.take(encoded(halves(), "PNG")) for _ in range(2))
    os.utime(old, (time.time() - 90_000,) * 2)
    uploads.take(b"Just some text.")
    assert Path(old).exists(), "nothing was kept"
    newer = uploads.take(encoded(halves(), "PNG"))
    assert files_of(uploads) == {Path(new), Path(newer)}


def test_nothing_but_what_the_page_shows_is_opened(uploads, tmp_path):
    own = Path(uploads.take(encoded(halves(), "PNG")))
    canary, text = tmp_path / "canary.png", uploads.served / "note.txt"
    halves().save(canary)
    text.write_bytes(own.read_bytes())
    link, linked, itself = (uploads.folder / name for name in ("link.png", "linked", "itself.png"))
    link.symlink_to(canary)
    linked.symlink_to(tmp_path)
    itself.symlink_to(itself)
    for value in (
        canary, str(canary), os.path.relpath(canary), str(text), link, str(linked / "canary.png"), itself,
        f"{own}/../../../canary.png", f"file://{canary}", "http://127.0.0.1/a.png", "data:image/png,a", "", ".", "/",
        uploads.folder, str(own.with_name("0" * 32 + ".png")), f"{own}\0", f"{canary}\0.png", "\ud800", "a" * 100_000,
        os.fsencode(canary), None, 7, True, [], [str(canary)], {}, {"path": str(canary)}, ("a", "b"),
    ):  # fmt: skip
        with pytest.raises(BadUpload, match="not there any more"):
            uploads.open(value)
    assert uploads.open(os.path.relpath(own)).size == (40, 30), "another way to write its path"


def test_a_full_disk_is_told(uploads):
    uploads.served.mkdir()
    uploads.folder.write_text("where the folder should be")
    with pytest.raises(BadUpload, match="full or read-only"):
        uploads.find(uploads.take(encoded(halves(), "PNG")))


# ---------------------------------------------------------------------------------------------------------- questions


def test_a_question_is_stripped():
    assert check_question("  What is\tthis?\r\nA dog?\n ") == "What is\tthis?\nA dog?"
    assert check_question("Ça, 什么 🐶?") == "Ça, 什么 🐶?"


@pytest.mark.parametrize("text", ["", None, " \n\t ", "\0\x07", "\u202e"])
def test_an_empty_question(text):
    with pytest.raises(BadUpload, match="empty"):
        check_question(text)


def test_a_statement_is_called_one():
    for text, words in (("\0", "The statement is empty"), ("x" * 2001, "The statement has 2,001 characters")):
        with pytest.raises(BadUpload, match=words):
            check_question(text, what="statement")


def test_a_long_question_is_told_its_length_and_the_limit():
    with pytest.raises(BadUpload, match="10,000 characters; at most 2,000"):
        check_question("x" * 10_000)
    with pytest.raises(BadUpload, match="1,000,000 characters"):
        check_question("x" * 1_000_000)
    assert check_question(" " + "x" * 2000 + " ") == "x" * 2000


@pytest.mark.parametrize(
    "text", ["<image>", "<image>\nWhat?", "a < image > b", "<<image>>", "<ima\0ge>", "<IMAGE>", "<im_start>"]
)
def test_no_image_token_is_left(text):
    kept = check_question(text)
    assert not re.search(r"<\s*(image|im_start)\s*>", kept, re.IGNORECASE)
    assert re.search("image|im_start", kept, re.IGNORECASE), "the word stays"


def test_control_characters_are_left_out():
    assert check_question("a\0b\x1b[31mc\ud800d\u202ee") == "ab[31mcde"
