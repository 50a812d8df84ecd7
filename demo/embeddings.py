"""Encode pictures once under every eye; what is encoded stays on disk for the next run.

    towers = open_towers("runs/quickstart/base", "runs/quickstart/clip-moe", "clip-moe")
    encoded = encode_pictures(pictures, towers, Path("runs/pairs/cache"))
    encoded.eyes["dense"]                # [N,P] fp16, memory-mapped; a skipped picture's row is 0

`train_encoder.features` encodes a source under ONE model, with captions, and would decode every picture once a model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from demo.images import Pictures, looks
from llava_clipmoe.files import SaveError, read_json, remove_leftovers, write_json
from llava_clipmoe.load import load_bundle
from llava_clipmoe.model_directory import local_directory, read_config
from llava_clipmoe.transformer_clipmoe import only_expert
from train_encoder.config import digest
from train_encoder.data.decode import BadImage, ImageTransform
from train_encoder.data.pairs import DataError
from train_encoder.features.encode import NotFinite, Precision, encode_images, pick_device
from train_encoder.progress import Bar

FORMAT = 1
"""Raise it when the same models and pictures give other numbers."""
FLUSH_SECONDS = 10.0
"""A killed run repeats at most so much work."""
MAX_BAD = 0.5
"""Share of unreadable pictures that stops the run: then it is the wrong folder, or a broken disk."""
DENSE, MOE, DINOV2 = "dense", "clip-moe", "dinov2"


# --- eyes -----------------------------------------------------------------------------------------------------------


class Tower(Protocol):
    """One model; `eyes` are the ways in which it looks."""

    name: str
    eyes: tuple[str, ...]
    fingerprint: str
    view: str
    """Towers of one view want the same pixels: they are made once."""

    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]: ...

    def encode(self, eye: str, pixels: torch.Tensor, device: torch.device, precision: Precision) -> torch.Tensor: ...


class ClipTower:
    """A dense CLIP (one eye), or a CLIP-MoE: its mixture and every expert alone. The weights are read when needed."""

    def __init__(self, source: str, *, dense: bool) -> None:
        """Raises FileNotFoundError where there is no model, ValueError where it is of the other kind."""
        self.directory = local_directory(source)
        config = read_config(self.directory)
        if config.is_dense != dense:
            flag, is_a, other = ("dense", "CLIP-MoE", "moe") if dense else ("moe", "dense CLIP", "dense")
            raise ValueError(f"--{flag} {source} is a {is_a}. Give a {'dense CLIP' if dense else 'CLIP-MoE'} there, "
                             f"and this one as --{other}.")  # fmt: skip
        self.name = self.directory.resolve().name
        experts = () if dense else tuple(f"expert{e}" for e in range(config.num_experts))
        self.eyes = (DENSE,) if dense else (MOE, *experts)
        self.fingerprint = weights_fingerprint(self.directory)
        self.size = config.vision_config.image_size
        self.view = f"clip {self.size}"
        self._bundle: Any = None

    def preprocess(self) -> ImageTransform:
        return ImageTransform(self.size)

    def encode(self, eye: str, pixels: torch.Tensor, device: torch.device, precision: Precision) -> torch.Tensor:
        """uint8 [B,3,R,R] -> L2-normalised [B,P] fp32 on the CPU. Raises NotFinite."""
        if self._bundle is None:
            self._bundle = load_bundle(self.directory)
            self._bundle.model.text_model = None  # a third of the memory, and never asked here
        settings = {"device": device, "precision": precision, "batch_size": len(pixels)}
        if eye in (DENSE, MOE):
            return encode_images(self._bundle, pixels, **settings)
        with only_expert(self._bundle.model, int(eye.removeprefix("expert"))):
            return encode_images(self._bundle, pixels, **settings)


class DinoTower:
    """DINOv2 (or any transformers vision model with a class token) as the reference eye; Tong et al. 2024, MMVP."""

    eyes = (DINOV2,)
    view = DINOV2

    def __init__(self, source: str) -> None:
        """Raises FileNotFoundError where there is no model."""
        self.directory = local_directory(source)
        self.name = self.directory.resolve().name
        if not list(self.directory.glob("*.safetensors")):
            raise FileNotFoundError(f"{source} has no safetensors weights, and a pickled file is not read. Save the "
                                    "model again with a current transformers (model.save_pretrained).")  # fmt: skip
        self.fingerprint = weights_fingerprint(self.directory)
        self._model: Any = None

    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(self.directory, local_files_only=True)
        return lambda image: torch.as_tensor(np.asarray(processor(images=image)["pixel_values"][0]))

    def encode(self, eye: str, pixels: torch.Tensor, device: torch.device, precision: Precision) -> torch.Tensor:
        """float [B,3,R,R] -> the class token, L2-normalised [B,P] fp32 on the CPU. Raises NotFinite."""
        if self._model is None:
            from transformers import AutoModel

            read = {"local_files_only": True, "use_safetensors": True}
            self._model = AutoModel.from_pretrained(self.directory, **read).to(device).eval()
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), autocast:
            tokens = self._model(pixel_values=pixels.to(device)).last_hidden_state
        found = F.normalize(tokens[:, 0].float(), dim=-1).cpu()
        if not found.isfinite().all():
            raise NotFinite(f"{self.name} gave NaN or infinite embeddings: its weights are damaged.")
        return found


def open_towers(dense: str, moe: str, reference: str) -> list[Tower]:
    """The towers of a mining run. `reference`: "clip-moe", "experts", or a DINOv2 directory or hub id."""
    towers: list[Tower] = [ClipTower(dense, dense=True), ClipTower(moe, dense=False)]
    return towers if reference in (MOE, "experts") else [*towers, DinoTower(reference)]


def weights_fingerprint(directory: Path) -> str:
    """A hash of all that makes a model's answers: every byte of its weights and configurations."""
    found = hashlib.sha256()
    names = ("config.json", "preprocessor_config.json", "*.safetensors", "*.index.json", "pytorch_model*.bin")
    for path in sorted({path for name in names for path in directory.glob(name)}):
        found.update(os.fsencode(path.name))
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                found.update(part)
    return found.hexdigest()[:16]


