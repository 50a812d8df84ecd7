"""What is measured when everything is trained: the variants that the method names (base, stages, experts, result).

Results go to `results.json` one by one, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.transformer_clipmoe import only_expert

from ..data.cache import check_images
from ..data.formats import open_source, parse_source
from ..progress import Bar
from ..saved_settings import digest
from ..training.metrics import Began
from ..training.run import Run
from .composition import evaluate_composition, open_composition
from .mmvp import evaluate_mmvp
from .retrieval import evaluate_retrieval
from .zero_shot import evaluate_zero_shot, open_zero_shot

UNTRAINED_ROUTER = "clip-moe (untrained router)"
"""Variant: a mixture before its routers are trained. Where they start random it is the control too."""
RANDOM_ROUTER = "clip-moe (random router)"
"""Variant: the control of a mixture whose routers start otherwise: the same experts under random routers."""


@dataclass(frozen=True)
class Variant:
    """A model that is measured: how to get it, and the one expert to use alone (None: the model as it is)."""

    load: Callable[[], ClipBundle]
    expert: int | None = None


@dataclass(frozen=True)
class Measure:
    """One data set: how a model is measured on it, and where in the results that goes."""

    scores_of: Callable[[ClipBundle], dict[str, Any]]
    part: dict[str, Any]
    """Data set -> variant -> scores."""
    data_set: str

    def has(self, variant: str) -> bool:
        return variant in self.part.get(self.data_set, {})

    def add(self, variant: str, bundle: ClipBundle) -> None:
        self.part.setdefault(self.data_set, {})[variant] = self.scores_of(bundle)


def evaluate_run(
    run: Run, variants: Mapping[str, Variant], final: str, describe: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Measure every variant of the run -> what results.json holds.

    final: the name of the result among the variants. describe: what is not a score (routing, clusters, ...).
    """
    results, file, began = _previous(run), run.folder.results, Began()
    measures = list(_classifications_and_composition(run, results))
    if set(variants) - set(results["done"]):
        measures = [*_retrieval_and_attributes(run, results), *measures]
    with Bar("evaluating", len(variants), unit="variants") as bar:
        for name, variant in variants.items():
            missing = [measure for measure in measures if not measure.has(name)]
            if missing:
                bundle = variant.load()
                with nullcontext() if variant.expert is None else only_expert(bundle.model, variant.expert):
                    for measure in missing:
                        measure.add(name, bundle)
                        write_json(file, results)
            if name not in results["done"]:
                results["done"].append(name)
                write_json(file, results)
            bar.advance(1)
    if "parameters" not in results:
        results |= {"result": final, **describe()}
        write_json(file, results)
        run.metrics.done("evaluate", "all", began, run.accelerator.device)
    return results


def _previous(run: Run) -> dict[str, Any]:
    """Results of an earlier start with the same evaluation settings, or an empty page.

    Classification and composition are no part of the key: one more data set is measured beside what is there.
    """
    added = ("zero_shot", "composition")
    key = digest({name: value for name, value in run.folder.config["evaluation"].items() if name not in added})
    fresh = {"key": key, "done": [], "retrieval": {}, "attributes": {}, "zero_shot": {}, "composition": {}}
    old = read_json(run.folder.results) if run.folder.results.exists() else {}
    return {**fresh, **old} if old.get("key") == key else fresh


def _encoding(run: Run) -> dict[str, Any]:
    batch_size = run.config.evaluation.batch_size
    return {"device": run.accelerator.device, "precision": run.config.engine.precision, "batch_size": batch_size}


def _retrieval_and_attributes(run: Run, results: dict[str, Any]) -> Iterator[Measure]:
    data, settings, workers = run.config.data, run.config.evaluation, run.config.engine.workers
    for number, entry in enumerate(settings.retrieval, start=1):
        name, chosen = parse_source(entry, data)
        source = open_source(chosen)
        good = check_images(
            source,
            workers=workers,
            max_bad_fraction=data.max_bad_fraction,
            skipped_path=run.folder.path / f"skipped-evaluation{number}.jsonl",
        )
        encoding = {"rows": np.flatnonzero(good), "workers": workers, **_encoding(run)}
        measure = partial(evaluate_retrieval, source=source, **encoding)
        yield Measure(measure, results["retrieval"], name)
    if settings.attributes:
        yield Measure(partial(evaluate_mmvp, folder=settings.attributes, **_encoding(run)), results, "attributes")


def _classifications_and_composition(run: Run, results: dict[str, Any]) -> Iterator[Measure]:
    for entry in run.config.evaluation.zero_shot:
        name, (classes, templates) = open_zero_shot(entry)
        loading = {"workers": run.config.engine.workers, **_encoding(run)}
        measure = partial(evaluate_zero_shot, data=classes, templates=templates, **loading)
        yield Measure(measure, results["zero_shot"], name)
    for entry in run.config.evaluation.composition:
        name, folder = open_composition(entry)
        loading = {"workers": run.config.engine.workers, **_encoding(run)}
        measure = partial(evaluate_composition, preset=name, folder=folder, **loading)
        yield Measure(measure, results["composition"], name)
