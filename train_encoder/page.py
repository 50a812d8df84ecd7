"""Building stones of a self-contained HTML page: escaping, tables, figures, scores, and the style sheet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is already HTML. Everything else is escaped on its way to the page."""


def html(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def table(head: Sequence[object], rows: Iterable[Sequence[object]], name: str = "table") -> Html:
    """A table that scrolls sideways on a narrow screen; its first column stays in view. `name` is read to the blind."""
    top = "".join(f'<th scope="col">{html(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{html(row[0])}</th>' + "".join(f"<td>{html(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(svgs: Iterable[str], how_to_read: object) -> Html:
    panels = "".join(f"<div>{svg}</div>" for svg in svgs)
    return Html(f'<figure><div class="panels">{panels}</div><figcaption>{html(how_to_read)}</figcaption></figure>')


def paragraph(text: object) -> Html:
    return Html(f"<p>{html(text)}</p>")


def join(*parts: str) -> Html:
    return Html("".join(parts))


# ---------------------------------------------------------------- numbers


def percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"


def standard_error(share: float, n: int) -> float:
    """Binomial standard error of a share measured on n independent trials."""
    return math.sqrt(max(share * (1 - share), 0) / n) if n else math.nan


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def system_order(names: Iterable[str]) -> list[str]:
    """base, stages, experts, CLIP-MoE untrained, CLIP-MoE; other names after them, in the order they came."""

    def key(name: str) -> tuple[int, int]:
        for place, pattern in enumerate((r"base$", r"stage(\d+)$", r"expert(\d+)$", r"clip-moe \(", r"clip-moe$")):
            if found := re.match(pattern, name):
                return place, int(found.group(1)) if found.groups() else 0
        return 99, 0

    return sorted(dict.fromkeys(names), key=key)


def score(value: float | None, best: float | None, base: float | None = None, error: float | None = None) -> Html:
    """A cell: the value in percent (bold when it is the best), ± its standard error, below it the distance to base."""
    if value is None:
        return Html("–")
    text = f"<b>{percent(value)}</b>" if best is not None and value == best else percent(value)
    if error is not None:
        text += f" <small>±{100 * error:.1f}</small>"
    if base is not None:
        delta = 100 * (value - base)
        kind = "up" if delta >= 0.05 else "down" if delta <= -0.05 else "same"
        text += f'<br><small class="{kind}">{delta:+.1f}</small>'.replace("-", "−")
    return Html(text)


def best_of(values: Iterable[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


# ---------------------------------------------------------------- style

CSS = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1c2128;--soft:#59626d;--line:#d9dee4;--card:#f5f7f9;--up:#1a7f4b;
--down:#b3403a;--link:#1f6fb2}
@media(prefers-color-scheme:dark){:root{--bg:#15181c;--ink:#e3e7ec;--soft:#9ba5b0;--line:#333a43;--card:#1d2228;
--up:#5cc48d;--down:#ee8a83;--link:#7ab8ee}}
*{box-sizing:border-box}html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0 auto;max-width:66rem;padding:1.5rem 1.25rem 4rem;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.75rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:1.02rem;margin:1.5rem 0 .5rem;overflow-wrap:anywhere}p{margin:.6rem 0;max-width:48rem}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
p,figcaption{color:var(--soft);font-size:.9rem}.lead{color:var(--ink);font-size:1rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1rem 0;font-size:.92rem}
.note{background:var(--card);border-left:3px solid #d9822b;padding:.6rem .9rem;border-radius:4px;max-width:48rem}
.note ul{margin:.3rem 0;padding-left:1.2rem;font-size:.9rem}
.tiles{display:flex;flex-wrap:wrap;gap:.75rem;margin:.5rem 0 0}.tiles div{background:var(--card);border-radius:8px;
padding:.6rem 1rem}.tiles span{display:block;font-size:.82rem;color:var(--soft)}
.tiles strong{font-size:1.25rem;font-variant-numeric:tabular-nums;white-space:nowrap}
.scroll{overflow-x:auto;margin:.75rem 0;max-width:100%}.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .8rem;text-align:right;vertical-align:top;min-width:4.6rem;
border-bottom:1px solid var(--line);line-height:1.35}thead th{color:var(--soft);font-weight:600;vertical-align:bottom;
max-width:9rem}th:first-child{text-align:left;position:sticky;left:0;background:var(--bg);min-width:5.5rem;
max-width:16rem;overflow-wrap:break-word}tbody th{font-weight:500}td{white-space:nowrap}small{color:var(--soft);
font-size:.78rem}
small.up{color:var(--up)}small.down{color:var(--down)}b{font-weight:700}
figure{margin:1rem 0}.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem}
.panels svg{display:block;width:100%;height:auto;color:var(--ink)}figcaption{margin-top:.5rem;max-width:48rem}
details summary{cursor:pointer;color:var(--link);font-size:.95rem}#attributes td small{display:block}
#settings td{text-align:left;white-space:normal;overflow-wrap:anywhere}
pre{background:var(--card);padding:.9rem 1rem;border-radius:8px;overflow-x:auto;font-size:.85rem;line-height:1.5}
@media(max-width:480px){body{padding:1rem .9rem 3rem}th,td{padding:.35rem .55rem;min-width:3.8rem}
th:first-child{max-width:8.5rem}}
@media print{details>*{display:block}nav{display:none}}
"""
