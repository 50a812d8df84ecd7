"""Any image-caption data set -> `PairSource`: one row an image, with its captions, read by index.

`open_source(DataConfig(source=...))` is the way in. Captions are kept as flat arrow text (memory-mapped
where `datasets` maps it), images stay where they are and are read one at a time: nothing is unpacked or
copied. CSV, TSV, parquet columns and hub data sets are read through `datasets`. JSON is read here, one row
at a time, because `datasets` loads a JSON list whole and, before version 5, refuses the mixed types of LLaVA's
files. Tar shards, row groups and image folders are read here because there `datasets` either copies everything
into its cache or gives no access by index.
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from train_encoder.config import DataConfig
from train_encoder.data import BadImage, DataError, ImageStore, PairSource

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FILE_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json",
              ".parquet": "parquet", ".tar": "tar"}  # fmt: skip
# Looked for in this order, whatever their case. `conversations` is the shape of LLaVA and ShareGPT4V.
IMAGE_COLUMNS = ("image", "image_path", "img", "img_path", "filepath", "file_path", "filename", "file_name", "file",
                 "image_file", "image_name", "image_filepath", "path", "jpg", "jpeg", "png", "webp")  # fmt: skip
CAPTION_COLUMNS = ("conversations", "captions", "caption", "texts", "text", "sentences", "sentence", "raw", "txt",
                   "title", "description", "alt_text")  # fmt: skip
KEY_COLUMNS = ("key", "__key__", "image_id", "id")
CHUNK_ROWS = 10_000
# One random read decodes a row group: img2dataset writes 100 rows (about 3 MB). Above this, the arrow cache is faster.
LARGE_ROW_GROUP_BYTES = 128 * 2**20


# --- where the images are: no store keeps a file open, so all of them can be forked, pickled and read by threads ---


@dataclass
class FileStore:
    """Images as files; a relative name starts from `root`."""

    root: Path

    def open(self, row: int, name: str) -> BinaryIO:
        path = self.root / name
        try:
            return path.open("rb")
        except FileNotFoundError as error:
            raise BadImage(f"missing: no file {path}") from error
        except (OSError, ValueError) as error:
            raise BadImage(f"unreadable: {error}") from error


@dataclass
class TarStore:
    """Images inside uncompressed tar shards, by shard, offset and size [rows]."""

    shards: list[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def open(self, row: int, name: str) -> BinaryIO:
        path, size = self.shards[self.shard[row]], int(self.size[row])
        try:
            with path.open("rb") as file:
                file.seek(int(self.offset[row]))
                data = file.read(size)
        except OSError as error:
            raise BadImage(f"unreadable: {error}") from error
        if len(data) < size:
            raise BadImage(f"corrupt: {path} ends in the middle of this image")
        return io.BytesIO(data)


@dataclass
class ParquetStore:
    """Image bytes in the row groups of parquet files; the row group read last is kept."""

    groups: list[tuple[Path, int]]
    starts: np.ndarray  # [groups + 1], the first row of each
    column: str
    root: Path
    _last: tuple[int, Any] | None = field(default=None, repr=False)

    def open(self, row: int, name: str) -> BinaryIO:
        group = int(np.searchsorted(self.starts, row, side="right")) - 1
        last = self._last  # read once: another thread may replace it
        if last is None or last[0] != group:
            path, index = self.groups[group]
            try:
                cells = pq.ParquetFile(path).read_row_group(index, columns=[self.column]).column(0)
            except (OSError, pa.ArrowException) as error:
                raise BadImage(f"unreadable: row group {index} of {path}: {error}") from error
            last = self._last = (group, cells)
        return _open_cell(last[1][row - int(self.starts[group])].as_py(), row, self.root)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_last": None}


@dataclass
class DatasetStore:
    """Images in one column of a (memory-mapped) `datasets.Dataset`."""

    dataset: Any
    root: Path

    def open(self, row: int, name: str) -> BinaryIO:
        (cell,) = self.dataset[row].values()
        return _open_cell(cell, row, self.root)


def _open_cell(cell: Any, row: int, root: Path) -> BinaryIO:
    """A table's image cell is bytes, a path, or {"bytes", "path"} as `datasets` stores images."""
    path = None
    if isinstance(cell, dict):
        cell, path = cell.get("bytes"), cell.get("path")
    if cell is None and path:
        return FileStore(root).open(row, path)
    if not cell:
        raise BadImage("missing: no image bytes in this row")
    return FileStore(root).open(row, cell) if isinstance(cell, str) else io.BytesIO(cell)


