"""webdataset's tar shards: the members with one key make a row, and are read in place."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataConfig
from .columns import CAPTION_COLUMNS, SEVERAL, caption_texts, visible
from .decode import DataError
from .image_files import image_suffixes
from .pairs import PairSource
from .rows import Rows
from .stores import TarStore


def open_tar(paths: list[Path], config: DataConfig) -> PairSource:
    """Index webdataset shards: of the members with one key, 1.jpg is the image, 1.txt or 1.json has its captions."""
    rows, places = Rows(config), []
    for number, path in enumerate(paths):
        pairs = []
        try:
            for key, image, texts in _tar_rows(path, config.caption_columns):
                one = image is not None and image is not SEVERAL
                pairs.append((visible(f"{path.name}/{key}") if one else image, texts))
                places.append((number, *(image if one else (0, 0))))
        except tarfile.TarError as error:
            raise DataError(
                f"{path} is not a complete, uncompressed tar file ({error}). Download it again, or unpack its "
                "compression: shards are read in place."
            ) from error
        rows.add_pairs(pairs)
    shard, offset, size = np.array(places, np.int64).reshape(-1, 3).T.copy()
    return PairSource(rows, TarStore(paths, shard, offset, size), by_name=False, files=paths)


def _tar_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any, list[str]]]:
    """Yields key, (offset, size) of the image (or None, SEVERAL), captions."""
    with tarfile.open(path, "r:") as tar:
        for key, members in _tar_samples(tar):
            images = [member for suffix, member in members.items() if suffix in image_suffixes()]
            image = (images[0].offset_data, images[0].size) if images else None
            text, fields = [], {}
            if ".txt" in members and not columns:
                text = [tar.extractfile(members[".txt"]).read().decode("utf-8-sig", errors="replace")]
            if ".json" in members:
                fields = _tar_json(tar.extractfile(members[".json"]).read())
            names = columns or next(([name] for name in CAPTION_COLUMNS if fields.get(name)), [])
            texts = text or [t for name in names for t in caption_texts(fields.get(name))]
            yield key, SEVERAL if len(images) > 1 else image, texts
        tar.fileobj.seek(tar.offset)  # where it stopped: also, without a word, at a damaged or half header
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no member at byte {tar.offset}")


def _tar_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields each sample's key (a name up to its first dot, as webdataset has it) and its members by suffix; a suffix
    that comes again begins another sample."""
    last, members = None, {}
    for member in tar:
        if not member.isfile():
            continue
        if member.issparse():  # a header of 512 bytes may promise a terabyte of zeros
            raise tarfile.ReadError(f"{member.name!r} is a sparse file")
        key, suffix = re.match(r"((?:.*/)?[^/.]*)\.?([^/]*)$", member.name, re.DOTALL).groups()
        suffix = "." + suffix.lower()
        if members and (key != last or suffix in members):
            yield last, members
            members, tar.members = {}, []  # tarfile would keep every header it has seen
        last, members[suffix] = key, member
    if members:
        yield last, members


def _tar_json(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):  # one damaged member: the row is dropped for want of a caption, and counted
        return {}
    return fields if isinstance(fields, dict) else {}
