"""Encode a whole data set once: L2-normalised embeddings as memory-mapped fp16 files that survive a killed run."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from llava_clipmoe.bundle import ClipBundle

from ..data.cache import RowImages
from ..data.dataset import padded
from ..data.decode import BadImage, ImageTransform, normalise
from ..data.pairs import PairSource
from ..progress import Bar
from ..saved_settings import digest
from .store import Embeddings, FeatureFolder, open_embeddings

FORMAT = 1
"""Raise it when the same model and data give other numbers: features of another format are made anew."""
CHUNK_ROWS = 4096
"""Rows between two flushes: seconds of work on a GPU, 6 MB at 768 dimensions."""

Captions = Literal["none", "first", "all"]
Precision = Literal["bf16", "fp32"]


class NotFinite(ValueError):
    """A model gave NaN or infinite embeddings: every number computed from them would be meaningless."""


def pick_device(device: str | torch.device) -> torch.device:
    """`auto` is the GPU where there is one, else the CPU; anything else is taken as it is."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


@contextlib.contextmanager
def inference(bundle: ClipBundle, device: torch.device, precision: Precision) -> Iterator[None]:
    """The model on `device`, in eval mode, without gradients, under bf16 autocast if asked; its mode is restored."""
    was_training = bundle.model.training
    bundle.model.to(device).eval()
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        bundle.model.train(was_training)


