"""What training reads: rows of images and captions, decoded, checked, cached and batched.

    source = open_source(DataConfig(source="train.csv"))              # train_encoder.sources
    good = check_images(source, workers=8, max_bad_fraction=0.01, skipped_path=run / "skipped.jsonl")
    dataset = EncoderDataset(source, tokenizer, ImageTransform(336), context_length=248, captions="random", seed=0)
    loader = DataLoader(dataset, batch_sampler=..., num_workers=8, collate_fn=collate)

Decoding and tokenising happen in the loader's workers. Which caption a row shows depends only on (seed, row, epoch).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.files import atomic_file, write_text
from train_encoder.config import DataConfig
from train_encoder.image_files import readable_formats

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


class BadImage(Exception):
    """An image that is missing, corrupt or over-large; the message names the cause."""


class DataError(ValueError):
    """A data source that cannot be used; the message names the cause and what to do next."""


# Pillow refuses a PNG with a text or colour profile of more than 1 MiB, which editors write. In all they may have 64.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


# --- decoding -------------------------------------------------------------------------------------------------------


def decode_image(file: BinaryIO, max_pixels: int, formats: Sequence[str] | None = None) -> Image.Image:
    """Decodes the first frame of an image file, upright and in RGB; transparent pixels lie on white.

    formats: Pillow's names of the only formats to try (default: all that it decodes itself, starting no program).
    Raises BadImage when the header promises more than `max_pixels` (nothing is decoded then), or when the file is
    corrupt or cut short.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # Pillow's limit would refuse what the settings allow
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged EXIF, which is handled, and large images: next line
            image = Image.open(file, formats=formats or readable_formats())
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"too large: {width} x {height} pixels in its header, over max_pixels={max_pixels}")
            image.load()
            return _to_rgb(_upright(image))
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: over max_pixels={max_pixels} by its header ({error})") from error
    except UnidentifiedImageError as error:
        raise BadImage("corrupt: no picture of a format that is read here") from error
    except Exception as error:  # Pillow's decoders raise almost anything on damaged bytes; no worker may die of it
        raise BadImage(f"corrupt: {type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation (tag 0x0112). Damaged EXIF does not make the pixels wrong, so it is ignored."""
    turns = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}  # fmt: skip
    try:
        turn = turns.get(image.getexif().get(0x0112))
    except Exception:  # the same wide range of errors as above, and the same reason
        logger.debug("EXIF data of an image cannot be read; taken as upright")
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" and image.getextrema()[1] <= 1:  # floats from 0 to 1, which convert() would make black
        image = image.point(lambda value: value * 255)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own convert() would clip to white
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


class ImageStore(Protocol):
    def open(self, row: int, name: str) -> BinaryIO: ...


