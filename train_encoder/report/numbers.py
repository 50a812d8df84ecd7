"""How numbers read in every table and page: decimals, signs, units, and what stands where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MISSING = "–"


@dataclass(frozen=True)
class Score:
    """A cell that is more than text: a score."""

    text: str
    best: bool = False
    """Bold."""
    error: str = ""
    """Small print behind the text, as ±2.3."""
    change: str = ""
    """Small print below it, as +1.4 or −0.6: green or red."""

    @property
    def direction(self) -> str:
        if not set(self.change) - set("+−0."):
            return "same"
        return "up" if self.change.startswith("+") else "down"

    def markdown(self) -> str:
        text = f"**{self.text}**" if self.best else self.text
        return " ".join(filter(None, [text, self.error, self.change and f"({self.change})"]))


def percent(share: float | None) -> str:
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def signed(value: float, digits: int = 1) -> str:
    """With its sign, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def millions(count: float, digits: int = 2) -> str:
    return f"{count / 1e6:,.{digits}f} M"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def best_of(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def score(value: float | None, best: float | None = None, base: float | None = None, n: int | None = None) -> Score:
    """A share in percent, bold where it is the best; with its distance to `base`, and with its binomial standard error
    where it was measured on `n` independent trials."""
    if value is None:
        return Score(MISSING)
    error = f"±{100 * math.sqrt(value * (1 - value) / n):.1f}" if n else ""
    return Score(percent(value), value == best, error, "" if base is None else signed(100 * (value - base)))
