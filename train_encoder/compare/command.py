"""The command `llava-clipmoe compare`: several recipes on the same data, base and seeds, and ONE page of tables.

    llava-clipmoe compare dmu fmoe direct-ft --seeds 3                       (OpenMoji, a small CLIP; hours on 2 cores)
    llava-clipmoe compare all --seeds 3 --jobs 2 --output-dir runs/compare
    llava-clipmoe compare dmu direct-ft --data train.csv --retrieval dev=dev.csv -- --engine.workers 2
    llava-clipmoe compare dmu fmoe --scale vitl14-336-sharegpt4v --retrieval coco=coco.json
    llava-clipmoe compare --llava checkpoints/llava-v1.5-7b checkpoints/llava-v1.5-7b-clipmoe

Each cell (recipe, seed) is a run of `train-encoder` of its own, in OUTPUT_DIR/RECIPE-seedN; what follows `--` is given
to all of them. A base that a recipe trains from nothing is trained once a seed, to its end, before any recipe starts.
Finished cells are kept, unfinished ones go on: repeat the command. The page is OUTPUT_DIR/compare.md and compare.html.
With --llava, what eval-llava measured of several LLaVAs is a table of the page, or with no recipe a page of its own
(llava.md, llava.html).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llava_clipmoe.files import read_json, write_text
from llava_clipmoe.processes import Children, end_of, exit_on_sigterm

from ..methods import METHODS
from ..recipes import RECIPES
from ..report.numbers import duration
from .llava import read_llavas
from .runs import Cell, read_cell
from .tables import make_page

Scale = Literal["openmoji", "vitl14-336-sharegpt4v"]
LARGE = ("cache", "features", "checkpoints")
"""Folders of a finished cell that nothing reads any more; decoded images of 2,000 drawings alone are 700 MB."""


@dataclass(frozen=True)
class Settings:
    recipes: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RECIPE...")] = ()
    """Recipes of one scale, as `dmu` or in full as `dmu-openmoji`, or `all` of them; `llava-clipmoe train-encoder
    --help` lists them."""
    scale: Scale = "openmoji"
    """Which model and data the recipes' short names stand for."""
    data: str | None = None
    """Train on this in the place of the scale's data: anything that --data.source of train-encoder takes."""
    retrieval: tuple[str, ...] = ()
    """Measure retrieval on these, NAME=SOURCE or NAME=SOURCE:SPLIT each; needed with --data."""
    zero_shot: tuple[str, ...] = ()
    """Measure classification on these, NAME=FOLDER each (imagenet, cifar10, cifar100, or a folder of classes). Emoji
    are classified by colour where they are the data."""
    attributes: str | None = None
    """Measure attribute pairs: a folder in MMVP-VLM's layout, or `openmoji` (the default where emoji are the data)."""
    seeds: int = 3
    """Every recipe is run with the seeds 0, 1, ..., this many."""
    output_dir: Path = Path("runs/compare")
    """Where the cells and the page are kept; give another one for other settings."""
    jobs: int = 1
    """Cells that run at once, the cores shared among them. On a CPU, two of one thread do more than one of two."""
    llava: tuple[str, ...] = ()
    """LLaVAs, [NAME=]DIR each: a folder with results of eval-llava, or a model directory that was measured. The first
    is what the others are compared with."""
    llava_results: Path = Path("runs/eval-llava")
    """Where eval-llava put the results of the model directories named by --llava."""


