"""The command `llava-clipmoe compare`: several recipes on the same data, base and seeds, and ONE page of tables.

    llava-clipmoe compare dmu-openmoji fmoe-openmoji direct-ft-openmoji --seeds 3 --output-dir runs/compare
    llava-clipmoe compare dmu-openmoji direct-ft-openmoji -- --data.source captions.csv --engine.workers 2

Each cell (recipe, seed) is a run of `train-encoder` of its own, in OUTPUT_DIR/RECIPE-seedN; what follows `--` is given
to all of them. A base that a recipe trains from nothing is trained once a seed, to its end, before any recipe starts.
Finished cells are kept, unfinished ones go on: repeat the command. The page is OUTPUT_DIR/compare.md.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llava_clipmoe.files import write_text

from .compare_page import Cell, compare_page, epochs_of, read_cell
from .recipes import RECIPES

BASE = "base"
LARGE = ("cache", "features", "checkpoints")
"""Folders of a finished cell that nothing reads any more; decoded images of 2,000 drawings alone are 700 MB."""


@dataclass(frozen=True)
class Settings:
    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")]
    """Names of recipes (`llava-clipmoe train-encoder --help` lists them), of one scale."""
    seeds: int = 3
    """Every recipe is run with the seeds 0, 1, ..., this many."""
    output_dir: Path = Path("runs/compare")
    jobs: int = 1
    """Cells that run at once, the cores shared among them. On a CPU, two of one thread do more than one of two."""


def main(argv: list[str]) -> int:
    """Run what is missing, write the page; -> 0."""
    split = argv.index("--") if "--" in argv else len(argv)
    s = tyro.cli(Settings, args=argv[:split], prog="llava-clipmoe compare", description=__doc__)
    more = argv[split + 1 :]
    check(s, more)
    console = Console()
    runner = Runner(s.jobs)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _run_everything(s, more, runner, console)
    finally:
        runner.stop()
    page = compare_page(read_cells(s), ["llava-clipmoe", "compare", *argv])
    write_text(s.output_dir / "compare.md", page)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {s.output_dir / 'compare.md'}", soft_wrap=True)
    return 0


def check(s: Settings, more: Sequence[str]) -> None:
    """Raise ValueError for recipes that cannot be compared."""
    unknown = [name for name in s.recipes if name not in RECIPES]
    if unknown or not s.recipes:
        wrong = f"there is no recipe {unknown[0]!r}" if unknown else "name the recipes to compare"
        raise ValueError(f"{wrong}. There are: {', '.join(RECIPES)}.")
    if len(set(s.recipes)) < len(s.recipes):
        raise ValueError("a recipe is named twice.")
    if s.seeds < 1 or s.jobs < 1:
        raise ValueError("--seeds and --jobs must be at least 1.")
    if any(flag.split("=")[0] in ("--output-dir", "--seed", "--base.source") for flag in more):
        raise ValueError("--output-dir, --seed and --base.source of the runs are set by compare; leave them out.")
    spent = {name: epochs_of(RECIPES[name][1]) for name in s.recipes}
    if len(set(spent.values())) > 1:
        listed = ", ".join(f"{name} {epochs:g}" for name, epochs in spent.items())
        raise ValueError(
            f"these recipes do not pass over the data equally often (epochs: {listed}): compare one scale."
        )


# ------------------------------------------------------------------------------------------------------------- running


def folder_of(s: Settings, recipe: str, seed: int) -> Path:
    return s.output_dir / f"{recipe}-seed{seed}"


def base_recipe(s: Settings) -> str:
    """The recipe that only makes and measures the base, at the scale of the first recipe."""
    scale = next(scale for scale in ("openmoji", "vitl14-336-sharegpt4v") if s.recipes[0].endswith(scale))
    return f"{BASE}-{scale}"


def _run_everything(s: Settings, more: Sequence[str], runner: Runner, console: Console) -> None:
    base = base_recipe(s)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        cells = [(recipe, seed) for seed in range(s.seeds) for recipe in s.recipes]
        task = bars.add_task("bases", total=s.seeds + len(cells))
        started, ran = time.monotonic(), 0

        def one(recipe: str, seed: int) -> None:
            nonlocal ran
            folder = folder_of(s, recipe, seed)
            if not is_finished(folder):
                bars.print(f"{recipe}, seed {seed} (log: {folder}.log)")
                runner.run(command(s, recipe, seed, more), Path(f"{folder}.log"))
                for name in LARGE:
                    shutil.rmtree(folder / name, ignore_errors=True)
                ran += 1
            bars.advance(task)
            left = bars.tasks[task].remaining or 0
            if ran and left:
                seconds = (time.monotonic() - started) / ran * left
                bars.update(task, description=f"cells, about {seconds / 60:.0f} min left")

        runner.all([lambda seed=seed: one(base, seed) for seed in range(s.seeds)])
        bars.update(task, description="cells")
        runner.all([lambda cell=cell: one(*cell) for cell in cells])


def command(s: Settings, recipe: str, seed: int, more: Sequence[str]) -> list[str]:
    """One cell as a `train-encoder` command."""
    words = [sys.executable, "-m", "llava_clipmoe.cli", "train-encoder", recipe, "--seed", str(seed)]
    words += ["--output-dir", str(folder_of(s, recipe, seed))]
    config = RECIPES[recipe][1]
    if config.method != BASE:
        # The very same base for all: converged before any of them starts, with its positions as they are.
        words += ["--base.source", str(folder_of(s, base_recipe(s), seed) / "base"), "--base.text-positions", "None"]
    return [*words, *more]


def is_finished(folder: Path) -> bool:
    """The page is the last thing that a run writes."""
    return (folder / "results.json").is_file() and (folder / "report.html").is_file()


class Runner:
    """Runs commands as child processes, some at once, and ends them all when it is stopped."""

    def __init__(self, jobs: int):
        self.jobs, self.stopped = jobs, False
        self._children: set[subprocess.Popen] = set()

    def all(self, works: Sequence[Callable[[], None]]) -> None:
        """Do all; the first error stops the others and is raised."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work) for work in works]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                self.stop()
                for future in futures:
                    future.cancel()
                raise

    def run(self, words: Sequence[str], log: Path) -> None:
        """One command, its output in `log`. Raises ChildProcessError with the end of it when it fails."""
        if self.stopped:
            return
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        with log.open("ab") as out:
            child = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT,
                                     env={"OMP_NUM_THREADS": threads, **os.environ})  # fmt: skip
            self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        if code and not self.stopped:
            tail = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:])
            raise ChildProcessError(
                f"a cell failed (exit status {code}). The end of {log}:\n{tail}\n"
                "Mend the cause and run the same command again: finished cells are kept."
            )

    def stop(self) -> None:
        self.stopped = True
        for child in list(self._children):
            child.terminate()


# ------------------------------------------------------------------------------------------------------------- reading


def read_cells(s: Settings) -> dict[str, list[Cell]]:
    """Recipe -> its cells by seed, the base first."""
    recipes = [base_recipe(s), *s.recipes]
    return {recipe: [read_cell(folder_of(s, recipe, seed)) for seed in range(s.seeds)] for recipe in recipes}