def tokenise(tokenizer: Any, captions: Sequence[str], context_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions, cut at the context -> ids [M,T] int64, T of the longest, padded with the end token, and lengths [M]."""
    encoded = []
    if captions:
        encoded = tokenizer(list(captions), truncation=True, max_length=context_length)["input_ids"]
    return padded(encoded), torch.tensor([len(ids) for ids in encoded], dtype=torch.int64)


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
        return torch.cat([_encode_pixels(bundle, part, device) for part in pixels.split(batch_size)])


def encode_texts(
    bundle: ClipBundle,
    captions: Sequence[str],
    *,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    batch_size: int = 256,
) -> torch.Tensor:
    """Captions -> L2-normalised embeddings [M,P] fp32 on the CPU, in the captions' order. Raises NotFinite."""
    device, ids = pick_device(device), _sorted_ids(bundle.tokenizer, captions, bundle.context_length)
    with inference(bundle, device, precision):
        return _encode_sorted(bundle, ids, device, batch_size)


SortedIds = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""ids [M,T] from the longest caption to the shortest, lengths [M], and the caption's number of each row [M]."""


def _sorted_ids(tokenizer: Any, captions: Sequence[str], context_length: int) -> SortedIds:
    ids, lengths = tokenise(tokenizer, captions, context_length)
    order = lengths.argsort(descending=True, stable=True)
    return ids[order], lengths[order], order


def _encode_pixels(bundle: ClipBundle, pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    pixels = normalise(pixels.to(device, non_blocking=True), bundle.image_mean, bundle.image_std)
    return _finish(bundle.model.get_image_features(pixels), "image")


def _encode_sorted(bundle: ClipBundle, texts: SortedIds, device: torch.device, batch_size: int) -> torch.Tensor:
    """Encode in batches that are trimmed to their longest caption; -> [M,P] in the captions' order.

    The mask is causal and the end token is pooled, so what follows it changes nothing and can be cut.
    """
    ids, lengths, order = texts
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


class _Images(Dataset):
    """An image's place among `rows` -> uint8 pixels [3,R,R], decoded in the loader's workers."""

    def __init__(self, source: PairSource, rows: np.ndarray, transform: ImageTransform, cache: Path | None) -> None:
        self.source, self.rows, self.image = source, rows, RowImages(source, transform, cache)

    def __getitem__(self, place: int) -> torch.Tensor:
        row = int(self.rows[place])
        pixels, error = self.image(row)
        if error is not None:
            raise BadImage(
                f"image {row} ({self.source.name(row)}) cannot be encoded: {error}. Remove or replace it, or leave it "
                "out with `rows`."
            )
        return pixels


class _Texts(Dataset):
    """A range of captions (start, stop), numbered image by image -> its sorted ids, made in the loader's workers."""

    def __init__(self, bundle: ClipBundle, source: PairSource, rows: np.ndarray, captions: Captions) -> None:
        self.tokenizer, self.context_length = bundle.tokenizer, bundle.context_length
        self.source, self.rows = source, rows
        self.most = {"none": 0, "first": 1, "all": None}[captions]
        counts = [len(source.captions(int(row))) for row in rows] if captions == "all" else self.most
        self.image = np.repeat(np.arange(len(rows)), counts)  # [M], the image of each caption, ascending

    def __getitem__(self, chunk: tuple[int, int]) -> SortedIds:
        start, stop = chunk
        first, last = self.image[start], self.image[stop - 1]
        rows = self.rows[first : last + 1].tolist()
        captions = [caption for row in rows for caption in self.source.captions(row)[: self.most]]
        skipped = start - int(np.searchsorted(self.image, first))
        return _sorted_ids(self.tokenizer, captions[skipped : skipped + stop - start], self.context_length)


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

    captions: the first of each image (M = N), all, or none (M = 0). rows: the images to use, all when absent.
    progress: a bar, not entered yet; it counts images and captions, and is told how many there are. cache: a file of
    `build_image_cache`. accelerator: each process encodes its own slice of the rows and all return the whole; all must
    see `folder`. model_id: a hash that stands for the weights; computed when absent. Another model, data set,
    `captions`, `rows`, `precision` or `dtype` starts over; another `batch_size` or number of workers does not.

    Raises BadImage (among `rows`), NotFinite, SaveError (disk full; what is done is kept), ValueError (no rows).
    """
    rank, world, wait = 0, 1, lambda: None
    if accelerator is not None:
        rank, world, wait = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
    device = accelerator.device if accelerator is not None else pick_device(device)
    rows = np.arange(len(source)) if rows is None else np.asarray(rows, np.int64)
    if not len(rows):
        raise ValueError("there is no image to encode: the data set is empty, or all of its images are bad.")
    texts = _Texts(bundle, source, rows, captions)
    counts = {"image": len(rows), "text": len(texts.image)}
    data = [source.fingerprint, digest(rows.tolist()), counts, captions]
    key = digest(FORMAT, *data, precision, dtype, *_model_facts(bundle, model_id))
    files = FeatureFolder(Path(folder), key, counts, bundle.model.config.projection_dim, dtype, rank, world)
    complete = files.complete
    wait()  # nobody changes the folder before all have looked at it
    if complete and rank == 0:
        files.drop_progress()  # of a process that was killed before it had done so
    if not complete:
        if rank == 0:
            files.prepare(texts.image, rows)
        wait()
        images = _Images(source, rows, ImageTransform(bundle.image_size), cache)
        left, done = files.left_to_do(chunk_rows)
        bar = progress or Bar("", None, main=False)
        # Process 0 shows the progress of all processes: their shares are equal.
        bar.total, bar.done = sum(counts.values()), world * done
        with inference(bundle, device, precision), bar:
            _write(bundle, files, left, images, texts, device, batch_size, workers, bar)
        wait()
        if rank == 0:
            files.finish({"images": counts["image"], "captions": counts["text"], "model": bundle.name})
        wait()
    return open_embeddings(folder)


def _write(bundle, files, left, images, texts, device, batch_size, workers, bar) -> None:
    """Encode the chunks of images and of captions that are left of this process's share."""
    if workers:  # the tokenizer's own threads do not survive a fork, and it would warn of that
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Loaders get a random generator of their own: they would draw from torch's global one, and a resumed run, which
    # skips this work, would then train on other random numbers.
    loader = {"num_workers": workers, "pin_memory": device.type == "cuda", "generator": torch.Generator()}
    # One loader over all chunks of images, so that its workers start once; a batch never crosses a chunk's end.
    spans = [(a, min(a + batch_size, stop)) for start, stop in left["image"] for a in range(start, stop, batch_size)]
    batches = DataLoader(images, batch_sampler=[range(a, b) for a, b in spans], **loader)
    starts, parts = {stop: start for start, stop in left["image"]}, []
    for (_, stop), pixels in zip(spans, batches, strict=True):
        parts.append(_encode_pixels(bundle, pixels, device))
        if stop in starts:
            files.write("image", starts[stop], torch.cat(parts))
            parts = []
        bar.advance(files.world * len(pixels))
    chunks = DataLoader(texts, batch_size=None, sampler=left["text"], **loader)
    for (start, stop), ids in zip(left["text"], chunks, strict=True):
        files.write("text", start, _encode_sorted(bundle, ids, device, batch_size))
        bar.advance(files.world * (stop - start))


def _model_facts(bundle: ClipBundle, model_id: str | None) -> list[Any]:
    """What embeddings depend on besides the data: weights, experts per token or the only one, activations, sizes."""
    config = bundle.model.config
    experts = [module.only_expert for module in bundle.model.modules() if hasattr(module, "only_expert")]
    towers = [(tower.num_experts_per_tok, tower.hidden_act) for tower in (config.vision_config, config.text_config)]
    switches = [experts, towers, config.text_config.eos_token_id]
    weights = model_id or model_fingerprint(bundle.model)
    return [weights, switches, bundle.image_size, bundle.image_mean, bundle.image_std, bundle.context_length]


def model_fingerprint(model: torch.nn.Module) -> str:
    """A hash of the names and values of all tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]
