"""LLaVA columns (Tables 3 and 7 of the CLIP-MoE paper): what `llava-clipmoe eval-llava` measured of several LLaVAs.

Reads the results.json of eval-llava: {"benchmark", "n", "limited", "headline", "metrics", "model", "paper", ...}. A
LLaVA is named by the folder that holds its results (anywhere below it), or by its model directory, whose results lie
where eval-llava puts them: RESULTS/BENCHMARK/MODEL.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_clipmoe.files import read_json

from ..report.document import Section, Table
from ..report.numbers import MISSING, signed
from .papers import LLAVA_13B

NEEDED = ("benchmark", "n", "headline", "metrics")
ORDER = "mme pope mmbench mmbench_cn mmvet vizwiz mmstar ocrbench vqav2 textvqa textvqa_no_ocr gqa mmvp".split()
"""Table 3's, then what it does not have; others come after them."""
Results = dict[str, dict[str, Any]]
"""Of one LLaVA: benchmark -> its results.json."""


def read_llavas(entries: Sequence[str], default: Path) -> dict[str, Results]:
    """`[NAME=]DIR` each -> results by name. default: where eval-llava keeps them (BENCHMARK/MODEL/results.json).

    Raises FileNotFoundError for a LLaVA without results, ValueError for two of one name, or two results of one
    benchmark in one folder.
    """
    llavas: dict[str, Results] = {}
    for entry in entries:
        name, _, given = entry.partition("=")
        if not given or Path(entry).exists():
            name, given = Path(entry).resolve().name, entry
        if name in llavas:
            raise ValueError(
                f"two LLaVAs are called {name!r}: give them names of their own, --llava NAME=DIR NAME=DIR."
            )
        llavas[name] = _read(Path(given), default)
    return llavas


def _read(folder: Path, default: Path) -> Results:
    model, files, results = folder.resolve().name, {}, {}
    measured = _measured(folder.rglob("results.json")) or _measured(default.glob(f"*/{model}/results.json"))
    for file, result in measured:
        benchmark = result["benchmark"]
        if benchmark in results:
            raise ValueError(
                f"{folder} holds two results of {benchmark}: {files[benchmark]} and {file}. Name the folder of one "
                "LLaVA's results."
            )
        files[benchmark], results[benchmark] = file, result
    if not results:
        what = "is not a folder" if not folder.is_dir() else "holds no results of eval-llava"
        raise FileNotFoundError(
            f"{folder} {what}, and there are none in {default}/BENCHMARK/{model} either. Measure that LLaVA first: "
            f"llava-clipmoe eval-llava pope --model-path {folder} --data playground/data/eval/pope"
        )
    return results


def _measured(files: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Those that eval-llava wrote; other commands have a results.json too."""
    found = [(file, read_json(file)) for file in sorted(files)]
    return [(file, result) for file, result in found if isinstance(result, dict) and all(k in result for k in NEEDED)]


def llava_section(llavas: Mapping[str, Results]) -> Section:
    """A row a benchmark, a column a LLaVA with its delta against the first, last the paper's figures (Table 3) for a
    language model of the first one's size."""
    known = {benchmark for results in llavas.values() for benchmark in results}
    first, notes, rows = next(iter(llavas)), [], []
    large = any("13b" in str(result.get("model")).lower() for result in llavas[first].values())
    for benchmark in [*(b for b in ORDER if b in known), *sorted(known - set(ORDER))]:
        found = {name: results[benchmark] for name, results in llavas.items() if benchmark in results}
        values = {name: _headline(result) for name, result in found.items()}
        base = values.get(first)
        cells = [_cell(values.get(name), None if name == first else base) for name in llavas]
        some = next(iter(found.values()))
        figures = LLAVA_13B.get(benchmark, ()) if large else (some.get("paper") or {}).values()
        paper = " → ".join(f"{value:,.1f}" for value in figures)
        rows.append([benchmark, str(some["headline"]).replace("_", " "), *cells, paper or MISSING])
        notes += _doubts(benchmark, found)
    intro = f"In brackets: the difference to {first}." if len(llavas) > 1 else ""
    table = Table(["benchmark", "metric", *llavas, f"paper: {'13B' if large else '7B'}, with CLIP-MoE"], rows)
    return Section("llava", "LLaVA", [block for block in (intro, table, " ".join(notes)) if block])


def _headline(result: Mapping[str, Any]) -> float | None:
    value = result["metrics"].get(result["headline"])
    return float(value) if isinstance(value, int | float) else None


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.1f}" if first is None else f"{value:,.1f} ({signed(value - first)})"


def _doubts(benchmark: str, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Notes on a row whose numbers are missing, or cannot be compared. found: LLaVA -> its result."""
    notes = []
    if any(result.get("limited") for result in found.values()):
        limited = ", ".join(f"{name} {result['n']:,}" for name, result in found.items() if result.get("limited"))
        notes.append(f"{benchmark}: only the first questions were asked ({limited}).")
    elif len({result["n"] for result in found.values()}) > 1:
        counts = ", ".join(f"{name} {result['n']:,}" for name, result in found.items())
        notes.append(f"{benchmark}: not the same number of questions ({counts}).")
    unscored = [name for name, result in found.items() if _headline(result) is None]
    if unscored:
        why = "a server or judge scores it, see next_step in its results.json"
        notes.append(f"{benchmark}: not scored here for {', '.join(unscored)} ({why}).")
    return notes
