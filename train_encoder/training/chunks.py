"""How many images a process holds a graph for at once (`--engine.chunk-size`): the largest chunk that a GPU can hold.

    small chunks are run and measured -> a line through them meets the limit -> the chunk there is run before it counts

Nothing is guessed: what counts has run forward and backward, on the card, with the model and what is trainable.
"""

from __future__ import annotations

import bisect
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from llava_clipmoe.files import read_json, write_json

from ..config import ChunkSize
from ..progress import is_main_process

USABLE = 0.9
"""Share of the memory that is free or ours. The rest is for holes between tensors and for allocations outside torch."""
FIRST = 8
"""Images of the first chunk that is measured; the second is twice as large."""
MOST_TRIALS = 12
SLACK, WHOLE_SLACK = 1.05, 1.25
"""A trial costs seconds, so sizes a little beyond the line are tried too. One piece is tried from further beyond it: it
needs less than the line says (there are no gradients yet at its peak), and saves a forward pass."""
WHOLE_WITHOUT_A_GPU, CHUNK_WITHOUT_A_GPU = 128, 10
"""Where nothing is measured: shares of up to 128 images run in one piece, larger ones in the recipe's chunks of 10."""

Trial = Callable[[int], int | None]
"""Runs a step in chunks of this many images -> the most bytes in use meanwhile; None: they did not fit."""


class ChunkError(ValueError):
    """The memory is too small for a step; the message says what to change."""


def even(share: int, most: int) -> int:
    """The chunk of at most `most` images that cuts `share` images into the fewest pieces, all of nearly one size."""
    return math.ceil(share / math.ceil(share / most))


def largest_chunk(share: int, limit: Callable[[], int], trial: Trial) -> tuple[int, int]:
    """(chunk, its peak in bytes): the largest even chunk of `share` images that runs within `limit()` bytes.

    The chunk that is returned has run. One image may pass the limit as long as it runs: nothing is smaller. Raises
    ChunkError when not even one image runs.
    """
    sizes = sorted({even(share, most) for most in range(1, share + 1)})
    peaks: dict[int, int] = {}  # of what has run, within the limit or above it
    fits, fails = -1, len(sizes)  # places of the largest size that fits and of the smallest that does not
    place = bisect.bisect_right(sizes, FIRST) - 1
    for _ in range(MOST_TRIALS):
        peak = trial(sizes[place])
        bound = limit()  # after the trial: what libraries have allocated for themselves is no longer free
        if peak is not None:
            peaks[sizes[place]] = peak
        if peak is not None and peak <= bound:
            fits = place
        else:
            fails = place
        wanted = _wanted(sizes, peaks, fits, fails, bound)
        place = min(bisect.bisect_right(sizes, wanted), fails) - 1
        if place <= fits:
            break
    if fits < 0 and 1 not in peaks:
        raise ChunkError("not even one image fits into the memory.")
    chunk = sizes[max(fits, 0)]
    return chunk, peaks[chunk]


def _wanted(sizes: list[int], peaks: dict[int, int], fits: int, fails: int, bound: int) -> float:
    """How many images to try next; no more than what fits already when the search is over."""
    failed = sizes[fails] if fails < len(sizes) else None
    if fits < 0:
        return failed / 2
    if failed is not None and failed not in peaks:
        # Memory ran out although the line said it would not: go down to three quarters, and stop near there.
        near = sizes[fits] >= 0.7 * failed
        return sizes[fits] if near else max(0.75 * failed, sizes[fits] + 1) if len(peaks) > 1 else 2 * sizes[fits]
    if len(peaks) < 2:
        return 2 * sizes[fits]
    small, large = sorted(peaks)[-2:]
    slope = (peaks[large] - peaks[small]) / (large - small)
    meets = large + (bound - peaks[large]) / slope if slope > 0 else sizes[-1]
    return sizes[-1] if WHOLE_SLACK * meets >= sizes[-1] else SLACK * meets


