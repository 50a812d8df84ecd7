"""The quick start's recipe over several seeds: is CLIP-MoE at least as good as its base and its best expert?

    python benchmarks/openmoji_seeds.py --seeds 0 1 2          (about 10 minutes a seed on 2 cores; resumes)

Runs `llava-clipmoe train-encoder dmu-openmoji --seed S --output-dir runs/openmoji-seedS` for every seed, then prints
mean and spread of every system on held-out concepts as Markdown (also into --output).
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

SCORES = ("i2t_r1", "t2i_r1", "i2t_r5", "t2i_r5")


@dataclass
class Settings:
    """Which runs to make and where the page goes."""

    seeds: tuple[int, ...] = (0, 1, 2)
    runs: Path = Path("runs")
    output: Path | None = Path("benchmarks/openmoji_seeds.md")
    flags: tuple[str, ...] = ()
    """More flags for train-encoder, for example `--flags --moe.optim.learning-rate 1e-4`."""


def run_seed(s: Settings, seed: int) -> dict:
    folder = s.runs / f"openmoji-seed{seed}"
    command = [sys.executable, "-m", "llava_clipmoe.cli", "train-encoder", "dmu-openmoji"]
    subprocess.run([*command, "--seed", str(seed), "--output-dir", str(folder), *s.flags], check=True)
    return json.loads((folder / "results.json").read_text())


def mean_and_spread(values: list[float], digits: int = 1) -> str:
    """Of shares, in percent."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.{digits}f} ± {100 * spread:.{digits}f}"


def mean_score(result: dict, system: str) -> float:
    """Mean of R@1 and R@5, both ways, over the retrieval sets of one run."""
    return statistics.mean(scores[system][score] for scores in result["retrieval"].values() for score in SCORES)


def page(s: Settings, results: list[dict]) -> str:
    first = results[0]
    systems = list(next(iter(first["retrieval"].values())))
    seeds = " ".join(map(str, s.seeds))
    lines = [f"Command: `python benchmarks/openmoji_seeds.py --seeds {seeds}`", ""]
    lines += [f"Mean ± standard deviation over seeds {seeds}, in percent, on concepts never seen in training.", ""]
    for name, scores in first["retrieval"].items():
        n = scores["base"]["images"]
        lines += [f"**{name}** ({n} pictures, {scores['base']['captions']} captions; chance R@1 {100 / n:.1f})", ""]
        lines += ["| system | I2T R@1 | T2I R@1 | I2T R@5 | T2I R@5 |", "|---|---|---|---|---|"]
        for system in systems:
            cells = [mean_and_spread([r["retrieval"][name][system][score] for r in results]) for score in SCORES]
            lines.append(f"| {system} | {' | '.join(cells)} |")
        lines.append("")
    if first["attributes"]:
        pairs = first["attributes"]["base"]["pairs"]
        lines += [f"**attribute pairs** ({pairs} pairs; chance 25)", "", "| system | accuracy |", "|---|---|"]
        lines += [f"| {x} | {mean_and_spread([r['attributes'][x]['overall'] for r in results])} |" for x in systems]
        lines.append("")
    lines += ["**Mean of all retrieval scores above, seed by seed**", ""]
    lines += ["| seed | base | best single expert | CLIP-MoE, untrained router | CLIP-MoE |", "|---|---|---|---|---|"]
    experts = [x for x in systems if x.startswith("expert")]
    for seed, r in zip(s.seeds, results, strict=True):
        best = max(experts, key=lambda x: mean_score(r, x))
        row = [mean_score(r, x) for x in ("base", best, "clip-moe (untrained router)", "clip-moe")]
        cells = [f"{100 * x:.1f}" for x in row]
        cells[1] += f" ({best})"
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    s = tyro.cli(Settings, description=__doc__, use_underscores=False)
    text = page(s, [run_seed(s, seed) for seed in s.seeds])
    print(text)
    if s.output is not None:
        s.output.write_text(text)


if __name__ == "__main__":
    main()
