"""The demo's other tabs in a real browser: blind votes, the look inside, the gallery of pairs, scores."""

from __future__ import annotations

import importlib.util
import json
import re

import pytest
from tiny.browser import (
    LEFT,
    RIGHT,
    answers,
    ask,
    bars,
    board,
    choose_by_keyboard,
    columns,
    gallery_captions,
    number,
    open_tab,
    panel,
    picture_loaded,
    pictures_of,
    wait_for,
)

pytest_plugins = ["tiny.browser_fixtures"]
pytestmark = [pytest.mark.xdist_group("browser")] if importlib.util.find_spec("xdist") else []


# ----------------------------------------------------------------------------------------------------------- blind vote


@pytest.fixture
def votes(site):
    """The file of votes, empty at first."""
    file = site.output / "votes.jsonl"
    file.unlink(missing_ok=True)
    return file


def new_round(page) -> None:
    page.evaluate("window.traffic = ''")
    page.locator("#new-round").click()
    page.locator("#vote-a:enabled").wait_for()


def test_a_vote_is_blind_until_it_is_given(visit, site, llavas, votes):
    page = visit(site)
    open_tab(page, "Pairs")
    gallery_captions(page, 6, 6)  # which tell what CLIP says of pairs, and are loaded with the page
    page.locator("#matches .eye").nth(1).wait_for(state="attached")  # so are these
    open_tab(page, "Blind vote")
    assert "No votes yet" in page.locator("#vote-score").inner_text()
    assert page.locator("#vote-a").is_disabled()
    new_round(page)
    shown = board(page, "#vote-board")
    told = {"tab": panel(page).inner_html(), "server": page.evaluate("window.traffic")}
    assert shown[0, 0] in told["tab"] and "process_completed" in told["server"]
    for where, text in told.items():
        text = re.sub(r'[^"]*/gradio_api/file=[^"]*', "", text)  # where the pictures lie
        assert not re.search(r"CLIP|MoE|llava-v1|\d s\b", text), f"{where}: {re.search('.{30}(CLIP|MoE| s).*', text)}"
    page.locator("#vote-b").click()
    page.locator("#vote-names").get_by_text("You said: B is better.").wait_for()
    sentence = page.locator("#vote-names").inner_text()
    names = re.match(r"A was (\S+) and B was (\S+)\. You said", sentence).groups()
    assert set(names) == {LEFT, RIGHT}
    assert [head.split("\n")[0] for head in columns(page, "#vote-board")] == [f"A: {names[0]}", f"B: {names[1]}"]
    (row,) = map(json.loads, votes.read_text().splitlines())
    pair = next(pair for pair in site.pairs if list(pair.names) == row["pictures"])
    assert (row["model_a"], row["model_b"], row["choice"]) == (*names, "b")
    assert [*row["answers_a"], *row["answers_b"]] == [shown[0, 0], shown[0, 1], shown[1, 0], shown[1, 1]]
    true = answers(llavas, pictures_of(site, site.pairs.index(pair)), row["question"])
    side = [LEFT, RIGHT].index(names[0])
    assert row["answers_a"] == [true[side, 0], true[side, 1]]
    assert re.search(r"preferred in [01] of 1 decided votes: 1?00?% \(95% interval \d+–\d+%\), too few to tell",
                     page.locator("#vote-score").inner_text())  # fmt: skip
    assert bars(page, "#vote-score")[names[1]] == "1"
    assert all(page.locator(f"#vote-{choice}").is_disabled() for choice in ("a", "b", "tie", "bad"))