# --- rows -----------------------------------------------------------------------------------------------------------


class _Rows:
    """What every reader fills: a name a row (null: no image), and flat captions with the row each belongs to."""

    def __init__(self) -> None:
        self.names: list[pa.Array] = []
        self.texts: list[pa.Array] = []
        self.text_rows: list[np.ndarray] = []
        self.count = 0

    def add(self, names: pa.Array, caption_columns: Sequence[pa.Array]) -> None:
        """Adds rows: names [rows], and caption columns [rows] of text, lists, or conversations."""
        for column in caption_columns:
            if isinstance(column.type, pa.BaseExtensionType):  # `datasets` stores mixed types as JSON text
                values = [json.loads(v) if isinstance(v, str) else v for v in column.to_pylist()]
                column = pa.array([caption_texts(value) for value in values], pa.list_(pa.string()))
            elif pa.types.is_nested(column.type) and column.type != pa.list_(pa.string()):
                column = pa.array([caption_texts(value) for value in column.to_pylist()], pa.list_(pa.string()))
            rows = np.arange(self.count, self.count + len(column))
            if pa.types.is_nested(column.type):
                rows = np.repeat(rows, pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False))
                column = column.flatten()
            self.texts.append(column.cast(pa.string()))
            self.text_rows.append(rows)
        names = names.cast(pa.string())
        blank = pc.equal(pc.utf8_trim_whitespace(names), "")
        self.names.append(pc.if_else(blank, pa.scalar(None, pa.string()), names))
        self.count += len(names)

    def source(self, store: ImageStore, config: DataConfig, *, by_name: bool, size: int = 0) -> PairSource:
        if self.count == 0:
            raise DataError(f"{config.source} has no rows. Check data.source and data.split.")
        names, texts = pa.chunked_array(self.names), pa.chunked_array(self.texts, pa.string())
        return PairSource(names, texts, np.concatenate(self.text_rows), store, config, by_name=by_name, size=size)


def caption_texts(value: Any) -> list[str]:
    """The captions in one cell: a text, a list of texts, {"raw": text}, or a conversation's first answer."""
    if value is None:
        return []
    if isinstance(value, dict):
        return next(([str(value[key])] for key in ("raw", "caption", "text", "value") if value.get(key)), [])
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            # Later answers of a LLaVA conversation reply to questions; only the first describes the image.
            return next((caption_texts(turn.get("value")) for turn in value if turn.get("from") == "gpt"), [])
        return [text for item in value for text in caption_texts(item)]
    return [str(value)]


# --- columns --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    image: str
    captions: tuple[str, ...]
    key: str | None
    status: str | None  # img2dataset's: failed downloads are rows too


def _find_columns(available: Sequence[str], config: DataConfig) -> _Columns:
    by_lower = {name.lower(): name for name in reversed(available)}

    def first(names: Iterable[str]) -> str | None:
        return next((by_lower[name] for name in names if name in by_lower), None)

    missing = [name for name in (config.image_column, *config.caption_columns) if name and name not in available]
    image = config.image_column or first(IMAGE_COLUMNS)
    numbered = [name for name in available if re.fullmatch(r"(caption|text|sentence)s?_?\d+", name.lower())]
    captions = config.caption_columns or tuple([name for name in [first(CAPTION_COLUMNS)] if name] or numbered)
    if missing or image is None or not captions:
        unseen = f"no column that looks like {'an image' if image is None else 'a caption'}"
        what = f"no column {', '.join(map(repr, missing))}" if missing else unseen
        raise DataError(f"{config.source} has {what}; its columns are: {', '.join(available)}. Name them with "
                        "data.image_column and data.caption_columns.")  # fmt: skip
    return _Columns(image, tuple(captions), first(KEY_COLUMNS), first(["status"]))


