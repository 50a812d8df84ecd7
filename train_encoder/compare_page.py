"""The page of a comparison, as Markdown: the summary, then the papers' tables, mean and spread over seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from .compare_cells import Cells
from .compare_llava import Llava, llava_section
from .compare_tables import Section, sections, summary
from .config import TrainConfig


def epochs_of(config: TrainConfig) -> float:
    """Passes over the data after the base, in all trainings together. 0 for the base alone."""
    by_method = {
        "dmu": (config.moe.num_experts - 1) * config.mcl.optim.epochs + config.moe.optim.epochs,
        "dmu-lora": (config.moe.num_experts - 1) * config.mcl.optim.epochs + config.moe.optim.epochs,
        "vanilla-moe": (config.moe.num_experts - 1) * config.mcl.optim.epochs + config.moe.optim.epochs,
        "fmoe": config.fmoe.optim.epochs + config.moe.optim.epochs,  # an expert passes over its own cluster
        "sparse-upcycling": config.moe.optim.epochs,
        "finetune": config.finetune.optim.epochs,
        "base": 0.0,
    }
    return by_method[config.method]


@dataclass(frozen=True)
class Page:
    """What a comparison says, for Markdown and for HTML."""

    title: str
    command: str
    lead: str
    summary: list[str]
    sections: list[Section]
    cells: Cells = field(default_factory=dict)

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", f"Command: `{self.command}`", "", *([self.lead, ""] if self.lead else [])]
        lines += [f"- {sentence}" for sentence in self.summary] + ([""] if self.summary else [])
        for section in self.sections:
            lines += section.markdown()
        return "\n".join(lines).rstrip() + "\n"


def make_page(cells: Cells, llavas: Sequence[Llava], command: Sequence[str]) -> Page:
    """cells: recipe -> its runs by seed, the base first (none: LLaVAs alone)."""
    llava = [llava_section(llavas)] if llavas else []
    if not cells:
        return Page("Comparison of LLaVAs", shlex.join(command), "", [], llava)
    seeds = len(next(iter(cells.values())))
    lead = (
        f"Mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, in percent. Every recipe starts from "
        "the same base of its seed and spends as many epochs on the same captions."
    )
    found = sections(cells)
    return Page("Comparison of recipes", shlex.join(command), lead, summary(cells, found), found + llava, cells)
