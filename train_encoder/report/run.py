"""The page of one run: `report.html`, self-contained, and the table that a run ends with.

    llava-clipmoe report runs/quickstart

It reads `config.json`, `metrics.jsonl`, `results.json` and `clusters/`; each may be absent, and a run in progress gets
a page that says what is missing. The same run directory gives the same bytes. Shares and accuracies are read as
fractions of 1 and shown in percent.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_clipmoe.files import write_text

from ..config import to_dict
from ..methods import METHODS
from ..recipes import RECIPES
from . import sections
from .document import Block, Code, Document, Section, Table, best_of, score
from .sections import RECALLS, Run, load_run

REPORT = "report.html"


# ---------------------------------------------------------------------------------------------------- the settings


def settings(run: Run) -> list[Block] | None:
    if run.config is None:
        return None
    rows = [[name, "none" if value is None else str(value)] for name, value in flatten(run.config).items()]
    return [Table(["setting", "value"], rows, folded=f"All {len(rows)} settings")]


def reproduce(run: Run) -> list[Block] | None:
    if run.config is None:
        return None
    return [
        "The nearest recipe, and every setting in which this run differs from it:",
        Code(reproduce_command(run.config)),
        "Under torchrun the same settings give the same global batches on any number of processes.",
    ]


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted names, as the flags are called."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def reproduce_command(config: dict[str, Any]) -> str:
    """The command line of a run's config: the recipe that differs least, and a flag for each difference."""
    mine = flatten(config)
    options = []
    for name, (_, recipe) in RECIPES.items():
        theirs = flatten(to_dict(recipe))
        options.append((name, {key: mine[key] for key in theirs if key in mine and mine[key] != theirs[key]}))
    name, changed = min(options, key=lambda option: len(option[1]))
    return " \\\n    ".join([f"llava-clipmoe train-encoder {name}", *(_flag(k, v) for k, v in changed.items())])


def _flag(name: str, value: Any) -> str:
    """One setting as tyro reads it: a switch is --a.b or --a.no-b, a list is its items."""
    group, dot, last = name.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{group}{dot}{'' if value else 'no-'}{last}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{group}{dot}{last}", *(shlex.quote(str(word)) for word in words)])


# ------------------------------------------------------------------------------------------------------------ the page


@dataclass(frozen=True)
class Part:
    """A place on the page."""

    title: str
    build: Callable[[Run], list[Block] | None]
    when: str
    """What has to happen before there is something to show."""
    setting: str = ""
    """Of the evaluation: without it nobody asked for this part."""

    @property
    def anchor(self) -> str:
        return self.build.__name__

    def asked_for(self, run: Run) -> bool:
        evaluation = (run.config or {}).get("evaluation") or {}
        return not self.setting or bool(evaluation.get(self.setting, True))


PARTS = (
    Part("Retrieval", sections.retrieval, "written after the evaluation (--evaluation.retrieval)", "retrieval"),
    Part("Zero-shot classification", sections.classification,
         "written after the evaluation (--evaluation.zero-shot)", "zero_shot"),
    Part("Loss", sections.loss, "drawn from the first logged training step on"),
    Part("Clusters", sections.clusters, "known when the first stage has been clustered"),
    Part("Attributes", sections.attributes, "written after the evaluation (--evaluation.attributes)", "attributes"),
    Part("Routing", sections.routing, "measured after the router training"),
    Part("How far the routers moved", sections.movement, "measured after the router training"),
    Part("Time and memory", sections.cost, "known when the first piece of work is done"),
    Part("Parameters", sections.parameters, "counted when the CLIP-MoE has been made"),
    Part("Settings", settings, "read from config.json"),
    Part("Reproduce", reproduce, "read from config.json"),
)  # fmt: skip


def write_report(run_dir: str | Path) -> Path:
    """Build `report.html` from what the run directory holds, and return its path. Atomic.

    Raises NotADirectoryError when there is no such directory.
    """
    run, shown = load_run(run_dir), []
    for one in PARTS:
        blocks = one.build(run)
        if blocks is None and one.asked_for(run):
            run.problems.append(f"{one.title}: {one.when}.")
            blocks = [f"Missing: {one.when}."]
        if blocks is not None:
            shown.append(Section(one.anchor, one.title, blocks))
    name = run.directory.resolve().name
    method = METHODS.get((run.config or {}).get("method", "dmu"))  # runs older than the setting made a CLIP-MoE
    lead = f"{method.title if method else ''} {_now(run)}".lstrip()
    page = Document(name, lead, shown, run.problems, "Not on this page:", f"{name}: CLIP-MoE run")
    write_text(run.directory / REPORT, page.html())
    return run.directory / REPORT


def _now(run: Run) -> str:
    """One sentence on where the run stands."""
    tables = [run.results.get(name) or {} for name in ("retrieval", "zero_shot")]
    scored = [*(variants for one in tables for variants in one.values()), run.results.get("attributes") or {}]
    if any(scored):  # results.json is written anew after every variant; the result comes last
        return "The run is evaluated." if any(run.final in one for one in scored) else "Evaluation goes on."
    if not run.steps:
        return "No training step has been logged yet."
    stage, rows = list(run.steps.items())[-1]
    total = f" of {rows[-1]['steps']:,}" if rows[-1].get("steps") else ""
    return f"Not evaluated yet. Last logged: {stage}, step {rows[-1]['step']:,}{total}."


def summary_table(results: dict[str, Any]) -> Table:
    """The headline of results.json for the terminal: a row a variant, in percent, the best of a column in bold."""
    columns: dict[str, dict[str, float | None]] = {}
    for name, variants in (results.get("retrieval") or {}).items():
        for key, title in RECALLS.items():
            columns[f"{name}\n{title}"] = {variant: scores.get(key) for variant, scores in variants.items()}
    if attributes := results.get("attributes"):
        columns["attribute\npairs"] = {variant: scores.get("overall") for variant, scores in attributes.items()}
    best = {title: best_of(values.values()) for title, values in columns.items()}
    variants = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [
        [name, *(score(values.get(name), best[title]) for title, values in columns.items())] for name in variants
    ]  # fmt: skip
    return Table(["variant", *columns], rows, "Results, in percent")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild report.html of a run.")
    parser.add_argument("run_dir", type=Path, help="the --output-dir of a train-encoder run")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
