"""What compressing a CLIP-MoE kept: the page that is printed, and compress.html."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import ScalarFormatter

from ..report import figures
from ..report.document import Document, Figure, Section, Table
from ..report.numbers import millions, percent
from ..report.sections import RECALLS

KINDS = {"image": "image embedding", "text": "text embedding", "patches": "patches (hidden state -2)"}
Recalls = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Trial:
    """A compressed model: how it was made, what it keeps, what it scores."""

    rank: int | None
    energy: float | None
    calibrated: bool
    kept: list[dict[str, Any]]
    """Of every block and layer: block, layer, rank, and the energy kept of each expert's difference."""
    parameters: dict[str, int]
    vision_macs: int
    cosine: dict[str, dict[str, float]] | None
    """image, text, patches -> mean and min of the cosine with the full model's features."""
    retrieval: dict[str, dict[str, float]]

    @property
    def kind(self) -> str:
        return "calibrated" if self.calibrated else "plain"

    @property
    def _energies(self) -> list[float]:
        return [share for one in self.kept for share in differing(one)]

    @property
    def energy_mean(self) -> float:
        return statistics.mean(self._energies)

    @property
    def energy_min(self) -> float:
        return min(self._energies)

    @property
    def ranks(self) -> str:
        """The rank of all differences, or its range."""
        found = sorted({one["rank"] for one in self.kept})
        return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"

    @property
    def lowest_cosine(self) -> float:
        """The lowest of the three mean cosines."""
        return min(one["mean"] for one in self.cosine.values())


def differing(kept: Mapping[str, Any]) -> list[float]:
    """The energies of the experts that differ from the base, which is the first."""
    return kept["energy"][1:] or kept["energy"]


def gaps(before: Recalls, after: Recalls) -> list[float]:
    """After minus before of every R@1 and R@5, in points."""
    return [100 * (after[name][score] - before[name][score]) for name in before for score in RECALLS]


def best(trials: Sequence[Trial], before: Recalls, cosine: float, points: float) -> Trial | None:
    """The smallest rank whose features and retrieval are near enough to the full model's; of two alike, the one with
    the higher cosine. None where there is none."""

    def good(one: Trial) -> bool:
        near = not before or abs(statistics.mean(gaps(before, one.retrieval))) <= points
        return near and one.lowest_cosine >= cosine

    return min(filter(good, trials), key=lambda one: (one.rank, -one.lowest_cosine), default=None)


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence: the smallest rank that is good enough."""
    limits, full = report["limits"], report["full"]
    found = best(_trials(report), full["retrieval"], limits["cosine"], limits["points"])
    measured = f" and retrieval within {limits['points']:g} points"
    asked = f"feature cosine >= {limits['cosine']:g}"
    asked += measured if full["retrieval"] else " (retrieval was not measured)"
    if found is None:
        return f"No rank keeps {asked}."
    small, whole = millions(found.parameters["total"], 1), millions(full["parameters"]["total"], 1)
    return f"The smallest rank that keeps {asked}: {found.rank}, {found.kind} ({small} parameters instead of {whole})."


def _trials(report: Mapping[str, Any]) -> list[Trial]:
    return [Trial(**one) for one in report["find"]]


# ------------------------------------------------------------------------------------------------------------ the page


def make_page(report: Mapping[str, Any]) -> Document:
    """The page of compress.json's content."""
    lead = "Experts as one FFN a block and low-rank differences to it. Nothing was trained."
    trial = None if report["compressed"] is None else Trial(**report["compressed"])
    sections: list[Section] = []
    if report["find"]:
        lead += f" {verdict(report)}"
        sections.append(_find(report))
    if trial is not None:
        sections.append(_size(report, trial))
        if trial.cosine is not None:
            sections.append(_cosine(report, trial))
        if trial.retrieval:
            sections.append(_retrieval(report["full"]["retrieval"], trial.retrieval))
    if report["find"]:
        sections.append(_by_rank(report))
    if trial is not None:
        sections.append(_energy_maps(trial))
    return Document(f"{report['model']}, compressed", lead, sections)


def _find(report: Mapping[str, Any]) -> Section:
    trials, full = _trials(report), report["full"]
    head = ["rank", "SVD", "energy kept (lowest)", *(f"1 - cosine: {name}" for name in KINDS), "largest single"]
    head += ["retrieval (largest)"] * bool(full["retrieval"]) + ["parameters", "vision GMACs"]
    last, rows = max(one.rank for one in trials), []
    for one in trials:
        row = ["full" if one.rank == last else str(one.rank), one.kind]
        row.append(f"{percent(one.energy_mean)} ({percent(one.energy_min)})")
        row += [_away(one.cosine[kind]["mean"]) for kind in KINDS]
        row.append(_away(min(found["min"] for found in one.cosine.values())))
        if full["retrieval"]:
            moved = gaps(full["retrieval"], one.retrieval)
            row.append(f"{statistics.mean(moved):+.2f} ({max(moved, key=abs):+.2f})")
        rows.append([*row, *_size_of(dataclasses.asdict(one))])
    note = (
        "Energy: of the experts' differences to the base, calibrated as inputs weigh it (the two cannot be compared). "
        f"Cosine with the full model's features, mean over {_counts(report['check'])}."
    )
    if full["retrieval"]:
        note += f" Retrieval: mean change of R@1 and R@5, both ways, in points, on {'; '.join(full['retrieval'])}."
    for name, one in (("The full model", full), ("A dense CLIP of this shape", report["dense"])):
        note += " {}: {} parameters, {} vision GMACs.".format(name, *_size_of(one))
    return Section("find", "What each rank keeps", [Table(head, rows), note])


