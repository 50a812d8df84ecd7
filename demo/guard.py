"""Who may speak with the page: the person at its own address, not any web page that happens to be open beside it.

Gradio sends no CORS header to strangers, so they can read nothing; but a browser would still carry their uploads here
(a form needs no permission), and a name of theirs that points to 127.0.0.1 would count as the page's own address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse

THIS_MACHINE = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")


class SameOriginOnly:
    """ASGI middleware: 403 for a request whose Origin is another address than the one it was sent to."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope.get("headers") or ()}
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host", ""):
            refused = PlainTextResponse("This page takes nothing from other pages.", status_code=403)
            await refused(scope, receive, send)
            return
        await self.app(scope, receive, send)


def middleware(host: str) -> Sequence[Middleware]:
    """For a server that listens on `host`. Where the user opened it to a network, its names cannot be known."""
    names = ["*"] if host in EVERYWHERE else [*THIS_MACHINE, host]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=names), Middleware(SameOriginOnly)]