def _collect(rows: _Rows, tables: Iterable[pa.Table], columns: _Columns, by_name: bool) -> None:
    """Gathers names and captions of arrow tables. Rows with the image inside are named by key, else by number."""
    for table in tables:
        name_column = columns.image if by_name else columns.key
        if name_column:
            names = table[name_column].combine_chunks()
        else:
            names = pa.array([f"row {rows.count + i}" for i in range(len(table))])
        if not by_name and columns.status:
            failed = pc.not_equal(table[columns.status].combine_chunks(), "success").fill_null(False)
            names = pc.if_else(failed, pa.scalar(None, names.type), names)
        rows.add(names, [table[name].combine_chunks() for name in columns.captions])


# --- formats --------------------------------------------------------------------------------------------------------


def _stream(kind: str, path: Path, columns: _Columns, by_name: bool, **options: Any) -> Iterator[pa.Table]:
    """Reads the needed columns of one file through `datasets`, batch by batch and without its cache."""
    import datasets

    wanted = [*([columns.image] if by_name else []), *columns.captions, columns.key, columns.status]
    wanted = list(dict.fromkeys(name for name in wanted if name))
    try:
        files = [glob.escape(str(path))]  # else a folder called `data[1]` silently has no rows
        stream = datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)
        yield from stream.select_columns(wanted).with_format("arrow").iter(CHUNK_ROWS)
    except (ValueError, OSError) as error:  # encoding, pandas' and arrow's parser errors are ValueErrors
        raise DataError(f"{path} cannot be read as {kind} in UTF-8: {error}. Repair it or save it again.") from error


def _open_csv(paths: list[Path], config: DataConfig) -> PairSource:
    import datasets

    rows = _Rows()
    for path in paths:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            header = next(csv.reader(file, delimiter=separator), [])
        if not header:
            raise DataError(f"{path} is empty. Its first line must name the columns, such as image,caption.")
        # All text: pandas would read the name "007" as 7 and the caption "NA" as no caption.
        features = datasets.Features({name: datasets.Value("string") for name in header})
        columns = _find_columns(header, config)
        options = dict(sep=separator, keep_default_na=False, features=features)
        _collect(rows, _stream("csv", path, columns, True, **options), columns, by_name=True)
    return _paths_source(rows, config, paths)


def _open_json(paths: list[Path], config: DataConfig) -> PairSource:
    rows, columns = _Rows(), None
    for path in paths:
        stream = json_rows(path)
        while chunk := list(itertools.islice(stream, CHUNK_ROWS)):
            if columns is None:
                columns = _find_columns(list(dict.fromkeys(key for row in chunk for key in row)), config)
            names = [row.get(columns.image) for row in chunk]
            lists = [[t for name in columns.captions for t in caption_texts(row.get(name))] for row in chunk]
            names = [name if isinstance(name, str) and name else None for name in names]
            rows.add(pa.array(names, pa.string()), [pa.array(lists, pa.list_(pa.string()))])
    return _paths_source(rows, config, paths)


