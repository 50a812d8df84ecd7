"""Any image-caption data set -> `PairSource`: one row an image, with its captions, read by index.

`open_source(DataConfig(source=...))` is the way in. Captions are kept as flat arrow text, images stay where they are
and are read one at a time: nothing is unpacked or copied. Saved and hub data sets are read through `datasets`, parquet
through pyarrow, CSV and JSON by `tables`, row by row: `datasets` loads a JSON list whole, refuses the mixed types of
LLaVA's files before version 5, and repairs a CSV's stray quotes by guessing. Tar shards, row groups and image folders
are read here because there `datasets` either copies everything into its cache or gives no access by index.
"""

from __future__ import annotations

import glob
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import DataConfig
from ..openmoji.build import build_openmoji
from .columns import find_columns, visible
from .image_files import Tree, is_image_name, walk
from .pairs import DataError, PairSource
from .rows import Rows, names_files
from .shards import open_tar
from .splits import files_of_split, picture_folders_of_split
from .stores import DatasetStore, FileStore, ParquetStore
from .tables import csv_rows, json_pairs, json_rows

logger = logging.getLogger(__name__)

FILE_KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".tar": "tar",
}
CHUNK_ROWS = 10_000
# One random read decodes a row group: img2dataset writes 100 rows (about 3 MB). Above this, the arrow cache is faster.
LARGE_ROW_GROUP_BYTES = 128 * 2**20
MAX_FILES = 1_000_000
"""Most files that a pattern such as `a-{000..999}.tar` may stand for."""


def _roots(paths: Sequence[Path], config: DataConfig) -> tuple[Path, list[str]]:
    """-> the folder that all images are below, and for each data file what its relative names start with.

    That is each file's own folder, unless data.image_root says otherwise: `0.png` of train/rows.csv is not that of
    test/rows.csv.
    """
    if config.image_root is not None:
        return Path(config.image_root), [""] * len(paths)
    parents = [path.parent for path in paths]
    if len(set(parents)) == 1:
        return parents[0], [""] * len(paths)
    parents = [Path(os.path.abspath(parent)) for parent in parents]
    root = Path(os.path.commonpath(parents))
    return root, ["" if parent == root else parent.relative_to(root).as_posix() for parent in parents]


def _open_text(paths: list[Path], config: DataConfig) -> PairSource:
    """CSV, TSV and JSON. Each CSV names its own columns; those of JSON files are what the first rows have."""
    rows, columns = Rows(config), None
    root, folders = _roots(paths, config)
    for path, folder in zip(paths, folders, strict=True):
        if FILE_KINDS[path.suffix.lower()] == "csv":
            pairs = csv_rows(path, config)
        else:
            values = json_rows(path)
            first = list(itertools.islice(values, CHUNK_ROWS))
            if first and columns is None:
                columns = find_columns(list(dict.fromkeys(itertools.chain.from_iterable(first))), config)
            pairs = json_pairs(itertools.chain(first, values), columns, path)
        while chunk := list(itertools.islice(pairs, CHUNK_ROWS)):
            rows.add_pairs(chunk, folder)
    return PairSource.of_files(rows, root, paths)


def _open_parquet(paths: list[Path], config: DataConfig) -> PairSource:
    try:
        files = [pq.ParquetFile(path) for path in paths]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{config.source} holds a damaged parquet file: {error}. Download it again.") from error
    columns = [find_columns(file.schema_arrow.names, config) for file in files]
    kinds = {
        (own.image, names_files(file.schema_arrow.field(own.image).type, own.image, str(path)))
        for path, file, own in zip(paths, files, columns, strict=True)
    }
    if len(kinds) > 1:
        raise DataError(
            f"{config.source}: its files do not have the same kind of image column. "
            "Give those of one kind as data.source."
        )
    ((image, by_name),) = kinds
    root, folders = _roots(paths, config)
    groups = [file.metadata.row_group(i) for file in files for i in range(file.num_row_groups)]
    largest = max((group.total_byte_size for group in groups), default=0)
    if not by_name and largest > LARGE_ROW_GROUP_BYTES and len(set(folders)) == 1:
        import datasets

        logger.warning("%s has large row groups; `datasets` copies it into its cache for random access", config.source)
        names = [glob.escape(str(path)) for path in paths]
        return _dataset_source(datasets.load_dataset("parquet", data_files=names, split="train"), config, root)
    rows = Rows(config)
    for path, file, own, folder in zip(paths, files, columns, folders, strict=True):
        rows.add_tables(_batches(path, file, own.wanted(by_name)), own, by_name, folder if by_name else "")
    if by_name:
        return PairSource.of_files(rows, root, paths)
    places = [(path, i) for path, file in zip(paths, files, strict=True) for i in range(file.num_row_groups)]
    starts = np.cumsum([0, *(group.num_rows for group in groups)])
    store = ParquetStore(places, starts, image, None if config.image_root is None else root)
    return PairSource(rows, store, by_name=False, files=paths)


