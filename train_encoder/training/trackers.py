"""Where training steps go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio; imported only when asked."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_clipmoe.files import read_json, write_json


class TensorBoardTracker:
    """One TensorBoard run a stage, under `run_dir/tensorboard/STAGE`."""

    def __init__(self, name: str, run_dir: Path, config: dict[str, Any]) -> None:
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

    def __init__(self, name: str, run_dir: Path, config: dict[str, Any]) -> None:
        self.module = importlib.import_module(name)
        file = run_dir / "tracker.json"
        if not file.exists():  # kept with the run: when it is resumed, it continues its own curve
            write_json(file, {"id": uuid.uuid4().hex[:8]})
        identity = f"{run_dir.resolve().name}-{read_json(file)['id']}"
        project = os.environ.get("TRACKER_PROJECT", "clip-moe")
        own = {"id": identity, "dir": str(run_dir)} if name == "wandb" else {}
        self.module.init(project=project, name=identity, config=config, resume="allow", **own)
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


TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": HostedTracker, "trackio": HostedTracker}


def check_trackers(names: Iterable[str]) -> None:
    """Raise ImportError now, not after the first stage, when a tracker's package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"tracker {name!r} needs the package {name!r} ({error}). Install it with `pip install {name}`, "
                "or leave the tracker out: metrics.jsonl and report.html are written without it."
            ) from error
