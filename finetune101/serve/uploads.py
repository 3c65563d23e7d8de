"""What clients send, within limits: of size, of time, and of what all of them send together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from finetune101.serve.answers import Problem

MB = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for; times in seconds."""

    megabytes: int = 32
    """Of one request."""
    pictures: int = 64
    """Of one request."""
    together: int = 256
    """Megabytes of all requests at hand together; at least those of one."""
    waiting: int = 128
    """Requests that wait for the network."""
    head: float = 10
    """Until a connection has sent the head of a request."""
    pause: float = 10
    """Between two pieces of a request."""
    upload: float = 120
    """For all of a request."""
    answer: float = 60
    """Until the network has answered."""
    linger: float = 2
    """For what a refused client still sends, so that it sees the refusal."""


class Failed(HTTPException):
    """An error that the client is told: a status code and one sentence."""

    def __init__(self, code: int, sentence: str, problem: Problem | None = None) -> None:
        super().__init__(code, sentence, {"retry-after": "1"} if code == 503 else None)
        self.problem = problem or Problem(sentence)


class Uploads:
    """The bytes of all requests at hand, together at most ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    def take(self, count: int) -> None:
        """Adds ``count`` bytes. Raises Failed where there is no room."""
        if self.held + count > self.most:
            raise Failed(503, "the server has too many pictures at hand; try again in a second")
        self.held += count

    def give(self, count: int) -> None:
        """The end of what ``take`` began."""
        self.held -= count


class Body:
    """The body of a request, read in pieces within its limits."""

    def __init__(self, request: Request, limits: Limits, uploads: Uploads) -> None:
        self.request, self.limits, self.uploads, self.count = request, limits, uploads, 0

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The bytes as they come. Raises Failed for a body that is too large or too slow, and ClientDisconnect."""
        length = self.request.headers.get("content-length", "")
        self._check(int(length) if length.isdecimal() else 0)
        loop = asyncio.get_running_loop()
        end = loop.time() + self.limits.upload
        stream = self.request.stream()
        while True:
            try:
                async with asyncio.timeout(min(self.limits.pause, end - loop.time())):
                    piece = await anext(stream, None)
            except TimeoutError:
                raise Failed(408, "the request took too long; send it again") from None
            if piece is None:
                return
            self._check(self.count + len(piece))
            self.uploads.take(len(piece))
            self.count += len(piece)
            yield piece

    def release(self) -> None:
        """Makes room for others."""
        self.uploads.give(self.count)
        self.count = 0

    def _check(self, count: int) -> None:
        most = self.limits.megabytes
        if count > most * MB:
            raise Failed(413, f"the request is larger than {most} MB; send fewer or smaller pictures")
