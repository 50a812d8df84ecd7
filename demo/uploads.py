"""What the page does with a visitor's file and question before anything else sees them."""

from __future__ import annotations

import contextlib
import io
import re
import secrets
import threading
import time
import unicodedata
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from llava_clipmoe.files import SaveError, atomic_file
from train_encoder.data.decode import BadImage, decode_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of what is accepted. Its other decoders (some start programs, as EPS does) are never tried."""
GONE = "The uploaded file is not there any more. Please upload it again."
NEXT_STEP = "Please upload a PNG, JPEG, WebP, GIF, BMP or TIFF picture."
_IMAGE_TOKEN = re.compile(r"<\s*/?\s*(image|im_start|im_end|im_patch)\s*>", re.IGNORECASE)


class BadUpload(ValueError):
    """A picture or question that cannot be used. The message is for the person at the page: cause and next step, no
    paths, no traces."""


@dataclass(frozen=True)
class Limits:
    """How large a picture may be."""

    max_bytes: int = 20 * 2**20
    """Bytes of the file."""
    max_pixels: int = 50_000_000
    """Width times height, by the header, before anything is decoded. Decoding takes up to 16 bytes a pixel."""
    max_aspect: float = 50.0
    """Longer side over shorter side. Padded to a square, a picture beyond this is a line of a few pixels."""


@dataclass(frozen=True)
class Picture:
    image: Image.Image
    """RGB, upright, transparent pixels on white."""
    note: str
    """What the visitor should know about how it was read, for instance of an animation; "" mostly."""


class Uploads:
    """The folder of the pictures that the page shows: those that `take` kept, and those that Gradio wrote for a mined
    pair. A visitor's request can open no other files."""

    KEPT_SECONDS = 86_400
    REMEMBERED = 1000
    """Messages about uploads."""

    def __init__(self, served: Path, limits: Limits = Limits()) -> None:
        self.served, self.limits = served.resolve(), limits
        self.folder = self.served / "uploads"
        self._notes: dict[str, str] = {}
        self._lock = threading.Lock()
        self._decoding = threading.Semaphore(2)  # a picture of the largest allowed size takes hundreds of megabytes

    def take(self, data: bytes) -> str:
        """Keep the picture in an uploaded file, as a PNG of its pixels alone under a name that nobody can guess; -> its
        path. A file that is refused gets a path too, where nothing is: `find` says why."""
        path = self.folder / f"{secrets.token_hex(16)}.png"
        try:
            with self._decoding:
                picture = picture_of(data, self.limits)
                self._keep(picture.image, path)
            note = picture.note
        except BadUpload as refused:
            note = str(refused)
        with self._lock:
            self._notes[path.name] = note
            if len(self._notes) > self.REMEMBERED:
                del self._notes[next(iter(self._notes))]
        return str(path)

    def _keep(self, image: Image.Image, path: Path) -> None:
        image.info = {}  # pixels alone: what else a file holds (where it was taken, whole texts) is shown to nobody
        with contextlib.suppress(OSError):  # there is no folder yet, or another thread was faster
            for old in self.folder.iterdir():
                if old.lstat().st_mtime < time.time() - self.KEPT_SECONDS:
                    old.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                image.save(temporary, "PNG", compress_level=1)
        except (SaveError, OSError) as error:
            raise BadUpload(
                "This picture cannot be kept: the disk of the server is full or read-only. Free some "
                "space there and upload it again."
            ) from error

    def find(self, path: Any) -> tuple[Path, str]:
        """The value that a visitor sent for a picture -> its file, and the note about it ("" mostly).

        Raises BadUpload for anything but a picture that is there, with the reason if the upload was refused.
        """
        found = inside(self.served, path)
        note = self._notes.get(found.name, "") if found else ""
        if found is None or not (found.suffix == ".png" and found.is_file()):
            raise BadUpload(note or GONE)
        return found, note

    def open(self, path: Any) -> Image.Image:
        """The picture in such a file. Raises BadUpload."""
        with self.find(path)[0].open("rb") as file:
            return decode_image(file, self.limits.max_pixels, ("PNG",))


def inside(folder: Path, path: Any) -> Path | None:
    """Where a path leads, links followed, if that is in `folder` (itself resolved); None for anything else that a
    visitor may send."""
    try:
        found = Path(path).resolve()
    except (OSError, ValueError, TypeError, RuntimeError):  # too long; a null byte; not text; a link to itself
        return None
    return found if folder in found.parents else None


def read_picture(path: Path, limits: Limits = Limits()) -> Picture:
    """The picture in a file of any name and content. Raises BadUpload."""
    try:
        with path.open("rb") as file:
            return picture_of(file.read(limits.max_bytes + 1), limits)
    except OSError as error:
        raise BadUpload(GONE) from error


