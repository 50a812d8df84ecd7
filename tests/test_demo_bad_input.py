"""The demo in a real browser with bad files, bad questions, two visitors at once and a model that vanishes: each time a
message, and the page goes on answering. And what it keeps to itself: files, other addresses, other sites."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from tiny.browser import (
    MAX_BYTES,
    REPOSITORY,
    SCRIPT,
    TRACE,
    answers,
    ask,
    board,
    choose_by_keyboard,
    draw,
    open_tab,
    picture_loaded,
    pictures_of,
    still_answers,
    told,
    upload,
)

pytest_plugins = ["tiny.browser_fixtures"]
pytestmark = [pytest.mark.xdist_group("browser")] if importlib.util.find_spec("xdist") else []


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bad-files")
    (folder / "text.png").write_text("This is no picture.\n" * 10)
    (folder / "empty.png").write_bytes(b"")
    Image.new("1", (30_000, 30_000)).save(folder / "bomb.png", optimize=True)
    draw("circle", "red").save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:150])
    assert (folder / "bomb.png").stat().st_size < MAX_BYTES, "it is to be refused for its pixels"
    Image.effect_noise((900, 900), 90).save(folder / "large.png")
    assert (folder / "large.png").stat().st_size > MAX_BYTES
    frames = [draw("square", "orange", 2), draw("circle", "blue", 3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    return folder


def test_bad_files_are_refused_with_a_message(visit, site, llavas, bad_files):
    page = visit(site)
    picture_loaded(page, "#picture-1")
    refused = {
        "text.png": "This file holds text, not a picture",
        "bomb.png": "far too large to be read safely. At most 50 million pixels",
        "cut.png": "This picture is damaged or was cut short",
        "large.png": "maximum",
    }
    for name, words in refused.items():
        upload(page, 1, bad_files / name)
        told(page, words)
        if name != "large.png":  # which the browser's side does not even send: what was there stays
            page.wait_for_function("!document.querySelector('#picture-1 img')")
    draw("circle", "green").save(bad_files / "good.png")
    upload(page, 1, bad_files / "good.png")  # the place takes another file
    picture_loaded(page, "#picture-1")
    still_answers(page, llavas, site)


def test_an_animation_gives_its_first_frame(visit, site, llavas, bad_files):
    page = visit(site)
    before = [picture_loaded(page, f"#picture-{n}") for n in (1, 2)]
    draw("square", "green").save(bad_files / "second.png")
    upload(page, 1, bad_files / "animated.gif")
    told(page, "only its first frame is used")
    picture_loaded(page, "#picture-1", but=before[0])
    upload(page, 2, bad_files / "second.png")
    picture_loaded(page, "#picture-2", but=before[1])
    ask(page, "What is it?")
    first = Image.open(bad_files / "animated.gif").convert("RGB")
    assert board(page) == answers(llavas, [first, draw("square", "green")], "What is it?")


# ------------------------------------------------------------------------------------------------------------ questions


def test_bad_questions_are_refused_with_a_message(visit, site, llavas):
    page = visit(site)
    refused = {
        " \n\t ": "The question is empty",
        "<image>" * 1500: "The question has 7,500 characters; at most 2,000",
        "why " * 2500: "The question has 9,999 characters; at most 2,000",
        "x" * 100_000: "The question has 100,000 characters",
    }
    for question, words in refused.items():
        ask(page, question)
        told(page, words)
        assert not page.locator("#board .cell").count()
    still_answers(page, llavas, site)


def test_markup_is_shown_as_text_and_never_run(visit, site, llavas):
    page = visit(site)
    choose_by_keyboard(page, "#pair-picker", "4 · text")
    question = f"What is {SCRIPT}?"
    page.wait_for_function("q => document.querySelector('#question textarea').value === q", arg=question)
    ask(page)
    assert board(page) == answers(llavas, pictures_of(site, 3), question)
    assert page.locator("#board .which small").all_inner_texts() == ["<b>bold</b>", "plain"]
    assert question in page.locator("#known-questions").inner_text()
    open_tab(page, "Pairs")
    page.locator("#gallery button.thumbnail-item").nth(3).click()
    page.locator("#pair-details .bar-row").first.wait_for()
    assert f"{SCRIPT} and square.png" in page.locator("#pair-details").inner_text()
    open_tab(page, "Blind vote")
    for _ in range(40):  # until chance draws that pair
        page.locator("#new-round").click()
        page.locator("#vote-a:enabled").wait_for()
        asked = page.locator("#vote-question").inner_text().strip()
        page.locator("#vote-tie").click()  # which closes the buttons, so that the next round's opening is seen
        page.locator("#vote-a:disabled").wait_for()
        if "window.hacked" in asked:
            break
    assert asked == question
    page.locator("#vote-names").get_by_text("You said").wait_for()
    open_tab(page, "Scores")
    page.locator("#score").click()
    page.locator("#score-progress").get_by_text("answers in").wait_for()
    assert page.evaluate("window.hacked") is None
    assert not page.locator("img[src=x], .board b, .board script").count()


# --------------------------------------------------------------------------------------------- two at once, models gone


def test_two_visitors_at_once_get_their_own_answers(visit, site, llavas):
    pages = [visit(site), visit(site)]
    questions = ["Is it red?", "Is it a circle?"]
    for page, question in zip(pages, questions, strict=True):
        ask(page, question)
    for page, question in zip(pages, questions, strict=True):
        assert board(page) == answers(llavas, pictures_of(site, 0), question)


def test_who_waits_sees_the_queue(visit, slow_site):
    first, second = visit(slow_site), visit(slow_site)
    ask(first)
    first.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    ask(second)
    second.wait_for_function("document.querySelector('#board')?.innerText.includes('in the queue: 1 before this one')")
    assert second.locator("#board .cell.waiting").count() == 4
    first.locator("#stop").click()  # the stop of one visitor is not the other's
    second.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    assert not second.locator("#board .cell.stopped").count()
    second.close()  # and who leaves makes room
    ask(first)
    first.wait_for_function("document.querySelectorAll('#board .cell.answering').length === 2")
    first.locator("#stop").click()
    board(first, state="stopped")


def test_a_vanished_model_is_told_and_the_page_goes_on(visit, site, llavas, tmp_path):
    page = visit(site)
    away = site.right.with_name("away")
    site.right.rename(away)
    try:
        ask(page)
        assert "CLIP-MoE" in told(page, "is no longer there. Answers still come from memory")
        assert board(page) == answers(llavas, pictures_of(site, 0), "What colour is the square?")
        open_tab(page, "Look inside")
        picture_loaded(page, "#difference-2")
        open_tab(page, "Blind vote")
        page.locator("#new-round").click()
        page.locator("#vote-a:enabled").wait_for()
        assert not TRACE.search(page.locator("body").inner_text())
    finally:
        away.rename(site.right)
    fresh = visit(site)
    still_answers(fresh, llavas, site)
    assert not fresh.get_by_test_id("toast-text").count()


def test_a_vanished_picture_is_told(visit, site, llavas):
    page = visit(site)
    picture = site.pairs[4].images[1]
    away = picture.with_name("away.png")
    picture.rename(away)
    try:
        choose_by_keyboard(page, "#pair-picker", "5 · count")
        told(page, "not there any more")
    finally:
        away.rename(picture)
    still_answers(page, llavas, site)


# ---------------------------------------------------------------------------------------------- what it keeps to itself


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc/net/tcp here")
def test_it_listens_on_this_machine_only(site):
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:] if Path(table).exists() else []:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == site.port:
                listening.append(local.rpartition(":")[0])
    assert listening == ["0100007F"], "127.0.0.1 in the kernel's byte order"


def test_no_file_outside_its_own_folder_is_served(visit, site):
    page = visit(site)
    shown = picture_loaded(page, "#picture-1")
    assert site.status_of(shown.removeprefix(site.url))[0] == 200, "or nothing below proves anything"
    (site.output / "votes.jsonl").touch()
    files = ["/etc/passwd", REPOSITORY / "pyproject.toml", site.folder / "pairs.jsonl", site.output / "votes.jsonl",
             site.right / "config.json", site.log, "pyproject.toml", "demo/app.py"]  # fmt: skip
    served = Path(shown.partition("file=")[2]).parent
    files += [served / ".." / ".." / ".." / "votes.jsonl", f"{served}/%2e%2e/%2e%2e/%2e%2e/votes.jsonl"]
    for file in files:
        for prefix in ("/gradio_api/file=", "/file="):
            status, _, body = site.status_of(f"{prefix}{file}")
            assert status in (403, 404) and b"root:" not in body, f"{prefix}{file}: {status}"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1.evil.example"])
def test_another_site_may_neither_read_nor_ask_nor_upload(site, origin):
    ask_for = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    body = json.dumps({"data": [], "fn_index": 0, "session_hash": "evil"}).encode()
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    upload = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nfilled\r\n--x--\r\n'
    requests = {
        "reading": site.status_of("/config", Origin=origin),
        "preflight": site.status_of("/gradio_api/queue/join", method="OPTIONS", Origin=origin, **ask_for),
        "sending": site.status_of("/gradio_api/queue/join", body, Origin=origin, **{"Content-Type": "text/plain"}),
        "uploading": site.status_of("/gradio_api/upload", upload, Origin=origin, **form),
    }
    refused = {what: found[0] for what, found in requests.items() if what != "preflight"}
    assert refused == {"reading": 403, "sending": 403, "uploading": 403}  # a preflight only asks; it gets no permission
    assert not any(found[1].get("access-control-allow-origin") for found in requests.values())
    assert site.status_of("/gradio_api/upload", upload, Origin=site.url, **form)[0] == 200, "its own page may"


def test_a_name_of_somebody_elses_that_points_here_is_not_its_address(site):
    assert site.status_of("/config", Host=f"evil.example:{site.port}")[0] == 400
    assert site.status_of("/config", Host=f"localhost:{site.port}")[0] == 200


def test_it_is_never_shared_to_the_internet(site):
    log = site.log.read_text()  # the server was started with GRADIO_SHARE=True
    assert "The page is at http://127.0.0.1" in log
    assert "public URL" not in log and "gradio.live" not in log and not TRACE.search(log)
