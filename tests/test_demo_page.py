"""The demo's page in a real browser: what Compare shows to whoever asks; on a phone, in the dark, by keyboard."""

from __future__ import annotations

import importlib.util
import re

import pytest
from tiny.browser import (
    LEFT,
    RIGHT,
    SCRIPT,
    TABS,
    TRACE,
    answers,
    ask,
    bars,
    board,
    choose_by_keyboard,
    columns,
    draw,
    open_tab,
    picture_loaded,
    pictures_of,
    told,
    upload,
)

pytest_plugins = ["tiny.browser_fixtures"]
pytestmark = [pytest.mark.xdist_group("browser")] if importlib.util.find_spec("xdist") else []


# -------------------------------------------------------------------------------------------------------------- compare


def test_the_page_opens_on_the_first_pair(visit, site):
    page = visit(site)
    assert "CLIP" in page.title()
    assert page.get_by_role("tab").all_inner_texts() == list(TABS)
    for n in (1, 2):
        picture_loaded(page, f"#picture-{n}")
        assert page.locator(f"#picture-{n} img").evaluate("i => [i.naturalWidth, i.naturalHeight]") == [120, 90]
    assert bars(page, "#cosines") == {"CLIP": "0.970", "CLIP-MoE": "0.580", "expert 0": "0.580", "expert 1": "0.590",
                                      "expert 2": "0.600", "expert 3": "0.610"}  # fmt: skip
    assert page.locator("#question textarea").input_value() == "What colour is the square?"
    assert not page.locator("#board .cell").count()


@pytest.mark.parametrize("how", ["button", "Enter"])
def test_four_answers_are_what_the_models_say(visit, site, llavas, how):
    page = visit(site)
    question = page.locator("#question textarea")
    question.fill("Is it a circle?")
    question.press("Enter") if how == "Enter" else page.locator("#ask").click()
    found = board(page)
    assert found == answers(llavas, pictures_of(site, 0), "Is it a circle?")
    assert found[1, 0] != found[1, 1], (
        "the LLaVA that sees must tell the two pictures apart, or this test proves little"
    )
    assert columns(page)[0].startswith(LEFT) and columns(page)[1].startswith(RIGHT)
    times = page.locator("#board .times").all_inner_texts()
    assert all(re.fullmatch(r"first word \d+\.\d s · \d+\.\d s", text) for text in times) and len(times) == 4


def test_the_badge_is_on_the_llava_that_gives_one_answer_twice(visit, site):
    page = visit(site)
    ask(page)
    board(page)
    badges = page.locator("#board .head .badge")
    assert [columns(page)[0].split("\n")[0], badges.all_inner_texts()] == [
        LEFT, ["the same answer for both pictures, though the truth differs"]]  # fmt: skip
    marks = page.locator("#board .mark").all_inner_texts()
    assert [mark[0] for mark in marks] == ["✗", "✓", "✗", "✓"]  # its truth is what CLIP-MoE says
    ask(page, "Is it a square?")  # a question whose truth is not known
    page.wait_for_function("!document.querySelector('#board .mark')")
    board(page)
    assert badges.all_inner_texts() == ["the same answer for both pictures"]
    choose_by_keyboard(page, "#pair-picker", "2 · state")  # one picture twice: both LLaVAs are blind
    page.wait_for_function("document.querySelector('#question textarea').value === 'Is it on?'")
    ask(page)
    board(page)
    assert badges.count() == 2


def test_another_pair_by_the_keyboard_and_by_chance(visit, site, llavas):
    page = visit(site)
    before = picture_loaded(page, "#picture-2")
    choose_by_keyboard(page, "#pair-picker", "3 · count")
    picture_loaded(page, "#picture-2", but=before)
    page.wait_for_function("document.querySelector('#cosines .bar-value').innerText === '0.960'")
    assert page.locator("#question textarea").input_value() == "How many circles are there?"
    page.get_by_label("Is it alone?").check()
    page.wait_for_function("document.querySelector('#question textarea').value === 'Is it alone?'")
    ask(page)
    assert board(page) == answers(llavas, pictures_of(site, 2), "Is it alone?")
    picker = page.locator("#pair-picker input")
    for _ in range(3):
        now = picker.input_value()
        page.locator("#another-pair").click()
        page.wait_for_function("now => document.querySelector('#pair-picker input').value !== now", arg=now)
    chosen = int(picker.input_value().split(" ")[0]) - 1
    expected = f"{site.pairs[chosen].cosines['dense']:.3f}"
    page.wait_for_function("t => document.querySelector('#cosines .bar-value').innerText === t", arg=expected)
    assert not page.locator("#board .cell").count(), "answers of another pair are left on the page"


