"""Small data sets on disk, for the tests of what reads them: pictures that are told apart by their colour."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

from train_encoder.config import DataConfig


def colour(i: int) -> tuple[int, int, int]:
    return (i * 20 % 256, 255 - i * 20 % 256, i * 7 % 256)


def picture(i: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    return Image.new("RGB", size, colour(i))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(i: int = 0) -> bytes:
    return encoded(picture(i))


def write_images(folder: Path, count: int) -> list[str]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(i))
    return names


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source_of(path: Path | str, **settings):
    from train_encoder.data.formats import open_source  # needs the `train` extra

    return open_source(DataConfig(source=str(path), **settings))


def content(source) -> list[tuple[list[str], tuple[int, ...]]]:
    """Captions and the colour of the middle pixel, row by row."""
    rows = range(len(source))
    return [(source.captions(i), source.image(i).getpixel((12, 8))) for i in rows]
