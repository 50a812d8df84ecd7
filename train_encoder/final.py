"""What is measured when everything is trained: base, every stage, every expert alone, CLIP-MoE before and after.

Results go to `results.json` system by system, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from llava_clipmoe.files import read_json, write_json
from llava_clipmoe.model_directory import ClipBundle
from llava_clipmoe.modeling_clipmoe import only_expert

from .config import digest
from .data import check_images
from .evaluate.mmvp import evaluate_mmvp
from .evaluate.retrieval import evaluate_retrieval
from .progress import Bar, peak_memory_bytes
from .report import summary_table, write_report
from .sources import open_source

if TYPE_CHECKING:
    from .pipeline import Pipeline


def evaluate_run(run: Pipeline) -> None:
    """Measure every system of the run, write results.json and report.html, and print the table."""
    results = _previous(run)
    started, systems, sources = time.time(), run.systems(), _retrieval_sources(run)
    with Bar("evaluating", len(systems), unit="systems") as bar:
        for system, (make, expert) in systems.items():
            if system not in results["done"]:
                _measure(run, results, sources, system, make(), expert)
                results["done"].append(system)
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
    """Results of an earlier start with the same evaluation settings, or an empty page."""
    key = digest(run.folder.config["evaluation"])
    if run.folder.results.exists():
        old = read_json(run.folder.results)
        if old.get("key") == key:
            return old
    return {"key": key, "done": [], "retrieval": {}, "attributes": {}}


def _retrieval_sources(run: Pipeline) -> dict:
    """name -> (source, its good rows): opened, and every image looked at, once for all systems."""
    from .pipeline import parse_source

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


def attribute_folder(source):
    """The folder of attribute pairs; `openmoji` is made on this machine."""
    from pathlib import Path

    if str(source) != "openmoji":
        return Path(source)
    from .openmoji import build_openmoji

    return build_openmoji() / "attribute_pairs"
