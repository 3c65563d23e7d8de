"""Around every request: foreign pages are refused, answers carry security headers, and refusals reach their client."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finetune101.serve.answers import Problem

SECURITY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


class Answer(Response):
    """JSON of a struct of ``serve.answers``. A refusal reads on for a moment, or the client would not see it."""

    def __init__(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(content), status, headers, "application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; what is left of the request is thrown away."""
        state = scope.get("state", {})
        if state.get("complete", True):
            await super().__call__(scope, receive, send)
            return
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(state["linger"]):
                while not state["complete"]:
                    if (await receive())["type"] == "http.disconnect":  # from then on it returns at once, for ever
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Guard:
    """Refuses what foreign pages send here, and puts the security headers on every answer.

    A page of another site cannot read answers of this server, but it could send pictures to it (Origin), and by a name
    of its own that leads to this address (DNS rebinding) it could read them (Host).
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], any_address: bool, linger: float) -> None:
        self.app, self.hosts, self.any_address, self.linger = app, hosts, any_address, linger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state |= {"complete": False, "started": False, "linger": self.linger}

        async def reading() -> Message:
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body", False):
                state["complete"] = True
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["started"] = True
                extra = [(name.encode(), value.encode()) for name, value in SECURITY.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        headers = Headers(scope=scope)
        if "content-length" not in headers and "transfer-encoding" not in headers:
            state["complete"] = True
        app: ASGIApp = self.app
        if not self._is_here(headers.get("host", "")):
            app = Answer(Problem("this Host is not the server's; open the address that serve printed"), 421)
        elif self._is_foreign(headers):
            app = Answer(Problem("requests of pages of other sites are refused"), 403)
        try:
            await app(scope, reading, guarded)
        except asyncio.CancelledError:  # the server ends, and this request has had its last seconds
            if not state["started"]:
                state["complete"] = True
                await Answer(Problem("the server is about to end"), 503, {"connection": "close"})(
                    scope, receive, guarded
                )

    def _is_here(self, host: str) -> bool:
        name = host_name(host)
        return name in self.hosts or (self.any_address and is_address(name))

    def _is_foreign(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:
            return headers.get("sec-fetch-site", "none") == "cross-site" and headers.get("sec-fetch-mode") != "navigate"
        try:
            return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        except ValueError:  # no browser sends such an Origin
            return True


def host_name(host: str) -> str:
    """The name in a Host header, without its port; "" where it has none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether ``name`` is an IP address, which no foreign site can make lead elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