def test_sides_change_and_votes_by_the_keyboard_are_counted_once(visit, site, votes):
    page = visit(site)
    open_tab(page, "Blind vote")
    rows, given = [], []
    while len(given) < 8 or len({row["model_a"] for row in rows}) == 1:
        assert len(given) < 24, "one LLaVA was A 24 times in a row"
        given.append(["a", "tie", "bad", "b"][len(given) % 4])
        new_round(page)
        page.locator(f"#vote-{given[-1]}").focus()
        page.keyboard.press("Enter")
        if given[-1] == "tie":
            page.keyboard.press("Enter")  # an impatient finger
        page.locator("#vote-score").get_by_text(f"Votes so far: {len(given)}", exact=True).wait_for()
        rows = [json.loads(line) for line in votes.read_text().splitlines()]
        assert [row["choice"] for row in rows] == given
    found = bars(page, "#vote-score")
    assert found["tie"] == str(given.count("tie")) and found["both bad"] == str(given.count("bad"))
    assert int(found[LEFT]) + int(found[RIGHT]) == given.count("a") + given.count("b")
    page.reload()
    open_tab(page, "Blind vote")
    page.locator("#vote-score").get_by_text(f"Votes so far: {len(given)}", exact=True).wait_for()


def test_a_stopped_round_has_no_vote(visit, slow_site):
    page = visit(slow_site)
    open_tab(page, "Blind vote")
    page.locator("#new-round").click()
    page.wait_for_function("document.querySelectorAll('#vote-board .cell.answering').length === 2")
    assert page.locator("#vote-a").is_disabled()
    page.locator("#stop-round").click()
    page.locator("#vote-names").get_by_text("This round has no vote").wait_for(timeout=30_000)
    assert page.locator("#vote-a").is_disabled()
    assert not (slow_site.output / "votes.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------- look inside


FIGURES = [f"#{what}-{n}" for what in ("experts", "shares", "difference") for n in (1, 2)]


def test_look_inside_follows_the_block_and_the_pair(visit, site):
    page = visit(site)
    open_tab(page, "Look inside")
    first = {where: picture_loaded(page, where) for where in FIGURES}
    assert len(set(first.values())) == len(first), "two of the figures are the same picture"
    mean = bars(page, "#difference-numbers")
    assert list(mean) == [LEFT, RIGHT] and all(0 < float(value) < 3 for value in mean.values())
    page.get_by_text("All blocks at once").click()
    strips = [picture_loaded(page, f"#strip-{n}") for n in (1, 2)]
    slider = page.locator("#block input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowRight")
    for n in (1, 2):
        picture_loaded(page, f"#experts-{n}", but=first[f"#experts-{n}"])
    assert slider.input_value() == "1" and slider.get_attribute("max") == "1"  # LLaVA reads 2 of the 3 blocks
    assert page.locator("#strip-1 img").get_attribute("src") == strips[0]
    open_tab(page, "Compare")
    choose_by_keyboard(page, "#pair-picker", "3 · count")
    page.wait_for_function("document.querySelector('#question textarea').value.startsWith('How many')")
    open_tab(page, "Look inside")
    for where in FIGURES:
        picture_loaded(page, where, but=first[where])
    changed = "before => document.querySelector('#difference-numbers .bar-value').innerText !== before"
    page.wait_for_function(changed, arg=mean[LEFT])


def test_one_picture_twice_differs_nowhere(visit, site):
    page = visit(site)
    choose_by_keyboard(page, "#pair-picker", "2 · state")
    page.wait_for_function("document.querySelector('#question textarea').value === 'Is it on?'")
    open_tab(page, "Look inside")
    page.locator("#difference-numbers .bar-row").nth(1).wait_for()
    assert bars(page, "#difference-numbers") == {LEFT: "0.00", RIGHT: "0.00"}
    picture_loaded(page, "#difference-2")


# ---------------------------------------------------------------------------------------------------------------- pairs


def test_the_gallery_is_filtered_and_sorted(visit, site):
    page = visit(site)
    open_tab(page, "Pairs")
    gaps = [number(text.rpartition("gap ")[2]) for text in gallery_captions(page, 6, 6)]
    assert gaps == sorted((pair.gap for pair in site.pairs), reverse=True)
    choose_by_keyboard(page, "#attribute", "count")
    assert all(text.startswith("count: ") for text in gallery_captions(page, 6, 2))
    choose_by_keyboard(page, "#attribute", "any")
    gallery_captions(page, 6, 6)
    choose_by_keyboard(page, "#order", "closest for CLIP first")
    page.locator("#gallery .caption-label").first.get_by_text("CLIP 0.990").wait_for()
    dense = [number(text.rpartition("CLIP ")[2]) for text in gallery_captions(page, 6, 6)]
    assert dense == sorted(dense, reverse=True)
    least = page.locator("#least-gap input[type=number]")
    least.fill("0.25")
    least.press("Enter")
    assert all(number(text.rpartition("gap ")[2]) >= 0.25 for text in gallery_captions(page, 6, 3))


def test_a_pair_of_the_gallery_is_compared(visit, site, llavas):
    page = visit(site)
    open_tab(page, "Pairs")
    gallery_captions(page, 6, 6)
    assert page.locator("#compare-pair").is_hidden()
    page.locator("#gallery button.thumbnail-item").nth(2).click()
    page.locator("#compare-pair").wait_for()
    assert bars(page, "#pair-details") == {"CLIP": "0.960", "CLIP-MoE": "0.710", "expert 0": "0.710",
                                           "expert 1": "0.720", "expert 2": "0.730", "expert 3": "0.740"}  # fmt: skip
    assert "How many circles are there? one / three" in page.locator("#pair-details").inner_text()
    page.locator("#compare-pair").click()
    page.locator("#ask").wait_for()
    page.wait_for_function("document.querySelector('#question textarea').value.startsWith('How many')")
    assert page.locator("#pair-picker input").input_value().startswith("3 · count")
    page.wait_for_function("document.querySelector('#matches .statements .text')?.innerText === 'one'")
    ask(page)
    assert board(page) == answers(llavas, pictures_of(site, 2), "How many circles are there?")


# --------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_all_pairs(visit, site, llavas):
    file = site.output / "scores.json"
    file.unlink(missing_ok=True)
    page = visit(site)
    open_tab(page, "Scores")
    page.evaluate("""() => { window.seen = []; new MutationObserver(() => {
        const bar = document.querySelector('#score-progress progress'); if (bar) window.seen.push([bar.value, bar.max]);
    }).observe(document.body, {subtree: true, childList: true}); }""")
    page.locator("#score").click()
    page.locator("#score-progress").get_by_text("24 answers in").wait_for()
    seen = page.evaluate("window.seen")
    assert all(most == 24 for _, most in seen) and seen == sorted(seen) and seen[0][0] < 24
    table = [row.locator("th, td").all_inner_texts() for row in page.locator("table.scores tr").all()]
    assert table[0] == ["what differs", LEFT, RIGHT, "questions"]
    counts = {row[0]: row[3] for row in table[1:]}
    assert counts == {"all": "6", "color": "1", "state": "1", "count": "2", "group": "1", "text": "1"}
    by_name = {row[0]: row for row in table}
    assert by_name["color"][1].startswith("0% (0–") and by_name["color"][2].startswith("100% (")
    wait_for(file.exists)
    saved = json.loads(file.read_text())
    assert saved["pairs_and_questions"] == 6 and saved["pair_accuracy"][LEFT] == 0
    assert by_name["all"][2].startswith(f"{saved['pair_accuracy'][RIGHT]:.0%} (")
    found = [row for row in saved["rows"] if row["pair"] == 0]
    assert found[0][RIGHT] != found[0][LEFT] and len(set(found[0][LEFT])) == 1 and len(set(found[0][RIGHT])) == 2
    assert f"{LEFT}: 6 of 6 · {RIGHT}: " in panel(page).inner_text()  # the blind LLaVA's answers are the same each time


def test_a_cancelled_score_leaves_the_page_usable(visit, slow_site):
    page = visit(slow_site)
    open_tab(page, "Scores")
    page.locator("#score").click()
    page.wait_for_function("document.querySelector('#score-progress progress')?.value > 0")
    page.locator("#cancel-score").click()
    note = page.locator("#score-progress").get_by_text("Cancelled after")
    note.wait_for()
    done, total = map(int, re.findall(r"\d+", note.inner_text()))
    assert 0 < done < total == 4 * 401
    assert not (slow_site.output / "scores.json").exists()
    page.locator("#score").click()
    page.wait_for_function("document.querySelector('#score-progress progress')?.value > 0")
    page.locator("#cancel-score").click()
    note.wait_for()