def _size(report: Mapping[str, Any], trial: Trial) -> Section:
    three = (report["dense"], report["full"], dataclasses.asdict(trial))
    total, macs = zip(*map(_size_of, three), strict=True)
    rows = [
        ["rank of the differences", "", "", trial.ranks],
        ["energy kept of them", "", "", f"{percent(trial.energy_mean)} (lowest {percent(trial.energy_min)})"],
        ["parameters", *total],
        ["parameters a pair uses", *(millions(one["parameters"]["active"], 1) for one in three)],
        ["vision tower, GMACs a picture", *macs],
    ]
    note = f"Cut for the inputs of {_counts(report['calibration'])}." if trial.calibrated else "Plain truncated SVD."
    return Section("size", "Size and cost", [Table(["", "dense CLIP of this shape", "full", "compressed"], rows), note])


def _cosine(report: Mapping[str, Any], trial: Trial) -> Section:
    rows = [[name, *(f"{trial.cosine[kind][part]:.6f}" for part in ("mean", "min"))] for kind, name in KINDS.items()]
    table = Table(["feature", "mean", "lowest"], rows)
    return Section("cosine", "Cosine with the full model's features", [table, f"{_counts(report['check'])}."])


def _retrieval(before: Recalls, after: Recalls) -> Section:
    rows = []
    for name, was in before.items():
        row = [name]
        for score in RECALLS:
            now = after[name][score]
            row.append(f"{percent(was[score])} -> {percent(now)} ({100 * (now - was[score]):+.1f})")
        rows.append(row)
    note = f"In percent, full -> compressed. Mean change {statistics.mean(gaps(before, after)):+.2f} points."
    return Section("retrieval", "Retrieval", [Table(["data", *RECALLS.values()], rows), note])


def _counts(sample: Mapping[str, Any]) -> str:
    return "{images:,} pictures and {captions:,} captions of {source}".format(**sample)


def _away(cosine: float) -> str:
    """1 - cosine, of which rounding leaves about 1e-7."""
    return f"{1 - cosine:.1e}" if 1 - cosine > 2e-7 else "0"


def _size_of(model: Mapping[str, Any]) -> tuple[str, str]:
    """Parameters, and GMACs of the vision tower."""
    return millions(model["parameters"]["total"], 1), f"{model['vision_macs'] / 1e9:,.3g}"


# ------------------------------------------------------------------------------------------------------------- figures


def _energy_maps(trial: Trial) -> Section:
    panels = []
    for tower, name in (("vision_model", "image"), ("text_model", "text")):
        for layer in ("fc1", "fc2"):
            kept = [one for one in trial.kept if one["block"].startswith(tower) and one["layer"] == layer]
            if kept:
                panels.append(_energy_map(f"{name}{layer}", f"{name} tower, {layer}", kept))
    how = (
        "Share of each expert's squared difference to the base FFN that its rank keeps, in percent; the base itself "
        "(expert 0) has no difference. Beside each block its rank."
    )
    return Section("energy", "Energy kept, block by block", [Figure(panels, how)])


def _energy_map(name: str, title: str, kept: Sequence[Mapping[str, Any]]) -> str:
    """A row a block, a column an expert; colours reach from the lowest share to 1."""
    shares, experts = list(map(differing, kept)), len(kept[0]["energy"])
    rows = [f"{one['block'].rpartition('.')[2]}  (rank {one['rank']})" for one in kept]
    limits = min(0.999, *map(min, shares)), 1.0
    columns = range(min(1, experts - 1), experts)
    return figures.heatmap(name, title, shares, rows, columns, limits, percent, f"energy kept, {title}")


def _by_rank(report: Mapping[str, Any]) -> Section:
    trials = _trials(report)
    panels = [_distance_by_rank(kind, title, trials, report["limits"]["cosine"]) for kind, title in KINDS.items()]
    how = "Lower is nearer to the full model; the dashed line is what was asked for. The last rank is the full one."
    return Section("ranks", "By rank", [Figure(panels, how)])


def _distance_by_rank(kind: str, title: str, trials: Sequence[Trial], asked: float) -> str:
    """1 - mean cosine with the full model, by rank; a line for the plain SVD, one for the calibrated."""
    with figures.panel(4.0, 2.8, title, "rank", "1 - cosine") as (figure, axes):
        for colour, label in zip(figures.COLOURS, ("plain", "calibrated"), strict=False):
            mine = [one for one in trials if one.kind == label]
            if mine:
                # What is equal but for rounding lies on the lower edge: a logarithmic axis has no zero.
                away = [max(1 - one.cosine[kind]["mean"], 1e-7) for one in mine]
                axes.plot([one.rank for one in mine], away, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(1 - asked, color=figures.COLOURS[5], linewidth=1, linestyle="--")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_yscale("log")
        axes.legend(loc="best")
        return figures.to_svg(figure, f"rank-{kind}", f"distance of the {title} to the full model, by rank")
