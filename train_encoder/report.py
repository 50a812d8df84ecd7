"""The page of one run: `report.html`, self-contained, and the table that a run ends with.

    python -m train_encoder.report runs/quickstart

It reads `config.json`, `metrics.jsonl`, `results.json` and `clusters/`; each may be absent, and a run in progress gets
a page that says what is missing. The same run directory gives the same bytes. Shares and accuracies are read as
fractions of 1 and shown in percent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from llava_clipmoe.files import write_text

from . import sections
from .page import CSS, Html, best_of, html, paragraph, percent, system_order
from .sections import Run, load_run

REPORT = "report.html"
SECTIONS: tuple[tuple[str, str, Callable[[Run], Html | None], str], ...] = (
    ("retrieval", "Retrieval", sections.retrieval_section, "written after the evaluation (--evaluation.retrieval)"),
    ("classification", "Zero-shot classification", sections.classification_section,
     "written after the evaluation (--evaluation.zero-shot)"),
    ("loss", "Loss", sections.loss_section, "drawn from the first logged training step on"),
    ("clusters", "Clusters", sections.cluster_section, "known when the first stage has been clustered"),
    ("attributes", "Attributes", sections.attribute_section, "written after the evaluation (--evaluation.attributes)"),
    ("routing", "Routing", sections.routing_section, "measured after the router training"),
    ("movement", "How far the routers moved", sections.movement_section, "measured after the router training"),
    ("cost", "Time and memory", sections.cost_section, "known when the first piece of work is done"),
    ("parameters", "Parameters", sections.parameter_section, "counted when the CLIP-MoE has been made"),
    ("settings", "Settings", sections.settings_section, "read from config.json"),
    ("reproduce", "Reproduce", sections.reproduce_section, "read from config.json"),
)  # fmt: skip
SETTING = {"retrieval": "retrieval", "classification": "zero_shot", "attributes": "attributes"}
"""Section -> the setting of the evaluation without which there is nothing to show."""


def _asked(run: Run, anchor: str) -> bool:
    settings = (run.config or {}).get("evaluation") or {}
    return anchor not in SETTING or bool(settings.get(SETTING[anchor], True))


def _now(run: Run) -> str:
    """One sentence on where the run stands."""
    tables = [run.results.get(name) or {} for name in ("retrieval", "zero_shot")]
    scored = [*(systems for one in tables for systems in one.values()), run.results.get("attributes") or {}]
    if any(scored):  # results.json is written anew after every system; CLIP-MoE comes last
        final = run.results.get("result", "clip-moe")
        return "The run is evaluated." if any(final in systems for systems in scored) else "Evaluation goes on."
    if not run.steps:
        return "No training step has been logged yet."
    stage, rows = list(run.steps.items())[-1]
    total = f" of {rows[-1]['steps']:,}" if rows[-1].get("steps") else ""
    return f"Not evaluated yet. Last logged: {stage}, step {rows[-1]['step']:,}{total}."


WHAT = {
    "dmu": "A CLIP-MoE made by Diversified Multiplet Upcycling.",
    "dmu-lora": "A CLIP-MoE made by Diversified Multiplet Upcycling, its stages of low rank (LoRA).",
    "fmoe": "A CLIP-FMoE: experts trained on clusters, beside the base behind a fusion gate.",
    "vanilla-moe": "A mixture of the base's FFNs and one set of directly fine-tuned ones.",
    "sparse-upcycling": "A mixture made by sparse upcycling.",
    "finetune": "A dense CLIP, fine-tuned.",
    "base": "A dense CLIP as it is.",
}


def _what(run: Run) -> str:
    """One sentence on what the run makes; runs older than the setting made a CLIP-MoE."""
    return WHAT.get((run.config or {}).get("method", "dmu"), "")


def write_report(run_dir: str | Path) -> Path:
    """Build `report.html` from what the run directory holds, and return its path. Atomic; see the module's text.

    Raises NotADirectoryError when there is no such directory.
    """
    run = load_run(run_dir)
    body, contents = [], []
    for anchor, title, build, when in SECTIONS:
        content = build(run)
        if content is None:
            if not _asked(run, anchor):
                continue
            run.problems.append(f"{title}: {when}.")
            content = paragraph(f"Missing: {when}.")
        contents.append(f'<a href="#{anchor}">{html(title)}</a>')
        body.append(f'<section id="{anchor}"><h2>{html(title)}</h2>{content}</section>')
    missing = "".join(f"<li>{html(problem)}</li>" for problem in run.problems)
    note = f'<div class="note">Not on this page:<ul>{missing}</ul></div>' if missing else ""
    name = html(run.directory.resolve().name)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: CLIP-MoE run</title><style>{CSS}</style></head><body><header><h1>{name}</h1>"
        f'<p class="lead">{html(_what(run))} {html(_now(run))}</p>{note}'
        f'<nav aria-label="Contents">{"".join(contents)}</nav></header><main>{"".join(body)}</main></body></html>\n'
    )
    path = run.directory / REPORT
    write_text(path, page)
    return path


def summary_table(results: dict[str, Any]) -> Table:
    """The headline of results.json for the terminal: a row a system, in percent, the best of a column in bold."""
    retrieval, attributes = results.get("retrieval") or {}, results.get("attributes") or {}
    columns: list[tuple[str, dict[str, float | None]]] = []
    for name, systems in retrieval.items():
        for key, title in (("i2t_r1", "I2T R@1"), ("t2i_r1", "T2I R@1"), ("i2t_r5", "I2T R@5"), ("t2i_r5", "T2I R@5")):
            columns.append((f"{name}\n{title}", {system: row.get(key) for system, row in systems.items()}))
    if attributes:
        columns.append(("attribute\npairs", {system: row.get("overall") for system, row in attributes.items()}))
    view = Table(title="Results, in percent")
    view.add_column(Text("system"), no_wrap=True)
    for title, _ in columns:
        view.add_column(Text(title), justify="right")
    best = [best_of(values.values()) for _, values in columns]
    for system in system_order(name for _, values in columns for name in values):
        cells = [Text(system)]
        for (_, values), top in zip(columns, best, strict=True):
            value = values.get(system)
            cells.append(Text(percent(value), style="bold" if value is not None and value == top else ""))
        view.add_row(*cells)
    return view


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Rebuild report.html of a run.")
    parser.add_argument("run_dir", type=Path, help="the --output-dir of a train-encoder run")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
