"""One cell of a comparison: what a finished run scored and what it spent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_clipmoe.files import read_json
from llava_clipmoe.model_directory import read_config
from llava_clipmoe.tokenizer import has_tokenizer, load_tokenizer, open_clip_tokenizer

from ..config import TrainConfig
from ..evaluate.run import RANDOM_ROUTER, UNTRAINED_ROUTER
from ..methods import METHODS
from ..saved_settings import filled, to_dict
from ..training.metrics import METRICS, read_metrics
from .cost import CaptionTokens, caption_tokens, run_flops, vision_macs


@dataclass(frozen=True)
class Cost:
    """What a run spent after its base."""

    steps: int
    samples: int
    train_seconds: float
    other_seconds: dict[str, float]
    """features, clusters, ... by the kind of work."""
    peak_memory: int
    """Bytes."""
    encoded: int = 0
    """Images whose features were computed, all stages together."""
    encoded_captions: int = 0

    @property
    def features(self) -> float:
        return self.other_seconds.get("features", 0.0)

    @property
    def clusters(self) -> float:
        return self.other_seconds.get("clusters", 0.0)

    @property
    def seconds(self) -> float:
        """Training, features and clusters."""
        return self.train_seconds + sum(self.other_seconds.values())


@dataclass(frozen=True)
class Cell:
    """One finished run."""

    results: dict[str, Any]
    cost: Cost
    inference_macs: int
    """Multiply-accumulates of the result's vision tower for one image."""
    flops: float = 0.0
    """Floating-point operations of everything after the base (cost.py)."""
    tokens: CaptionTokens | None = None
    """Lengths of the captions that `flops` rests on."""

    @property
    def final(self) -> str:
        """The result's name among the variants (runs older than the setting made a CLIP-MoE)."""
        return self.results.get("result", "clip-moe")

    def has(self, kind: str, name: str) -> bool:
        """Whether the result was measured on a data set. kind: retrieval or zero_shot."""
        return self.final in (self.results.get(kind) or {}).get(name, {})

    def scores(self, kind: str, name: str, variant: str | None = None) -> dict[str, float]:
        """Of the result, or of another variant."""
        return self.results[kind][name][variant or self.final]

    @property
    def control(self) -> str | None:
        """The variant with the same experts under random routers, never trained; None where there are no routers."""
        if not self.results.get("routing"):
            return None
        measured = self.results.get("done") or ()
        return next((name for name in (RANDOM_ROUTER, UNTRAINED_ROUTER) if name in measured), None)


Cells = Mapping[str, Sequence[Cell]]
"""Recipe -> its cells by seed, the base first."""


def read_cell(folder: Path) -> Cell:
    """A finished run's scores and costs. Raises FileNotFoundError when it is not finished."""
    settings = filled(read_json(folder / "config.json"), to_dict(TrainConfig()))
    config = json.loads(json.dumps(settings), object_hook=lambda values: SimpleNamespace(**values))
    rows, _ = read_metrics(folder / METRICS)
    method, base = METHODS[config.method], read_config(folder / "base")
    result = read_config(folder / method.output)
    trainings = method.trainings(config, base, result)
    cpu = config.engine.device == "cpu" and config.engine.workers == 0
    batches = {name: training.optim.global_batch_size for name, training in trainings.items()}
    cost, flops, tokens = cost_of(rows, batches, cpu), 0.0, None
    if trainings:
        data = json.dumps(settings["data"], sort_keys=True)
        context = base.text_config.max_position_embeddings
        tokens = _tokens(data, folder / "base", context, max(batches.values()))
        encoded = cost.encoded, cost.encoded_captions
        chunks = {row["stage"]: row["chunk_size"] for row in rows if "chunk_size" in row}
        flops = run_flops(trainings, config.engine, base, steps_of(rows), *encoded, tokens, chunks)
    return Cell(read_json(folder / "results.json"), cost, vision_macs(result.vision_config), flops, tokens)


_measured: dict[tuple, CaptionTokens] = {}


def _tokens(data: str, base: Path, context: int, batch: int) -> CaptionTokens:
    """Measured once for all cells that read the same data: their tokenizers are alike."""
    key = data, context, batch
    if key not in _measured:
        tokenizer = load_tokenizer(base, context) if has_tokenizer(base) else open_clip_tokenizer(context)
        _measured[key] = caption_tokens(json.loads(data), tokenizer, context, batch)
    return _measured[key]


def steps_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Steps of every training after the base, by its name."""
    return {row["stage"]: row["steps"] for row in rows if "step" in row and not row.get("stage", "").startswith("base")}


def cost_of(rows: Sequence[Mapping[str, Any]], batches: Mapping[str, int], cpu: bool = False) -> Cost:
    """From the lines of metrics.jsonl; the base's own training counts nowhere, nor does evaluation.

    batches: images a step of each training. cpu: everything ran in one process on a CPU, whose own time counts. A
    training that was killed and resumed logs only its last part: its time is scaled up to the whole.
    """
    done = [row for row in rows if row.get("event") == "done" and row.get("work") != "evaluate"]
    own = [row for row in done if not (row["work"] == "train" and row["stage"].startswith("base"))]
    steps = steps_of(rows)
    longest: dict[tuple[str, str], Mapping[str, Any]] = {}
    for row in sorted(own, key=lambda row: row.get("images", 0)):  # work begun again after a kill has two lines
        longest[row["work"], row["stage"]] = row
    other: dict[str, float] = {}
    samples = seconds = encoded = captions = 0
    for (work, stage), row in longest.items():
        # On a CPU its own time and not the clock's: a comparison runs for hours, and other programs run beside it.
        took = row.get("cpu_seconds", row["seconds"]) if cpu else row["seconds"]
        if work == "train":
            whole = steps[stage] * batches[stage]
            samples += whole
            seconds += took * (whole / row["images"] if row["images"] else 1)
        else:
            other[work] = other.get(work, 0.0) + took
            if work == "features":
                encoded += row["images"]
                captions += row.get("captions", row["images"])  # older runs wrote one number and meant both
    peak = max((row["peak_memory_bytes"] for row in own), default=0)
    return Cost(sum(steps.values()), samples, seconds, other, peak, encoded, captions)