def json_rows(path: Path) -> Iterator[dict]:
    """Yields the rows of a JSON list or of JSON lines, one at a time: these files reach gigabytes."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            for row in _list_items(file) if start == "[" else _line_items(file, start):
                if not isinstance(row, dict):
                    raise DataError(f"{path} holds {type(row).__name__} where a row such as "
                                    '{"image": ..., "caption": ...} should be.')  # fmt: skip
                yield row
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is neither a JSON list of rows nor JSON lines in UTF-8 ({error}). Write one row a "
                        'line, such as {"image": "a.jpg", "caption": "a cat"}.') from error  # fmt: skip


def _line_items(file: io.TextIOBase, start: str) -> Iterator[Any]:
    return (json.loads(line) for line in itertools.chain([start + file.readline()], file) if line.strip())


def _list_items(file: io.TextIOBase) -> Iterator[Any]:
    """Yields the items of a JSON list whose opening bracket has been read."""
    decoder, text, at, size = json.JSONDecoder(), "", 0, 1 << 20
    while True:
        while at < len(text) and text[at] in ", \t\r\n":
            at += 1
        if text[at : at + 1] == "]":
            return
        try:
            item, at = decoder.raw_decode(text, at)
            size = 1 << 20
            yield item
        except json.JSONDecodeError:  # perhaps only the end of what was read so far
            more = file.read(size)
            if not more:
                raise
            text, at, size = text[at:] + more, 0, min(2 * size, 1 << 28)


def _paths_source(rows: _Rows, config: DataConfig, paths: Sequence[Path] = ()) -> PairSource:
    """A source of rows that name image files; `paths` are the data files, if there are any."""
    root = Path(config.image_root or (paths[0].parent if paths else "."))
    first = next((array.drop_null()[0].as_py() for array in rows.names if array.null_count < len(array)), "")
    if re.match(r"https?://", first):
        raise DataError(f"{config.source} names images by URL ({first}). Download them first, for example with "
                        "img2dataset, and give its output as data.source.")  # fmt: skip
    return rows.source(FileStore(root), config, by_name=True, size=_size(paths))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _open_parquet(paths: list[Path], config: DataConfig) -> PairSource:
    import datasets

    try:
        files = [(path, pq.ParquetFile(path)) for path in paths]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{config.source} holds a damaged parquet file: {error}. Download it again.") from error
    schema = files[0][1].schema_arrow
    columns = _find_columns(schema.names, config)
    by_name = pa.types.is_string(schema.field(columns.image).type)
    groups = [(path, i, file.metadata.row_group(i)) for path, file in files for i in range(file.num_row_groups)]
    if not by_name and max((group.total_byte_size for *_, group in groups), default=0) > LARGE_ROW_GROUP_BYTES:
        logger.warning("%s has large row groups; `datasets` copies it into its cache for random access", config.source)
        whole = datasets.load_dataset("parquet", data_files=[glob.escape(str(p)) for p in paths], split="train")
        return _dataset_source(whole, config)
    rows = _Rows()
    for path, _ in files:
        _collect(rows, _stream("parquet", path, columns, by_name), columns, by_name)
    if by_name:
        return _paths_source(rows, config, paths)
    starts = np.concatenate([[0], np.cumsum([group.num_rows for *_, group in groups])]).astype(np.int64)
    root = Path(config.image_root or paths[0].parent)
    store = ParquetStore([group[:2] for group in groups], starts, columns.image, root)
    return rows.source(store, config, by_name=False, size=_size(paths))


def _open_tar(paths: list[Path], config: DataConfig) -> PairSource:
    """Indexes webdataset shards: members of one key are a row; 1.jpg the image, 1.txt or 1.json its captions."""
    rows, places = _Rows(), []
    for number, path in enumerate(paths):
        names, captions = [], []
        try:
            for key, image, texts in _tar_rows(path, config.caption_columns):
                names.append(f"{path.name}/{key}" if image else None)
                captions.append(texts)
                places.append((number, *(image or (0, 0))))
        except tarfile.TarError as error:
            raise DataError(f"{path} is not a complete, uncompressed tar file ({error}). Download it again, or unpack "
                            "its compression: shards are read in place.") from error  # fmt: skip
        rows.add(pa.array(names, pa.string()), [pa.array(captions, pa.list_(pa.string()))])
    shard, offset, size = np.array(places, np.int64).reshape(-1, 3).T.copy()
    return rows.source(TarStore(paths, shard, offset, size), config, by_name=False, size=_size(paths))


def _tar_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int] | None, list[str]]]:
    """Yields key, (offset, size) of the image, captions. A key ends at its first dot, as webdataset has it."""
    with tarfile.open(path, "r:") as tar:
        split = ((member, *re.match(r"((?:.*/)?[^/.]*)\.?([^/]*)$", member.name, re.DOTALL).groups())
                 for member in tar if member.isfile())  # fmt: skip
        for key, members in itertools.groupby(split, key=lambda item: item[1]):
            image, text, fields = None, [], {}
            for member, _, suffix in members:
                suffix = "." + suffix.lower()
                if suffix in IMAGE_SUFFIXES:
                    image = (member.offset_data, member.size)
                elif suffix == ".txt" and not columns:
                    text = [tar.extractfile(member).read().decode(errors="replace")]
                elif suffix == ".json":
                    fields = _tar_json(tar.extractfile(member).read())
            names = columns or next(([name] for name in CAPTION_COLUMNS if fields.get(name)), [])
            yield key, image, text or [t for name in names for t in caption_texts(fields.get(name))]
            tar.members = []  # tarfile would keep every header it has seen
        tar.fileobj.seek(tar.offset)  # where it stopped: also, without a word, at a damaged or half header
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError(f"no member at byte {tar.offset}")


def _tar_json(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except ValueError:  # one damaged member: the row is dropped for want of a caption, and counted
        return {}
    return fields if isinstance(fields, dict) else {}


def _open_image_folder(folder: Path, config: DataConfig) -> PairSource:
    """Reads a.jpg + a.txt, at any depth; one caption a line."""
    rows = _Rows()
    walk = (root / name for root, names in _walk(folder) for name in names
            if Path(name).suffix.lower() in IMAGE_SUFFIXES)  # fmt: skip
    while chunk := list(itertools.islice(walk, CHUNK_ROWS)):
        texts = [path.with_suffix(".txt") for path in chunk]
        captions = [text.read_text("utf-8-sig", "replace").splitlines() if text.exists() else [] for text in texts]
        names = [path.relative_to(folder).as_posix() for path in chunk]
        rows.add(pa.array(names, pa.string()), [pa.array(captions, pa.list_(pa.string()))])
    return rows.source(FileStore(folder), config, by_name=True)


def _walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder below `folder` and the files in it, in the same order on every machine."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield Path(root), sorted(files)


def _dataset_source(dataset: Any, config: DataConfig) -> PairSource:
    """Wraps a `datasets.Dataset`, memory-mapped where it is."""
    import datasets

    columns = _find_columns(dataset.column_names, config)
    if isinstance(dataset.features[columns.image], datasets.Image):
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    by_name = isinstance(dataset.features[columns.image], datasets.Value) and pa.types.is_string(
        dataset.features[columns.image].pa_type)  # fmt: skip
    wanted = [columns.image] * by_name + [*columns.captions, columns.key, columns.status]
    tables = dataset.select_columns(list(dict.fromkeys(name for name in wanted if name)))
    rows = _Rows()
    _collect(rows, tables.with_format("arrow").iter(CHUNK_ROWS), columns, by_name)
    if by_name:
        return _paths_source(rows, config)
    store = DatasetStore(dataset.select_columns([columns.image]), Path(config.image_root or "."))
    return rows.source(store, config, by_name=False)


# --- finding the format ---------------------------------------------------------------------------------------------


def open_source(config: DataConfig) -> PairSource:
    """Opens `config.source`, whatever its format (the list is DataConfig.source's).

    A hub name may end in `:subset`. Raises DataError naming the cause and the next step.
    """
    if config.source == "openmoji":
        from train_encoder.openmoji import build_openmoji

        return _open_json([build_openmoji() / f"{config.split}.jsonl"], config)
    path = Path(config.source).expanduser()
    paths = [path] if path.exists() else [Path(name).expanduser() for name in _expand_braces(config.source)]
    if missing := [str(each) for each in paths if not each.exists()]:
        if not _looks_like_path(config.source):
            return _open_hub(config)
        raise DataError(f"{config.source}: {len(missing)} of {len(paths)} files do not exist, among them "
                        f"{', '.join(missing[:3])}. Check data.source.")  # fmt: skip
    if path.is_dir():
        return _open_folder(path, config)
    kinds = {FILE_KINDS.get(each.suffix.lower()) for each in paths}
    if len(kinds) > 1 or None in kinds:
        raise DataError(f"{config.source} is of no known format. data.source may be a {', '.join(FILE_KINDS)} file, "
                        "a folder, or a hub data set.")  # fmt: skip
    return _OPENERS[kinds.pop()](paths, config)


_OPENERS = {"csv": _open_csv, "json": _open_json, "parquet": _open_parquet, "tar": _open_tar}


def _expand_braces(text: str) -> list[str]:
    """Expands `a-{000..012}.tar` and `{a,b}.tar` as a shell does."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        return [text]
    first, last, words = match.groups()
    parts = words.split(",") if words else [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [text[: match.start()] + part + rest for part in parts for rest in _expand_braces(text[match.end() :])]


def _looks_like_path(source: str) -> bool:
    """A hub name is `name` or `owner/name`, with no file suffix that we read."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in FILE_KINDS


def _open_folder(folder: Path, config: DataConfig) -> PairSource:
    """Opens a folder by what is inside: a saved data set, shards, image and text files, or tables."""
    import datasets

    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.Dataset):
            return _dataset_source(saved, config)
        if config.split not in saved:
            raise DataError(f"{folder} has no split {config.split!r}; it has: {', '.join(saved)}. Set data.split.")
        return _dataset_source(saved[config.split], config)
    files: dict[str, list[Path]] = {}
    has_pairs = False
    for root, names in _walk(folder):
        texts = {Path(name).stem for name in names if name.endswith(".txt")}
        for name in map(Path, names):
            has_pairs |= name.suffix.lower() in IMAGE_SUFFIXES and name.stem in texts
            if name.suffix.lower() in FILE_KINDS and not name.stem.endswith("_stats"):  # img2dataset's reports
                files.setdefault(name.suffix.lower(), []).append(root / name)
    if has_pairs and ".tar" not in files:
        return _open_image_folder(folder, config)  # before the rest: img2dataset lays tables beside such files
    for suffix in (".tar", ".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json"):
        if suffix in files:
            return _OPENERS[FILE_KINDS[suffix]](_of_split(files[suffix], config), config)
    raise DataError(f"{folder} holds no data that can be read: no tar, parquet, jsonl, csv or json file, and no image "
                    "with a .txt file of the same name beside it. Check data.source.")  # fmt: skip


def _of_split(files: list[Path], config: DataConfig) -> list[Path]:
    """Keeps the files named after the split (`train-00000.parquet`, `dev.csv`), where files are named so."""
    found: dict[str, list[Path]] = {}
    for file in files:
        if match := re.search(r"(?:^|[-_.])(train|val|valid|validation|dev|test)(?:$|[-_.])", file.stem.lower()):
            found.setdefault(match[1], []).append(file)
    if found and config.split not in found:
        raise DataError(f"{config.source} has no files of split {config.split!r}; it has: {', '.join(found)}. "
                        "Set data.split.")  # fmt: skip
    return found.get(config.split, files)


def _open_hub(config: DataConfig) -> PairSource:
    import datasets

    name, _, subset = config.source.partition(":")
    try:
        dataset = datasets.load_dataset(name, subset or None, split=config.split)
    except Exception as error:  # dozens of kinds, from the network up; the cause goes into the message
        raise DataError(f"{config.source}: there is neither a file or folder of that name nor a hub data set that can "
                        f"be reached ({type(error).__name__}: {error}). Check data.source, data.split and the "
                        "network.") from error  # fmt: skip
    return _dataset_source(dataset, config)
