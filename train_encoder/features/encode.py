"""Encode a whole data set once: L2-normalised embeddings as memory-mapped fp16 files that survive a killed run.

embeddings = encode_source(bundle, source, run / "features" / "stage0", captions="first", device="cuda")
embeddings.image, embeddings.text            # [N,P], [M,P]
"""

from __future__ import annotations

import contextlib
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

from ..config import digest
from ..data.cache import RowImages
from ..data.decode import BadImage, ImageTransform, normalise
from ..data.pairs import PairSource
from ..progress import Bar
from .store import Embeddings, FeatureFolder, open_embeddings

FORMAT = 1
"""Raise it when the same model and data give other numbers: features of another format are made anew."""
CHUNK_ROWS = 4096
"""Rows between two flushes: seconds of work on a GPU, 6 MB at 768 dimensions."""

Captions = Literal["none", "first", "all"]
Precision = Literal["bf16", "fp32"]


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


# --- a whole source -------------------------------------------------------------------------------------------------


class _Images(Dataset):
    """Row numbers -> uint8 pixels [3,R,R], decoded in the loader's workers."""

    def __init__(self, source: PairSource, transform: ImageTransform, cache: Path | None) -> None:
        self.source, self.image = source, RowImages(source, transform, cache)

    def __getitem__(self, row: int) -> torch.Tensor:
        pixels, error = self.image(row)
        if error is not None:
            raise BadImage(
                f"image {row} ({self.source.name(row)}) cannot be encoded: {error}. Remove or replace it, or leave it "
                "out with `rows`."
            )
        return pixels


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
    settings = [captions, precision, dtype, *_model_facts(bundle, model_id)]
    key = digest(FORMAT, source.fingerprint, digest(work.rows.tolist()), counts, *settings)
    files = FeatureFolder(Path(folder), key, shapes, dtype, rank)
    complete = files.complete
    wait()  # nobody changes the folder before all have looked at it
    if complete and rank == 0:
        files.drop_progress()  # of a process that was killed before it had done so
    if not complete:
        if rank == 0:
            files.prepare(work.text_image, work.rows)
        wait()
        left, skipped = _left_to_do(files, counts, rank, world, chunk_rows)
        if progress is not None:
            progress.total, progress.done = sum(counts.values()), world * skipped
        with inference(bundle, device, precision), progress or contextlib.nullcontext() as bar:
            # Process 0 shows the progress of all processes: their shares are equal.
            report = (lambda items: bar.advance(world * items)) if bar is not None else (lambda items: None)
            _write(bundle, work, files, left, cache, device, batch_size, workers, report)
        wait()
        if rank == 0:
            files.finish({"images": counts["image"], "captions": counts["text"], "model": bundle.name})
        wait()
    return open_embeddings(folder)


def _left_to_do(files, counts, rank, world, chunk_rows) -> tuple[dict[str, list[tuple[int, int]]], int]:
    """-> (the chunks of this process's share that are left, by kind; how many rows of it are done already)."""
    done, left, skipped = files.done_rows(), {}, 0
    for kind, count in counts.items():
        share = _chunks(count, rank, world, chunk_rows)
        left[kind] = [(start, stop) for start, stop in share if not done[kind][start:stop].all()]
        skipped += sum(stop - start for start, stop in share) - sum(stop - start for start, stop in left[kind])
    return left, skipped


def _chunks(count: int, rank: int, world: int, size: int) -> list[tuple[int, int]]:
    """The ranges of one process's contiguous share of `count` rows."""
    begin, end = count * rank // world, count * (rank + 1) // world
    return [(start, min(start + size, end)) for start in range(begin, end, size)]


def _write(bundle, work, files, left, cache, device, batch_size, workers, report) -> None:
    """Encode what is left of this process's share. report: called with the number of items as they are done."""
    if workers:  # the tokenizer's own threads do not survive a fork, and it would warn of that
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loader = {"num_workers": workers, "pin_memory": device.type == "cuda", "generator": torch.Generator()}
    _write_images(bundle, work, files, left["image"], cache, device, batch_size, loader, report)
    _write_texts(bundle, work, files, left["text"], device, batch_size, loader, report)


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


def _model_facts(bundle: ClipBundle, model_id: str | None) -> list[Any]:
    """What the embeddings depend on besides the data."""
    model = [model_id or model_fingerprint(bundle.model), _switches(bundle.model)]
    return [*model, bundle.image_size, bundle.image_mean, bundle.image_std, bundle.context_length]


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and values of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def _switches(model: torch.nn.Module) -> list[Any]:
    """What changes embeddings besides the tensors: experts per token, the one expert selected, activations."""
    towers = (model.config.vision_config, model.config.text_config)
    experts = [module.only_expert for module in model.modules() if hasattr(module, "only_expert")]
    return [experts, [(tower.num_experts_per_tok, tower.hidden_act) for tower in towers], towers[1].eos_token_id]
