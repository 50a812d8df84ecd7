"""Finds picture files: training, classification and mining walk through folders in the same way."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# Pillow finds these too, but reads them by starting a program (EPS: Ghostscript), only on Windows (WMF), or not at all.
UNREADABLE = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

Tree = list[tuple[Path, list[str]]]
"""What `walk` gives, kept."""


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that it decodes itself, the common ones first."""
    Image.init()
    return (*COMMON, *sorted(set(Image.OPEN) - UNREADABLE - set(COMMON)))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of those formats in lower case, as ".jpg"."""
    formats = {*readable_formats(), "MPO"}  # a phone's JPEG, opened as one
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def is_image_name(name: str) -> bool:
    """Whether a file of this name should be a picture; hidden files (`.x.png`, `._x.jpg`) are none."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in image_suffixes()


def image_files(folder: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """Every picture in and below `folder`, but for hidden ones and those in the folder `leave_out`."""
    for place, names in walk(folder, leave_out):
        yield from (place / name for name in names if is_image_name(name))


def walk(folder: Path, leave_out: Path | None = None) -> Iterator[tuple[Path, list[str]]]:
    """Each folder in and below `folder` and the names of its files, in the same order on every machine.

    Links to folders are followed; a folder that is reached twice (a link to one above it, two links to one) is given
    once. Hidden folders are left out.
    """
    seen = {os.path.realpath(leave_out)} - {os.path.realpath(folder)} if leave_out is not None else set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(place), sorted(names)
