"""Fixtures of the demo's browser tests: tiny LLaVAs, running servers, a Chromium. A pytest plugin:
`pytest_plugins = ["tiny.browser_fixtures"]` in a test file.

Where Chromium, playwright or gradio is missing the tests are skipped; with LLAVA_CLIPMOE_REQUIRE_BROWSER=1 they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tiny.browser import CHROMIUM, MAX_BYTES, PATIENCE, TOKENS, Site, edit_weights, make_pairs, serve, what_is_missing
from tiny.llavas import make_two_llavas


@pytest.fixture(scope="session")
def can_browse() -> None:
    """Skips, or fails where the browser is required."""
    if reason := what_is_missing():
        (pytest.fail if os.environ.get("LLAVA_CLIPMOE_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def llava_folders(can_browse: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny random LLaVAs that never end an answer by themselves; the left one is blind: no picture reaches it."""
    directories = make_two_llavas(tmp_path_factory.mktemp("llavas"))
    for directory in directories:
        edit_weights(directory, "lm_head.weight", lambda weight: weight[2].zero_())  # </s> is never the likeliest
    edit_weights(directories[0], "model.mm_projector.2.weight", lambda weight: weight.zero_())
    return directories


@pytest.fixture(scope="session")
def llavas(llava_folders):
    """Both LLaVAs in this process: what the page should say is asked of them."""
    from demo.llava.load import load_llavas, prepare_upstream
    from demo.llava.settings import Models

    prepare_upstream()
    return load_llavas(Models(left=llava_folders[0], right=llava_folders[1], device="cpu"), lambda line: None)


@pytest.fixture(scope="session")
def site(llava_folders, llavas, tmp_path_factory) -> Iterator[Site]:
    """The demo with short answers."""
    folder = tmp_path_factory.mktemp("site")
    pairs = make_pairs(folder / "pairs", llavas)
    settings = ["--max-new-tokens", TOKENS, "--upload-limits.max-bytes", MAX_BYTES]
    with serve(folder, *llava_folders, pairs, *map(str, settings)) as site:
        yield site


@pytest.fixture(scope="session")
def slow_site(site, tmp_path_factory) -> Iterator[Site]:
    """The demo with answers that go on for minutes, and a pair with 400 questions."""
    from demo.mining.pairs import Question, write_pairs

    folder = tmp_path_factory.mktemp("slow-site")
    shutil.copytree(site.folder / "pictures", folder / "pairs" / "pictures")
    shutil.copy(site.folder / "pairs.jsonl", folder / "pairs")
    pairs = replace(site, folder=folder / "pairs").pairs[:2]
    many = tuple(Question("number", f"Is it {i}?", ("yes", "no")) for i in range(400))
    write_pairs(folder / "pairs", [pairs[0], replace(pairs[1], questions=many)], {})
    with serve(folder, site.left, site.right, folder / "pairs", "--max-new-tokens", "20000") as slow:
        yield slow


@pytest.fixture(scope="module")
def chromium(can_browse):
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(site, path="/", **context) -> a new visitor's page, up and with the first pair shown.

    At the end no script on it may have failed, and it may have asked nobody but the site.
    """
    contexts, wrong = [], []

    def visit(site: Site, path: str = "/", **settings: Any):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
        contexts.append(context)
        context.set_default_timeout(1000 * PATIENCE)
        context.add_init_script(RECORD_TRAFFIC)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"script: {error}"))
        page.on("request", lambda request: None if request.url.startswith((site.url, "data:", "blob:"))
                else wrong.append(f"asked {request.url}"))  # fmt: skip
        page.goto(site.url + path)
        page.wait_for_function("document.querySelector('#question textarea')?.value.length > 0")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


RECORD_TRAFFIC = """
    window.traffic = "";
    const ask = window.fetch;
    window.fetch = async (...given) => {
        const answer = await ask(...given), reader = answer.clone().body?.getReader(), decoder = new TextDecoder();
        const read = async () => {
            const {done, value} = await reader.read();
            if (!done) { window.traffic += decoder.decode(value, {stream: true}); await read(); }
        };
        if (reader) read().catch(() => {});
        return answer;
    };
"""
"""All that the server tells the page, as text in `window.traffic`."""
