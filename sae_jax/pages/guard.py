"""Who may ask the local server of `explore`, and what it answers with.

It listens on this machine alone, but so does every page that a browser has open, and every user of the machine. So:

    the token in the address   only who was given it; compared in constant time
    Host                       this machine by name: another name that leads here (DNS rebinding) is refused
    Sec-Fetch-Site, Origin     what another site's page asks for is refused; a link may be followed from anywhere
    POST                       JSON of at most MAX_BYTES, so that no form of another site can send it
    every answer               runs no script but the server's own, and is neither kept nor shown inside other sites
"""

from __future__ import annotations

import hmac
import json
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_jax.types import UserError

MAX_BYTES = 1 << 16
HERE = ("127.0.0.1", "localhost", "::1")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

T = TypeVar("T")


class RefusedError(UserError):
    """A request that is answered with `status` and one line."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """An application behind the checks above, at /TOKEN/."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            return  # there are no other connections

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            inside = self._checked(scope)
        except RefusedError as refusal:
            await error(refusal.status, str(refusal))(scope, receive, send_with_headers)
        else:
            await self._app(inside, receive, send_with_headers)

    def _checked(self, scope: Scope) -> Scope:
        """The same request to the application, whose paths begin after the token."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _name(f"//{host}") not in HERE:
            raise RefusedError(421, f"{host!r} is not this server; use the address that sae-jax explore printed")
        token, slash, path = scope["path"].removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(errors="replace"), self._token):
            raise RefusedError(
                403, "the token in the address is missing or wrong; use the one that sae-jax explore printed"
            )
        site, is_link = headers.get("sec-fetch-site", "none"), _is_link(scope, headers)
        origin = headers.get("origin")
        if (site not in ("same-origin", "none") and not is_link) or origin not in (None, f"http://{host}"):
            raise RefusedError(403, "another site asks; open the address itself")
        if scope["method"] == "POST":
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise RefusedError(415, "what is sent must be application/json")
            if headers.get("content-length", "0").isdecimal() and int(headers.get("content-length", "0")) > MAX_BYTES:
                raise RefusedError(413, TOO_LONG)
        return {**scope, "path": f"/{path}", "raw_path": None, "root_path": ""}


TOO_LONG = f"what is sent is longer than {MAX_BYTES:,} bytes; give a shorter text"


async def body_as(kind: type[T], request: Request) -> T:
    """The JSON that a request sends. RefusedError for anything else, or for too much of it, however it is sent."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise RefusedError(413, TOO_LONG)
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as invalid:  # and ValidationError, which is one
        raise RefusedError(400, f"what is sent cannot be read: {invalid}") from None


def answer(content: Any) -> Response:
    """JSON, in ASCII: tokens hold bytes that are no UTF-8 on their own."""
    return Response(json.dumps(content, allow_nan=False), media_type="application/json")


def error(status: int, line: str) -> Response:
    """One line that says what is wrong."""
    return Response(json.dumps({"error": line}), status, media_type="application/json")


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether a person follows a link to here in a tab of its own."""
    wanted = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    return scope["method"] == "GET" and all(headers.get(name) == value for name, value in wanted.items())


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
