"""The page of one run: `report.html`, self-contained, and the table that a run ends with.

    llava-clipmoe report runs/quickstart

It reads `config.json`, `metrics.jsonl`, `results.json` and `clusters/`; each may be absent, and a run in progress gets
a page that says what is missing. The same run directory gives the same bytes. Shares and accuracies are read as
fractions of 1 and shown in percent.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llava_clipmoe.files import write_text

from ..config import METHOD_TITLES
from ..recipes import RECIPES
from ..saved_settings import to_dict
from . import sections
from .document import Block, Code, Document, Section, Table
from .numbers import best_of, score
from .sections import RECALLS, Run, load_run

REPORT = "report.html"
HELP = "The --output-dir of a train-encoder run, finished or not."


def main(argv: list[str]) -> int:
    """Write the page (report.html) of a run, and print its path; -> 0."""
    folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help=HELP)]
    about = "Write the page of a run, RUN/report.html: scores, losses, clusters, routing, cost, settings."
    print(write_report(tyro.cli(folder, args=argv, prog="llava-clipmoe report", description=about)))
    return 0


# ---------------------------------------------------------------------------------------------------- the settings


def settings(run: Run) -> list[Block]:
    rows = [[name, "none" if value is None else str(value)] for name, value in flatten(run.config).items()]
    return [Table(["setting", "value"], rows, folded=f"All {len(rows)} settings")] if rows else []


def reproduce(run: Run) -> list[Block]:
    if not run.config:
        return []
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
    changes = {}
    for name, (_, recipe) in RECIPES.items():
        theirs = flatten(to_dict(recipe))
        changes[name] = {key: mine[key] for key in theirs if key in mine and mine[key] != theirs[key]}
    name = min(changes, key=lambda name: len(changes[name]))
    return " \\\n    ".join([f"llava-clipmoe train-encoder {name}", *(_flag(k, v) for k, v in changes[name].items())])


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
    """A place on the page, called as its function is."""

    title: str
    build: Callable[[Run], list[Block]]
    when: str
    """What has to happen before there is something to show."""
    setting: str = ""
    """Of the evaluation: without it nobody asked for this part."""
    since_ever: bool = True
    """Whether every run has the setting; else one without it is older, and did not ask."""

    def asked_for(self, run: Run) -> bool:
        return not self.setting or bool(run.config.get("evaluation", {}).get(self.setting, self.since_ever))


def _measured(title: str, build: Callable[[Run], list[Block]], setting: str, since_ever: bool = True) -> Part:
    flag = setting.replace("_", "-")
    return Part(title, build, f"written after the evaluation (--evaluation.{flag})", setting, since_ever)


PARTS = (
    _measured("Retrieval", sections.retrieval, "retrieval"),
    _measured("Zero-shot classification", sections.classification, "zero_shot"),
    _measured("Captions that differ little", sections.composition, "composition", since_ever=False),
    Part("Loss", sections.loss, "drawn from the first logged training step on"),
    Part("Clusters", sections.clusters, "known when the first stage has been clustered"),
    _measured("Attributes", sections.attributes, "attributes"),
    Part("Routing", sections.routing, "measured after the router training"),
    Part("How far the routers moved", sections.movement, "measured after the router training"),
    Part("Time and memory", sections.cost, "known when the first piece of work is done"),
    Part("Parameters", sections.parameters, "counted when the CLIP-MoE has been made"),
    Part("Settings", settings, "read from config.json"),
    Part("Reproduce", reproduce, "read from config.json"),
)


def write_report(run_dir: str | Path) -> Path:
    """Build `report.html` from what the run directory holds, and return its path. Atomic.

    Raises NotADirectoryError when there is no such directory.
    """
    run, shown = load_run(run_dir), []
    for part in PARTS:
        blocks = part.build(run)
        if not blocks and part.asked_for(run):
            run.problems.append(f"{part.title}: {part.when}.")
            blocks = [f"Missing: {part.when}."]
        if blocks:
            shown.append(Section(part.build.__name__, part.title, blocks))
    name = run.directory.resolve().name
    method = run.config.get("method", "dmu")  # runs older than the setting made a CLIP-MoE
    lead = f"{METHOD_TITLES.get(method, '')} {_now(run)}".lstrip()
    page = Document(name, lead, shown, run.problems, "Not on this page:", f"{name}: CLIP-MoE run")
    write_text(run.directory / REPORT, page.html())
    return run.directory / REPORT


def _now(run: Run) -> str:
    """One sentence on where the run stands."""
    tables = [*run.measured("retrieval").values(), *run.measured("zero_shot").values(), run.measured("attributes")]
    if any(tables):  # results.json is written anew after every variant; the result comes last
        return "The run is evaluated." if any(run.final in variants for variants in tables) else "Evaluation goes on."
    if not run.steps:
        return "No training step has been logged yet."
    stage, rows = list(run.steps.items())[-1]
    total = f" of {rows[-1]['steps']:,}" if rows[-1].get("steps") else ""
    return f"Not evaluated yet. Last logged: {stage}, step {rows[-1]['step']:,}{total}."


R_AT_1 = ("i2t_r1", "t2i_r1")


def summary_table(results: dict[str, Any]) -> Table:
    """The headline of results.json for the terminal: a row a variant, in percent, the best of a column in bold."""
    columns: dict[str, dict[str, float | None]] = {}
    for name, variants in (results.get("retrieval") or {}).items():
        for key in R_AT_1:
            columns[f"{name}\n{RECALLS[key]}"] = {variant: scores.get(key) for variant, scores in variants.items()}
    for name, variants in (results.get("zero_shot") or {}).items():
        columns[f"{name}\ntop-1"] = {variant: scores.get("top1") for variant, scores in variants.items()}
    if attributes := results.get("attributes"):
        columns["attribute\npairs"] = {variant: scores.get("overall") for variant, scores in attributes.items()}
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    means = {name: mean_score(results, name) for name in names}
    if any(mean is not None for mean in means.values()):
        columns["mean of\nthe kinds"] = means
    best = {title: best_of(values.values()) for title, values in columns.items()}
    rows = [[name, *(score(values.get(name), best[title]) for title, values in columns.items())] for name in names]
    return Table(["variant", *columns], rows, "Results, in percent")


def mean_score(results: dict[str, Any], variant: str) -> float | None:
    """Mean of what was measured of a variant: retrieval (mean of R@1, both ways), classification (mean of top-1) and
    attribute pairs. None where fewer than two of these kinds were measured, or one of this variant is missing."""
    kinds = [
        [scores.get(variant, {}).get(key) for scores in (results.get("retrieval") or {}).values() for key in R_AT_1],
        [scores.get(variant, {}).get("top1") for scores in (results.get("zero_shot") or {}).values()],
        [results["attributes"].get(variant, {}).get("overall")] if results.get("attributes") else [],
    ]
    measured = [kind for kind in kinds if kind]
    if len(measured) < 2 or any(value is None for kind in measured for value in kind):
        return None
    return statistics.mean(map(statistics.mean, measured))
