"""Which columns of a table are the image, the captions and the key, and what their cells say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llava_clipmoe.files import replace_surrogates
from train_encoder.config import DataConfig

from .decode import DataError

# Looked for in this order, whatever their case. `conversations` is the shape of LLaVA and ShareGPT4V.
IMAGE_COLUMNS = (
    "image image_path img img_path filepath file_path filename file_name file image_file image_name image_filepath "
    "path jpg jpeg png webp images image_paths"
).split()
CAPTION_COLUMNS = (
    "conversations captions caption texts text sentences sentence raw txt title description alt_text"
).split()
KEY_COLUMNS = ("key", "__key__", "image_id", "id")


@dataclass(frozen=True)
class Columns:
    image: str
    captions: tuple[str, ...]
    key: str | None
    status: str | None  # img2dataset's: failed downloads are rows too

    def wanted(self, by_name: bool) -> list[str]:
        """The columns to read besides images that are stored inside (by_name: the image column holds paths)."""
        names = [self.image if by_name else None, *self.captions, self.key, self.status]
        return list(dict.fromkeys(name for name in names if name))


def find_columns(available: Sequence[str], config: DataConfig) -> Columns:
    """The columns to read: those that `config` names, else those with a well-known name. Raises DataError."""
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
        raise DataError(
            f"{config.source} has {what}; its columns are: {name_columns(available)}. "
            "Name them with data.image_column and data.caption_columns."
        )
    twice = [name for name in (image, *captions) if list(available).count(name) > 1]
    if twice:
        raise DataError(
            f"{config.source} has more than one column called {twice[0]!r}: which one is meant? "
            "Give them different names."
        )
    return Columns(image, tuple(captions), first(KEY_COLUMNS), first(["status"]))


def name_columns(columns: Sequence[str]) -> str:
    """The columns of a table as a message shows them."""
    shown = [name if len(name) <= 60 else name[:57] + "..." for name in columns[:30]]
    return ", ".join(shown + ["..."] * (len(columns) > 30))


def caption_texts(value: Any) -> list[str]:
    """The captions in one cell: a text, a list of texts, {"raw": text}, or a conversation's first answer.

    Half a surrogate pair (of an emoji that was cut) becomes U+FFFD.
    """
    if value is None or value != value:  # NaN: pandas' missing text
        return []
    if isinstance(value, dict):
        texts = (caption_texts(value[key]) for key in ("raw", "caption", "text", "value") if value.get(key))
        return next(texts, [])
    if isinstance(value, list):
        if value and isinstance(value[0], dict) and "from" in value[0]:
            # Later answers of a LLaVA conversation reply to questions; only the first describes the image.
            answers = (turn for turn in value if isinstance(turn, dict) and turn.get("from") == "gpt")
            return next((caption_texts(turn.get("value")) for turn in answers), [])
        return [text for item in value for text in caption_texts(item)]
    return [replace_surrogates(str(value))]


SEVERAL = object()


def image_name(value: Any) -> Any:
    """The path in an image cell (a text, {"path": text}, or a list of one), None, or SEVERAL for a list of more."""
    if isinstance(value, list):
        return SEVERAL if len(value) > 1 else image_name(value[0]) if value else None
    if isinstance(value, dict):
        value = value.get("path")
    return value if isinstance(value, str) and value else None


def visible(name: str) -> str:
    """A file's name as text that can be stored and printed; bytes that are not UTF-8 as escapes ("caf\\udce9.png")."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode("utf-8")
