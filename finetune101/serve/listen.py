"""The socket of a server, and how long its clients may take."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from finetune101.errors import Refused
from finetune101.serve.uploads import Limits

CONNECTIONS = 500
LAST_SECONDS = 2  # for the requests at hand when the server ends


class Timed(H11Protocol):
    """HTTP/1.1 that closes connections whose client is too slow, wherever it stands.

    uvicorn limits the pause between two requests only; a client that sends a byte a second would stay for ever.
    """

    limits = Limits()
    _timer: asyncio.TimerHandle | None = None
    _timed: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected: it has ``head`` seconds for the head of its first request."""
        super().connection_made(transport)
        self._set(self.limits.head)

    def data_received(self, data: bytes) -> None:
        """With the head of a request begins the time for all of it."""
        super().data_received(data)
        self._begin()

    def on_response_complete(self) -> None:
        """The next request may begin."""
        super().on_response_complete()
        self._set(self.limits.head)
        self._begin()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        super().connection_lost(exc)
        self._unset()

    def _begin(self) -> None:
        if self.cycle is not None and self.cycle is not self._timed and not self.cycle.response_complete:
            self._timed = self.cycle
            limits = self.limits
            self._set(limits.upload + limits.answer + limits.linger + limits.pause)

    def _set(self, seconds: float) -> None:
        self._unset()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _unset(self) -> None:
        if self._timer:
            self._timer.cancel()


def listening(host: str, port: int) -> socket.socket:
    """A socket at ``host`` and ``port`` (0 takes a free one). Raises Refused where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise Refused(f"--host {host} is no address of this machine; give 127.0.0.1") from error
    server = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would share the port
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(256)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise Refused(f"port {port} of {host} is taken; give another one, such as --port {port + 1}") from error
        if error.errno == errno.EACCES:
            raise Refused(f"port {port} is for administrators; give one above 1023, such as --port 8000") from error
        raise Refused(f"--host {host} is no address of this machine ({error.strerror}); give 127.0.0.1") from error
    return server


def addresses_of(server: socket.socket) -> list[str]:
    """The addresses of a page: for browsers on this machine, then, where it listens at all addresses, for others."""
    host, port = server.getsockname()[:2]
    if not ipaddress.ip_address(host).is_unspecified:  # 0.0.0.0 and ::, which no browser can open
        return [_address(host, port)]
    own = own_address(server.family)
    return [f"http://localhost:{port}/", *([_address(own, port)] if own else [])]


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def own_address(family: int = socket.AF_INET) -> str:
    """The address of this machine on its network, "" without one; nothing is sent to find it."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(("2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def http_server(app: Starlette, limits: Limits) -> uvicorn.Server:
    """A server for ``app``: ``run(sockets=[...])`` answers until Ctrl-C (KeyboardInterrupt) or SIGTERM."""
    config = uvicorn.Config(
        app,
        http=type("Protocol", (Timed,), {"limits": limits}),
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
    return uvicorn.Server(config)