# --- the files ------------------------------------------------------------------------------------------------------


class Store:
    """One array [N, width] on disk that grows from the first row on, and a JSON file that says how far it is."""

    def __init__(self, folder: Path, name: str, key: str, count: int, dtype: str) -> None:
        self.path, self.progress = (folder / f"{name}-{key}{suffix}" for suffix in (".npy", ".json"))
        self.count, self.dtype, self.state = count, np.dtype(dtype), {"done": 0, "bad": {}}
        self._file: Any = None
        if self.progress.exists() and self._fits():
            self.state = read_json(self.progress)

    @property
    def done(self) -> int:
        return self.state["done"]

    def _fits(self) -> bool:
        try:
            found = self.array()
        except (OSError, ValueError):  # missing, or cut short: made again
            return False
        return found.shape[0] == self.count and found.dtype == self.dtype

    def array(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def write(self, start: int, values: np.ndarray) -> None:
        """Rows from `start` on; they count once `flush` has been called.

        Written with `write`, not through a memory map: a full disk is then an error and not a dead process.
        """
        try:
            if self._file is None:
                if self.done == 0:
                    self.progress.unlink(missing_ok=True)
                    shape = (self.count, values.shape[1])
                    self._refuse_full_disk(self.count * values.shape[1] * self.dtype.itemsize)
                    np.lib.format.open_memmap(self.path, "w+", self.dtype, shape)
                self._offset = self.array().offset
                self._file = self.path.open("r+b")
            self._file.seek(self._offset + start * values.shape[1] * self.dtype.itemsize)
            self._file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        except OSError as error:
            raise self._no_space(error) from error

    def flush(self, done: int, bad: dict[str, str] | None = None) -> None:
        """All rows before `done` are on the disk now, and the progress file says so."""
        if self._file is None or done <= self.done:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._no_space(error) from error
        self.state = {"done": done, "bad": bad or {}}
        write_json(self.progress, self.state)

    def _refuse_full_disk(self, need: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise SaveError(f"the embeddings in {self.path.parent} need {need / 1e9:.1f} GB more, but "
                            f"{free / 1e9:.1f} GB are free. Free some space, or give another --cache.")  # fmt: skip

    def _no_space(self, error: OSError) -> SaveError:
        if isinstance(error, SaveError):
            return error
        return SaveError(f"could not write embeddings to {self.path}: {error}. What was finished is kept: free some "
                         "space and run the same command again.")  # fmt: skip


# --- one pass over the pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """Pictures under every eye: N rows each, memory-mapped. A skipped picture has a row of zeros."""

    eyes: dict[str, np.ndarray]
    looks: np.ndarray
    bad: dict[int, str]
    """Why a picture was skipped."""
    encoded: int
    """Pictures that were decoded by this run: 0 where all came from the cache."""


class _Decoded(Dataset):
    """A picture's number -> its looks and its pixels by view, or the error; made in the loader's workers."""

    def __init__(self, pictures: Pictures, views: dict[str, Callable]) -> None:
        self.pictures, self.views = pictures, views

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            image = self.pictures.image(i)
        except BadImage as error:
            return {"row": i, "error": str(error)}
        return {"row": i, "looks": looks(image), "pixels": {view: make(image) for view, make in self.views.items()}}


def _collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacked in the worker: a batch then travels as a few tensors and not as hundreds."""
    good = [item for item in items if "error" not in item]
    views = good[0]["pixels"] if good else ()
    return {
        "rows": np.array([item["row"] for item in items]),
        "good": np.array(["error" not in item for item in items]),
        "bad": {str(item["row"]): item["error"] for item in items if "error" in item},
        "looks": np.stack([item["looks"] for item in good]) if good else None,
        "pixels": {view: torch.stack([item["pixels"][view] for item in good]) for view in views},
    }


def encode_pictures(
    pictures: Pictures,
    towers: Sequence[Tower],
    cache: Path,
    *,
    device: str = "auto",
    precision: Precision = "fp32",
    batch_size: int = 64,
    workers: int = 0,
) -> Encoded:
    """Every picture under every eye of `towers`, each decoded once; what `cache` has of them is kept.

    Other pictures, weights or precision have another key there, so nothing stale is ever read; another batch size
    has not. Raises DataError when over half of the pictures cannot be read, NotFinite, SaveError (what is done is
    kept).
    """
    cache.mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache)
    count, known = len(pictures), (FORMAT, pictures.fingerprint, pictures.max_pixels)
    seen = Store(cache, "looks", digest(*known), count, "uint8")
    stores = {
        eye: Store(cache, eye, digest(*known, tower.fingerprint, precision), count, "float16")
        for tower in towers
        for eye in tower.eyes
    }
    start = min(store.done for store in (seen, *stores.values()))
    bad = dict(seen.state["bad"])
    if start < count:
        left = [tower for tower in towers if any(stores[eye].done < count for eye in tower.eyes)]
        batches = _batches(pictures, left, start, batch_size, workers)
        _encode(batches, left, stores, seen, bad, pictures, pick_device(device), precision, start)
    arrays = {eye: store.array() for eye, store in stores.items()}
    return Encoded(arrays, seen.array(), {int(row): error for row, error in bad.items()}, count - start)


def _batches(pictures: Pictures, towers: Sequence[Tower], start: int, batch_size: int, workers: int) -> DataLoader:
    views = {tower.view: tower.preprocess() for tower in towers}
    rows = range(start, len(pictures))
    return DataLoader(_Decoded(pictures, views), batch_size, sampler=rows, num_workers=workers, collate_fn=_collate)


def _encode(batches, towers, stores, seen, bad, pictures, device, precision, start) -> None:
    count, flushed, stop = len(pictures), time.monotonic(), start
    with Bar("encoding", count, completed=start) as bar:
        for batch in batches:
            begin, stop, good = int(batch["rows"][0]), int(batch["rows"][-1]) + 1, batch["good"]
            bad.update(batch["bad"])
            _refuse_too_many(bad, pictures)
            for tower in towers:
                for eye in tower.eyes:
                    if stop > stores[eye].done and good.any():
                        found = tower.encode(eye, batch["pixels"][tower.view], device, precision)
                        stores[eye].write(begin, _spread(found.numpy(), good))
            if stop > seen.done and good.any():
                seen.write(begin, _spread(batch["looks"], good))
            if time.monotonic() - flushed >= FLUSH_SECONDS or stop == count:
                for store in (*stores.values(), seen):
                    store.flush(stop, bad)
                flushed = time.monotonic()
            bar.advance(len(good))


def _spread(values: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Rows of the good pictures -> rows of all, 0 for the others."""
    rows = np.zeros((len(good), values.shape[1]), values.dtype)
    rows[good] = values
    return rows


def _refuse_too_many(bad: dict[str, str], pictures: Pictures) -> None:
    if len(bad) > MAX_BAD * len(pictures):
        first = [f"{pictures.names[int(row)]} ({error})" for row, error in list(bad.items())[:3]]
        raise DataError(f"{len(bad)} of {len(pictures)} pictures cannot be read, first: {'; '.join(first)}. Is this "
                        "the right folder? Repair or remove them.")  # fmt: skip
