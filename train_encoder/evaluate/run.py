"""What is measured when everything is trained: base, every stage, every expert alone, CLIP-MoE before and after.

Results go to `results.json` variant by variant, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.transformer_clipmoe import only_expert

from ..config import digest
from ..data.cache import check_images
from ..data.formats import open_source, parse_source
from ..data.pairs import PairSource
from ..openmoji.drawings import build_openmoji
from ..progress import Bar
from ..training.metrics import Began
from ..training.run import Run
from .mmvp import evaluate_mmvp
from .retrieval import evaluate_retrieval
from .zero_shot import Classes, Templates, evaluate_zero_shot, open_zero_shot


@dataclass(frozen=True)
class Variant:
    """A model that is measured: how to get it, and the one expert to use alone (None: the model as it is)."""

    load: Callable[[], ClipBundle]
    expert: int | None = None


def evaluate_run(
    run: Run, variants: Mapping[str, Variant], final: str, describe: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measure every variant of the run -> what results.json holds.

    final: the name of the result among the variants. describe: what is not a score (routing, clusters, ...).
    """
    evaluation = _Evaluation(run, set(variants))
    results, file, began = evaluation.results, run.folder.results, Began()
    with Bar("evaluating", len(variants), unit="variants") as bar:
        for name, variant in variants.items():
            evaluation.measure(name, variant)
            bar.advance(1)
    if "parameters" not in results:
        results |= {"result": final, **describe()}
        write_json(file, results)
        run.metrics.done("evaluate", "all", began, run.accelerator.device)
    return results


class _Evaluation:
    """The data of an evaluation, opened once for all variants, and the results so far."""

    def __init__(self, run: Run, variants: set[str]):
        self.run, self.results = run, _previous(run)
        evaluation, engine = run.config.evaluation, run.config.engine
        self.settings = {
            "device": run.accelerator.device,
            "precision": engine.precision,
            "batch_size": evaluation.batch_size,
        }
        self.classes: dict[str, tuple[Classes, Templates]] = dict(map(open_zero_shot, evaluation.zero_shot))
        self.sources = _retrieval_sources(run) if variants - set(self.results["done"]) else {}

    def measure(self, name: str, variant: Variant) -> None:
        """Everything that results.json does not have of this variant yet."""
        results, file = self.results, self.run.folder.results
        if name not in results["done"]:
            self._call(variant, lambda bundle: self._retrieval_and_attributes(name, bundle))
            results["done"].append(name)
            write_json(file, results)
        for dataset, (classes, templates) in self.classes.items():
            if name not in results["zero_shot"].setdefault(dataset, {}):
                found = self._call(variant, lambda bundle, c=classes, t=templates: self._zero_shot(bundle, c, t))
                results["zero_shot"][dataset][name] = found
                write_json(file, results)

    def _call(self, variant: Variant, work: Callable[[ClipBundle], Any]) -> Any:
        bundle = variant.load()
        with nullcontext() if variant.expert is None else only_expert(bundle.model, variant.expert):
            return work(bundle)

    def _retrieval_and_attributes(self, name: str, bundle: ClipBundle) -> None:
        workers, attributes = self.run.config.engine.workers, self.run.config.evaluation.attributes
        for dataset, (source, rows) in self.sources.items():
            found = evaluate_retrieval(bundle, source, rows=rows, workers=workers, **self.settings)
            self.results["retrieval"].setdefault(dataset, {})[name] = found
        if attributes:
            self.results["attributes"][name] = evaluate_mmvp(bundle, attribute_folder(attributes), **self.settings)

    def _zero_shot(self, bundle: ClipBundle, classes: Classes, templates: Templates) -> dict[str, Any]:
        workers = self.run.config.engine.workers
        return evaluate_zero_shot(bundle, classes, templates=templates, workers=workers, **self.settings)


def _previous(run: Run) -> dict[str, Any]:
    """Results of an earlier start with the same evaluation settings, or an empty page.

    Classification is no part of the key: a data set more is measured beside what is there.
    """
    key = digest({name: value for name, value in run.folder.config["evaluation"].items() if name != "zero_shot"})
    fresh = {"key": key, "done": [], "retrieval": {}, "attributes": {}, "zero_shot": {}}
    if run.folder.results.exists():
        old = read_json(run.folder.results)
        if old.get("key") == key:
            return {**fresh, **old}
    return fresh


def _retrieval_sources(run: Run) -> dict[str, tuple[PairSource, np.ndarray]]:
    """name -> (source, its usable rows)."""
    sources = {}
    for number, entry in enumerate(run.config.evaluation.retrieval, start=1):
        name, data = parse_source(entry, run.config.data)
        source = open_source(data)
        good = check_images(
            source,
            workers=run.config.engine.workers,
            max_bad_fraction=run.config.data.max_bad_fraction,
            skipped_path=run.folder.path / f"skipped-evaluation{number}.jsonl",
        )
        sources[name] = source, np.flatnonzero(good)
    return sources


def attribute_folder(source: Path | str) -> Path:
    """The folder of attribute pairs; `openmoji` is made on this machine."""
    return build_openmoji() / "attribute_pairs" if str(source) == "openmoji" else Path(source)
