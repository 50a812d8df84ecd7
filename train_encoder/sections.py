"""The sections of a run's report: each takes a `Run` and gives its HTML, or None when there is nothing to show yet."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llava_clipmoe.files import read_json

from . import figures
from .config import to_dict
from .page import (
    Html,
    best_of,
    duration,
    figure,
    html,
    join,
    paragraph,
    percent,
    score,
    standard_error,
    system_order,
    table,
)
from .recipes import RECIPES
from .training.metrics import METRICS, read_metrics

RETRIEVAL = {
    "i2t_r1": ("image→text R@1", 1), "i2t_r5": ("R@5", 5), "i2t_r10": ("R@10", 10),
    "t2i_r1": ("text→image R@1", 1), "t2i_r5": ("R@5", 5), "t2i_r10": ("R@10", 10),
}  # fmt: skip
CLASSES = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
ATTRIBUTE_CHANCE = 0.25  # MMVP-VLM: a pair counts when both of its images are matched right


# ---------------------------------------------------------------- the run


@dataclass
class Run:
    """What a run directory holds; what could not be read is None or empty, with the reason in `problems`."""

    directory: Path
    config: dict[str, Any] | None = None
    results: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    done: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def load_run(directory: str | Path) -> Run:
    """Read a run directory. Raises NotADirectoryError when there is none; absent and damaged files are noted."""
    run = Run(Path(directory))
    if not run.directory.is_dir():
        raise NotADirectoryError(f"there is no run at {run.directory}: give the --output-dir of a train-encoder run.")

    def read(name: str) -> dict[str, Any] | None:
        path = run.directory / name
        if not path.exists():
            run.problems.append(f"{name} is not there yet.")
            return None
        try:
            value = read_json(path)
        except ValueError as error:
            run.problems.append(f"{name} cannot be read: {error}")
            return None
        if not isinstance(value, dict):
            run.problems.append(f"{name} holds no JSON object.")
            return None
        return value

    run.config = read("config.json")
    run.results = read("results.json") or {}
    rows, unreadable = read_metrics(run.directory / METRICS)
    if not rows:
        run.problems.append(f"{METRICS} is not there yet, or is empty.")
    if unreadable:
        run.problems.append(f"{METRICS}: {unreadable} unreadable line(s) left out (a killed run tears its last line).")
    for row in rows:
        if row.get("event") == "done":
            run.done.append(row)
        elif "step" in row and "stage" in row:
            run.steps.setdefault(str(row["stage"]), []).append(row)
    return run


# ---------------------------------------------------------------- what was measured


def retrieval_section(run: Run) -> Html | None:
    data = run.results.get("retrieval")
    if not data:
        return None
    return join(
        *(_retrieval_table(name, systems) for name, systems in data.items()),
        paragraph(
            "R@k: the share of queries whose right answer is among the first k, in percent; bold is the best of a "
            "column, the small number below is the distance to the base. ± is one binomial standard error, "
            "√(p(1−p)/n), with n images for image→text and n captions for text→image; several captions of one image "
            "are not independent, which makes the ± of text→image too small where there are several. A difference "
            "below about twice its ± may be chance. stageK is the dense CLIP of a stage; expertK is the CLIP-MoE with "
            "all tokens sent to one expert, which should agree with stageK (expert0 with the base) up to rounding."
        ),
    )


def _retrieval_table(name: str, systems: dict[str, dict[str, float]]) -> Html:
    order = system_order(systems)
    first = systems[order[0]]
    images, captions = first.get("images"), first.get("captions")
    best = {key: best_of(systems[s].get(key) for s in order) for key in RETRIEVAL}
    base = systems.get("base", {})
    rows = []
    for system in order:
        row: list[object] = [system]
        for key, (_, k) in RETRIEVAL.items():
            value = systems[system].get(key)
            n = systems[system].get("images" if key.startswith("i2t") else "captions") or 0
            error = standard_error(value, n) if value is not None and k == 1 and n else None
            row.append(score(value, best[key], base.get(key) if system != "base" else None, error))
        rows.append(row)
    tiles = "".join(
        f"<div><span>{text}, base → CLIP-MoE</span>"
        f"<strong>{percent(base[key])} → {percent(systems['clip-moe'][key])}</strong></div>"
        for key, text in (("i2t_r1", "image→text R@1"), ("t2i_r1", "text→image R@1"))
        if key in base and key in systems.get("clip-moe", {})
    )
    return join(
        f"<h3>{html(name)}</h3>",
        f'<div class="tiles">{tiles}</div>' if tiles else "",
        paragraph(f"{images:,} images, {captions:,} captions; chance R@1 is {100 / images:.2g}%.") if images else "",
        table(["system", *(title for title, _ in RETRIEVAL.values())], rows, f"retrieval, {name}"),
    )


def classification_section(run: Run) -> Html | None:
    data = run.results.get("zero_shot")
    return join(*(_classification_table(name, systems) for name, systems in data.items())) if data else None


def _classification_table(name: str, systems: dict[str, dict[str, Any]]) -> Html:
    order = system_order(systems)
    first, base = systems[order[0]], systems.get("base", {})
    images, classes = first["images"], first["classes"]
    best = {key: best_of(systems[s].get(key) for s in order) for key in CLASSES}

    def one(system: str, key: str) -> object:
        value, n = systems[system].get(key), systems[system].get("images")
        error = standard_error(value, n) if key == "top1" and value is not None and n else None
        return score(value, best[key], base.get(key) if system != "base" else None, error)

    return join(
        f"<h3>{html(name)}</h3>",
        paragraph(f"{images:,} images, {classes:,} classes; chance is {100 / classes:.2g}%."),
        table(["system", *CLASSES.values()], [[s, *(one(s, key) for key in CLASSES)] for s in order], name),
    )


def loss_section(run: Run) -> Html | None:
    if not run.steps:
        return None
    panels, balance = [], []
    for index, (stage, rows) in enumerate(run.steps.items()):
        for key, target in (("contrastive", panels), ("balance", balance)):
            if key == "contrastive" and not any(key in row for row in rows):
                key = "loss"
            points = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                label = f"{key} loss" if key != "loss" else "loss"
                target.append(figures.curve(f"{key}{index}", stage, steps, values, label, 0 if key != "balance" else 1))
    parts = [
        figure(
            panels,
            "Contrastive loss of every training: thin is what was logged, bold its moving average over a twentieth of "
            "the curve. Lower is better within a panel only: a later stage's negatives come from one narrow cluster, "
            "so its loss starts higher and says nothing against it.",
        )
    ]
    if balance:
        parts.append(
            figure(
                balance,
                "Load-balance loss of the router training, averaged over the blocks: 1 when all experts are first "
                "choice equally often, the number of experts when one takes every token.",
            )
        )
    diverged = [s for s, rows in run.steps.items() if any(not math.isfinite(float(r.get("loss") or 0)) for r in rows)]
    if diverged:
        parts.append(paragraph(f"Steps whose loss was not finite (gaps in the curve): {', '.join(diverged)}."))
    return join(*parts)


def _clusters(run: Run) -> list[dict[str, Any]]:
    """From results.json; before it is written, from clusters/stage*.npz (labels accumulated as the trainer does)."""
    if run.results.get("clusters"):
        return run.results["clusters"]
    found, paths = [], []
    files = sorted((run.directory / "clusters").glob("stage*.npz"), key=lambda p: (len(p.name), p.name))
    for stage, path in enumerate(files, start=1):
        try:
            with np.load(path, allow_pickle=False) as archive:
                paths.append(archive["labels"])
            sizes = np.unique(np.stack(paths, axis=1), axis=0, return_counts=True)[1]
        except (OSError, ValueError, KeyError) as error:
            run.problems.append(f"clusters/{path.name} cannot be read: {error}")
            break
        found.append({"stage": f"stage{stage}", "sizes": sizes.tolist()})
    return found


def cluster_section(run: Run) -> Html | None:
    clusters = _clusters(run)
    if not clusters:
        return None
    batch = flatten(run.config or {}).get("mcl.optim.global_batch_size")
    depths = sorted({int(depth) for c in clusters for depth in c.get("batches_by_depth") or {}}, reverse=True)
    panels, rows = [], []
    for index, entry in enumerate(clusters):
        sizes = np.asarray([size for size in entry["sizes"] if size > 0], dtype=np.int64)
        if not len(sizes):
            continue
        label = f"stage{entry['stage']}" if isinstance(entry["stage"], int) else entry["stage"]
        panels.append(figures.cluster_sizes(f"clusters{index}", label, sizes, batch))
        small = f"{100 * sizes[sizes < batch].sum() / sizes.sum():.1f}%" if batch else "–"
        by_depth = {int(depth): n for depth, n in (entry.get("batches_by_depth") or {}).items()}
        rows.append([label, f"{len(sizes):,}", f"{sizes.min():,}", f"{int(np.median(sizes)):,}", f"{sizes.max():,}",
                     small, *(f"{by_depth[d]:,}" if d in by_depth else "–" for d in depths)])  # fmt: skip
    head = ["stage", "clusters", "smallest", "median", "largest", "images in clusters below a batch",
            *(f"batches at depth {depth}" for depth in depths)]  # fmt: skip
    return join(
        figure(
            panels,
            "Images in each cluster from which a stage draws its batches, largest first, on a log scale. What lies "
            "below the dashed line is smaller than one global batch.",
        ),
        table(head, rows),
        paragraph(
            "Depth is how many stages of clusters all images of a batch share: a cluster smaller than a batch is "
            "filled up from the cluster that it came from, one depth less; depth 0 is the whole data set."
        ),
    )


def attribute_section(run: Run) -> Html | None:
    data = run.results.get("attributes")
    if not data:
        return None
    order = system_order(data)
    pairs = {name: entry.get("pairs") for system in order for name, entry in data[system].get("by_type", {}).items()}

    def row(title: str, n: int | None, values: list[float | None], errors: bool = False) -> list[object]:
        best = best_of(values)
        cells = [score(v, best, None, standard_error(v, n) if errors and n and v is not None else None) for v in values]
        return [title, f"{n:,}" if n else "–", *cells]

    rows = [
        row(name, n, [data[s].get("by_type", {}).get(name, {}).get("accuracy") for s in order])
        for name, n in pairs.items()
    ]
    total = data[order[0]].get("pairs")
    rows.append(row("overall", total, [data[s].get("overall") for s in order], errors=True))
    fewest = min((n for n in pairs.values() if n), default=0)
    noise = f" With {fewest} pairs an attribute's ± is up to {50 / math.sqrt(fewest):.0f} points." if fewest else ""
    return join(
        paragraph("Pairs of images that a system tells apart, in percent."),
        table(["attribute", "pairs", *order], rows, "accuracy by attribute"),
        paragraph(
            "Scored as MMVP-VLM is: a pair counts when both of its images are matched to their own statements; chance "
            f"is {100 * ATTRIBUTE_CHANCE:.0f}%. Bold is the best of a row: experts that see different things are best "
            "in different rows. ± is one binomial standard error." + noise
        ),
    )


def routing_section(run: Run) -> Html | None:
    data = run.results.get("routing") or {}
    panels, notes = [], []
    for tower in ("vision", "text"):
        shares = data.get(tower)
        if not shares:
            continue
        blocks = data.get(f"{tower}_blocks") or range(len(shares))
        panels.append(figures.heatmap(f"routing{tower}", tower, shares, list(blocks)))
        largest = [max(row) for row in shares]
        notes.append(
            f"{tower}: {sum(share > 0.8 for share in largest)} of {len(shares)} blocks give more than 80% of their "
            f"tokens to one expert first; the smallest share anywhere is {percent(min(min(row) for row in shares))}%."
        )
    if not panels:
        return None
    experts = len((data.get("vision") or data.get("text"))[0])
    return join(
        figure(
            panels,
            f"Share of tokens whose first choice is an expert; a row is a block and adds to 100%. Even use would be "
            f"{100 / experts:.0f}% everywhere; expert 0 is the base, expert K comes from stage K.",
        ),
        paragraph(" ".join(notes)),
    )


def movement_section(run: Run) -> Html | None:
    data = run.results.get("router_movement")
    if not data:
        return None
    series: dict[str, dict[str, tuple[list, list]]] = {"relative_change": {}, "changed_top1": {}}
    for position, entry in enumerate(data):
        tower, _, number = str(entry["block"]).rpartition(".")
        block = int(number) if number.isdigit() else position
        for key, towers in series.items():
            if entry.get(key) is not None:
                blocks, values = towers.setdefault(tower or "blocks", ([], []))
                blocks.append(block)
                values.append(entry[key])
    titles = {"relative_change": "change of the weights, |W − W₀| / |W₀|",
              "changed_top1": "tokens with a new first expert"}  # fmt: skip
    panels = [figures.lines_by_block(f"moved{key.replace('_', '')}", titles[key], towers, percent=True)
              for key, towers in series.items() if towers]  # fmt: skip
    rows = [
        [entry["block"], f"{percent(entry.get('relative_change'))}%",
         "–" if entry.get("cosine") is None else f"{entry['cosine']:.4f}", f"{percent(entry.get('changed_top1'))}%"]
        for entry in data
    ]  # fmt: skip
    experts = ", ".join(f"{name} {percent(share)}%" for name, share in (run.results.get("ffn_change") or {}).items())
    details = table(["block", "|W − W₀| / |W₀|", "cosine(W, W₀)", "tokens with a new first expert"], rows)
    return join(
        figure(
            panels,
            "How far training moved each router W from its random start W₀, and how many tokens it sends to another "
            "expert for it. Lines near 0% mean that the routing is still the random one.",
        ),
        paragraph(f"The experts themselves, all FFNs of a stage against the base's: {experts}.") if experts else "",
        Html(f"<details><summary>All {len(rows)} routers</summary>{details}</details>"),
    )


def cost_section(run: Run) -> Html | None:
    if not run.done:
        return None
    merged: dict[tuple[str, str], dict[str, float]] = {}
    for row in run.done:
        entry = merged.setdefault(
            (str(row.get("stage") or "whole run"), str(row.get("work", ""))), {"s": 0, "n": 0, "m": 0}
        )
        entry["s"] += row.get("seconds") or 0
        entry["n"] += row.get("images") or 0
        entry["m"] = max(entry["m"], row.get("peak_memory_bytes") or 0)
    rows: list[list[object]] = [
        [stage, work, duration(e["s"]), f"{e['n']:,}" if e["n"] else "–",
         f"{e['n'] / e['s']:,.1f}" if e["n"] and e["s"] else "–", f"{e['m'] / 2**30:.2f}" if e["m"] else "–"]
        for (stage, work), e in merged.items()
    ]  # fmt: skip
    peak = max(e["m"] for e in merged.values())
    total = sum(e["s"] for e in merged.values())
    rows.append(["total", "", duration(total), "", "", f"{peak / 2**30:.2f}" if peak else "–"])
    stages, works = (list(dict.fromkeys(key[part] for key in merged)) for part in (0, 1))
    unit, name = (3600, "hours") if total > 7200 else (60, "minutes") if total > 120 else (1, "seconds")
    times = {w: [merged.get((s, w), {"s": 0})["s"] / unit for s in stages] for w in works}
    memory = {"peak": [max(e["m"] for (stage, _), e in merged.items() if stage == s) / 2**30 for s in stages]}
    return join(
        figure(
            [
                figures.stacked_bars("time", "time", stages, times, name),
                figures.stacked_bars("memory", "peak memory", stages, memory, "GiB"),
            ],
            "Time of each stage by the kind of work, and the most memory that any of its work needed: "
            "allocated on the GPU where there is one, else resident memory of the process.",
        ),
        table(["stage", "work", "time", "images", "images/s", "peak memory, GiB"], rows),
        paragraph("Memory is that of process 0. Work that was interrupted and done again counts once."),
    )


def parameter_section(run: Run) -> Html | None:
    data = run.results.get("parameters")
    if not data:
        return None
    labels = {"dense": "base (dense)", "active": "CLIP-MoE, used for one token", "total": "CLIP-MoE, all"}
    dense = data.get("dense")
    rows = [[labels[key], f"{data[key] / 1e6:,.2f} M", f"{data[key] / dense:.2f}×" if dense else "–"]
            for key in labels if data.get(key) is not None]  # fmt: skip
    return table(["parameters", "number", "to base"], rows)


def settings_section(run: Run) -> Html | None:
    if run.config is None:
        return None
    rows = [[name, "none" if value is None else value] for name, value in flatten(run.config).items()]
    return Html(f"<details><summary>All {len(rows)} settings</summary>{table(['setting', 'value'], rows)}</details>")


def reproduce_section(run: Run) -> Html | None:
    if run.config is None:
        return None
    return join(
        paragraph("The nearest recipe, and every setting in which this run differs from it:"),
        Html(f"<pre>{html(reproduce_command(run.config))}</pre>"),
        paragraph("Under torchrun the same settings give the same global batches on any number of processes."),
    )


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
    group, _, last = name.replace("_", "-").rpartition(".")
    group = f"{group}." if group else ""
    if isinstance(value, bool):
        return f"--{group}{'' if value else 'no-'}{last}"
    words = value if isinstance(value, list) else [value]
    return " ".join([f"--{group}{last}", *(shlex.quote(str(word)) for word in words)])
