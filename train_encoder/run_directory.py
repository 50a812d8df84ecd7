"""The run's directory: where every piece lies, and whether it belongs to this command."""

from __future__ import annotations

import fcntl
import hashlib
import time
from pathlib import Path

import numpy as np

from llava_clipmoe.files import leftovers, read_json, remove_leftovers, write_json

from .config import TrainConfig
from .saved_settings import differences, to_dict

PATIENCE = 8
"""Seconds to wait for the lock: a killed process's loader workers hold it until they notice, torch says within 5."""


class RunError(ValueError):
    """The output directory cannot be used for this run."""


class RunDirectory:
    """`runs/NAME`: paths of its pieces (docs/train-encoder.md), and the run's settings as JSON values."""

    def __init__(self, config: TrainConfig):
        self.path = Path(config.output_dir)
        self.config = to_dict(config)
        self.base = self.path / "base"
        self.cache = self.path / "cache" / "images.npy"
        self.skipped = self.path / "skipped.jsonl"
        self.results = self.path / "results.json"
        self.routers = self.path / "router-init" / "routers.safetensors"
        self._lock = None

    def stage_weights(self, number: int) -> Path:
        return self.path / f"stage{number}" / "model.safetensors"

    def expert_weights(self, number: int) -> Path:
        """FFNs of one independently trained expert (CLIP-FMoE)."""
        return self.path / f"expert{number}" / "model.safetensors"

    def clusters(self, number: int) -> Path:
        return self.path / "clusters" / f"stage{number}.npz"

    def features(self, name: str) -> Path:
        return self.path / "features" / name

    def checkpoints(self, name: str) -> Path:
        return self.path / "checkpoints" / name

    def chunk(self, name: str) -> Path:
        """The chunk of images that was measured for a training: a resumed run computes with the same."""
        return self.path / "chunks" / f"{name}.json"

    def trainings(self) -> list[str]:
        """Names of those whose resume state is there."""
        return [folder.name for folder in self.checkpoints("").glob("*")]

    def claim(self, main_process: bool) -> None:
        """Make the directory this run's; a chunk that the settings leave open ("auto") is then the one that the run
        began with. Raises RunError when the directory holds another run, or is in use by one."""
        config_file = self.path / "config.json"
        if not main_process:
            self._keep_chunk(read_json(config_file))
            return
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; give a directory: --output-dir runs/NAME.")
        if self.path.exists() and not config_file.exists() and not self._is_new():
            raise RunError(f"{self.path} exists and is not a run of this trainer. Use another --output-dir.")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock_it()
        if config_file.exists():
            old = read_json(config_file)
            self._keep_chunk(old)
            if changed := differences(old, self.config):
                raise RunError(
                    f"{self.path} holds a run with other settings:\n  " + "\n  ".join(changed) + "\n"
                    "Repeat its own command to resume it, or give another --output-dir."
                )
            before, now = old["engine"]["chunk_size"], self.config["engine"]["chunk_size"]
            if now != before:
                print(f"--engine.chunk-size is {now} from here on; it was {before}. Numbers will differ by rounding.")
        # Before anything is written: they may be what has filled the disk.
        for folder in (self.path, self.cache.parent, self.path / "clusters", *self.features("").glob("*")):
            remove_leftovers(folder)
        write_json(config_file, self.config)

    def _keep_chunk(self, old: dict) -> None:
        if self.config["engine"]["chunk_size"] == "auto":
            self.config["engine"]["chunk_size"] = old["engine"]["chunk_size"]

    def _is_new(self) -> bool:
        """Empty, or as a process left it that was killed before config.json was there."""
        return set(self.path.iterdir()) <= {self.path / ".lock", *leftovers(self.path, "config.json")}

    def _lock_it(self) -> None:
        self._lock = open(self.path / ".lock", "w")  # held, and released by the system, until exit
        until = time.monotonic() + PATIENCE
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if time.monotonic() > until:
                    raise RunError(
                        f"another process is training in {self.path}. Wait for it, stop it, or use another "
                        "--output-dir."
                    ) from error
            time.sleep(0.1)

    def check_data(self, fingerprint: str, main_process: bool) -> None:
        """Raises RunError when the data is not what this run started with."""
        file = self.path / "data.json"
        if main_process and not file.exists():
            write_json(file, {"fingerprint": fingerprint})
        if file.exists() and read_json(file)["fingerprint"] != fingerprint:
            raise RunError(
                f"the data is not what the run in {self.path} started with (other rows or another order). "
                "Restore it to resume, or give another --output-dir."
            )


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, shortened."""
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()[:16]
