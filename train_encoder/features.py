"""Encode a whole data set once: L2-normalised embeddings as memory-mapped fp16 files that survive a killed run.

    embeddings = encode_source(bundle, source, run / "features" / "stage0", captions="first", device="cuda")
    embeddings.image, embeddings.text            # [N,P], [M,P]

A folder of features holds `image.npy` [N,P], `text.npy` [M,P], `text_image.npy` [M], `rows.npy` [N], while it is being
made a `progress-RANK.json` of every process, and when it is whole `features.json`. A chunk of rows is written and
flushed BEFORE the progress file names it, so a killed run repeats at most one chunk a process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import SaveError, read_json, remove_leftovers, write_json

from .config import digest
from .data import BadImage, ImageCache, ImageTransform, PairSource, normalise
from .progress import Bar

FORMAT = 1
"""Raise it when the same model and data give other numbers: features of another format are made anew."""
DONE = "features.json"
CHUNK_ROWS = 4096
"""Rows between two flushes: seconds of work on a GPU, 6 MB at 768 dimensions."""
KINDS = ("image", "text")

Captions = Literal["none", "first", "all"]
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a data set, L2-normalised, read from disk as they are used.

    image [N,P]; text [M,P]; text_image [M]: the row of `image` that a caption belongs to; rows [N]: the source's
    number of each image.
    """

    image: np.ndarray
    text: np.ndarray
    text_image: np.ndarray
    rows: np.ndarray


class NotFinite(ValueError):
    """A model gave NaN or infinite embeddings: every number computed from them would be meaningless."""


# --- one batch ------------------------------------------------------------------------------------------------------


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU; anything else is taken as it is."""
    if str(device) != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def inference(bundle: ClipBundle, device: torch.device, precision: Precision) -> Iterator[None]:
    """The model on `device`, in eval mode, without gradients, under bf16 autocast if asked; its mode is restored."""
    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision must be bf16 or fp32, got {precision!r}.")
    was_training = bundle.model.training
    bundle.model.to(device).eval()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        bundle.model.train(was_training)


def tokenise(tokenizer: Any, captions: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions -> ids [M,T] int64, padded with the end token and cut at the context, and lengths [M].

    T is the longest caption's length.
    """
    if not captions:
        return torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    encoded = tokenizer(list(captions), truncation=True, max_length=context_length)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in encoded])
    longest = int(lengths.max())
    return torch.tensor([ids + [ids[-1]] * (longest - len(ids)) for ids in encoded]), lengths


def encode_images(
    bundle: ClipBundle,
    pixels: torch.Tensor,
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 64,
) -> torch.Tensor:
    """uint8 pixels [B,3,R,R] (from ImageTransform) -> L2-normalised embeddings [B,P] fp32 on the CPU.

    Raises NotFinite.
    """
    device = pick_device(device)
    with inference(bundle, device, precision):
        parts = [_encode_pixels(bundle, part, device) for part in pixels.split(batch_size)]
    return torch.cat(parts)


def encode_texts(
    bundle: ClipBundle,
    captions: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
) -> torch.Tensor:
    """Captions -> L2-normalised embeddings [M,P] fp32 on the CPU, in the captions' order. Raises NotFinite."""
    device = pick_device(device)
    with inference(bundle, device, precision):
        ids = _sorted_ids(bundle.tokenizer, captions, bundle.context_length)
        return _encode_sorted(bundle, *ids, device, batch_size)


