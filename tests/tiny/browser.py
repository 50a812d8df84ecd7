"""What the demo's browser tests share: drawn pairs, the server as a process, and words for what one does on the page.

The fixtures that use it are in demo_fixtures.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from tiny.llavas import upstream_is_installed

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 90.0
"""Seconds that anything on the page may take: continuous integration has two slow cores."""
TOKENS = 24
"""Of an answer."""
MAX_BYTES = 400_000
"""Of an upload."""
LEFT, RIGHT = "CLIP", "CLIP-MoE"
TABS = ("Compare", "Blind vote", "Look inside", "Pairs", "Scores")
TRACE = re.compile(r"Traceback|\b[A-Z]\w+(?:Error|Exception)\b")
SCRIPT = "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'> ${window.hacked=1}"


def what_is_missing() -> str:
    """Why the browser tests cannot run here; "" where they can."""
    packages = [name for name in ("gradio", "playwright", "imagehash") if importlib.util.find_spec(name) is None]
    if packages:
        return f"not installed: {', '.join(packages)}"
    if not upstream_is_installed():
        return "upstream LLaVA (llava-torch) is not installed"
    return "" if CHROMIUM else "there is no chromium on the PATH"


# ----------------------------------------------------------------------------------------------------- models and pairs


def edit_weights(directory: Path, name: str, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(directory / "model.safetensors")
    change(state[name])
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def answers(llavas, pictures, question: str) -> dict[tuple[int, int], str]:
    """{(LLaVA, picture): its whole answer}."""
    from demo.llava.settings import Generation

    how = Generation(max_new_tokens=TOKENS)
    return {
        (e, p): list(llava.stream(picture, question, how))[-1]
        for e, llava in enumerate(llavas)
        for p, picture in enumerate(pictures)
    }


def draw(shape: str, colour: str, count: int = 1) -> Image.Image:
    image = Image.new("RGB", (120, 90), "white")
    pen = ImageDraw.Draw(image)
    for i in range(count):
        box = (10 + 36 * i, 20, 42 + 36 * i, 70)
        pen.ellipse(box, fill=colour) if shape == "circle" else pen.rectangle(box, fill=colour)
    return image


def make_pairs(folder: Path, llavas) -> Path:
    """Six pairs. The right answers to the first one's question are what CLIP-MoE says; the pictures of the second are
    one picture, so that both LLaVAs are blind; a name and a question hold HTML."""
    from demo.mining.pairs import BlindPair, Question, save_picture, write_pairs

    asked = "What colour is the square?"
    colours = draw("square", "red"), draw("square", "blue")
    truth = answers(llavas, colours, asked)
    rows = [
        (colours, ("red.png", "blue.png"), 0.97, 0.58, [("color", asked, (truth[1, 0], truth[1, 1]))]),
        ((draw("circle", "green"),) * 2, ("a.png", "b.png"), 0.99, 0.68, [("state", "Is it on?", ("yes", "no"))]),
        ((draw("circle", "red", 1), draw("circle", "red", 3)), ("1.png", "3.png"), 0.96, 0.71,
         [("count", "How many circles are there?", ("one", "three")), ("group", "Is it alone?", ("yes", "no"))]),
        ((draw("circle", "blue"), draw("square", "blue")), (SCRIPT, "square.png"), 0.98, 0.78,
         [("text", f"What is {SCRIPT}?", ("<b>bold</b>", "plain"))]),
        ((draw("circle", "green", 2), draw("circle", "green", 3)), ("2g.png", "3g.png"), 0.95, 0.80,
         [("count", "How many circles are there?", ("two", "three"))]),
        ((draw("square", "green"), draw("square", "black")), ("green.png", "black.png"), 0.96, 0.89, []),
    ]  # fmt: skip
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    pairs, number = [], 0
    for images, names, dense, moe, questions in rows:
        paths = []
        for image, name in zip(images, names, strict=True):
            number += 1
            paths.append(pictures / save_picture(image, pictures, name, number))
        cosines = {"dense": dense, "clip-moe": moe} | {f"expert{i}": moe + 0.01 * i for i in range(4)}
        questions = tuple(Question(*question) for question in questions)
        pairs.append(BlindPair(tuple(paths), names, cosines, "clip-moe", round(dense - moe, 2), True, questions))
    write_pairs(folder, pairs, {})
    return folder


# ----------------------------------------------------------------------------------------------------------- the server


@dataclass(frozen=True)
class Site:
    """A running demo."""

    url: str
    port: int
    output: Path
    left: Path
    right: Path
    folder: Path
    """Of the pairs."""
    log: Path

    @property
    def pairs(self):
        from demo.mining.pairs import read_pairs

        return read_pairs(self.folder)

    def status_of(
        self, path: str, body: bytes | None = None, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """-> (status, headers in lower case, body) of a request for a path of the site, sent as it is."""
        request = urllib.request.Request(self.url + path, body, headers, method=method)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE) as found:
                return found.status, {k.lower(): v for k, v in found.headers.items()}, found.read()
        except urllib.error.HTTPError as error:
            return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@contextlib.contextmanager
def serve(folder: Path, left: Path, right: Path, pairs: Path, *arguments: str) -> Iterator[Site]:
    """`llava-clipmoe demo` as a process of its own, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    site = Site(f"http://127.0.0.1:{port}", port, folder / "demo", left, right, pairs, folder / "server.log")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                   "GRADIO_SHARE": "True"}  # fmt: skip
    command = [sys.executable, "-m", "llava_clipmoe.cli", "demo", "--left", left, "--right", right, "--pairs", pairs]
    command += ["--output-dir", site.output, "--port", port, "--no-open-browser", "--device", "cpu", *arguments]
    with site.log.open("w") as log:
        process = subprocess.Popen(
            [*map(str, command)], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: process.poll() is not None or answers_at(port), 180)
        assert process.poll() is None, f"the demo ended: {site.log.read_text()[-3000:]}"
        yield site
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answers_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(happened: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """For what is not on the page (files, processes). Fails when it does not happen in time."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"not in {seconds:.0f} s"
        time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------- the browser


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def panel(page):
    """What is shown below the tabs."""
    return page.locator("[role=tabpanel]:visible")


def ask(page, question: str | None = None) -> None:
    """Ask (what stands in the field already, or `question`) by the button."""
    if question is not None:
        page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def board(page, where: str = "#board", state: str = "done") -> dict[tuple[int, int], str]:
    """{(LLaVA, picture): text} when all four cells are in this state."""
    all_four = """([where, state]) => {
        const cells = [...document.querySelectorAll(where + ' .cell')];
        return cells.length === 4 && cells.every(cell => cell.classList.contains(state))
            && cells.map(cell => cell.querySelector('.answer').textContent); }"""
    texts = page.wait_for_function(all_four, arg=[where, state]).json_value()
    return {(i % 2, i // 2): text for i, text in enumerate(texts)}


def columns(page, where: str = "#board") -> list[str]:
    """The heads of both columns, with their badges."""
    return page.locator(f"{where} .head").all_inner_texts()


def number(text: str | None) -> float:
    return float(re.search(r"-?\d+(\.\d+)?", text or "").group())


def bars(page, where: str) -> dict[str, str]:
    """{label: value} of the rows of bars in an element."""
    rows = page.locator(f"{where} .bar-row")
    labels, values = rows.locator(".bar-label").all_text_contents(), rows.locator(".bar-value").all_text_contents()
    return dict(zip(labels, values, strict=True))


def picture_loaded(page, where: str, but: str | None = None) -> str:
    """Wait until a picture (another than the one of this address) is shown there, decoded; -> its address."""
    page.wait_for_function(
        "([where, but]) => { const i = document.querySelector(where + ' img');"
        " return i && i.complete && i.naturalWidth > 0 && i.src !== but; }", arg=[where, but])  # fmt: skip
    return page.locator(f"{where} img").first.get_attribute("src")


def upload(page, number: int, file: Path | dict[str, Any]) -> None:
    page.locator(f"#picture-{number} input[type=file]").set_input_files(file)


def choose_by_keyboard(page, where: str, text: str) -> None:
    """Choose the entry of a dropdown that holds `text`, with the keyboard alone."""
    field = page.locator(f"{where} input[role=combobox]")
    field.focus()
    field.fill(text)
    page.keyboard.press("Enter")


def told(page, words: str):
    """Wait for a message on the page with these words; no message may hold a trace. -> its text."""
    from playwright.sync_api import expect

    toast = page.get_by_test_id("toast-text").filter(has_text=words)
    expect(toast.first).to_be_visible()
    shown = page.locator("body").inner_text()
    assert not TRACE.search(shown), TRACE.search(shown)
    return toast.first.inner_text()


def still_answers(page, llavas, site: Site) -> None:
    """A normal question on the first pair gets its four answers, on this page as it is."""
    choose_by_keyboard(page, "#pair-picker", "1 · color")
    # All that an earlier step of a test may have left changed: the question that stands there may be this very one
    # already, and the pair's cosines are gone where pictures were uploaded.
    page.wait_for_function("document.querySelector('#question textarea').value.startsWith('What colour') &&"
                           "document.querySelector('#cosines .bar-value')?.innerText === '0.970'")  # fmt: skip
    ask(page)
    assert board(page) == answers(llavas, pictures_of(site, 0), "What colour is the square?")


def pictures_of(site: Site, pair: int) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in site.pairs[pair].images]


def gallery_captions(page, total: int, count: int) -> list[str]:
    """Of the gallery of pairs, once it holds `count` of the `total` pairs."""
    page.locator("#pair-count").get_by_text(f"{count} of {total} pairs", exact=True).wait_for()
    page.wait_for_function("n => document.querySelectorAll('#gallery .caption-label').length === n", arg=count)
    return page.locator("#gallery .caption-label").all_inner_texts()
