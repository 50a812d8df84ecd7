"""LLaVA columns (Tables 3 and 7 of the CLIP-MoE paper): what `llava-clipmoe eval-llava` measured of several LLaVAs.

Reads the results.json of eval-llava: {"benchmark", "n", "limited", "headline", "metrics", "model", "paper", ...}. A
LLaVA is named by the folder that holds its results (anywhere below it), or by its model directory, whose results lie
where eval-llava puts them: RESULTS/BENCHMARK/MODEL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_clipmoe.files import read_json

from ..report.document import MISSING, Section, Table, signed

NEEDED = ("benchmark", "n", "headline", "metrics")
ORDER = "mme pope mmbench mmbench_cn mmvet vizwiz mmstar ocrbench vqav2 textvqa textvqa_no_ocr gqa mmvp".split()
"""Table 3's, then what it does not have; others come after them."""


@dataclass(frozen=True)
class Llava:
    """One column: benchmark -> its results.json."""

    name: str
    results: dict[str, dict[str, Any]]


def read_llavas(entries: Sequence[str], default: Path) -> list[Llava]:
    """`[NAME=]DIR` each. default: where eval-llava keeps results (BENCHMARK/MODEL/results.json).

    Raises FileNotFoundError for a LLaVA without results, ValueError for two of one name, or two results of one
    benchmark in one folder.
    """
    found = [_read(entry, default) for entry in entries]
    names = [llava.name for llava in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two LLaVAs are called {twice!r}: give them names of their own, --llava NAME=DIR NAME=DIR.")
    return found


def _read(entry: str, default: Path) -> Llava:
    name, _, given = entry.partition("=")
    if not given or Path(entry).exists():
        name, given = Path(entry).resolve().name, entry
    folder, model = Path(given), Path(given).resolve().name
    measured = _measured(folder.rglob("results.json")) or _measured(default.glob(f"*/{model}/results.json"))
    files: dict[str, Path] = {}
    for file, result in measured:
        benchmark = result["benchmark"]
        if benchmark in files:
            raise ValueError(
                f"{folder} holds two results of {benchmark}: {files[benchmark]} and {file}. Name the folder of one "
                "LLaVA's results."
            )
        files[benchmark] = file
    if not measured:
        what = "is not a folder" if not folder.is_dir() else "holds no results of eval-llava"
        raise FileNotFoundError(
            f"{folder} {what}, and there are none in {default}/BENCHMARK/{model} either. Measure that LLaVA first: "
            f"llava-clipmoe eval-llava pope --model-path {folder} --data playground/data/eval/pope"
        )
    return Llava(name, {result["benchmark"]: result for _, result in measured})


def _measured(files: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Those that eval-llava wrote; other commands have a results.json too."""
    found = [(file, read_json(file)) for file in sorted(files)]
    return [(file, result) for file, result in found if isinstance(result, dict) and all(k in result for k in NEEDED)]


def llava_section(llavas: Sequence[Llava]) -> Section:
    """A row a benchmark, a column a LLaVA with its delta against the first, the paper's figures last."""
    known = {benchmark for llava in llavas for benchmark in llava.results}
    ordered = [b for b in ORDER if b in known] + sorted(known - set(ORDER))
    first, notes, rows = llavas[0], [], []
    for benchmark in ordered:
        of = [llava.results.get(benchmark) for llava in llavas]
        values = [_headline(result) for result in of]
        cells = [_cell(value, values[0] if number else None) for number, value in enumerate(values)]
        some = next(result for result in of if result is not None)
        rows.append([benchmark, str(some["headline"]).replace("_", " "), *cells, _paper(some)])
        notes += _doubts(benchmark, llavas, of)
    head = ["benchmark", "metric", *(llava.name for llava in llavas), "paper: 7B, with CLIP-MoE"]
    intro = f"In brackets: the difference to {first.name}." if len(llavas) > 1 else ""
    blocks = [intro, Table(head, rows), " ".join(notes)]
    return Section("llava", "LLaVA", [block for block in blocks if block])


def _headline(result: dict[str, Any] | None) -> float | None:
    value = None if result is None else result["metrics"].get(result["headline"])
    return float(value) if isinstance(value, int | float) else None


def _cell(value: float | None, first: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value:,.1f}" if first is None else f"{value:,.1f} ({signed(value - first)})"


def _paper(result: dict[str, Any]) -> str:
    return " → ".join(f"{value:,.1f}" for value in result["paper"].values()) if result.get("paper") else MISSING


def _doubts(benchmark: str, llavas: Sequence[Llava], of: Sequence[dict[str, Any] | None]) -> list[str]:
    """Notes on a row whose numbers are missing, or cannot be compared."""
    pairs = [(llava.name, result) for llava, result in zip(llavas, of, strict=True) if result is not None]
    notes = []
    if any(result.get("limited") for _, result in pairs):
        limited = ", ".join(f"{name} {result['n']:,}" for name, result in pairs if result.get("limited"))
        notes.append(f"{benchmark}: only the first questions were asked ({limited}).")
    elif len({result["n"] for _, result in pairs}) > 1:
        counts = ", ".join(f"{name} {result['n']:,}" for name, result in pairs)
        notes.append(f"{benchmark}: not the same number of questions ({counts}).")
    unscored = [name for name, result in pairs if _headline(result) is None]
    if unscored:
        why = "a server or judge scores it, see next_step in its results.json"
        notes.append(f"{benchmark}: not scored here for {', '.join(unscored)} ({why}).")
    return notes