def _encode_pixels(bundle: ClipBundle, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    pixels = normalise(pixels.to(device, non_blocking=True), bundle.image_mean, bundle.image_std)
    return _finish(bundle.model.get_image_features(pixels), "image")


def _sorted_ids(
    tokenizer: Any, captions: Sequence[str], context_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> ids [M,T] from the longest caption to the shortest, lengths [M], and the caption's number of each row [M]."""
    ids, lengths = tokenise(tokenizer, captions, context_length)
    order = lengths.argsort(descending=True, stable=True)
    return ids[order], lengths[order], order


def _encode_sorted(
    bundle: ClipBundle,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    order: torch.Tensor,
    device: torch.device,
    batch_size: int,
) -> torch.Tensor:
    """Encode ids sorted by length, each batch trimmed to its longest; -> [M,P] in the order before sorting.

    The mask is causal and the end token is pooled, so what follows it changes nothing and can be cut.
    """
    out = torch.empty(len(ids), bundle.model.config.projection_dim)
    for start in range(0, len(ids), batch_size):
        batch = ids[start : start + batch_size, : int(lengths[start])].to(device, torch.int64, non_blocking=True)
        out[order[start : start + batch_size]] = _finish(bundle.model.get_text_features(batch), "text")
    return out


def _finish(features: torch.Tensor, kind: str) -> torch.Tensor:
    embeddings = F.normalize(features.float(), dim=-1).cpu()
    if not embeddings.isfinite().all():
        raise NotFinite(
            f"the model gave NaN or infinite {kind} embeddings. Its weights are damaged or its training diverged; "
            "if it was evaluated in bf16, try --precision fp32."
        )
    return embeddings


# --- the files ------------------------------------------------------------------------------------------------------


class _Folder:
    """The files of one encoding: created by process 0, written by all, each its own rows."""

    def __init__(self, path: Path, key: str, shapes: dict[str, tuple[int, int]], dtype: str, rank: int) -> None:
        self.path, self.key, self.shapes, self.dtype, self.rank = path, key, shapes, np.dtype(dtype), rank
        self.mine: dict[str, list[list[int]]] = {kind: [] for kind in KINDS}

    def array(self, kind: str) -> Path:
        return self.path / f"{kind}.npy"

    @property
    def progress(self) -> Path:
        return self.path / f"progress-{self.rank}.json"

    @property
    def complete(self) -> bool:
        done = self.path / DONE
        return done.exists() and read_json(done).get("key") == self.key and self._arrays_fit()

    def _arrays_fit(self) -> bool:
        try:
            found = {kind: np.load(self.array(kind), mmap_mode="r", allow_pickle=False) for kind in KINDS}
        except (OSError, ValueError):  # missing, or cut short
            return False
        return all(array.shape == self.shapes[kind] and array.dtype == self.dtype for kind, array in found.items())

    def prepare(self, text_image: np.ndarray, rows: np.ndarray) -> None:
        """Keep what an earlier run of the same work left; else start over. Process 0 only."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        progress = list(self.path.glob("progress-*.json"))
        if self._arrays_fit() and progress and all(_read_progress(p).get("key") == self.key for p in progress):
            return
        for stale in [self.path / DONE, *progress]:  # first of all: arrays without them count for nothing
            stale.unlink(missing_ok=True)
        try:
            np.save(self.path / "text_image.npy", text_image)
            np.save(self.path / "rows.npy", rows)
            for kind, shape in self.shapes.items():
                np.lib.format.open_memmap(self.array(kind), "w+", self.dtype, shape)
        except OSError as error:
            raise _no_space(self.path, error) from error

    def done_rows(self) -> dict[str, np.ndarray]:
        """True for the rows that any process has written, by kind; also takes up this process's own progress."""
        done = {kind: np.zeros(self.shapes[kind][0], bool) for kind in KINDS}
        for path in sorted(self.path.glob("progress-*.json")):
            content = _read_progress(path)
            if content.get("key") != self.key:
                continue
            for kind, start, stop in ((k, a, b) for k in KINDS for a, b in content[k]):
                done[kind][start:stop] = True
            if path == self.progress:
                self.mine = {kind: content[kind] for kind in KINDS}
        return done

    def write(self, kind: str, start: int, embeddings: torch.Tensor) -> None:
        """Rows from `start` on: to the disk first, then into the progress file.

        Written with `write`, not through a memory map: a full disk is then an error and not a dead process.
        """
        values = embeddings.numpy().astype(self.dtype)
        offset = np.load(self.array(kind), mmap_mode="r", allow_pickle=False).offset + start * values[0].nbytes
        try:
            with open(self.array(kind), "r+b") as file:
                file.seek(offset)
                file.write(values.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _no_space(self.path, error) from error
        self.mine[kind] = _merge([*self.mine[kind], [start, start + len(values)]])
        write_json(self.progress, {"key": self.key, **self.mine})

    def finish(self, facts: dict[str, Any]) -> None:
        """The mark that it is whole, then the progress files go. Process 0 only."""
        write_json(self.path / DONE, {"key": self.key, **facts})
        self.drop_progress()

    def drop_progress(self) -> None:
        for path in self.path.glob("progress-*.json"):
            path.unlink()


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError):  # it cannot be trusted, so its rows are made again
        return {}


def _merge(ranges: list[list[int]]) -> list[list[int]]:
    merged: list[list[int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return merged


def _no_space(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"could not write features to {path}: {error}. What was finished is kept: free some space and run the same "
        "command again."
    )


def open_embeddings(folder: str | Path) -> Embeddings:
    """Open a whole folder of features, memory-mapped. Raises FileNotFoundError when it is not whole."""
    folder = Path(folder)
    if not (folder / DONE).exists():
        raise FileNotFoundError(f"{folder} holds no finished features ({DONE} is missing): run the encoding again.")
    names = [field.name for field in dataclasses.fields(Embeddings)]
    return Embeddings(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names))


# --- a whole source -------------------------------------------------------------------------------------------------


class _Images(Dataset):
    """Row numbers -> uint8 pixels [3,R,R], decoded in the loader's workers."""

    def __init__(self, source: PairSource, transform: ImageTransform, cache: Path | None) -> None:
        self.source, self.transform = source, transform
        self.cache = None if cache is None else ImageCache(cache, source, transform)

    def __getitem__(self, row: int) -> torch.Tensor:
        try:
            return self.transform(self.source.image(row)) if self.cache is None else self.cache.read(row)
        except BadImage as error:
            raise BadImage(
                f"image {row} ({self.source.name(row)}) cannot be encoded: {error}. Remove or replace it, or leave it "
                "out with `rows`."
            ) from error


class _TextChunks(Dataset):
    """A range of captions -> its ids sorted by length: made in the loader's workers, a chunk at a time."""

    def __init__(self, bundle: ClipBundle, work: _Work) -> None:
        self.tokenizer, self.context_length, self.work = bundle.tokenizer, bundle.context_length, work

    def __getitem__(self, chunk: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return _sorted_ids(self.tokenizer, self.work.captions(*chunk), self.context_length)


@dataclass(frozen=True)
class _Work:
    """Which images and captions of a source are encoded."""

    source: PairSource
    rows: np.ndarray  # [N]
    text_image: np.ndarray  # [M], ascending

    @classmethod
    def of(cls, source: PairSource, captions: Captions, rows: np.ndarray | None) -> _Work:
        if captions not in get_args(Captions):
            raise ValueError(f"captions must be none, first or all, got {captions!r}.")
        rows = np.arange(len(source)) if rows is None else np.asarray(rows, np.int64)
        if not len(rows):
            raise ValueError("there is no image to encode: the data set is empty, or all of its images are bad.")
        counts = [len(source.captions(int(row))) for row in rows] if captions == "all" else int(captions == "first")
        return cls(source, rows, np.repeat(np.arange(len(rows)), counts))

    def captions(self, start: int, stop: int) -> list[str]:
        """Captions number `start` to `stop`, image by image."""
        found: list[str] = []
        image, nth = -1, 0
        for position in range(start, stop):
            if self.text_image[position] != image:
                image = int(self.text_image[position])
                nth = position - int(np.searchsorted(self.text_image, image))
                own = self.source.captions(int(self.rows[image]))
            found.append(own[nth])
            nth += 1
        return found


def encode_source(
    bundle: ClipBundle,
    source: PairSource,
    folder: str | Path,
    *,
    captions: Captions = "first",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    precision: Precision = "bf16",
    workers: int = 0,
    progress: Bar | None = None,
    cache: Path | None = None,
    accelerator: Any = None,
    rows: np.ndarray | None = None,
    model_id: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    chunk_rows: int = CHUNK_ROWS,
) -> Embeddings:
    """Encode images and captions of `source` into `folder`; what an earlier, killed run finished there is kept.

    `captions`: the first of each image (M = N), all, or none (M = 0). `rows`: the images to use, all when absent.
    `progress`: a bar, not entered yet; it counts images and captions, and is told how many there are. `cache`: a file
    of `build_image_cache`. With an `accelerate.Accelerator` each process encodes its own slice
    of the rows and all of them return the whole; `folder` must be on a file system that all of them see.
    `model_id` stands for the weights (a hash); it is computed when absent. Another model, data set, `captions`,
    `rows`, `precision` or `dtype` starts over; another `batch_size` or number of workers does not.

    Raises BadImage (an unreadable image among `rows`), NotFinite, SaveError (disk full; what is done is kept),
    ValueError (nothing to encode).
    """
    device = accelerator.device if accelerator is not None else pick_device(device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
    wait = accelerator.wait_for_everyone if accelerator is not None else (lambda: None)
    work = _Work.of(source, captions, rows)
    counts = {"image": len(work.rows), "text": len(work.text_image)}
    shapes = {kind: (count, bundle.model.config.projection_dim) for kind, count in counts.items()}
    key = digest(FORMAT, source.fingerprint, digest(work.rows.tolist()), counts, captions, precision, dtype,
                 model_id or model_fingerprint(bundle.model), _switches(bundle.model), bundle.image_size,
                 bundle.image_mean, bundle.image_std, bundle.context_length)  # fmt: skip
    files = _Folder(Path(folder), key, shapes, dtype, rank)
    complete = files.complete
    wait()  # nobody changes the folder before all have looked at it
    if complete and rank == 0:
        files.drop_progress()  # of a process that was killed before it had done so
    if not complete:
        if rank == 0:
            files.prepare(work.text_image, work.rows)
        wait()
        done = files.done_rows()
        chunks = {kind: _chunks(count, rank, world, chunk_rows) for kind, count in counts.items()}
        left = {kind: [(a, b) for a, b in chunks[kind] if not done[kind][a:b].all()] for kind in KINDS}
        if progress is not None:
            skipped = [b - a for kind in KINDS for a, b in chunks[kind] if (a, b) not in left[kind]]
            progress.total, progress.done = sum(counts.values()), world * sum(skipped)
        with inference(bundle, device, precision), progress or contextlib.nullcontext() as bar:
            # The bar of process 0 speaks for all: their shares are equal.
            report = (lambda items: bar.advance(world * items)) if bar is not None else (lambda items: None)
            if workers:  # the tokenizer's own threads do not survive a fork, and it would warn of that
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            loader = {"num_workers": workers, "pin_memory": device.type == "cuda", "generator": torch.Generator()}
            _write_images(bundle, work, files, left["image"], cache, device, batch_size, loader, report)
            _write_texts(bundle, work, files, left["text"], device, batch_size, loader, report)
        wait()
        if rank == 0:
            files.finish({"images": counts["image"], "captions": counts["text"], "model": bundle.name})
        wait()
    return open_embeddings(folder)


def _chunks(count: int, rank: int, world: int, size: int) -> list[tuple[int, int]]:
    """The ranges of one process's contiguous share of `count` rows."""
    begin, end = count * rank // world, count * (rank + 1) // world
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def _write_images(bundle, work, files, chunks, cache, device, batch_size, loader, report) -> None:
    """One loader over all chunks, so that its workers start once; a batch never crosses a chunk's end.

    Loaders get a random generator of their own: they would draw from torch's global one, and a resumed run, which
    skips this work, would then train on other random numbers.
    """
    spans = [(a, min(a + batch_size, stop)) for start, stop in chunks for a in range(start, stop, batch_size)]
    images = _Images(work.source, ImageTransform(bundle.image_size), cache)
    batches = DataLoader(images, batch_sampler=[work.rows[a:b].tolist() for a, b in spans], **loader)
    ends, parts = {stop: start for start, stop in chunks}, []
    for (_, stop), pixels in zip(spans, batches, strict=True):
        parts.append(_encode_pixels(bundle, pixels, device))
        if stop in ends:
            files.write("image", ends[stop], torch.cat(parts))
            parts = []
        report(len(pixels))


def _write_texts(bundle, work, files, chunks, device, batch_size, loader, report) -> None:
    batches = DataLoader(_TextChunks(bundle, work), batch_size=None, sampler=chunks, **loader)
    for (start, _), ids in zip(chunks, batches, strict=True):
        files.write("text", start, _encode_sorted(bundle, *ids, device, batch_size))
        report(len(ids[0]))


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and values of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _switches(model: torch.nn.Module) -> list[Any]:
    """What changes a model's answers beside its tensors: experts per token, the one expert selected, activations."""
    towers = (model.config.vision_config, model.config.text_config)
    experts = [module.only_expert for module in model.modules() if hasattr(module, "only_expert")]
    return [experts, [(tower.num_experts_per_tok, tower.hidden_act) for tower in towers], towers[1].eos_token_id]
