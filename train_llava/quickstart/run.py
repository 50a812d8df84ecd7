"""Running the steps of both towers side by side, one child process after the other for each, with a bar each."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import train_llava
from llava_clipmoe.files import read_json, remove_leftovers, write_json
from llava_clipmoe.processes import Children, end_of

from .steps import Step

ROOT = Path(train_llava.__file__).resolve().parent.parent
"""Folder of our packages, which a child process must find too."""


class TowerRun:
    """The steps of one tower; finished ones are kept and not run again."""

    def __init__(self, job: Mapping[str, Any], steps: Sequence[Step], threads: int):
        self.job, self.steps, self.threads = job, steps, threads
        self.total, self.finished = sum(step.seconds for step in steps), 0.0
        """Expected work, in seconds."""
        self.now, self.log = "", Path()
        """Name and log of the step under way."""
        self.seconds: dict[str, float] = {}
        """What each finished step took."""

    def run(self, children: Children) -> None:
        """Run all steps that are not done, until `children` are stopped.

        Raises ChildProcessError with the end of the log if a step fails.
        """
        work = Path(self.job["work"])
        work.mkdir(parents=True, exist_ok=True)
        remove_leftovers(work)
        write_json(work / "job.json", dict(self.job))
        for step in self.steps:
            marker = work / f"{step.folder.name}.done.json"
            if not (marker.exists() and step.folder.is_dir()):
                self._run_step(step, work / f"{step.folder.name}.log", marker, children)
            if children.stopped:
                return
            self.seconds[step.name] = read_json(marker)["seconds"]
            self.finished += step.seconds

    def _run_step(self, step: Step, log: Path, marker: Path, children: Children) -> None:
        # A step begins anew: upstream's own LoRA checkpoints lack the projector, which stage 2 trains too.
        shutil.rmtree(step.folder, ignore_errors=True)
        log.unlink(missing_ok=True)
        self.now, self.log, start = step.name, log, time.monotonic()
        status = children.run(step.command, log=log, env=_environment(self.threads))
        if status is None:
            return
        if status != 0:
            raise ChildProcessError(
                f"{self.job['name']}: the step {step.name!r} failed (exit status {status}). The end of {log}:\n"
                f"{end_of(log)}\nMend the cause and run the same command again: the steps before are kept."
            )
        write_json(marker, {"seconds": round(time.monotonic() - start, 1)})

    def progress(self) -> float:
        """How much is done, in seconds of expected work, by the end of the present step's log."""
        if self.now in self.seconds or not self.log.is_file():
            return self.finished
        running = next(step for step in self.steps if step.name == self.now)
        return self.finished + running.seconds * last_fraction(self.log)


def last_fraction(log: Path) -> float:
    """How far a step is, 0 to 1, by the last "done/total [" in its log: tqdm's bars and our own lines have it."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = re.findall(r"(\d+)/(\d+) \[", file.read().decode(errors="replace"))
    done, total = map(int, found[-1]) if found else (0, 1)
    return min(1.0, done / max(1, total))


def _environment(threads: int) -> dict[str, str]:
    """A child's environment: its share of the cores, no hub, and glibc told to keep freed memory."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    glibc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}
    ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **glibc, **ours, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run_all(runs: Sequence[TowerRun], console: Console) -> None:
    """Run both towers at once: two processes of one thread do more than one of two. The first error ends both."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TimeElapsedColumn())
    columns += (TextColumn("left"), TimeRemainingColumn())
    children, shown = Children(), [""] * len(runs)
    with Progress(*columns, console=console, speed_estimate_period=300) as bars, ThreadPoolExecutor(1) as pool:
        tasks = [bars.add_task(run.job["name"], total=run.total) for run in runs]
        everything = pool.submit(children.run_all, [partial(run.run, children) for run in runs])
        try:
            while not everything.done():
                wait([everything], timeout=0.5)
                for i, (run, task) in enumerate(zip(runs, tasks, strict=True)):
                    bars.update(task, description=f"{run.job['name']}: {run.now}", completed=run.progress())
                    if run.now != shown[i]:  # in a log without a terminal the bars do not show
                        bars.print(f"{run.job['name']}: {run.now} (log: {run.log})")
                        shown[i] = run.now
        finally:
            children.stop()
    everything.result()
