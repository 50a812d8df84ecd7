"""What the benchmarks share: interleaved times, a process of its own for peak memory, the machine in words, a table.

Times of two things are comparable only when both were taken in the same minutes: other work comes and goes. So every
round runs every variant once, and medians are over the rounds.
"""

from __future__ import annotations

import logging
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch

from llava_clipmoe.files import write_text
from train_encoder.training.memory import peak_memory_bytes, reset_peak_memory

Device = Literal["auto", "cpu", "cuda"]
PRELOADED = ["transformers.models.clip.modeling_clip", "llava_clipmoe.vision_tower", "train_encoder.training.loop"]


def pick_device(name: Device) -> torch.device:
    """`auto` is the GPU where there is one."""
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else "cpu" if name == "auto" else name)


# ---------------------------------------------------------------------------------------------------------------- time


def synchronise(device: torch.device) -> None:
    """Wait until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, until its results are there; on a GPU by the card's own clock."""
    synchronise(device)
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def interleaved(
    works: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm: int = 1,
    limit: float | None = None, before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Seconds of every work in every round, after `warm` rounds that are not counted. Even rounds run backwards, so
    that nothing always comes after the same neighbour.

    limit: no further round starts after so many seconds. before: called before every round, not timed, as for a new
    input: what meets the same one again and again may run on what libraries kept of it.
    """
    for _ in range(warm):
        before()
        for work in works.values():
            work()
    found: dict[str, list[float]] = {name: [] for name in works}
    started = time.perf_counter()
    for number in range(rounds):
        before()
        for name in list(works)[:: -1 if number % 2 else 1]:
            found[name].append(seconds_of(works[name], device))
        if limit is not None and time.perf_counter() - started > limit:
            break
    return found


def medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in found.items()}


def peak_flops(device: torch.device, dtype: torch.dtype, size: int | None = None, rounds: int = 5) -> float:
    """Floating-point operations a second of one large matrix product: what the machine reaches at its best, now."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = interleaved({"product": lambda: a @ b}, rounds, device, warm=2)["product"]
    return 2 * size**3 / min(times)


# -------------------------------------------------------------------------------------------------------------- memory


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a process of its own; function and arguments can be pickled.

    From a server that has imported the libraries and run nothing: a child starts in no time, with no threads and no
    GPU taken. Raises what the function raised.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


class Peak:
    """Most memory in use since it was made, in bytes; on a CPU above what the process held then (its libraries)."""

    def __init__(self, device: torch.device):
        self.device = device
        if not reset_peak_memory(device) and device.type != "cuda":
            print("this system does not forget a process's old peak: memory may be too high", file=sys.stderr)
        self.before = 0 if device.type == "cuda" else peak_memory_bytes(device)

    def bytes(self) -> int:
        return peak_memory_bytes(self.device) - self.before


DOES_NOT_FIT = "does not fit"


def why_not(error: Exception) -> str:
    """What a table says in the place of a variant that raised this."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower():
        return DOES_NOT_FIT
    words = (str(error).strip() or "no message").splitlines()[0][:100].replace("|", "/")
    return f"failed: {type(error).__name__}: {words}"


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the package warned of inside the `with`, as that its kernels are not used: a table of the fast path would
    otherwise show the slow one's figures."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage().replace("|", "/"))
    logger = logging.getLogger("llava_clipmoe")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# --------------------------------------------------------------------------------------------------------------- table


def machine(device: torch.device) -> str:
    """Card or processor, threads and torch's version, for the line above a table."""
    if device.type == "cuda":
        place = torch.cuda.get_device_name(device)
    else:
        place = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{place}, torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def command(program: str, arguments: Sequence[str] | None) -> str:
    """The line that made the table. arguments: None for those of this process."""
    given = sys.argv[1:] if arguments is None else arguments
    return f"Command: `python benchmarks/{Path(program).name}{' ' if given else ''}{shlex.join(given)}`"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers (right-aligned)."""
    cells = [[str(value) for value in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:>{width}}" if i else f"{cell:<{width}}" for i, (cell, width) in pairs) + " |"
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in cells)
    ]
    rule = "|" + "|".join(("-" * (width + 1) + ":") if i else "-" * (width + 2) for i, width in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def append(text: str, output: Path) -> None:
    """Add it to the end of a file, atomically."""
    before = output.read_text(encoding="utf-8") + "\n" if output.exists() else ""
    write_text(output, before + text + "\n")


class Report:
    """Tables that are printed and written as they come: what was measured before a program is stopped is not lost."""

    def __init__(self, output: Path | None):
        self.output = output

    def add(self, text: str) -> None:
        """A paragraph or a table."""
        print(text, end="\n\n", flush=True)
        if self.output is not None:
            append(text, self.output)
