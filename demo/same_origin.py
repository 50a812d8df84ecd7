"""The outer check of every request: what passes is what the page itself asks, from its own address.

Its own address: other sites can read nothing, as Gradio sends them no CORS header. But a browser would still send their
uploads here (a form needs no permission), and a host name of theirs may point to 127.0.0.1. Both are refused.

What the page asks: Gradio answers at some fifty addresses that the page does not use, takes and serves files of any
kind, fetches what a value names as a URL, and opens what a value names as a path. None of that reaches it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from demo.uploads import Uploads, inside

THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
API = "/gradio_api"
READ = re.compile(
    rf"/|/config|/theme\.css|/favicon\.ico|/(assets|static)/.+|{API}/(info|app_id|startup-events|queue/data|heartbeat/[^/]+)"
)
"""What the page reads from Gradio: itself, Gradio's scripts and styles, and the results of its events."""
WRITTEN = (f"{API}/cancel", f"{API}/reset")
JOIN, UPLOAD, PROGRESS, FILE = f"{API}/queue/join", f"{API}/upload", f"{API}/upload_progress", f"{API}/file="
"""An event, an upload, an upload's progress, a file: answered here, or checked before Gradio gets it."""
MOST_ASKED = 2**20
"""Bytes of an event. Far more than the longest question, so that the page can say which limit that exceeds."""
ASKED = ("data", "fn_index", "session_hash", "event_data", "trigger_id")
PICTURES = {".png": "image/png", ".webp": "image/webp"}


class Guard:
    """ASGI middleware: the page's own requests pass, uploads and pictures are handled here, anything else gets 404, and
    another site 403. Every answer tells the browser to trust its content type and never to guess a web page."""

    def __init__(self, app: ASGIApp, uploads: Uploads):
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def declared(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        if scope["type"] != "http":  # the server's start and end: no address of Gradio's takes a websocket
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        origin, path, method = headers.get("origin"), scope["path"], scope["method"]
        reads, writes = method in ("GET", "HEAD"), method == "POST"
        answer: ASGIApp = PlainTextResponse("This page has nothing here.", status_code=404)
        if origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
            answer = PlainTextResponse("This page takes nothing from other pages.", status_code=403)
        elif (reads and READ.fullmatch(path)) or (writes and path in WRITTEN):
            answer = self.app
        elif writes and path == JOIN:
            event = _event(await _body(receive, MOST_ASKED), self.uploads.served)
            if event is None:
                answer = PlainTextResponse("This is nothing that the page asks.", status_code=400)
            else:
                answer, receive = self.app, _again(event, receive)
        elif writes and path == UPLOAD:
            answer = await self._upload(scope, receive)
        elif reads and path == PROGRESS:  # Gradio did not see the upload, but the page waits for its end
            answer = PlainTextResponse('data: {"msg": "done"}\n\n', media_type="text/event-stream")
        elif reads and path.startswith(FILE):
            file = inside(self.uploads.served, path.removeprefix(FILE))
            if file is not None and file.suffix in PICTURES and file.is_file():
                locked = {"Content-Security-Policy": "default-src 'none'; sandbox"}
                answer = FileResponse(file, media_type=PICTURES[file.suffix], headers=locked)
        await answer(scope, receive, declared)

    async def _upload(self, scope: Scope, receive: Receive) -> Response:
        """Answer an upload as Gradio would, with a list of paths: here of one picture."""
        most = self.uploads.limits.max_bytes
        body = await _body(receive, most + 2**16)  # 2**16: what a form adds around the file
        if body is None:
            return PlainTextResponse(f"Too large: at most one file of {most:,} bytes is taken.", status_code=413)
        try:
            async with Request(scope, _again(body, receive)).form(max_files=1, max_fields=1) as form:
                files = [await part.read() for part in form.getlist("files") if isinstance(part, UploadFile)]
        except (MultiPartException, HTTPException):
            files = []
        if not files:
            return PlainTextResponse("One file at a time is taken here.", status_code=400)
        return JSONResponse([await run_in_threadpool(self.uploads.take, files[0])])


def _event(body: bytes | None, served: Path) -> bytes | None:
    """The request for an event, reduced to what may be asked; None for what may not.

    Its values are text, numbers, or pictures in `served`, of which nothing but the path is passed on.
    """
    try:
        sent = json.loads(body)
        asked = {key: sent[key] for key in ASKED if key in sent}
        asked["data"] = [_value(value, served) for value in sent["data"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return json.dumps(asked).encode()


def _value(value: Any, served: Path) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    path = inside(served, value["path"])
    if path is None:
        raise ValueError("a file that is not the page's")
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


async def _body(receive: Receive, most: int) -> bytes | None:
    """A request's body; None when it is longer than `most` bytes, or the client leaves before its end."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most or message["type"] == "http.disconnect":
            return None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` for the next reader of the request: gives `body`, then what is still to come."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return left.pop() if left else await receive()

    return again


def middleware(host: str, uploads: Uploads) -> list[Middleware]:
    """For a server that listens on `host`. On all of a machine's addresses its names cannot be known: any is taken."""
    names = ["*"] if host in EVERYWHERE else [*THIS_MACHINE, host]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(Guard, uploads=uploads)]
