"""The demo's page as a stranger's program sees it: every address and every event, with whatever can be sent there.
Nothing but the page's own pictures is opened or served, and an upload is a picture or nothing."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny.browser import draw, make_pairs

pytest_plugins = ["tiny.browser_fixtures"]
META = {"meta": {"_type": "gradio.FileData"}}
CANARY = (12, 201, 77)
"""A colour that no picture of the page has."""
ELSEWHERE = "canary.invalid"
"""A host whose address nobody may ask for."""
JSON = {"Content-Type": "application/json"}
NOTHING = "This page has nothing here."
MAX_BYTES = 200_000


# ------------------------------------------------------------------------------------------------------------- the page


class Page(NamedTuple):
    blocks: Any
    demo: Any
    client: Any
    served: Path
    canary: Path
    """A picture that the server can read and nobody may get."""
    bytes_of_canary: bytes


@pytest.fixture(scope="module")
def page(llava_folders, llavas, tmp_path_factory) -> Iterator[Page]:
    """The demo in this process: its addresses and events can be listed, and what it opens be heard."""
    import httpx
    from rich.console import Console

    from demo.app import Settings, environment, launch, prepare
    from demo.llava.settings import Generation, Models
    from demo.uploads import Limits

    folder = tmp_path_factory.mktemp("guarded")
    pairs = make_pairs(folder / "pairs", llavas)
    settings = Settings(Models(*llava_folders, device="cpu"), Generation(max_new_tokens=4), pairs,
                        folder / "demo", open_browser=False, upload_limits=Limits(MAX_BYTES))  # fmt: skip
    data = png(Image.new("RGB", (60, 60), CANARY))
    (folder / "canary.png").write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(settings).items():
            patch.setenv(name, value)
        demo = prepare(settings, Console(quiet=True))
        blocks = launch(demo, settings)
        with httpx.Client(base_url=blocks.local_url.rstrip("/"), timeout=60, trust_env=False) as client:
            yield Page(blocks, demo, client, demo.uploads.served, folder / "canary.png", data)
        blocks.close()


heard: list[str] = []
"""What this process has opened of canaries, and asked about ELSEWHERE, since the list was cleared."""


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.link", "shutil.copyfile", "socket.getaddrinfo", "socket.connect"):
        told = " ".join(map(str, arguments))
        if "canary" in told:
            heard.append(f"{event}: {told}")


@pytest.fixture(scope="module")
def listening() -> None:
    sys.addaudithook(_listen)  # which cannot be taken away again: one for all tests


@pytest.fixture
def nothing_heard(listening) -> Iterator[None]:
    """No canary is opened, and nobody is asked for ELSEWHERE, while the test runs."""
    heard.clear()
    yield
    assert not heard


def png(image: Image.Image, **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **more)
    return buffer.getvalue()


def upload(page: Page, data: bytes, name: str = "a.png", kind: str = "image/png") -> str:
    found = page.client.post("/gradio_api/upload", files={"files": (name, data, kind)})
    assert found.status_code == 200, found.text
    (path,) = found.json()
    return path


def run(page: Page, number: int, data: Any, session: str, **more: Any) -> tuple[int, list[dict[str, Any]]]:
    """-> (status, messages) of an event, asked for as the page's own script does."""
    body = {"data": data, "fn_index": number, "session_hash": session, **more}
    joined = page.client.post("/gradio_api/queue/join", content=json.dumps(body), headers=JSON)
    if joined.status_code != 200:
        return joined.status_code, []
    messages = []
    with page.client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        for line in filter(None, stream.iter_lines()):
            messages.append(json.loads(line.removeprefix("data:")))
            if messages[-1]["msg"] in ("process_completed", "unexpected_error"):
                break
    return 200, messages


def done(page: Page, number: int, data: Any, session: str, **more: Any) -> list[Any]:
    """The values that an event gives back at its end."""
    status, messages = run(page, number, data, session, **more)
    assert status == 200 and messages[-1]["success"], messages
    return messages[-1]["output"]["data"]