def test_two_pictures_of_ones_own(visit, site, llavas, tmp_path):
    from demo.llava.similarity import Similarity

    pictures = [draw("circle", "red", 2), draw("square", "green", 3), draw("square", "black")]
    for n, picture in enumerate(pictures):
        picture.save(tmp_path / f"{n}.png")
    page = visit(site)
    before = [picture_loaded(page, f"#picture-{n}") for n in (1, 2)]
    for n in (1, 2):
        upload(page, n, tmp_path / f"{n - 1}.png")
        picture_loaded(page, f"#picture-{n}", but=before[n - 1])
    page.wait_for_function("!document.querySelector('#cosines .bar-row')")
    ask(page, "What is it?")
    assert board(page) == answers(llavas, pictures[:2], "What is it?")
    page.wait_for_function("document.querySelectorAll('#cosines .bar-row').length === 2")
    expected = Similarity(llavas).cosines(*pictures[:2])
    assert bars(page, "#cosines") == {name: f"{value:.3f}" for name, value in expected.items()}
    now = picture_loaded(page, "#picture-2")
    page.locator("#picture-2").get_by_label("Remove Image").click()
    page.wait_for_function("!document.querySelector('#picture-2 img')")
    ask(page)
    page.get_by_test_id("toast-text").filter(has_text="Picture 2 is missing").wait_for()
    upload(page, 2, tmp_path / "2.png")
    picture_loaded(page, "#picture-2", but=now)
    ask(page)
    assert board(page) == answers(llavas, [pictures[0], pictures[2]], "What is it?")


def eyes(page, *statements: str) -> list[tuple[str, list[list[str]]]]:
    """(caption, the cells of each row) of both tables, once they are about these statements."""
    texts = "[...document.querySelectorAll('#matches .statements .text')].map(text => text.textContent)"
    page.wait_for_function(f"given => JSON.stringify({texts}) === JSON.stringify(given)", arg=list(statements))
    return [
        (
            table.locator("caption").inner_text(),
            [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()],
        )
        for table in page.locator("#matches table").all()
    ]


def matched(llavas, pictures, *statements: str) -> list[tuple[str, list[list[str]]]]:
    """What `eyes` should be."""
    from demo.llava.similarity import Similarity

    found = []
    for name, match in zip((LEFT, RIGHT), Similarity(llavas).matches(pictures, statements), strict=True):
        rows = [[f"{cosine:.4f}" for cosine in row] for row in match.cosines]
        for own, chosen in enumerate(match.chosen):
            if chosen is not None:
                rows[own][chosen] += " ✓ right" if chosen == own else " ✗ wrong"
        found.append((f"{name} " + ("✗ matches none", "✗ matches one", "✓ matches both")[match.right], rows))
    return found


def test_what_the_eyes_themselves_say(visit, site, llavas):
    page = visit(site)
    fields = [page.locator(f"#statement-{n} textarea") for n in (1, 2)]
    needed = page.locator("#matches .note", has_text="a statement about each of them are needed")
    assert eyes(page, *site.pairs[0].statements) == matched(llavas, pictures_of(site, 0), *site.pairs[0].statements)
    choose_by_keyboard(page, "#pair-picker", "3 · count")
    three = eyes(page, "one", "three")
    assert not fields[0].is_visible()
    page.get_by_text("Change the statements").click()
    assert three == matched(llavas, pictures_of(site, 2), "one", "three")
    fields[0].fill("red")
    fields[1].fill("b")
    page.locator("#match").click()
    typed = eyes(page, "red", "b")
    assert typed == matched(llavas, pictures_of(site, 2), "red", "b") != three
    fields[1].fill(SCRIPT)
    fields[1].press("Enter")
    assert eyes(page, "red", SCRIPT) == matched(llavas, pictures_of(site, 2), "red", SCRIPT)
    assert page.evaluate("window.hacked") is None and not page.locator("#matches script, #matches img").count()
    fields[0].fill(" ")
    page.locator("#match").click()
    needed.wait_for()
    assert not page.locator("#matches table").count()
    fields[0].fill("x" * 2001)
    page.locator("#match").click()
    told(page, "The statement has 2,001 characters; at most 2,000")
    choose_by_keyboard(page, "#pair-picker", "2 · state")  # one picture twice
    assert [caption for caption, _ in eyes(page, "yes", "no")] == [f"{name} ✗ matches none" for name in (LEFT, RIGHT)]
    page.locator("#another-pair").click()
    page.wait_for_function("!document.querySelector('#pair-picker input').value.startsWith('2')")
    pair = int(page.locator("#pair-picker input").input_value().split(" ")[0]) - 1
    if all(site.pairs[pair].statements):
        eyes(page, *site.pairs[pair].statements)
    choose_by_keyboard(page, "#pair-picker", "6 · green")  # no question, and the names are files'
    needed.wait_for()
    assert [field.input_value() for field in fields] == ["", ""]


