"""What is measured when everything is trained: the variants that the method names (base, stages, experts, result).

Results go to `results.json` variant by variant, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.transformer_clipmoe import only_expert

from ..config import digest
from ..data.cache import check_images
from ..data.formats import open_source, parse_source
from ..data.pairs import PairSource
from ..progress import Bar
from ..training.metrics import Began
from ..training.run import Run
from .mmvp import evaluate_mmvp
from .retrieval import evaluate_retrieval
from .zero_shot import evaluate_zero_shot, open_zero_shot


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
    evaluation, began = _Evaluation(run, set(variants)), Began()
    results = evaluation.results
    with Bar("evaluating", len(variants), unit="variants") as bar:
        for name, variant in variants.items():
            evaluation.measure(name, variant)
            bar.advance(1)
    if "parameters" not in results:
        results |= {"result": final, **describe()}
        write_json(run.folder.results, results)
        run.metrics.done("evaluate", "all", began, run.accelerator.device)
    return results


class _Evaluation:
    """The data of an evaluation, opened once for all variants, and the results so far."""

    def __init__(self, run: Run, variants: set[str]):
        self.file, self.results = run.folder.results, _previous(run)
        self.attributes, engine = run.config.evaluation.attributes, run.config.engine
        batch_size = run.config.evaluation.batch_size
        self.encoding = {"device": run.accelerator.device, "precision": engine.precision, "batch_size": batch_size}
        self.loading = {**self.encoding, "workers": engine.workers}
        self.classes = dict(map(open_zero_shot, run.config.evaluation.zero_shot))
        self.sources = _retrieval_sources(run) if variants - set(self.results["done"]) else {}

    def measure(self, name: str, variant: Variant) -> None:
        """Everything that results.json does not have of this variant yet."""
        results = self.results
        if name not in results["done"]:
            self._apply(self._retrieval_and_attributes, name, variant)
            results["done"].append(name)
            write_json(self.file, results)
        for dataset in self.classes:
            if name not in results["zero_shot"].setdefault(dataset, {}):
                self._apply(self._zero_shot, name, variant, dataset)
                write_json(self.file, results)

    def _apply(self, work: Callable[..., None], name: str, variant: Variant, *more: str) -> None:
        bundle = variant.load()
        with nullcontext() if variant.expert is None else only_expert(bundle.model, variant.expert):
            work(name, bundle, *more)

    def _retrieval_and_attributes(self, name: str, bundle: ClipBundle) -> None:
        for dataset, (source, rows) in self.sources.items():
            found = evaluate_retrieval(bundle, source, rows=rows, **self.loading)
            self.results["retrieval"].setdefault(dataset, {})[name] = found
        if self.attributes:
            self.results["attributes"][name] = evaluate_mmvp(bundle, self.attributes, **self.encoding)

    def _zero_shot(self, name: str, bundle: ClipBundle, dataset: str) -> None:
        classes, templates = self.classes[dataset]
        found = evaluate_zero_shot(bundle, classes, templates=templates, **self.loading)
        self.results["zero_shot"][dataset][name] = found


def _previous(run: Run) -> dict[str, Any]:
    """Results of an earlier start with the same evaluation settings, or an empty page.

    Classification is no part of the key: one more data set is measured beside what is there.
    """
    key = digest({name: value for name, value in run.folder.config["evaluation"].items() if name != "zero_shot"})
    fresh = {"key": key, "done": [], "retrieval": {}, "attributes": {}, "zero_shot": {}}
    old = read_json(run.folder.results) if run.folder.results.exists() else {}
    return {**fresh, **old} if old.get("key") == key else fresh


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
