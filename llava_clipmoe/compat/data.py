"""Upstream's training data: rows that it would die of are named, a broken picture is skipped, before hours are lost.

Upstream's `LazySupervisedDataset` (llava/train/train.py) reads rows and opens pictures as it goes, and dies of the
first that it cannot use.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import defaultdict
from typing import Any

from PIL import Image

from ..conversations import TEMPLATES

CHECKED_PATHS = 2000
"""Pictures looked for before training starts, evenly over the data: enough for a wrong folder."""
MAX_BAD_SHARE = 0.01
MIN_BAD = 5
"""More than 1% broken pictures (and at least this many) stop the run, as in the encoder's trainer."""
IMAGE_TOKEN = "<image>"


class BadTrainingData(ValueError):
    """The conversations or pictures that LLaVA is to be trained on cannot be used."""


def guard(dataset: Any) -> Any:
    """Make a LLaVA data set robust, in place; -> the data set. Raises BadTrainingData for rows that upstream would die
    of or train without their picture, and when pictures are missing."""
    rows = getattr(dataset, "list_data_dict", None)
    if rows is None:
        return dataset
    check_rows(rows, _style())
    check_paths(rows, dataset.data_args)
    _skip_broken(type(dataset))
    return dataset


def names_of_trainer(dataset: Any) -> dict[str, Any]:
    """The names in the module of upstream's data set, its train.py, which may run as __main__. To be changed in place;
    empty for a data set that is no class of Python's own."""
    return getattr(inspect.unwrap(type(dataset).__getitem__), "__globals__", {})


# ---------------------------------------------------------------------------------------------------------------- rows


def _style() -> str:
    """Which of upstream's five functions reads the conversations, chosen as its `preprocess` does. Ours for the
    templates of `conversations.py` takes the turns that upstream's for MPT takes."""
    from llava.conversation import default_conversation as template

    if template.sep_style.name in ("PLAIN", "LLAMA_2"):
        return template.sep_style.name.lower()
    if template.version.startswith("v1"):
        return "v1"
    return "mpt" if template.version in ("mpt", *TEMPLATES) else "v0"


def check_rows(rows: Any, style: str) -> None:
    """Look at every row; raise BadTrainingData naming those that upstream's function for `style` cannot use.

    A row whose `image` names no picture becomes one without `image`, in place: upstream asks only whether it is there.
    Rows that upstream lets pass and reads otherwise than one may think are said on stderr.
    """
    if not isinstance(rows, list) or not rows:
        raise BadTrainingData(f"the data must be a JSON list of at least one row, this is {_shown(rows)}.")
    faults: dict[int, str] = {}
    remarks: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            faults[number] = f"is {_shown(row)}"
            continue
        fault = _picture_fault(row) or _turns_fault(row, style)
        if fault is not None:
            faults[number] = fault
        else:
            for remark in _remarks(row, style):
                remarks[remark].append(number)
    if faults:
        first = "; ".join(f"{_name(rows, number)} {faults[number]}" for number in list(faults)[:3])
        raise BadTrainingData(
            f"{len(faults)} of {len(rows)} rows cannot be trained on (counted from 0): {first}"
            f"{'; ...' if len(faults) > 3 else ''}. Mend these rows or take them out."
        )
    for remark, numbers in remarks.items():
        print(f"llava-clipmoe: rows {remark}: {len(numbers)}, first {_name(rows, numbers[0])}.", file=sys.stderr)


def _name(rows: list[Any], number: int) -> str:
    known = isinstance(rows[number], dict) and "id" in rows[number]
    return f"row {number} (id {rows[number]['id']})" if known else f"row {number}"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def _picture_fault(row: dict[str, Any]) -> str | None:
    """What is wrong with `image`; None when it is one path, or when there is none, which is then also written so."""
    if "image" not in row:
        return None
    picture = row["image"]
    if isinstance(picture, list):
        if len(picture) > 1:
            return f"has {len(picture)} pictures, and LLaVA reads one a row"
        picture = row["image"] = picture[0] if picture else None
    if picture is None or picture == "" or picture != picture:  # the last: NaN, which is a table's null
        del row["image"]
    elif not isinstance(picture, str):
        return f'has no path as its "image": {_shown(picture)}'
    return None


def _turns_fault(row: dict[str, Any], style: str) -> str | None:
    """Why upstream's function for `style` would die of the turns, or see another number of pictures than there is."""
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return f'has no list of turns as its "conversations": {_shown(turns)}'
    try:
        values = [turn["value"] for turn in turns]
        roles = [turn["from"] for turn in turns] if style != "plain" else []
        strange, empty = set(roles) - {"human", "gpt"}, not "".join(values).strip()
    except (KeyError, TypeError):
        return f'has a turn that is not {{"from": ..., "value": a text}}: {_shown(_unreadable(turns, style))}'
    if empty:
        return "has no text"  # upstream's sampler asks every row for a length
    if style == "plain":
        return _plain_fault("image" in row, values)
    if strange:
        return f"has turns from {', '.join(sorted(map(repr, strange)))}, which must be from 'human' and 'gpt'"
    if style != "v0":
        skipped = roles[0] == "gpt"  # upstream leaves a first turn of gpt's out
        values, roles = values[skipped:], roles[skipped:]
        if roles != (["human", "gpt"] * len(roles))[: len(roles)]:
            return "has turns in which human and gpt do not alternate"
        if style == "llama_2" and values[:1] == [""]:
            return "has an empty first question, of which --version llama_2 dies"
    return _token_fault(sum(IMAGE_TOKEN in value for value in values)) if "image" in row else None