def events(page: Page) -> dict[int, tuple[str, list[str]]]:
    """{number: (what starts it, the types of its inputs)}."""
    names = {number: block.elem_id or type(block).__name__ for number, block in page.blocks.blocks.items()}
    return {
        number: (" ".join(f"{names.get(target)}.{trigger}" for target, trigger in event.targets),
                 [type(block).__name__ for block in event.inputs])
        for number, event in page.blocks.fns.items()
    }  # fmt: skip


def numbered(page: Page, started: str) -> int:
    (number,) = [number for number, (by, _) in events(page).items() if by == started]
    return number


def with_both_uploaded(page: Page, session: str) -> list[dict[str, Any]]:
    """Upload two pictures as a visitor of this session, so that no mined pair is chosen; -> their values."""
    values = [{"path": upload(page, png(draw("circle", colour))), **META} for colour in ("red", "blue")]
    for n, value in enumerate(values, start=1):
        done(page, numbered(page, f"picture-{n}.upload"), [value, None], session)
    return values


def files_named(value: Any) -> list[str]:
    """Addresses of all files in what an event gave back."""
    return re.findall(r"/gradio_api/file=[^\"\\ ]+", json.dumps(value))


# -------------------------------------------------------------------------------------------------------- the addresses

OPEN = {
    "GET /", "HEAD /", "GET /config", "GET /theme.css", "GET /favicon.ico", "GET /assets/{path:path}",
    "GET /static/{path:path}", "GET /gradio_api/info", "GET /gradio_api/app_id", "GET /gradio_api/startup-events",
    "GET /gradio_api/heartbeat/{session_hash}", "GET /gradio_api/queue/data", "POST /gradio_api/queue/join",
    "POST /gradio_api/cancel", "POST /gradio_api/reset", "POST /gradio_api/upload", "GET /gradio_api/upload_progress",
    "GET /gradio_api/file={path_or_url:path}", "HEAD /gradio_api/file={path_or_url:path}",
}  # fmt: skip
"""Every address of Gradio's that is answered."""


def addresses(routes: list[Any]) -> Iterator[tuple[str, str]]:
    """(method, path) of all that the server knows, those of routers in it too."""
    for route in routes:
        if (within := getattr(route, "original_router", None)) is not None:
            yield from addresses(within.routes)
        else:
            assert "WebSocket" not in type(route).__name__, "the guard lets these pass"
            yield from ((method, route.path) for method in getattr(route, "methods", ["GET"]))


def test_every_address_that_the_page_does_not_use_is_closed(page):
    known = sorted(addresses(page.blocks.app.routes))
    assert len(known) > 50, "these are not all of Gradio's"
    own, passed = upload(page, png(draw("circle", "red"))), set()
    for method, path in known:
        filled = re.sub(r"\{.*?\}", own if "file=" in path else "0", path)
        with page.client.stream(method, filled, json={} if method == "POST" else None) as answer:
            assert answer.headers["x-content-type-options"] == "nosniff", filled
            if answer.status_code != 404 or answer.read().decode() not in (NOTHING, ""):
                passed.add(f"{method} {path}")
    assert passed == OPEN, "decide whether the page needs it, and look at what it can be made to do"


def test_what_would_keep_or_send_pictures_elsewhere_is_off(page):
    blocks = page.blocks
    assert not any((getattr(blocks, "run_history", False), blocks.enable_monitoring, blocks.mcp_server, blocks.share,
                    blocks.analytics_enabled, getattr(blocks, "vibe_mode", False)))  # fmt: skip


@pytest.mark.parametrize("path", ["run/predict", "api/predict", "call/uploaded", "call/v2/uploaded", "run/uploaded"])
def test_events_are_asked_in_one_way_only(page, path, nothing_heard):
    for number in events(page):
        body = {"data": [{"path": str(page.canary)}, None], "fn_index": number, "session_hash": "a"}
        assert [page.client.post(f"{prefix}/{path}", json=body).status_code for prefix in ("", "/gradio_api")] == [
            404
        ] * 2


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"])
def test_other_methods_are_refused(page, method):
    for path in ("/", "/gradio_api/upload", "/gradio_api/queue/join", f"/gradio_api/file={page.canary}"):
        assert page.client.request(method, path).status_code == 404


