"""README, CONTRIBUTING, CHANGELOG and docs/: every link leads somewhere, and every command of ours parses.

`docs/reproduce.md`, whose commands are made of variables and loops, has its own test: `test_reproduce_guide.py`.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_reproduce_guide import GUIDE, Parsed, blocks, check_command

PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((REPOSITORY / "docs").glob("*.md"))
WITH_COMMANDS = [page for page in PAGES if page != GUIDE and "\nllava-clipmoe " in page.read_text(encoding="utf-8")]
PLACEHOLDERS = {"BENCH": "pope"}


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", [page for page in PAGES if page != GUIDE], ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"`([\w/]+/[\w.]+\.(?:py|sh|md|css|j2|tsv))`", prose(page))
    places = [REPOSITORY, *(REPOSITORY / name for name in ("llava_clipmoe", "train_encoder", "train_llava", "demo"))]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    elsewhere = ("runs/", "llava/", "OUTPUT_DIR/")  # made by a command, or upstream's
    assert not [name for name in missing if not name.startswith(elsewhere)]


def commands(text: str) -> list[list[str]]:
    """The words of every line of a bash block that starts with `llava-clipmoe`, its comment left out."""
    lines = "\n".join(blocks("bash", text)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("llava-clipmoe ")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_every_command_parses(page, monkeypatch):
    def then_stop(parser, args=None, namespace=None, real=argparse.ArgumentParser.parse_args):
        raise Parsed(real(parser, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop)  # of the commands without tyro
    monkeypatch.chdir(REPOSITORY)
    refused = []
    for words in commands(page.read_text(encoding="utf-8")):
        try:
            check_command([PLACEHOLDERS.get(word, word) for word in words], monkeypatch)
        except (SystemExit, ValueError, AssertionError) as error:
            refused.append(f"{' '.join(words)}: {error}")
    assert not refused, "\n".join(refused)
