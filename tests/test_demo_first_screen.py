"""What a visitor sees at once, in a real browser: the clearest pair and what the eyes make of it, without scrolling;
and the gallery with each eye's scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
from tiny.browser import LEFT, RIGHT, Site, choose_by_keyboard, draw, gallery_captions, open_tab, picture_loaded, serve

pytest_plugins = ["tiny.browser_fixtures"]
pytestmark = [pytest.mark.xdist_group("browser")] if importlib.util.find_spec("xdist") else []

SAID = "cat, red ground. one large upright, plain, day, ball, sign {} {}."
PAIRS = (
    ("color", ("red", "blue"), ("a red square", "a blue square"), 0.40, (2, 2)),
    ("letter", ("O", "A"), (SAID.format("O", "left"), SAID.format("A", "left")), 0.30, (1, 1)),
    ("letter", ("A", "X"), (SAID.format("A", "left"), SAID.format("X", "left")), 0.20, (0, 2)),
    ("side", ("left", "right"), (SAID.format("A", "left"), SAID.format("A", "right")), 0.10, (0, 2)),
    ("", (), None, 0.05, None),
)
"""Attribute, answers, statements, gap, statements right by each eye; in the file's order."""


@pytest.fixture(scope="module")
def scored_site(llava_folders, tmp_path_factory) -> Iterator[Site]:
    """The demo with pairs that have statements and each eye's scores; the last has neither."""
    from demo.mining.pairs import EYES, BlindPair, Question, save_picture, write_pairs

    folder, pairs = tmp_path_factory.mktemp("scored-site"), []
    pictures = folder / "pairs" / "pictures"
    pictures.mkdir(parents=True)
    for number, (attribute, answers, statements, gap, right) in enumerate(PAIRS):
        images = [draw("square", "red", 1 + number % 3).resize((240, 240)), draw("circle", "blue").resize((240, 240))]
        paths = [pictures / save_picture(image, pictures, "", 2 * number + i) for i, image in enumerate(images)]
        asked = (Question(attribute, f"Which {attribute}?", answers, statements),) if answers else ()
        scores = None if right is None else dict(zip(EYES, right, strict=True))
        cosines = {"dense": 0.99, "clip-moe": round(0.99 - gap, 2)}
        pairs.append(BlindPair(tuple(paths), ("1.png", "2.png"), cosines, "clip-moe", gap, True, asked, scores))
    write_pairs(folder / "pairs", pairs, {})
    with serve(folder, *llava_folders, folder / "pairs", "--max-new-tokens", "4") as site:
        yield site


SIZES = {"desktop": {"viewport": {"width": 1280, "height": 800}}}
SIZES["phone"] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.mark.parametrize("device", SIZES)
def test_the_clearest_pair_and_the_eyes_verdict_are_seen_without_scrolling(visit, scored_site, device):
    page = visit(scored_site, **SIZES[device])
    assert page.locator("#pair-picker input").input_value().startswith("3 · letter: A / X")
    for n in (1, 2):
        picture_loaded(page, f"#picture-{n}")
    page.locator("#matches .eye").nth(1).wait_for()
    assert tuple(page.locator("#matches .statements .text").all_inner_texts()) == PAIRS[2][2]
    assert page.locator("#matches .statements b").all_inner_texts() == ["A", "X"]
    assert [text.split(" ")[0] for text in page.locator("#matches caption").all_inner_texts()] == [LEFT, RIGHT]
    height = SIZES[device]["viewport"]["height"]
    for where in ("#picture-1 img", "#picture-2 img", "#matches .statements", "#matches .eye"):
        for seen in page.locator(where).all():
            box = seen.bounding_box()
            assert box["y"] >= 0 and box["height"] > 20 and box["y"] + box["height"] <= height, (where, box)
    assert page.evaluate("scrollY") == 0


def test_the_gallery_tells_each_eyes_score_and_shows_the_clearest_first(visit, scored_site):
    page = visit(scored_site)
    open_tab(page, "Pairs")
    assert gallery_captions(page, 5, 5) == [
        "letter: A / X · CLIP 0/2 · CLIP-MoE 2/2",
        "side: left / right · CLIP 0/2 · CLIP-MoE 2/2",
        "color: red / blue · CLIP 2/2 · CLIP-MoE 2/2",
        "letter: O / A · CLIP 1/2 · CLIP-MoE 1/2",
        "CLIP 0.990, gap 0.050",
    ]
    choose_by_keyboard(page, "#attribute", "letter")
    assert [text[:13] for text in gallery_captions(page, 5, 2)] == ["letter: A / X", "letter: O / A"]
    choose_by_keyboard(page, "#order", "widest gap first")
    page.locator("#gallery .caption-label").first.get_by_text("letter: O / A").wait_for()
    page.locator("#gallery button.thumbnail-item").first.click()
    page.locator("#compare-pair").click()
    page.wait_for_function("document.querySelector('#matches .statements b')?.innerText === 'O'")


def test_the_table_by_attribute_counts_the_pairs_that_each_eye_has_right(visit, scored_site):
    page = visit(scored_site)
    open_tab(page, "Pairs")
    table = [row.locator("th, td").all_inner_texts() for row in page.locator("#pair-counts tr").all()]
    assert table[0] == ["what differs", LEFT, RIGHT, "pairs"]
    shares = {row[0]: (row[1].split(" ")[0], row[2].split(" ")[0], row[3]) for row in table[1:]}
    assert shares == {
        "all": ("25%", "75%", "4"), "color": ("100%", "100%", "1"),
        "letter": ("0%", "50%", "2"), "side": ("0%", "100%", "1"),
    }  # fmt: skip
    assert "chance is 25%" in page.locator("#pair-counts").inner_text()