def _plain_fault(has_picture: bool, values: list[str]) -> str | None:
    """Of the first turn only <image> is read, the second is the caption; it does not matter who says them."""
    if not has_picture:
        return "has no picture, which --version plain needs"
    if len(values) != 2:
        return f"has not the two turns ({IMAGE_TOKEN}, the caption) that --version plain needs, but {len(values)}"
    if IMAGE_TOKEN not in values[0]:
        return f"has no {IMAGE_TOKEN} in its first turn, which --version plain needs"
    return _token_fault(1 + (IMAGE_TOKEN in values[1]))


def _token_fault(turns_with_token: int) -> str | None:
    """Several tokens in one turn are one: upstream puts a single one at the turn's start."""
    if turns_with_token == 1:
        return None
    return f"has one picture, but {IMAGE_TOKEN} in {turns_with_token or 'none'} of the turns that are read"


def _unreadable(turns: list[Any], style: str) -> Any:
    for turn in turns:
        needed = ("value",) if style == "plain" else ("from", "value")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in needed):
            return turn
    return turns


def _remarks(row: dict[str, Any], style: str) -> list[str]:
    """What is worth saying of a row that upstream lets pass."""
    turns, remarks = row["conversations"], []
    if "image" not in row and any(IMAGE_TOKEN in turn["value"] for turn in turns):
        remarks.append(f"without a picture but with {IMAGE_TOKEN}, which is read as plain words there")
    if style not in ("plain", "v0") and (turns[-1]["from"] == "human" or len(turns) == 1):
        remarks.append("that do not end with an answer, which LLaVA's trainer ignores")
    return remarks


# ------------------------------------------------------------------------------------------------------------ pictures


def check_paths(rows: list[dict[str, Any]], data_args: Any) -> None:
    """Look for a sample of the pictures, the first and the last included; raise BadTrainingData naming the missing."""
    pictures = [row["image"] for row in rows if "image" in row]
    for setting, flag in (("image_processor", "--vision_tower"), ("image_folder", "--image_folder")):
        if pictures and getattr(data_args, setting, None) is None:
            raise BadTrainingData(f"the data has pictures, but {flag} is not given.")
    step = max(1, len(pictures) // CHECKED_PATHS)
    sample = dict.fromkeys([*pictures[::step], *pictures[-1:]])
    missing = [name for name in sample if not os.path.isfile(_path(data_args, name))]
    if missing:
        raise BadTrainingData(_missing(missing, len(sample), data_args.image_folder))


def _path(data_args: Any, name: str) -> str:
    return os.path.join(data_args.image_folder, name)  # as upstream does


def _missing(names: list[str], looked_for: int, folder: str | None) -> str:
    shown = ", ".join(name[:200] for name in names[:3]) + (" ..." if len(names) > 3 else "")
    return (
        f"{len(names)} of {looked_for} pictures that were looked for are not in {folder}: {shown}. Check "
        "--image_folder (paths in the data are relative to it), finish the download, or take these rows out."
    )


def _skip_broken(cls: type) -> None:
    if hasattr(cls.__getitem__, "skips_broken"):
        return
    upstream = cls.__getitem__

    @functools.wraps(upstream)
    def __getitem__(self, index: int) -> Any:
        for step in range(len(self.list_data_dict)):
            position = (index + step) % len(self.list_data_dict)
            try:
                return upstream(self, position)
            except Exception:
                broken = _broken_picture(self, position)
            if broken is None:
                return _again(upstream, self, position)
            _count_broken(self, position, broken)
        raise BadTrainingData("not one picture of the data can be read.")

    __getitem__.skips_broken = True
    cls.__getitem__ = __getitem__


def _broken_picture(dataset: Any, position: int) -> Exception | None:
    """What opening the row's picture as upstream does raises; None when it opens, or the row has none.

    Pillow and its plugins raise whatever they meet (ValueError, RuntimeError, struct.error, ...), so the kind of an
    error does not tell a broken picture from a fault of the program.
    """
    name = dataset.list_data_dict[position].get("image")
    if name is None:
        return None
    try:
        with Image.open(_path(dataset.data_args, name)) as picture:
            picture.convert("RGB")
    except FileNotFoundError as error:
        raise BadTrainingData(_missing([name], 1, dataset.data_args.image_folder)) from error
    except MemoryError:
        raise
    except Exception as error:
        return error
    return None


def _again(upstream: Any, dataset: Any, position: int) -> Any:
    """A second try after an error that is not the picture's: a hiccup of the disk is over, a fault of the program
    comes again, and its row is named."""
    try:
        return upstream(dataset, position)
    except Exception as error:
        name = _name(dataset.list_data_dict, position)
        print(f"llava-clipmoe: {name} could not be prepared ({type(error).__name__}).", file=sys.stderr)
        raise


def _count_broken(dataset: Any, position: int, error: Exception) -> None:
    """Say it once per picture; the next row takes its place. Raises BadTrainingData when there are too many."""
    broken = dataset.__dict__.setdefault("broken_pictures", set())  # one set in each data-loading process
    row = dataset.list_data_dict[position]
    if position not in broken:
        broken.add(position)
        print(
            f"llava-clipmoe: skipped row {row.get('id', position)}: {row.get('image')} cannot be read "
            f"({str(error) or type(error).__name__}); {len(broken)} so far.",
            file=sys.stderr,
        )
    if len(broken) > max(MIN_BAD, MAX_BAD_SHARE * len(dataset.list_data_dict)):
        raise BadTrainingData(
            f"{len(broken)} pictures cannot be read, more than {MAX_BAD_SHARE:.0%} of the data (the last: "
            f"{row.get('image')}: {error}). Something is wrong with the download in {dataset.data_args.image_folder}."
        ) from error