def test_statements_about_pictures_of_ones_own(visit, site, llavas, tmp_path):
    pictures = [draw("circle", "red", 2), draw("square", "green", 3), draw("square", "black")]
    for n, picture in enumerate(pictures):
        picture.save(tmp_path / f"{n}.png")
    page = visit(site)
    eyes(page, *site.pairs[0].statements)
    fields = [page.locator(f"#statement-{n} textarea") for n in (1, 2)]
    for n in (1, 2):
        before = picture_loaded(page, f"#picture-{n}")
        upload(page, n, tmp_path / f"{n - 1}.png")
        picture_loaded(page, f"#picture-{n}", but=before)
    needed = page.locator("#matches .note", has_text="a statement about each of them are needed")
    needed.wait_for()
    assert [field.input_value() for field in fields] == ["", ""], "a mined pair's statements, about other pictures"
    assert fields[0].is_visible()
    fields[0].fill("red")
    fields[1].fill("green")
    fields[1].press("Enter")
    assert eyes(page, "red", "green") == matched(llavas, pictures[:2], "red", "green")
    page.locator("#picture-2").get_by_label("Remove Image").click()
    needed.wait_for()
    upload(page, 2, tmp_path / "2.png")
    assert eyes(page, "red", "green") == matched(llavas, [pictures[0], pictures[2]], "red", "green")


def test_stop_ends_long_answers_and_the_next_question_is_answered(visit, slow_site):
    page = visit(slow_site)
    ask(page)
    page.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2 && "
                           "document.querySelector('#board .cell.answering').innerText.length > 100")  # fmt: skip
    page.locator("#stop").click()
    page.locator("#board .cell.stopped").nth(3).wait_for(timeout=30_000)
    assert page.locator("#board .cell").count() == 4
    ask(page, "And now?")  # both models are free again
    page.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    page.locator("#stop").click()
    board(page, state="stopped")


@pytest.mark.parametrize("how", ["pair", "upload", "gallery"])
def test_answers_about_pictures_that_were_changed_meanwhile_are_not_shown(visit, slow_site, tmp_path, how):
    page = visit(slow_site)
    before = picture_loaded(page, "#picture-1")
    ask(page)
    page.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    if how == "pair":
        choose_by_keyboard(page, "#pair-picker", "2 · number")
    elif how == "upload":
        draw("square", "green").save(tmp_path / "green.png")
        upload(page, 1, tmp_path / "green.png")
    else:
        open_tab(page, "Pairs")
        page.locator("#gallery button.thumbnail-item", has_text="number").click()
        page.locator("#compare-pair").click()
        page.locator("#ask").wait_for()
    picture_loaded(page, "#picture-1", but=before)
    page.wait_for_function("!document.querySelector('#board .cell')")
    page.wait_for_timeout(1500)  # an answer that goes on would be drawn again ten times a second
    assert not page.locator("#board .cell").count()
    ask(page, "And now?")  # both models are free
    page.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    page.locator("#stop").click()
    board(page, state="stopped")


# ------------------------------------------------------------------------------------------------ phone, dark, keyboard


FILL = (
    ("Compare", "#ask", "#board .cell.done >> nth=3"),
    ("Blind vote", "#new-round", "#vote-a:enabled"),
    ("Look inside", "#look", "#shares-2 img"),
    ("Pairs", "#gallery button.thumbnail-item >> nth=3", "#pair-details .bar-row >> nth=5"),
    ("Scores", "#score", "#score-progress .note"),
)
"""A tab, what fills it, what is there when it is full."""


def test_nothing_is_wider_than_a_phone(visit, site):
    page = visit(site, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    for name, press, ready in FILL:
        tab = page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():  # Gradio moves tabs that do not fit into a menu
            page.locator(".overflow-menu > button").click()
            tab = page.locator(".overflow-dropdown").get_by_text(name, exact=True)
        tab.click()
        page.locator(press).click()
        page.locator(ready).wait_for()
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth, visualViewport.width]")
        assert wide == [390, 390, 390], name


CONTRAST = """(places) => {
    const pixel = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = colour => { pixel.clearRect(0, 0, 1, 1); pixel.fillStyle = colour; pixel.fillRect(0, 0, 1, 1);
                             return [...pixel.getImageData(0, 0, 1, 1).data]; };
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
                                                           if (c[3] === 255) return c; } return [255, 255, 255, 255]; };
    return places.flatMap(where => [...document.querySelectorAll(where)].map(e => {
        const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))];
        return [where, (Math.max(a, b) + .05) / (Math.min(a, b) + .05)]; }));
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_are_readable_in_light_and_dark(visit, site, theme):
    page = visit(site, f"/?__theme={theme}")
    ask(page)
    board(page)
    ground = page.evaluate("getComputedStyle(document.querySelector('gradio-app')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) is (theme == "dark")
    page.locator("#matches .eye").nth(1).wait_for()
    places = [".answer", ".times", ".mark", ".badge", ".head", ".which", ".which small", ".bar-label", ".bars-title"]
    places += [".eye caption", ".eye th", ".eye td", ".eye .mark", ".statements .which", ".statements .text"]
    found = page.evaluate(CONTRAST, places)
    assert {where for where, _ in found} == set(places)
    assert not [(where, ratio) for where, ratio in found if ratio < 4.5]


def test_the_keyboard_alone_reaches_question_and_button(visit, site, llavas):
    page = visit(site)
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]:not([id^=range])')?.id"))
        if reached[-1] == "ask":
            break
    assert reached[-1] == "ask" and {"pair-picker", "another-pair", "question"} <= set(reached)
    page.keyboard.press("Enter")
    assert board(page) == answers(llavas, pictures_of(site, 0), "What colour is the square?")
    assert not TRACE.search(page.locator("body").inner_text())
