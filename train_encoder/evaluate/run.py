"""What is measured when everything is trained: base, every stage, every expert alone, CLIP-MoE before and after.

Results go to `results.json` system by system, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from llava_clipmoe.bundle import ClipBundle
from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.transformer_clipmoe import only_expert

from ..config import digest
from ..data.cache import check_images
from ..data.formats import open_source
from ..progress import Bar
from ..report import summary_table, write_report
from ..training.memory import peak_memory_bytes
from .mmvp import evaluate_mmvp
from .retrieval import evaluate_retrieval
from .zero_shot import Classes, Templates, evaluate_zero_shot, open_zero_shot

if TYPE_CHECKING:
    from ..training.run import Pipeline


def evaluate_run(run: Pipeline) -> None:
    """Measure every system of the run, write results.json and report.html, and print the table."""
    results = _previous(run)
    started, systems, classes = time.time(), run.systems(), _open_classes(run)
    sources = _retrieval_sources(run) if set(systems) - set(results["done"]) else {}
    with Bar("evaluating", len(systems), unit="systems") as bar:
        for system, (make, expert) in systems.items():
            if system not in results["done"]:
                _measure(run, results, sources, system, make(), expert)
                results["done"].append(system)
                write_json(run.folder.results, results)
            for name, data in classes.items():
                if system not in results["zero_shot"].setdefault(name, {}):
                    results["zero_shot"][name][system] = _classify(run, data, make(), expert)
                    write_json(run.folder.results, results)
            bar.advance(1)
    if "parameters" not in results:
        results |= {"result": run.final, **run.describe()}
        write_json(run.folder.results, results)
        run.metrics.log({"event": "done", "work": "evaluate", "stage": "all", "seconds": time.time() - started,
                         "peak_memory_bytes": peak_memory_bytes(run.accelerator.device)})  # fmt: skip
    page = write_report(run.folder.path)
    console = Console()
    if not console.is_terminal:  # a log has no width: never cut a system's name
        console = Console(width=160)
    console.print(summary_table(results))
    console.print(f"report: {page}\nmodel:  {run.folder.result}", highlight=False, soft_wrap=True)


def _previous(run: Pipeline) -> dict:
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


def _retrieval_sources(run: Pipeline) -> dict:
    """name -> (source, its good rows): opened, and every image looked at, once for all systems."""
    from ..data.formats import parse_source

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


def _measure(run: Pipeline, results: dict, sources: dict, system: str, bundle: ClipBundle, expert: int | None) -> None:
    evaluation, engine = run.config.evaluation, run.config.engine
    settings = {"batch_size": evaluation.batch_size, "device": run.accelerator.device, "precision": engine.precision}
    if expert is not None:
        with only_expert(bundle.model, expert):
            return _measure(run, results, sources, system, bundle, None)
    for name, (source, rows) in sources.items():
        found = evaluate_retrieval(bundle, source, rows=rows, workers=engine.workers, **settings)
        results["retrieval"].setdefault(name, {})[system] = found
    if evaluation.attributes:
        results["attributes"][system] = evaluate_mmvp(bundle, attribute_folder(evaluation.attributes), **settings)


def _open_classes(run: Pipeline) -> dict[str, tuple[Classes, Templates]]:
    """name -> labelled images and their prompts, opened once for all systems."""
    return dict(open_zero_shot(entry) for entry in run.config.evaluation.zero_shot)


def _classify(run: Pipeline, data: tuple[Classes, Templates], bundle: ClipBundle, expert: int | None) -> dict:
    evaluation, engine = run.config.evaluation, run.config.engine
    with nullcontext() if expert is None else only_expert(bundle.model, expert):
        return evaluate_zero_shot(
            bundle, data[0], templates=data[1], batch_size=evaluation.batch_size, workers=engine.workers,
            device=run.accelerator.device, precision=engine.precision,
        )  # fmt: skip


def attribute_folder(source):
    """The folder of attribute pairs; `openmoji` is made on this machine."""
    from pathlib import Path

    if str(source) != "openmoji":
        return Path(source)
    from ..openmoji.drawings import build_openmoji

    return build_openmoji() / "attribute_pairs"