class PairSource:
    """Image-caption rows, one row an image; all captions of the same image path belong to one row.

    `fingerprint` names the data (source, sizes, first and last rows): a run resumes only on the same data.
    `dropped_empty` counts the images left out because all their captions were blank, `dropped_imageless` the table
    rows that name no image, `dropped_several` those that name more than one.
    """

    def __init__(
        self,
        names: pa.ChunkedArray,
        texts: pa.ChunkedArray,
        text_rows: np.ndarray,
        store: ImageStore,
        config: DataConfig,
        *,
        by_name: bool,
        size: int = 0,
        several: int = 0,
    ) -> None:
        """names [rows] (null: no image); texts [captions], text_rows [captions] the row of each, ascending in a column.

        `by_name`: rows of one name are one image. `size`: bytes of the data files, for the fingerprint. `several`: how
        many of the rows without a name have more than one image.
        Raises DataError when no image has a caption.
        """
        image_of_row, row_of_image = _images_of_rows(names, by_name)
        image_of_text = image_of_row[text_rows]
        # Some character that str.strip keeps: found without a trimmed copy of all texts.
        filled = pc.match_substring_regex(texts, r"[^\s\p{Z}\p{Cc}]").fill_null(False).to_numpy()
        kept = np.flatnonzero(filled & (image_of_text >= 0))
        counts = np.bincount(image_of_text[kept], minlength=len(row_of_image))
        self._order = kept[np.argsort(image_of_text[kept], kind="stable")]  # texts, image by image
        stop = None if config.limit is None else config.limit + 1
        self._offsets = np.concatenate([[0], np.cumsum(counts[counts > 0])])[:stop]
        self._row_of_image = row_of_image[counts > 0][: config.limit]
        self._names, self._texts, self._store = names, texts, store
        self.max_pixels = config.max_pixels
        self.dropped_empty = int((counts == 0).sum())
        self.dropped_imageless, self.dropped_several = int(names.null_count) - several, several
        self._report_dropped(config)
        self.fingerprint = self._fingerprint(config, size)

    def _report_dropped(self, config: DataConfig) -> None:
        dropped = {"images without a caption": self.dropped_empty, "rows without an image": self.dropped_imageless,
                   "rows with several images": self.dropped_several}  # fmt: skip
        text = " and ".join(f"{count} {what}" for what, count in dropped.items() if count)
        if len(self) == 0:
            raise DataError(f"{config.source} has no image with a caption ({text or 'it is empty'}). Check "
                            "data.image_column, data.caption_columns and data.limit.")  # fmt: skip
        if text:
            logger.warning("%s: left out %s", config.source, text)

    def _fingerprint(self, config: DataConfig, size: int) -> str:
        ends = [(self.name(i), self.captions(i)) for i in (0, len(self) - 1)]
        # The source's last part only: a data folder that was moved is still the same data.
        return _digest(Path(config.source).name, config.split, size, len(self), int(self._offsets[-1]), ends)

    @property
    def images_fingerprint(self) -> str:
        """Names the images and their order, whatever captions are read with them."""
        some = range(0, len(self), max(1, len(self) // 1000))
        return _digest(len(self), [self.name(i) for i in some])

    def __len__(self) -> int:
        return len(self._row_of_image)

    def name(self, i: int) -> str:
        """Path or key of image i."""
        return self._names[int(self._row_of_image[i])].as_py()

    def captions(self, i: int) -> list[str]:
        """All captions of image i: at least one, none blank, stripped."""
        return [self._texts[int(t)].as_py().strip() for t in self._order[self._offsets[i] : self._offsets[i + 1]]]

    def image(self, i: int) -> Image.Image:
        """Image i in RGB, read and decoded now. Raises BadImage."""
        with self._store.open(int(self._row_of_image[i]), self.name(i)) as file:
            return decode_image(file, self.max_pixels)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _images_of_rows(names: pa.ChunkedArray, by_name: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the images in order of appearance: image of each row [rows] (-1: none), a row of each image."""
    present = names.is_valid().to_numpy()
    image_of_row = np.where(present, np.cumsum(present) - 1, -1)
    if by_name:
        codes = names.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if codes.max(initial=-1) < image_of_row.max():  # else every path is unique and there is nothing to group
            image_of_row = codes.astype(np.int64)
    row_of_image = np.zeros(image_of_row.max() + 1, np.int64)
    rows = np.flatnonzero(present)
    row_of_image[image_of_row[rows]] = rows
    return image_of_row, row_of_image


# --- pixels and tokens ----------------------------------------------------------------------------------------------

# A strip of 1 x 10,000 pixels would become 336 x 3,360,000 on its way to a centre crop of 336 x 336.
MAX_ASPECT = 32


@dataclass(frozen=True)
class ImageTransform:
    """CLIP's preprocessing short of the float part: shorter side to `size` (bicubic), centre crop, uint8.

    Rounds as OpenAI's code does (torchvision), so the pixels are the ones that the pretrained weights have seen.
    """

    size: int

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image -> uint8 [3, size, size]."""
        short = min(image.size)
        if max(image.size) > MAX_ASPECT * short:
            image = self._centre_crop(image, *(min(side, MAX_ASPECT * short) for side in image.size))
        width, height = (self.size * side // short for side in image.size)
        image = self._centre_crop(image.resize((width, height), Image.Resampling.BICUBIC), self.size, self.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    @staticmethod
    def _centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        return image.crop((left, top, left + width, top + height))


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 [B,3,H,W] -> float32 [B,3,H,W] on the same device: (pixels / 255 - mean) / std, by channel."""
    mean_3, std_3 = (_channels(tuple(v), pixels.device) for v in (mean, std))
    # In place: a batch of 336 px pictures is large, and each temporary copy costs as much as the arithmetic.
    return pixels.to(torch.float32, copy=True).div_(255).sub_(mean_3).div_(std_3)


@functools.lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[3,1,1] on the device; kept, as sending it there in every step is a wait for a GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def choose_caption(captions: Sequence[str], how: str, seed: int, row: int, epoch: int) -> str:
    """The caption of a row in an epoch; the same whatever process asks, and in whatever order."""
    if how == "first":
        return captions[0]
    if how == "longest":
        return max(captions, key=len)
    if how != "random":
        raise ValueError(f"captions={how!r} is not one of: random, first, longest.")
    return captions[int(np.random.SeedSequence([seed, row, epoch]).generate_state(1)[0]) % len(captions)]


def first_sentence(caption: str) -> str:
    """The caption up to the end of its first sentence: the short caption of Long-CLIP and CLIP-FMoE.

    Long-CLIP's rule (the text before the first full stop that a space follows), and a line's end.
    """
    return re.split(r"(?<=\S)\.\s|\n", caption.strip(), maxsplit=1)[0].strip()


class EncoderDataset(Dataset):
    """Rows as training wants them; images are decoded and captions tokenised where it is called, in the workers."""

    def __init__(
        self,
        source: PairSource,
        tokenizer: Any,
        transform: ImageTransform,
        context_length: int,
        captions: Literal["random", "first", "longest"],
        seed: int,
        cache: Path | None = None,
        short: bool = False,
    ) -> None:
        """`cache`: a file of build_image_cache to read pixels from; DataError when it is of other data. `short`: give
        the first sentence of each caption too."""
        self.source, self.tokenizer, self.transform = source, tokenizer, transform
        self.context_length, self.captions, self.seed = context_length, captions, seed
        self._cache = None if cache is None else ImageCache(cache, source, transform)
        self.short = short

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """`key`: a row, or (row, epoch). Gives row, pixels (uint8 [3,S,S]; None for a bad image, whose cause is in
        `error`), tokens (BOS .. EOT) and truncated. A bad image does not raise."""
        row, epoch = (int(k) for k in key) if isinstance(key, (tuple, list)) else (int(key), 0)
        pixels, error = None, None
        try:
            pixels = self.transform(self.source.image(row)) if self._cache is None else self._cache.read(row)
        except BadImage as bad:
            error = str(bad)
        caption = choose_caption(self.source.captions(row), self.captions, self.seed, row, epoch)
        tokens, truncated = self.tokens(caption)
        found = {"row": row, "pixels": pixels, "tokens": tokens, "truncated": truncated, "error": error}
        return found | {"short": self.tokens(first_sentence(caption))[0]} if self.short else found

    def tokens(self, caption: str) -> tuple[list[int], bool]:
        """BOS, the caption and EOT, at most context_length tokens (the last is always EOT); whether text was lost."""
        ids = self.tokenizer(caption, verbose=False)["input_ids"]  # not verbose: length is our business
        if len(ids) <= self.context_length:
            return ids, False
        return [*ids[: self.context_length - 1], ids[-1]], True

    def count_truncated(self, rows: Sequence[int] | np.ndarray | None = None) -> tuple[int, int]:
        """How many captions of `rows` (default: all) are longer than context_length, and how many there are."""
        rows = range(len(self.source)) if rows is None else rows
        cut = [self.tokens(caption)[1] for row in rows for caption in self.source.captions(int(row))]
        return sum(cut), len(cut)


@dataclass
class Batch:
    """B rows, T tokens of the longest caption, S pixels a side. B is smaller than asked for when images were bad."""

    pixel_values: torch.Tensor  # uint8 [B,3,S,S]
    input_ids: torch.Tensor  # int64 [B,T], padded with EOT as CLIP does
    attention_mask: torch.Tensor  # int64 [B,T], 0 on padding
    rows: torch.Tensor  # int64 [B]
    bad: list[tuple[int, str]]  # (row, error) of images that could not be read
    truncated: int  # captions of this batch that were cut to the context length
    short_ids: torch.Tensor | None = None  # int64 [B,T'], the captions' first sentences, where they are asked for

    @property
    def texts(self) -> list[torch.Tensor]:
        """Ids of every caption an image has: the whole one, then its first sentence."""
        return [self.input_ids] if self.short_ids is None else [self.input_ids, self.short_ids]

    def pin_memory(self) -> Batch:  # DataLoader(pin_memory=True) looks for this name
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in values.items()})


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    """Rows of EncoderDataset -> Batch. A bad image's row is left out, not replaced: a second copy of another row
    would be a false negative. `len(batch.rows)` may be 0."""
    good = [row for row in rows if row["pixels"] is not None]
    input_ids, lengths = _padded([row["tokens"] for row in good])
    short = [row["short"] for row in good if "short" in row]
    return Batch(
        pixel_values=torch.stack([row["pixels"] for row in good]) if good else torch.empty(0, 3, 0, 0).byte(),
        input_ids=input_ids,
        attention_mask=(torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        rows=torch.tensor([row["row"] for row in good], dtype=torch.int64),
        bad=[(row["row"], row["error"]) for row in rows if row["pixels"] is None],
        truncated=sum(row["truncated"] for row in good),
        short_ids=_padded(short)[0] if short else None,
    )


def _padded(captions: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token lists -> ids [B,T] padded with each one's last token (EOT), and lengths [B]."""
    lengths = torch.tensor([len(ids) for ids in captions], dtype=torch.int64)
    longest = int(lengths.max()) if len(captions) else 0
    padded = [ids + ids[-1:] * (longest - len(ids)) for ids in captions]
    return torch.tensor(padded, dtype=torch.int64).view(len(captions), longest), lengths


# --- one pass over all images: check, cache -------------------------------------------------------------------------


class _Scan(Dataset):
    """Decodes rows one by one; writes them into the .npy file `pixels` where there is one."""

    def __init__(self, source: PairSource, rows: np.ndarray, transform: ImageTransform | None, pixels: Path | None):
        self.source, self.rows, self.transform, self.pixels = source, rows, transform, pixels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, slot: int) -> tuple[int, str | OSError | None]:
        """A row, and why its image is bad or its pixels were not written. Returned, not raised: a loader would wrap the
        error in a worker's traceback."""
        row = int(self.rows[slot])
        try:
            image = self.source.image(row)
        except BadImage as error:
            return row, str(error)
        try:
            if self.pixels is not None:
                self._write(slot, self.transform(image).numpy())
        except OSError as error:
            return row, error
        return row, None

    def _write(self, slot: int, values: np.ndarray) -> None:
        """Written with `write`, not through a memory map: a full disk is then an error and not a dead process."""
        with open(self.pixels, "r+b") as file:  # for each image: workers write disjoint slots
            file.seek((slot - len(self)) * values.nbytes, os.SEEK_END)
            file.write(values.tobytes())


def _bad_rows(scan: _Scan, workers: int, progress: Progress | None) -> Iterator[tuple[int, str]]:
    # A generator of its own: a loader draws from torch's global one, and a resumed run, which does not scan, would
    # then train on other random numbers.
    loader = DataLoader(scan, batch_size=32, num_workers=workers, collate_fn=list, generator=torch.Generator())
    done = 0
    for results in loader:
        for row, error in results:
            if isinstance(error, OSError):
                raise error
            if error is not None:
                yield row, error
        done += len(results)
        if progress is not None:
            progress(done, len(scan))


def build_image_cache(
    source: PairSource,
    rows: np.ndarray,
    transform: ImageTransform,
    path: Path,
    *,
    workers: int,
    progress: Progress | None = None,
) -> list[tuple[int, str]]:
    """Writes the transformed images of `rows` to `path`, a memory-mapped uint8 .npy [len(rows),3,S,S].

    `path` appears only when it is complete; beside it `path` + `.index.npz` says which row lies where and of what
    data. Gives (row, error) of bad images, whose slots stay unused. Raises DataError when the disk has no room, and
    SaveError when others fill it meanwhile.
    """
    rows, path = np.asarray(rows, np.int64), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(rows), 3, transform.size, transform.size)
    need, free = int(np.prod(shape)), shutil.disk_usage(path.parent).free
    if need > free:  # said now, and not hours later
        raise DataError(f"The image cache {path} needs {need / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free. Free "
                        "some space, or train without data.cache_images.")  # fmt: skip
    index = _cache_index(path)
    with atomic_file(path) as temporary:
        np.lib.format.open_memmap(temporary, "w+", np.uint8, shape).flush()
        bad = list(_bad_rows(_Scan(source, rows, transform, temporary), workers, progress))
        index.unlink(missing_ok=True)  # an index never stands beside pixels that it does not describe
    slots = np.full(len(source), -1, np.int64)
    slots[rows] = np.arange(len(rows))
    slots[[row for row, _ in bad]] = -1
    _save_arrays(index, slots=slots, key=_key(source, transform))
    return bad


class ImageCache:
    """Reads what build_image_cache wrote."""

    def __init__(self, path: Path, source: PairSource, transform: ImageTransform) -> None:
        stored = _load_arrays(_cache_index(path), _key(source, transform))
        if stored is None or not path.exists():
            raise DataError(f"{path} is not a complete image cache of this data at {transform.size} pixels. Delete it "
                            "and build it again, or train without data.cache_images.")  # fmt: skip
        self._path, self._slots = path, stored["slots"]
        self._pixels: np.ndarray | None = None

    def read(self, row: int) -> torch.Tensor:
        """uint8 [3,S,S]. Raises BadImage for a row that is not in the cache."""
        if self._slots[row] < 0:
            raise BadImage(f"not in the image cache {self._path}: bad, or left out, when it was built")
        if self._pixels is None:
            self._pixels = np.load(self._path, mmap_mode="r")
        return torch.from_numpy(np.array(self._pixels[self._slots[row]]))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # a pickled memmap would carry all its pixels to each worker


def check_images(
    source: PairSource,
    *,
    workers: int,
    max_bad_fraction: float,
    skipped_path: Path,
    progress: Progress | None = None,
    transform: ImageTransform | None = None,
    cache: Path | None = None,
) -> np.ndarray:
    """Decodes every image once; gives a bool mask of the good rows [N].

    Writes the bad ones to `skipped_path`, a JSON line {"row", "image", "error"} each, and its result to a .npz of the
    same name, from which the next call on the same data reads it back. With `cache` (and `transform`) the same pass
    builds the image cache there. Raises DataError when more than `max_bad_fraction` of the images are bad.
    """
    skipped_path, rows = Path(skipped_path), np.arange(len(source))
    result, key = skipped_path.with_suffix(".npz"), _key(source)
    stored = _load_arrays(result, key)
    if cache is not None:
        if transform is None:
            raise ValueError("check_images builds an image cache only with a transform: pass both.")
        if not Path(cache).exists() or _load_arrays(_cache_index(cache), _key(source, transform)) is None:
            stored = None
    if stored is not None:
        bad = list(zip(stored["rows"].tolist(), stored["errors"].tolist(), strict=True))
    elif cache is not None:
        bad = build_image_cache(source, rows, transform, cache, workers=workers, progress=progress)
    else:
        bad = list(_bad_rows(_Scan(source, rows, None, None), workers, progress))
    bad_rows = np.array([row for row, _ in bad], np.int64)
    if stored is None or not skipped_path.exists():  # of several processes, only the one that looked writes
        lines = [json.dumps({"row": row, "image": source.name(row), "error": error}) + "\n" for row, error in bad]
        write_text(skipped_path, "".join(lines))
        _save_arrays(result, key=key, rows=bad_rows, errors=np.array([error for _, error in bad], str))
    _refuse_too_many(source, bad, max_bad_fraction, skipped_path)
    return ~np.isin(rows, bad_rows)


def _refuse_too_many(source: PairSource, bad: list[tuple[int, str]], limit: float, skipped_path: Path) -> None:
    if not bad:
        return
    share, names = len(bad) / len(source), ", ".join(source.name(row) for row, _ in bad[:3])
    summary = f"{len(bad)} of {len(source)} images ({share:.1%}) are bad, first: {names}. All are in {skipped_path}."
    if share <= limit:
        logger.warning("%s They are skipped.", summary)
        return
    missing = sum(error.startswith("missing") for _, error in bad) * 2 > len(bad)
    hint = "Most are missing: is data.image_root right? If so, repair" if missing else "Repair"
    raise DataError(f"{summary} The first is {bad[0][1]}. {hint} them, or raise "
                    f"data.max_bad_fraction (now {limit}).")  # fmt: skip


def _key(source: PairSource, transform: ImageTransform | None = None) -> str:
    """What a stored result belongs to."""
    # By the images alone: the base may train on other captions of the same pictures, from the same cache.
    return f"{source.images_fingerprint} max_pixels={source.max_pixels}" + (
        f" size={transform.size}" if transform else ""
    )


def _cache_index(path: Path) -> Path:
    return Path(f"{path}.index.npz")


def _save_arrays(path: Path, **arrays: Any) -> None:
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _load_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Arrays of a .npz, or None where it is absent, unreadable or of another key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        logger.warning("%s is damaged (%s); its work is done again", path, error)
        return None
    return arrays if str(arrays.get("key")) == key else None