class Card:
    """The memory of a CUDA device in bytes, by the counters of torch's allocator and of the driver."""

    def __init__(self, device: torch.device):
        self.device, self.name = device, torch.cuda.get_device_name(device)
        self.total = torch.cuda.mem_get_info(device)[1]

    def limit(self) -> int:
        """What is free or held by this process already, less a reserve; other programs on the card keep theirs."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(USABLE * (free + torch.cuda.memory_reserved(self.device)))

    def peak(self, work: Callable[[], None]) -> int | None:
        """Do the work -> the most bytes in use meanwhile; None when memory ran out. Leaves no block behind that other
        work could not use."""
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            work()
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
        finally:
            # The error holds the work's frames, and these hold its tensors: only now can they be freed.
            gc.collect()
            torch.cuda.empty_cache()
        return None


def gauge_of(device: torch.device) -> Card | None:
    """What measures the device's memory; None where nothing does."""
    return Card(device) if device.type == "cuda" else None


def choose_chunk(
    given: ChunkSize,
    name: str,
    share: int,
    file: Path,
    accelerator: Accelerator,
    gauge: Card | None,
    measured: Callable[[Card], Trial],
) -> int | None:
    """Images of a chunk of the training `name`; None: the process's `share` of the batch in one piece.

    A number, or None, is taken as given. "auto" is what `file` says, from when this training began; without the file
    it is measured, the same for all processes, and kept there. measured: a gauge -> the trials of this training.
    """
    if given != "auto":
        return given
    if file.exists():
        kept = read_json(file)
        _say(f"{name}: chunks of {kept['images']} images, as measured on {kept['device']} when this training began")
        return kept["images"]
    if gauge is None:
        return None if share <= WHOLE_WITHOUT_A_GPU else even(share, CHUNK_WITHOUT_A_GPU)
    try:
        chunk, peak = largest_chunk(share, gauge.limit, measured(gauge))
    except ChunkError as error:
        raise ChunkError(f"{name}: {error} {too_little(1, share, gauge)}") from error
    if accelerator.num_processes > 1:  # the card that holds least decides
        least = accelerator.gather(torch.tensor([[chunk, peak]], device=accelerator.device)).tolist()
        chunk, peak = min(least)
    if accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        facts = {"images": chunk, "share": share, "device": gauge.name}
        write_json(file, {**facts, "peak_memory_bytes": peak, "total_memory_bytes": gauge.total})
    accelerator.wait_for_everyone()
    pieces = "in one piece, " if chunk >= share else "chunks of "
    _say(f"{name}: {pieces}{chunk} images: {peak / 2**30:.1f} of {gauge.total / 2**30:.1f} GiB")
    return chunk


def kept_chunks(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured in a run (its folder `chunks/`), by training: "images" of a chunk, "share" (a process's images
    of a batch), "device", "peak_memory_bytes" and "total_memory_bytes"."""
    return {file.stem: read_json(file) for file in sorted(folder.glob("*.json"))}


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


def ran_out_of_memory(error: RuntimeError) -> bool:
    """True for the errors by which torch and its libraries say that the memory is full, on a GPU or a CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError) or should_reduce_batch_size(error):
        return True
    return any(words in str(error) for words in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"))


@contextmanager
def out_of_memory_names_the_flag(name: str, chunk: int | None, share: int, gauge: Card | None) -> Iterator[None]:
    """Inside the `with`, running out of memory becomes a ChunkError that says how to go on."""
    try:
        yield
    except RuntimeError as error:
        if not ran_out_of_memory(error):
            raise
        chunk = min(chunk or share, share)
        pieces = f"in chunks of {chunk}" if chunk < share else f"with all {share} images of a process in one piece"
        cause = str(error).splitlines()[0]
        raise ChunkError(f"{name} ran out of memory {pieces} ({cause}). {too_little(chunk, share, gauge)}") from error


def too_little(chunk: int, share: int, gauge: Card | None) -> str:
    """What to do when `chunk` images do not fit."""
    where = f"The card ({gauge.name}) has {gauge.total / 2**30:.1f} GiB" if gauge else "This machine has no GPU"
    smaller = sorted({even(share, max(1, chunk * part // 4)) for part in (3, 2)} - {chunk}, reverse=True)
    if not smaller:
        return (
            f"{where}; --engine.chunk-size is at 1 image and cannot be lower. Use --engine.activation-checkpointing, "
            "free what other programs hold there, or train less at once: low-rank stages (dmu-lora-...), or a smaller "
            "--base.source."
        )
    values = ", then ".join(f"--engine.chunk-size {size}" for size in smaller)
    return (
        f"{where}. Repeat the command with {values}: it goes on from the last checkpoint, and the chunk changes "
        "nothing but rounding. --engine.activation-checkpointing needs less memory too."
    )