def test_a_path_written_in_another_way_leads_nowhere_else(page, nothing_heard):
    for path in ("//gradio_api/upload", "/gradio_api//upload", "/gradio_api/upload/", "/gradio_api/%2e/upload",
                 "/GRADIO_API/upload", "/gradio_api/upload;a", "/gradio_api/x/../upload"):  # fmt: skip
        found = page.client.post(path, files={"files": ("x.html", b"<script>1</script>", "text/html")})
        assert found.status_code == 404 or page.client.get(f"/gradio_api/file={found.json()[0]}").status_code == 404
    canary = str(page.canary)
    for path in (f"/gradio_api/file/{canary}", f"/file={canary}", f"/gradio_api/proxy=file://{canary}",
                 f"/gradio_api/proxy=http://{ELSEWHERE}/", f"/gradio_api/file=http://{ELSEWHERE}/a.png",
                 f"/static/../../../../../../../..{canary}", f"/static/{'%2e%2e/' * 20}{canary}", f"/assets/{canary}",
                 f"/static/%2F{canary}", f"/svelte/{canary}", f"/gradio_api/custom_component/a/client/a/{canary}",
                 f"/?deep_link=../../{canary}", f"/config?deep_link=../../{canary}"):  # fmt: skip
        assert page.bytes_of_canary not in page.client.get(path).content


# ----------------------------------------------------------------------------------------------------- files are served