def _batches(path: Path, file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.Table]:
    try:
        for batch in file.iter_batches(CHUNK_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is damaged: {error}. Download it again.") from error


def _open_image_folder(tree: Tree, folder: Path, config: DataConfig) -> PairSource:
    """Reads a.jpg + a.txt, at any depth; one caption a line."""
    rows, orphans = Rows(config), []
    chosen = picture_folders_of_split(tree, folder, config)
    for place, names in tree:
        if place not in chosen:
            continue
        texts = {Path(name).stem: place / name for name in names if Path(name).suffix.lower() == ".txt"}
        pictures = [place / name for name in names if is_image_name(name)]
        orphans += [texts[stem] for stem in texts.keys() - {picture.stem for picture in pictures}]
        for start in range(0, len(pictures), CHUNK_ROWS):
            some = pictures[start : start + CHUNK_ROWS]
            rows.add_pairs([(path.relative_to(folder).as_posix(), _lines(texts.get(path.stem))) for path in some])
    if orphans:
        message = "%s: %d .txt files have no picture beside them that can be read, such as %s"
        logger.warning(message, config.source, len(orphans), visible(str(min(orphans))))
    return PairSource(rows, FileStore(folder, rows.true_names), by_name=False)


def _lines(path: Path | None) -> list[str]:
    if path is None or not path.is_file():
        return []
    return path.read_text("utf-8-sig", "replace").split("\n")  # not splitlines: U+2028 ends no line


def _dataset_source(dataset: Any, config: DataConfig, root: Path | None = None) -> PairSource:
    """Wraps a `datasets.Dataset`, memory-mapped where it is. root: where relative paths start without image_root."""
    import datasets

    columns = find_columns(dataset.column_names, config)
    if isinstance(dataset.features[columns.image], datasets.Image):
        dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    kind = dataset.features.arrow_schema.field(columns.image).type
    by_name = names_files(kind, columns.image, config.source)
    rows, root = Rows(config), Path(config.image_root or root or ".")
    tables = dataset.select_columns(columns.wanted(by_name)).with_format("arrow")
    rows.add_tables(tables.iter(CHUNK_ROWS), columns, by_name)
    if by_name:
        return PairSource.of_files(rows, root)
    return PairSource(rows, DatasetStore(dataset.select_columns([columns.image]), root), by_name=False)


OPENERS = {"csv": _open_text, "json": _open_text, "parquet": _open_parquet, "tar": open_tar}


def open_source(config: DataConfig) -> PairSource:
    """Opens `config.source`, whatever its format (the list is DataConfig.source's).

    A hub name may end in `:subset`. Raises DataError naming the cause and the next step.
    """
    if config.source == "openmoji":
        return _open_text([build_openmoji() / f"{config.split}.jsonl"], config)
    path = Path(config.source).expanduser()
    paths = [path] if path.exists() else [Path(name).expanduser() for name in _expand_braces(config.source)]
    if missing := [str(each) for each in paths if not each.exists()]:
        if not _looks_like_path(config.source):
            return _open_hub(config)
        raise DataError(
            f"{config.source}: {len(missing)} of {len(paths)} files do not exist, among them "
            f"{', '.join(missing[:3])}. Check data.source."
        )
    if path.is_dir():
        return _open_folder(path, config)
    kinds = {FILE_KINDS.get(each.suffix.lower()) for each in paths}
    if len(kinds) > 1 or None in kinds:
        raise DataError(
            f"{config.source} is of no known format. data.source may be a {', '.join(FILE_KINDS)} file, a folder, "
            "or a hub data set."
        )
    return OPENERS[kinds.pop()](paths, config)


def _expand_braces(text: str) -> list[str]:
    """Expands `a-{000..012}.tar` and `{a,b}.tar` as a shell does. Raises DataError for more than MAX_FILES."""
    names = list(itertools.islice(_braces(text), MAX_FILES + 1))
    if len(names) > MAX_FILES:
        raise DataError(f"{text} stands for more than {MAX_FILES:,} files. Check the numbers in its braces.")
    return names


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if not match:
        yield text
        return
    first, last, words = match.groups()
    parts = words.split(",") if words else (str(i).zfill(len(first)) for i in range(int(first), int(last) + 1))
    for part in parts:
        yield from (text[: match.start()] + part + rest for rest in _braces(text[match.end() :]))


def _looks_like_path(source: str) -> bool:
    """A hub name is `name` or `owner/name`, with no file suffix that we read."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or Path(source).suffix.lower() in FILE_KINDS


def _open_folder(folder: Path, config: DataConfig) -> PairSource:
    """Opens a folder by its content: a saved data set, shards, image and text files, or tables."""
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _open_saved(folder, config)
    tree = list(walk(folder))
    files: dict[str, list[Path]] = {}
    has_pairs = False
    for place, names in tree:
        texts = {Path(name).stem for name in names if name.lower().endswith(".txt")}
        for name in names:
            has_pairs |= is_image_name(name) and Path(name).stem in texts
            suffix = Path(name).suffix.lower()
            if suffix in FILE_KINDS and not Path(name).stem.endswith("_stats"):  # img2dataset's reports
                files.setdefault(suffix, []).append(place / name)
    if has_pairs and ".tar" not in files:
        return _open_image_folder(tree, folder, config)  # before the rest: img2dataset lays tables beside such files
    for suffix in (".tar", ".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json"):
        if suffix in files:
            # img2dataset's own tables beside shards are expected, and a .json file may be anything.
            others = [each for other, some in files.items() if other not in (suffix, ".json") for each in some]
            if others and suffix != ".tar":
                message = "%s: its %s files are read; left out %d others, such as %s. Give one kind as data.source"
                logger.warning(message, config.source, suffix, len(others), visible(str(others[0])))
            return OPENERS[FILE_KINDS[suffix]](files_of_split(files[suffix], folder, config), config)
    raise DataError(
        f"{folder} holds no data that can be read: no tar, parquet, jsonl, csv or json file, and no image with a .txt "
        "file of the same name beside it. Check data.source."
    )


def _open_saved(folder: Path, config: DataConfig) -> PairSource:
    """A folder that `datasets` saved."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # KeyError, TypeError, ...: whatever a half or foreign state.json leads to
        raise DataError(
            f"{folder} looks like a saved data set (it has a state.json or dataset_dict.json), but `datasets` cannot "
            f"open it ({type(error).__name__}: {error}). Save it again."
        ) from error
    if isinstance(saved, datasets.Dataset):
        return _dataset_source(saved, config)
    if config.split not in saved:
        raise DataError(f"{folder} has no split {config.split!r}; it has: {', '.join(saved)}. Set data.split.")
    return _dataset_source(saved[config.split], config)


def _open_hub(config: DataConfig) -> PairSource:
    import datasets

    name, _, subset = config.source.partition(":")
    try:
        dataset = datasets.load_dataset(name, subset or None, split=config.split)
    except Exception as error:  # dozens of kinds, from the network up; the cause goes into the message
        raise DataError(
            f"{config.source}: there is neither a file or folder of that name nor a hub data set that can be reached "
            f"({type(error).__name__}: {error}). Check data.source, data.split and the network."
        ) from error
    return _dataset_source(dataset, config)


def parse_source(text: str, data: DataConfig) -> tuple[str, DataConfig]:
    """`NAME=SOURCE[:SPLIT]` -> (name, the data settings to read it with)."""
    name, _, rest = text.rpartition("=") if "=" in text else (text, "", text)
    source, _, split = rest.rpartition(":") if ":" in rest and not Path(rest).exists() else (rest, "", "train")
    # The images of other data lie elsewhere and in another column.
    same = {"image_root": data.image_root, "image_column": data.image_column} if source == data.source else {}
    return name, DataConfig(source=source, split=split, **same)