def main(argv: list[str]) -> int:
    """Run what is missing, write the page; -> 0."""
    split = argv.index("--") if "--" in argv else len(argv)
    s = tyro.cli(Settings, args=argv[:split], prog="llava-clipmoe compare", description=__doc__)
    more = argv[split + 1 :]
    check(s, more)
    llavas, console = read_llavas(s.llava, s.llava_results), Console()
    cells: dict[str, list[Cell]] = {}
    if s.recipes:
        run_everything(s, more, console)
        cells = read_cells(s)
    page = make_page(cells, llavas, ["llava-clipmoe", "compare", *argv])
    stem = s.output_dir / ("compare" if s.recipes else "llava")
    write_text(stem.with_suffix(".md"), page.markdown())
    write_text(stem.with_suffix(".html"), page.html())
    console.print(page.markdown(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"page: {stem}.md, with figures: {stem}.html", soft_wrap=True)
    return 0


# ------------------------------------------------------------------------------------------------------ what to compare


def scale_of(s: Settings) -> str:
    """By the first recipe that is named in full, else --scale. Raises ValueError for a recipe of no scale."""
    full = next((name for name in s.recipes if name in RECIPES), None)
    if full is None:
        return s.scale
    for scale in get_args(Scale):
        if full.endswith(f"-{scale}"):
            return scale
    scales = ", ".join(get_args(Scale))
    raise ValueError(f"{full} stands alone: there is nothing to compare it with. The scales are {scales}.")


def recipes_of(s: Settings) -> list[str]:
    """Full names of the recipes. Raises ValueError for names that do not exist."""
    scale = scale_of(s)
    every = [name for name in RECIPES if name.endswith(f"-{scale}") and name != base_recipe(s)]
    if s.recipes == ("all",):
        return every
    found = [name if name in RECIPES else f"{name}-{scale}" for name in s.recipes]
    if unknown := [name for name in found if name not in RECIPES]:
        listed = ", ".join(short(s, name) for name in every)
        wrong = short(s, unknown[0])
        raise ValueError(f"there is no recipe {wrong!r} of the scale {scale}. There are: {listed}; or all.")
    return found


def base_recipe(s: Settings) -> str:
    """The recipe that only makes and measures the base."""
    return f"base-{scale_of(s)}"


def short(s: Settings, recipe: str) -> str:
    """A recipe's name on the page."""
    return recipe.removesuffix(f"-{scale_of(s)}")


def check(s: Settings, more: Sequence[str]) -> None:
    """Raise ValueError for recipes that cannot be compared."""
    if s.seeds < 1 or s.jobs < 1:
        raise ValueError("--seeds and --jobs must be at least 1.")
    if not s.recipes:
        if s.llava:
            return
        raise ValueError(
            f"name the recipes to compare (or all), or LLaVAs by --llava. There are: {', '.join(RECIPES)}."
        )
    recipes = recipes_of(s)
    if len(set(recipes)) < len(recipes):
        raise ValueError("a recipe is named twice.")
    if _given(more, "--output-dir", "--seed", "--base.source"):
        raise ValueError("--output-dir, --seed and --base.source of the runs are set by compare; leave them out.")
    measured = s.retrieval or s.zero_shot or s.attributes or _given(more, "--evaluation.retrieval")
    if s.data is not None and not measured:
        raise ValueError(
            "with --data, say what to measure: --retrieval NAME=SOURCE (pictures that training never sees)."
        )
    spent = {name: epochs_of(name) for name in recipes}
    if len(set(spent.values())) > 1:
        listed = ", ".join(f"{name} {epochs:g}" for name, epochs in spent.items())
        raise ValueError(
            f"these recipes do not pass over the data equally often (epochs: {listed}): compare one scale."
        )


def epochs_of(recipe: str) -> float:
    """Passes over the data after the base. 0 for the base alone."""
    config = RECIPES[recipe][1]
    return METHODS[config.method].epochs(config)


def _given(flags: Sequence[str], *names: str) -> bool:
    return any(flag.split("=")[0] in names for flag in flags)


def run_flags(s: Settings, more: Sequence[str]) -> list[str]:
    """Flags of every cell, the user's own last."""
    config = RECIPES[base_recipe(s)][1]
    flags, other = [], s.data is not None and s.data != config.data.source
    if other:
        flags += ["--data.source", s.data]
        if config.base.scratch.caption_columns:  # the scenes'; found by name elsewhere
            flags += ["--base.scratch.early-caption-columns", "--base.scratch.caption-columns", "--moe.caption-columns"]
    if s.retrieval or other:
        flags += ["--evaluation.retrieval", *s.retrieval]
    if s.attributes or other:
        flags += ["--evaluation.attributes", s.attributes or "None"]
    if not _given(more, "--evaluation.zero-shot"):
        flags += ["--evaluation.zero-shot", *zero_shot_of(s, more)]
    return [*flags, *more]


def zero_shot_of(s: Settings, more: Sequence[str]) -> tuple[str, ...]:
    """What is classified: what was asked for, else scenes by noun and colour where they are what a cell trains on."""
    if s.zero_shot or _given(more, "--evaluation.zero-shot", "--data.source"):
        return s.zero_shot
    emoji = scale_of(s) == "openmoji" and s.data in (None, "openmoji")
    return ("openmoji-nouns", "openmoji-colours") if emoji else ()


# ------------------------------------------------------------------------------------------------------------- running


def folder_of(s: Settings, recipe: str, seed: int) -> Path:
    return s.output_dir / f"{recipe}-seed{seed}"


def run_everything(s: Settings, more: Sequence[str], console: Console) -> None:
    """All bases, then all cells, `jobs` at once; what is finished is kept. Ctrl-C and SIGTERM end the children too."""
    bases = [(base_recipe(s), seed) for seed in range(s.seeds)]
    cells = [(recipe, seed) for seed in range(s.seeds) for recipe in recipes_of(s)]
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    children = Children()
    with exit_on_sigterm(), Progress(*columns, console=console) as bars:
        run_group(s, "bases", bases, more, children, bars)
        run_group(s, "cells", cells, more, children, bars)


def run_group(
    s: Settings, kind: str, group: Sequence[tuple[str, int]], more: Sequence[str], children: Children, bars: Progress
) -> None:
    """Those of the (recipe, seed) that are not finished, with the time that is left."""
    classified = [entry.partition("=")[0] for entry in zero_shot_of(s, more)]
    missing = [cell for cell in group if not is_finished(folder_of(s, *cell), classified)]
    task = bars.add_task(kind, total=len(group), completed=len(group) - len(missing))
    took: list[float] = []

    def run_one(recipe: str, seed: int) -> None:
        started = time.monotonic()
        run_cell(s, recipe, seed, more, children, bars)
        took.append(time.monotonic() - started)
        left = statistics.mean(took) * (len(missing) - len(took)) / s.jobs / 60
        bars.update(task, advance=1, description=f"{kind}, about {left:.0f} min left" if left else kind)

    if missing:
        children.run_all([partial(run_one, *cell) for cell in missing], at_once=s.jobs)


def run_cell(s: Settings, recipe: str, seed: int, more: Sequence[str], children: Children, bars: Progress) -> None:
    """Run one cell, and drop what is large and needed no more. Raises ChildProcessError when it fails by itself."""
    folder, started = folder_of(s, recipe, seed), time.monotonic()
    log = Path(f"{folder}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    bars.print(f"{recipe}, seed {seed} (log: {log})")
    threads = str(max(1, (os.cpu_count() or 1) // s.jobs))
    status = children.run(command(s, recipe, seed, more), log=log, env={"OMP_NUM_THREADS": threads, **os.environ})
    if status is None:  # everything is being stopped
        return
    if status:
        raise ChildProcessError(
            f"a cell failed (exit status {status}). The end of {log}:\n{end_of(log)}\n"
            "Mend the cause and run the same command again: finished cells are kept."
        )
    for name in LARGE:
        shutil.rmtree(folder / name, ignore_errors=True)
    cost = read_cell(folder).cost
    spent = f": {cost.steps:,} steps, {cost.samples:,} samples" if cost.steps else ""
    bars.print(f"{recipe}, seed {seed}{spent}; {duration(time.monotonic() - started)} in all")


def command(s: Settings, recipe: str, seed: int, more: Sequence[str]) -> list[str]:
    """One cell as a `train-encoder` command."""
    words = [sys.executable, "-m", "llava_clipmoe.cli", "train-encoder", recipe, "--seed", str(seed)]
    words += ["--output-dir", str(folder_of(s, recipe, seed))]
    if recipe != base_recipe(s):
        # The very same base for all: converged before any of them starts, with its positions as they are.
        words += ["--base.source", str(folder_of(s, base_recipe(s), seed) / "base"), "--base.text-positions", "None"]
    return [*words, *run_flags(s, more)]


def is_finished(folder: Path, zero_shot: Sequence[str] = ()) -> bool:
    """The page is the last thing that a run writes; classification may have been asked for since."""
    if not (folder / "results.json").is_file() or not (folder / "report.html").is_file():
        return False
    results = read_json(folder / "results.json")
    return all(results.get("result") in (results.get("zero_shot") or {}).get(name, {}) for name in zero_shot)


def read_cells(s: Settings) -> dict[str, list[Cell]]:
    """Recipe, by its short name -> its cells by seed, the base first."""
    names = [base_recipe(s), *recipes_of(s)]
    return {short(s, name): [read_cell(folder_of(s, name, seed)) for seed in range(s.seeds)] for name in names}