def test_only_the_pages_own_pictures_are_served(page, nothing_heard):
    own = Path(upload(page, png(draw("circle", "red"))))
    folder = own.parent
    assert page.client.get(f"/gradio_api/file={own}").status_code == 200, "or nothing below proves anything"
    link, linked = folder / "link.png", folder / "linked"
    link.symlink_to(page.canary)
    linked.symlink_to(page.canary.parent)
    (page.served / "page.html").write_text("<script>1</script>")
    (page.served / "picture.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (page.served / "nothing").write_bytes(own.read_bytes())
    names = [
        page.canary, link, linked / "canary.png", folder / ".." / ".." / ".." / "canary.png", folder, page.served, "",
        page.demo.pairs[0].images[0], page.served / "page.html", page.served / "picture.svg", page.served / "nothing",
        os.path.relpath(page.canary), f"file://{page.canary}", f"{own}%00", f"{own}%00.png", f"{page.canary}%00.png",
        f"http://{ELSEWHERE}/canary.png", f"https://{ELSEWHERE}/canary.png", f"//{ELSEWHERE}/canary.png",
        "data:image/png;base64,AAAA", "~/canary.png", "/proc/self/environ", "/etc/passwd", "/dev/zero", "a" * 5000,
        f"{own}/../../../../canary.png", f"{str(own).upper()}", "%ff%fe", f"{page.canary}?{own}", f"{own} ",
    ]  # fmt: skip
    for name in names:
        found = page.client.get(f"/gradio_api/file={name}")
        assert (found.status_code, found.text) == (404, NOTHING), name
    for made in (link, linked, page.served / "page.html", page.served / "picture.svg", page.served / "nothing"):
        made.unlink()


def test_files_are_shown_as_pictures_and_as_nothing_else(page):
    own = upload(page, png(draw("circle", "red")))
    shown = [f"/gradio_api/file={own}", *files_named(done(page, numbered(page, "pair-picker.input"), [2], "s"))]
    load = [number for number, (by, inputs) in events(page).items() if by.endswith(".load") and inputs]
    shown += files_named(done(page, load[0], ["any", "widest gap first", 0.07], "s"))
    assert len(shown) == 1 + 2 + 6
    for address in shown:
        found = page.client.get(address)
        kind = {"PNG": "image/png", "WEBP": "image/webp"}[Image.open(io.BytesIO(found.content)).format]
        assert (found.status_code, found.headers["content-type"]) == (200, kind)
        assert found.headers["x-content-type-options"] == "nosniff"
        assert found.headers["content-security-policy"] == "default-src 'none'; sandbox"


# -------------------------------------------------------------------------------------------------------------- uploads

SCRIPT = b"<html><script>document.title = 'ran'</script></html>"


def with_script(kind: str) -> bytes:
    """A whole picture that holds a script in its metadata and another after its end."""
    more: dict[str, Any] = {"comment": SCRIPT} if kind in ("GIF", "JPEG") else {}
    if kind == "PNG":
        more["pnginfo"] = PngImagePlugin.PngInfo()
        more["pnginfo"].add_text("Comment", SCRIPT.decode())
    if kind == "WEBP":
        more["xmp"] = SCRIPT
    exif = Image.Exif()
    exif[0x010E] = SCRIPT.decode()
    if kind in ("JPEG", "WEBP", "TIFF"):
        more["exif"] = exif
    buffer = io.BytesIO()
    draw("square", "orange").save(buffer, kind, **more)
    return buffer.getvalue() + SCRIPT


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_of_an_uploaded_picture_the_pixels_are_kept_and_nothing_else(page, kind):
    data = with_script(kind)
    assert data.count(SCRIPT) > (kind not in ("BMP", "TIFF"))
    found = page.client.get(f"/gradio_api/file={upload(page, data, 'x.html', 'text/html')}")
    assert (found.status_code, found.headers["content-type"]) == (200, "image/png")
    assert b"script" not in found.content and SCRIPT[:20] not in found.content
    assert not Image.open(io.BytesIO(found.content)).info
    with Image.open(io.BytesIO(data)) as picture:
        assert Image.open(io.BytesIO(found.content)).tobytes() == picture.convert("RGB").tobytes()


@pytest.mark.parametrize(
    "data",
    [SCRIPT, b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", b"", b"GIF89a", b"%PDF-1.7", b"#!/bin/sh"],
    ids=["html", "svg", "empty", "gif", "pdf", "sh"],
)
def test_what_is_no_picture_is_not_kept_and_the_page_tells_why(page, data):
    before = sorted(page.served.rglob("*"))
    for name in ("x.html", "x.svg", "x.png", "../../x.html", "/etc/x", "x.png\0.html", "a" * 300):
        path = upload(page, data, name, "text/html")
        assert page.client.get(f"/gradio_api/file={path}").status_code == 404
        assert sorted(page.served.rglob("*")) == before
        status, messages = run(page, numbered(page, "picture-1.upload"), [{"path": path, **META}, None], "s")
        told = [message for message in messages if message["msg"] == "log"]
        assert status == 200 and messages[-1]["output"]["data"][0] is None
        assert [message["title"] for message in told] == ["Picture 1 was not taken"]
        assert re.search("empty|holds text|SVG|PDF|damaged", told[0]["log"]) and str(page.served) not in told[0]["log"]


def test_a_file_that_is_too_large_is_not_even_read_to_its_end(page):
    before = sorted(page.served.rglob("*"))
    for size in (MAX_BYTES + 2**16, 30 * MAX_BYTES):
        found = page.client.post("/gradio_api/upload", files={"files": ("a.png", secrets.token_bytes(size))})
        assert found.status_code == 413 and "200,000 bytes" in found.text
    path = upload(page, secrets.token_bytes(MAX_BYTES + 1))
    assert page.client.get(f"/gradio_api/file={path}").status_code == 404
    assert sorted(page.served.rglob("*")) == before


def test_a_photo_that_is_larger_as_pixels_than_as_a_file_may_be_is_answered(page):
    noise = Image.effect_noise((500, 500), 90).convert("RGB")
    buffer, session = io.BytesIO(), uuid.uuid4().hex
    noise.save(buffer, "JPEG", quality=60)
    assert buffer.tell() < MAX_BYTES < len(png(noise))
    values = [{"path": upload(page, buffer.getvalue(), "photo.jpg"), **META} for _ in range(2)]
    for n, value in enumerate(values, start=1):
        assert done(page, numbered(page, f"picture-{n}.upload"), [value, None], session)[0]["path"] == value["path"]
    done(page, numbered(page, "ask.click"), [None, *values, "What is it?"], session)


def test_a_form_that_is_not_the_pages_is_refused(page):
    good, before = png(draw("circle", "red")), sorted(page.served.rglob("*"))
    forms: list[dict[str, Any]] = [
        {"files": [("files", ("a.png", good)), ("files", ("b.png", good))]}, {"files": {"other": ("a.png", good)}},
        {"data": {"files": "/etc/passwd"}}, {"json": [str(page.canary)]}, {"content": good}, {"content": b""},
        {"content": b"--x\r\ncut", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        {"content": b"", "headers": {"content-type": "multipart/form-data"}},
    ]  # fmt: skip
    for form in forms:
        found = page.client.post("/gradio_api/upload", **form)
        assert (found.status_code, found.text) == (400, "One file at a time is taken here."), form
    assert sorted(page.served.rglob("*")) == before


# --------------------------------------------------------------------------------------------------------------- events

WITH_PICTURES = {"picture-1.upload", "picture-2.upload", "ask.click", "question.submit", "look.click", "Tab.select",
                 "whose.input", "State.change match.click statement-1.submit statement-2.submit"}  # fmt: skip


def values(page: Page, link: Path) -> dict[str, Any]:
    """Whatever can be sent as a picture's value and is none that the page gave."""
    canary, own = str(page.canary), upload(page, png(draw("square", "blue")))
    url = f"http://{ELSEWHERE}/canary.png"
    return {
        "path": {"path": canary}, "with meta": {"path": canary, **META}, "meta is null": {"path": canary, "meta": None},
        "other meta": {"path": canary, "meta": {"_type": "gradio.Other"}}, "text": canary, "number": 7, "yes": True,
        "stream": {"path": canary, "is_stream": True, **META}, "svg": {"path": canary, "orig_name": "a.svg"},
        "url": {"url": canary, **META}, "file url": {"path": f"file://{canary}", **META}, "url alone": {"url": url},
        "http": {"path": url}, "http with meta": {"path": url, **META}, "https": {"path": f"https{url[4:]}", **META},
        "both": {"path": canary, "url": url, **META}, "own url": {"path": canary, "url": f"/gradio_api/file={own}"},
        "data url": {"url": "data:image/png;base64,iVBORw0KGgo=", **META}, "data path": {"path": "data:image/png,a"},
        "relative": {"path": os.path.relpath(canary), **META}, "up": {"path": f"{own}/../../../../canary.png", **META},
        "link": {"path": str(link), **META}, "link without meta": {"path": str(link)},
        "null byte": {"path": f"{canary}\0.png"}, "null byte behind": {"path": f"{own}\0", **META}, "list": [canary],
        "list of files": [{"path": canary, **META}], "nested": {"image": {"path": canary, **META}},
        "path in path": {"path": {"path": canary, **META}}, "paths": {"path": [canary]}, "empty": {},
        "none": {"path": ""},
        "path is a number": {"path": 3}, "folder": {"path": str(page.served), **META}, "root": {"path": "/", **META},
        "no text": {"path": "\ud800"}, "long": {"path": "a" * 100_000}, "home": {"path": "~/canary.png"},
        "update": {"__type__": "update", "value": {"path": canary, **META}}, "device": {"path": "/dev/zero", **META},
        "a pair's": {"path": str(page.demo.pairs[0].images[0]), **META}, "itself": {"path": "/proc/self/environ"},
        "votes": {"path": str(page.demo.folder / "votes.jsonl"), **META},
        "guess": {"path": str(Path(own).with_name(f"{secrets.token_hex(16)}.png")), **META},
    }  # fmt: skip


def shown_by_gradio(page: Page) -> str:
    """A picture in the served folder which is no upload."""
    (first, _) = files_named(done(page, numbered(page, "pair-picker.input"), [1], uuid.uuid4().hex))
    return first.partition("=")[2]


@pytest.fixture
def link(page) -> Iterator[Path]:
    """A link to the canary among the uploads, as nobody could make it."""
    link = page.demo.uploads.folder / f"{'0' * 32}.png"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(page.canary)
    yield link
    link.unlink()


def test_the_events_that_take_pictures_are_known(page):
    assert {by for by, inputs in events(page).values() if "Image" in inputs} == WITH_PICTURES
    known = {"Image", "State", "Dropdown", "Textbox", "Radio", "Slider"}
    assert {kind for _, inputs in events(page).values() for kind in inputs} <= known, "what can be sent as its value?"


@pytest.mark.parametrize("guard", ["", "its values are not looked into"])
@pytest.mark.parametrize("started", sorted(WITH_PICTURES))
def test_an_event_opens_nothing_but_uploads(page, link, nothing_heard, started, guard, monkeypatch):
    from demo.page.compare import NEEDED

    if guard:
        monkeypatch.setattr("demo.same_origin._value", lambda value, served: value)
    number = numbered(page, started)
    inputs = [type(block).__name__ for block in page.blocks.fns[number].inputs]
    usual = {"State": None, "Textbox": "What is it?", "Radio": page.demo.names[1], "Slider": 0}
    session = uuid.uuid4().hex
    own = [with_both_uploaded(page, session)[0], {"path": shown_by_gradio(page), **META}]  # the other of a mined pair
    images = [place for place, kind in enumerate(inputs) if kind == "Image"]
    good = [own[images.index(place)] if kind == "Image" else usual[kind] for place, kind in enumerate(inputs)]
    assert any(done(page, number, good, session)), "or nothing below proves anything"
    for what, value in values(page, link).items():
        if guard and "http" in what:  # Gradio itself would ask for the host's address
            continue
        for place in images:
            status, messages = run(page, number, [value if at == place else v for at, v in enumerate(good)], session)
            # A value without any path is no picture: the page says that one is needed.
            needed = isinstance(value, dict) and "path" not in value and NEEDED in json.dumps(messages)
            refused = status == 400 or not messages[-1]["success"] or needed
            assert refused or (started.endswith(".upload") and left_empty(messages)), (what, messages[-1:])
    assert any(done(page, number, good, session)), "it goes on for who sends what it takes"


def left_empty(messages: list[dict[str, Any]]) -> bool:
    """Nothing is in the place; if something could have been meant, the page says why."""
    told = [message["log"] for message in messages if message["msg"] == "log"]
    return messages[-1]["output"]["data"][0] is None and all("not there any more" in text for text in told)


def test_no_event_opens_a_file_that_any_of_its_values_names(page, link, nothing_heard):
    for number, (_, inputs) in events(page).items():
        for what, value in values(page, link).items():
            for place in range(len(inputs)):
                if not isinstance(value, dict | list):
                    continue
                data = [value if at == place else None for at in range(len(inputs))]
                status, messages = run(page, number, data, uuid.uuid4().hex)
                # A name in the page's own folder passes: what is opened of those, the test above asks.
                assert status == 400 or what == "guess" or not messages[-1]["success"], (number, what)


def test_what_comes_with_an_event_opens_nothing(page, link, nothing_heard):
    number = numbered(page, "gallery.select")
    picked = {"index": 1, "value": {"image": {"path": shown_by_gradio(page), "url": None, **META}, "caption": ""}}
    assert "a.png and b.png" in done(page, number, [None], "s", event_data=picked)[1]
    for more in (
        {"oauth_token": "a"},
        {"batched": True},
        {"simple_format": True},
        {"event_id": "0"},
        {"trigger_id": 1},
    ):
        assert "a.png" in done(page, number, [None], "s", event_data=picked, **more)[1]
    for value in values(page, link).values():
        found = run(page, number, [None], "s", event_data={"index": 1, "value": value})[1][-1]["output"]
        assert not files_named(found)
    for index in (str(page.canary), {"path": str(page.canary), **META}, None, 10**9, [0], -1.5):
        status, messages = run(page, number, [None], "s", event_data={**picked, "index": index})
        assert status == 200 and not messages[-1]["success"]
        assert "Traceback" not in json.dumps(messages)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"7", b'{"fn_index": 2}', b'{"data": null, "fn_index": 2}',
                                  b'{"data": [[]], "fn_index": 2}', b"[" * 100_000, b'{"data": [' + b"[" * 100_000,
                                  b'{"data": ["' + b"a" * 2**20 + b'"]}', b"\xff\xfe"],
                         ids=lambda body: body[:20].decode("latin-1"))  # fmt: skip
def test_what_is_no_event_is_refused(page, body):
    assert page.client.post("/gradio_api/queue/join", content=body, headers=JSON).status_code == 400


def test_nothing_of_the_canary_has_come_into_what_is_served(page):
    """Last: after all that was tried above."""
    pictures = [file for file in page.served.rglob("*") if file.is_file()]
    assert len(pictures) > 10
    for file in pictures:
        with Image.open(file) as picture:
            assert not (np.asarray(picture.convert("RGB")) == CANARY).all(-1).any(), file
