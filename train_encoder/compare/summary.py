"""What a comparison says in a few sentences: who is best, by how much, and whether that is more than the spread.

Recipes of one seed start from the same base and see the same data, so they are compared seed by seed: the mean of the
paired differences against its standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..report.document import Section, Table
from ..report.numbers import MISSING, duration, signed
from .runs import Cells

CLEAR = 2.0
"""A difference of so many standard errors, and of one sign in every seed, is called clear."""
PAPER_CLUSTERING, PAPER_TRAINING = 4.15, -0.725
"""CLIP-FMoE paper: ICCL's clustering is 4.15 times as fast as CLIP-MoE's, its training takes 72.5% less time."""
Scores = Mapping[str, Sequence[float]]
"""Recipe (or another row) -> its values by seed."""


@dataclass(frozen=True)
class ScoreTable(Table):
    """Mean and spread of each recipe; `scores` is the column that the summary and the figures speak of."""

    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """a - b, paired by seed."""

    mean: float
    error: float
    """Standard error of the mean; NaN for one seed."""
    wins: int
    """Seeds in which a is ahead."""
    seeds: int

    @property
    def clear(self) -> bool:
        return self.seeds > 1 and abs(self.mean) > CLEAR * self.error and self.wins in (0, self.seeds)


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Compare two recipes' scores, seed by seed."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    seeds = len(differences)
    error = statistics.stdev(differences) / math.sqrt(seeds) if seeds > 1 else math.nan
    return Difference(statistics.mean(differences), error, sum(d > 0 for d in differences), seeds)


def sentence(title: str, scores: Scores, base: str | None = None) -> str:
    """Best, runner-up, difference and spread, in percent; and how far the best is from the base."""
    first, second, *_ = sorted(scores, key=lambda name: -statistics.mean(scores[name]))
    lead = paired(scores[first], scores[second])
    spread = "one seed says nothing of the spread"
    if lead.seeds > 1:
        verdict = "more than the spread" if lead.clear else "within the spread"
        spread = f"± {100 * lead.error:.1f} standard error, ahead in {lead.wins} of {lead.seeds} seeds: {verdict}"
    text = (
        f"**{title}**: {first} is first with {100 * statistics.mean(scores[first]):.1f}, {100 * lead.mean:.1f} "
        f"above {second} ({spread})"
    )
    if base in (None, first, second):
        return text + "."
    over = paired(scores[first], scores[base])
    sure = "" if over.seeds == 1 else ", clearly" if over.clear else ", not clearly"
    return f"{text}; it is {100 * over.mean:.1f} above the base{sure}."


def summary(cells: Cells, found: Sequence[Section]) -> list[str]:
    """Three to five sentences: who is first where, by how much, and whether that is more than the spread."""
    base, said = next(iter(cells)), []
    for section in found:
        for table in [table for table in section.tables if isinstance(table, ScoreTable)][:2]:
            scores = {recipe: table.scores[recipe] for recipe in cells}  # experts alone left out
            if len(scores) > 1:
                said.append(sentence(f"{section.title}, {table.title}".rstrip(", "), scores, base))
    spent = {recipe: statistics.mean(cell.cost.seconds for cell in run) for recipe, run in cells.items()}
    spent = {recipe: seconds for recipe, seconds in spent.items() if seconds}
    if len(spent) < 2:
        return said[:4]
    least, most = min(spent, key=spent.get), max(spent, key=spent.get)
    cost = (
        f"**Cost**: {least} takes least time ({duration(spent[least])} after the base, features and clusters "
        f"included), {most} most ({duration(spent[most])})."
    )
    return [*said[:4], cost]


# ---------------------------------------------------------------------------------------------- CLIP-FMoE's two claims


def fmoe_claims(cells: Cells) -> list[list[str]]:
    """Rows (what, here, the paper's figure) of CLIP-FMoE against CLIP-MoE; none unless both are compared."""
    if not {"dmu", "fmoe"} <= set(cells):
        return []
    both = [(a.cost, b.cost) for a, b in zip(cells["dmu"], cells["fmoe"], strict=True)]
    if not all(a.clusters and b.clusters and a.seconds for a, b in both):
        return []
    faster = [a.clusters / b.clusters for a, b in both]
    with_features = [(a.clusters + a.features) / (b.clusters + b.features) for a, b in both]
    total = [b.seconds / a.seconds - 1 for a, b in both]
    training = [b.train_seconds / a.train_seconds - 1 for a, b in both]
    return [
        ["clustering time, dmu : fmoe", _times(faster), f"{PAPER_CLUSTERING:g}x as fast"],
        ["the same with the features that are clustered", _times(with_features), MISSING],
        ["total training time, fmoe against dmu", _change(total), f"{signed(100 * PAPER_TRAINING)}%"],
        ["of it gradient steps alone", _change(training), MISSING],
    ]


def _times(factors: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(factors):.2f}" if len(factors) > 1 else ""
    return f"{statistics.mean(factors):.2f}{spread}x"


def _change(shares: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{signed(100 * statistics.mean(shares))}{spread}%"