def picture_of(data: bytes, limits: Limits = Limits()) -> Picture:
    """The picture in a file's bytes. Raises BadUpload."""
    if not data:
        raise BadUpload("This file is empty (0 bytes): perhaps the upload was cut off. Please upload it again.")
    if len(data) > limits.max_bytes:
        most = f"{limits.max_bytes / 2**20:,.0f} MB" if limits.max_bytes >= 2**20 else f"{limits.max_bytes:,} bytes"
        raise BadUpload(f"This file is too large: over {most}. Upload a smaller picture, or save it as a JPEG first.")
    note = _check_header(data, limits)
    try:
        return Picture(decode_image(io.BytesIO(data), limits.max_pixels, FORMATS), note)
    except BadImage as error:
        raise BadUpload(
            "This picture is damaged or was cut short: it starts like a picture, but cannot be read to its end. Open "
            "it in a picture viewer, save it again and upload the new file."
        ) from error


def _check_header(data: bytes, limits: Limits) -> str:
    """Check what the header alone says; no pixel is decoded. -> the note. Raises BadUpload."""
    most = f"At most {limits.max_pixels / 1e6:,.0f} million pixels are allowed: scale it down and upload it again."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be a decompression bomb": that is decided below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadUpload(f"{_what_it_is(data)} {NEXT_STEP}") from error
    except Image.DecompressionBombError as error:
        raise BadUpload(f"This picture is far too large to be read safely. {most}") from error
    except Exception as error:  # Pillow's readers raise almost anything on a damaged header
        raise BadUpload(f"This picture's header is damaged, so it cannot be read. {NEXT_STEP}") from error
    width, height = image.size
    if min(width, height) < 1:
        raise BadUpload(f"This picture is {width} x {height} pixels: there is nothing in it. {NEXT_STEP}")
    if width * height > limits.max_pixels:
        count = f"{width:,} x {height:,} pixels make {width * height / 1e6:,.0f} million"
        raise BadUpload(f"This picture is too large: {count}. {most}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise BadUpload(
            f"This picture is {width:,} x {height:,} pixels, more than {limits.max_aspect:g} times as long as it is "
            "wide; the model would see a thin line. Cut out the part that matters and upload that."
        )
    with contextlib.suppress(Exception):  # counting frames reads on: whether the first is whole, decoding will show
        if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's JPEG with a preview
            if image.format == "TIFF":
                return "This file has several pages: only the first is used."
            return "This picture is animated: only its first frame is used."
    return ""


def _what_it_is(data: bytes) -> str:
    """About a file that is none of FORMATS."""
    start = data[:1024]
    text = start.decode("utf-8", errors="ignore")
    if b"<svg" in data[:4096].lower() and text.lower().lstrip("\ufeff \t\r\n").startswith(
        ("<svg", "<?xml", "<!doctype")
    ):
        return "This is an SVG drawing, which cannot be read here. Export it as a PNG."
    if start[4:8] == b"ftyp":
        kind = "an AVIF or HEIC photo" if start[8:12] in (b"heic", b"heix", b"mif1", b"avif", b"heif") else "a video"
        return f"This is {kind}, which cannot be read here. Save it as a JPEG."
    if start.startswith(b"%PDF"):
        return "This is a PDF document, not a picture."
    if len(text.encode()) > len(start) - 4 and not any(map(_is_control, text)):  # 4: a letter that was cut
        return "This file holds text, not a picture, whatever its name says."
    return "This file is not a picture that can be read here, or its beginning is damaged."


def _is_control(letter: str) -> bool:
    return unicodedata.category(letter) == "Cc" and letter not in "\t\r\n"


def check_question(text: str | None, limit: int = 2000, what: str = "question") -> str:
    """The question (or `what` it is) as the models get it: stripped, without control characters and image tokens.
    Raises BadUpload.

    Upstream's prompts put a picture wherever "<image>" stands (llava.mm_utils.tokenizer_image_token), so a question
    that holds the word would ask for a picture that is not there. It becomes "image".
    """
    text = text or ""
    if len(text) <= 20 * limit:  # nothing below should have to read a megabyte
        text = "".join(letter for letter in text.replace("\r\n", "\n") if _is_allowed(letter))
        while _IMAGE_TOKEN.search(text):  # again: what is left of "<<image>>" is "<image>"
            text = _IMAGE_TOKEN.sub(r"\1", text)
        text = text.strip()
    if not text:
        raise BadUpload(f"The {what} is empty. Type a {what} about the pictures, then ask again.")
    if len(text) > limit:
        raise BadUpload(
            f"The {what} has {len(text):,} characters; at most {limit:,} are allowed. Shorten it and ask again."
        )
    return text


def _is_allowed(letter: str) -> bool:
    # Cs: half of a surrogate pair, which no tokenizer can encode. U+202A to U+202E, U+2066 to U+2069 change the order
    # in which text is shown, but not that in which the model reads it.
    hidden = "\u202a" <= letter <= "\u202e" or "\u2066" <= letter <= "\u2069"
    return not (_is_control(letter) or unicodedata.category(letter) == "Cs" or hidden)
