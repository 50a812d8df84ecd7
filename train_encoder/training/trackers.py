"""Where training steps go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio; imported only when asked."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from llava_clipmoe.files import read_json, write_json


class Tracker(Protocol):
    """Where training steps go besides metrics.jsonl."""

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """One TensorBoard run a stage, under `run_dir/tensorboard/STAGE`."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        self.folder = run_dir / "tensorboard"
        self.writers: dict[str, Any] = {}

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if stage not in self.writers:
            # purge_step hides what a killed run drew beyond the checkpoint that this one resumed from.
            self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=step, flush_secs=20)
        for name, value in numbers.items():
            self.writers[stage].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class HostedTracker:
    """Weights & Biases or trackio, which share one interface. Project: $TRACKER_PROJECT or "clip-moe"."""

    def __init__(self, package: str, run_dir: Path, config: dict[str, Any]) -> None:
        self.module = __import__(package)
        project = os.environ.get("TRACKER_PROJECT", "clip-moe")
        identity = f"{run_dir.resolve().name}-{_run_identity(run_dir)}"
        arguments: dict[str, Any] = {"project": project, "name": identity, "config": config, "resume": "allow"}
        if package == "wandb":
            arguments |= {"id": identity, "dir": str(run_dir)}
        self.run = self.module.init(**arguments)
        self.stages: set[str] = set()

    def log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        if stage not in self.stages and hasattr(self.module, "define_metric"):
            # wandb has one step counter a run, which must grow; ours starts again at every stage.
            self.module.define_metric(f"{stage}/step")
            self.module.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self.stages.add(stage)
        self.module.log({f"{stage}/{name}": value for name, value in numbers.items()} | {f"{stage}/step": step})

    def close(self) -> None:
        self.module.finish()


def _run_identity(run_dir: Path) -> str:
    """A name that is kept with the run: when it is resumed, it continues its own curve at a hosted tracker."""
    path = run_dir / "tracker.json"
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return read_json(path)["id"]


TRACKERS = {
    "tensorboard": TensorBoardTracker,
    "wandb": lambda run_dir, config: HostedTracker("wandb", run_dir, config),
    "trackio": lambda run_dir, config: HostedTracker("trackio", run_dir, config),
}


def check_trackers(names: Iterable[str]) -> None:
    """Raise now, not after the first stage, when a tracker does not exist or its package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"there is no tracker {name!r}; choose among {', '.join(TRACKERS)}.")
        try:
            __import__(name)
        except ImportError as error:
            raise ImportError(
                f"tracker {name!r} needs the package {name!r} ({error}). Install it with `pip install {name}`, "
                "or leave the tracker out: metrics.jsonl and report.html are written without it."
            ) from error
