"""Pictures of a running demo for the README: goes through all tabs as a visitor would.

python tests/demo_screenshots.py http://127.0.0.1:7860 docs/
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from tiny.browser import CHROMIUM, open_tab, panel, picture_loaded

MOST_BYTES = 250 * 1024
MARGIN = 16
"""Pixels around the content."""
ALL_LOADED = """[...document.images].every(image => image.complete || !image.offsetParent
    || image.getBoundingClientRect().top > image.closest('.grid-wrap')?.getBoundingClientRect().bottom)"""
"""But for those further down in the gallery, which a browser loads when they are scrolled to."""


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = visit(browser, url, viewport={"width": 1160, "height": 900})
        compare(page)
        save(page, folder / "demo-compare.png")
        for name, fill in {"look": look, "pairs": pairs, "vote": vote, "scores": scores}.items():
            fill(page)
            save(page, folder / f"demo-{name}.png")
        phone = visit(
            browser, f"{url.rstrip('/')}/?__theme=dark", viewport={"width": 390, "height": 844}, is_mobile=True
        )
        compare(phone)
        save(phone, folder / "demo-phone.png")
        browser.close()


def visit(browser: Any, url: str, **settings: Any) -> Page:
    context = browser.new_context(**settings)
    context.set_default_timeout(600_000)  # milliseconds: large models on a slow machine
    page = context.new_page()
    page.goto(url)
    page.wait_for_function("document.querySelector('#question textarea')?.value.length > 0")
    return page


def compare(page: Page) -> None:
    """The pair that the page opens on, asked about."""
    for number in (1, 2):
        picture_loaded(page, f"#picture-{number}")
    page.locator("#matches .eye").nth(1).wait_for()
    page.locator("#ask").click()
    page.locator("#board .cell.done").nth(3).wait_for()


def look(page: Page) -> None:
    open_tab(page, "Look inside")
    for where in ("experts-1", "experts-2", "shares-1", "shares-2", "difference-1", "difference-2"):
        picture_loaded(page, f"#{where}")


def pairs(page: Page) -> None:
    open_tab(page, "Pairs")
    page.locator("#gallery button.thumbnail-item").first.click()
    page.locator("#pair-details .bar-row").first.wait_for()


def vote(page: Page) -> None:
    open_tab(page, "Blind vote")
    page.locator("#new-round").click()
    page.locator("#vote-a:enabled").click()
    page.locator("#vote-names").get_by_text("You said").wait_for()


def scores(page: Page) -> None:
    open_tab(page, "Scores")
    page.locator("#score").click()
    page.locator("#score-progress").get_by_text("Written to").wait_for()


def save(page: Page, file: Path) -> None:
    """The page from its title to the end of what the tab shows, nothing below; at most MOST_BYTES."""
    page.mouse.move(0, 0)
    page.wait_for_function("![...document.querySelectorAll('.toast-body')].length")
    page.wait_for_function(ALL_LOADED)
    bottom = panel(page).evaluate("p => p.getBoundingClientRect().bottom + scrollY")
    clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": bottom + MARGIN}
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip, animations="disabled"))).convert("RGB")
    for colours in (None, 256, 128, 64, 32):  # fewer only where it must be: the rare ones of a legend are lost
        small = picture.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE) if colours else picture
        small.save(file, optimize=True)
        if file.stat().st_size <= MOST_BYTES:
            return
    raise ValueError(f"{file} takes {file.stat().st_size} bytes even with {colours} colours: show less on it.")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
