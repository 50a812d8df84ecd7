"""Time and memory of the search for blind pairs, against scikit-learn's exact neighbours and one whole product.

    python benchmarks/pair_mining.py                  (100,000 embeddings of width 768: minutes on 2 cores)
    python benchmarks/pair_mining.py --device cuda

Random embeddings with planted pairs, which every method must find and nothing else. Each measurement is a process of
its own, so that peak memory is its own; its memory before the search (libraries loaded) is shown beside it. A baseline
runs at growing sizes; its time at the full size is extrapolated with the exponent measured between its two largest.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

THRESHOLD, PLANTED = 0.95, 50


@dataclass
class Settings:
    """What to measure."""

    count: int = 100_000
    width: int = 768
    device: str = "cpu"
    baseline_counts: tuple[int, ...] = (5_000, 10_000, 20_000)
    only: str | None = None
    """Used by the benchmark itself: measure one method in this process,"""
    folder: Path | None = None
    """on the embeddings in this folder."""


def make_embeddings(folder: Path, count: int, width: int) -> list[list[int]]:
    """Write dense.npy and reference.npy [count, width] fp16; -> the planted pairs, alike to 0.97 under the first and
    opposed under the second."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, (PLANTED, 2), replace=False), axis=1)
    arrays = {}
    for name in ("dense", "reference"):
        arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, (count, width))
        for start in range(0, count, 10_000):
            rows = rng.standard_normal((min(10_000, count - start), width), np.float32)
            arrays[name][start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for i, j in chosen:
        arrays["dense"][j] = arrays["dense"][i] + 0.25 * arrays["dense"][j]  # cosine 1 / sqrt(1 + 0.25^2) = 0.970
        arrays["reference"][j] = -arrays["reference"][i]
    return sorted(chosen.tolist())


def ours(s: Settings, dense: np.ndarray, reference: np.ndarray) -> list[list[int]]:
    from demo.mining.search import Criteria, search

    found = search(dense, [reference], Criteria(top=1000), device=s.device)
    return np.stack([found.first, found.second], 1).tolist()


def sklearn_brute(s: Settings, dense: np.ndarray, reference: np.ndarray) -> list[list[int]]:
    from sklearn.neighbors import NearestNeighbors

    rows = dense.astype(np.float32)
    finder = NearestNeighbors(radius=1 - THRESHOLD, algorithm="brute", metric="cosine").fit(rows)
    near = finder.radius_neighbors(return_distance=False)
    return [[i, int(j)] for i, some in enumerate(near) for j in some if i < j]


def whole_product(s: Settings, dense: np.ndarray, reference: np.ndarray) -> list[list[int]]:
    rows = dense.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.argwhere(np.triu(rows @ rows.T, 1) > THRESHOLD).tolist()


METHODS = {"mine-pairs": ours, "scikit-learn, brute force": sklearn_brute, "one N x N product": whole_product}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_here(s: Settings) -> None:
    """One method in this process; prints a JSON line."""
    import sklearn.neighbors  # noqa: F401
    import torch  # before the clock: they take seconds to load, and count in everyone's memory

    import demo.mining.search  # noqa: F401

    dense, reference = (np.load(s.folder / f"{name}.npy", mmap_mode="r")[: s.count] for name in ("dense", "reference"))
    torch.zeros(1, device=s.device)
    before, start = peak_mib(), time.perf_counter()
    found = METHODS[s.only](s, dense, reference)
    row = {"seconds": time.perf_counter() - start, "before": before, "peak": peak_mib(), "found": sorted(found)}
    print(json.dumps(row))


def measure(s: Settings, method: str, folder: Path, planted: list[list[int]], count: int) -> dict:
    flags = ["--only", method, "--folder", str(folder), "--count", str(count), "--device", s.device]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    expected = [pair for pair in planted if pair[1] < count]
    if row["found"] != expected:
        raise SystemExit(
            f"{method} at {count:,} found {len(row['found'])} pairs, not the {len(expected)} planted ones."
        )
    return {**row, "method": method, "count": count}


def extrapolated(rows: list[dict], count: int) -> tuple[float, float]:
    """-> seconds at `count`, and the exponent between the two largest sizes."""
    a, b = rows[-2:]
    exponent = math.log(b["seconds"] / a["seconds"]) / math.log(b["count"] / a["count"])
    return b["seconds"] * (count / b["count"]) ** exponent, exponent


def main() -> None:
    import torch
    import tyro
    from rich import box
    from rich.console import Console
    from rich.table import Table

    s = tyro.cli(Settings, description=__doc__)
    if s.only:
        return measure_here(s)
    title = (f"pairs above {THRESHOLD} among N embeddings of width {s.width}; {s.device}, {platform.machine()}, "
             f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    table = Table(box=box.SIMPLE_HEAVY, title=title)
    for column in ("method", "N", "seconds", "peak MiB", "of it libraries", "planted found"):
        table.add_column(column, justify="left" if column == "method" else "right")
    with tempfile.TemporaryDirectory() as folder:
        planted = make_embeddings(Path(folder), s.count, s.width)
        for method in METHODS:
            counts = [n for n in s.baseline_counts if n < s.count]
            counts += [s.count] if method == "mine-pairs" else []
            rows = [measure(s, method, Path(folder), planted, count) for count in counts]
            for row in rows:
                cells = (f"{row['seconds']:.1f}", f"{row['peak']:,.0f}", f"{row['before']:,.0f}")
                table.add_row(method, f"{row['count']:,}", *cells, f"{len(row['found'])}")
            if method != "mine-pairs":
                seconds, exponent = extrapolated(rows, s.count)
                table.add_row(method, f"{s.count:,}", f"~{seconds:.0f} (N^{exponent:.2f})", "", "", "extrapolated")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
