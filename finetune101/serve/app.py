"""A page and a JSON interface that try a trained network, for browsers on this machine or, by ``--host``, on others.

Nothing that a client sends names a file: pages are read once, pictures stay bytes in memory. One thread runs the
network (``serve.worker``); what waits for it is bounded in number and in bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from PIL import Image as Pillow
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

import finetune101
from finetune101.errors import Refused, shortened
from finetune101.serve.answers import PARAMETERS, About, Answers, Problem, openapi
from finetune101.serve.guard import Answer, Guard
from finetune101.serve.uploads import MB, Body, Failed, Limits, Uploads
from finetune101.serve.worker import Busy, Classifier, Job, Worker

TEMPLATES = Path(__file__).parent / "templates"
FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/words.js": ("words.js", "text/javascript"),
    "/backend.js": ("server.js", "text/javascript"),
}
"""Path of the server -> file in ``templates/`` and its media type."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
logging.getLogger("python_multipart").addHandler(logging.NullHandler())  # else clients write to the terminal
FAULT = "the server failed at this request; its terminal shows why"


class Service:
    """The handlers of a server for one network."""

    def __init__(self, about: About, worker: Worker, limits: Limits) -> None:
        self.about, self.worker, self.limits = about, worker, limits
        self.uploads = Uploads(max(limits.together, limits.megabytes) * MB)

    async def network(self, request: Request) -> Response:
        """GET /network: the network and its classes."""
        return Answer(self.about)

    async def description(self, request: Request) -> Response:
        """GET /openapi.json: the interface."""
        return Answer(openapi(finetune101.__version__, self.limits.megabytes, self.limits.pictures))

    async def predict(self, request: Request) -> Response:
        """POST /predict: the classes of the pictures in a multipart body, or of the one whose bytes the body is."""
        check_query(request, PARAMETERS)
        top_k, explain = number(request, "top_k", 5, 1, 1000), number(request, "explain", 0, 0, 1)
        if explain and not self.about.explains:
            raise Failed(400, f"{self.about.name} cannot show where it looked; serve a run or a released network")
        body, job, loop = Body(request, self.limits, self.uploads), None, asyncio.get_running_loop()
        try:
            pictures = await self._pictures(request, body)
            job = Job(pictures, top_k, bool(explain))
            answers = await self._answers(request, job)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            if job is None:
                body.release()
            else:  # a pass that has begun holds its pictures until its end, whoever has gone

                def released(_: object) -> None:
                    with contextlib.suppress(RuntimeError):  # the server has ended
                        loop.call_soon_threadsafe(body.release)

                job.answer.cancel()
                job.answer.add_done_callback(released)
        if not answers.predictions:
            first = answers.failed[0]
            sentence = f"none of the pictures can be read ({first.reason}); send JPEG, PNG or WebP"
            raise Failed(422, sentence, Problem(sentence, answers.failed))
        return Answer(answers)

    async def _pictures(self, request: Request, body: Body) -> list[tuple[str, bytes]]:
        """(name, bytes) of the pictures in a request. Raises Failed."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            content = b"".join([piece async for piece in body.pieces()])
            if not content:
                raise Failed(400, "the request is empty; send the bytes of a picture, or multipart/form-data")
            return [("", content)]
        most = self.limits.pictures
        parser = MultiPartParser(request.headers, body.pieces(), max_files=most, max_fields=most, max_part_size=MB)
        try:
            form = await parser.parse()
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if not files:
                raise Failed(400, "the request holds no file; send pictures as files of a form")
            return [(shortened(file.filename or ""), await file.read()) for file in files]
        except MultiPartException as error:
            raise Failed(400, f"the multipart body cannot be read ({error.message.rstrip('.')})") from error
        finally:
            for part in parser._files_to_close_on_error:  # by itself it closes them at some of its errors only
                part.close()

    async def _answers(self, request: Request, job: Job) -> Answers:
        """What the worker says of ``job``. Raises Failed, and ClientDisconnect where nobody waits any more."""
        try:
            waiting = asyncio.wrap_future(self.worker.submit(job))
        except Busy:
            raise Failed(503, "too many requests wait for the network; try again in a second") from None
        gone = asyncio.ensure_future(disconnected(request))
        both: set[asyncio.Future[Any]] = {waiting, gone}
        try:
            done, _ = await asyncio.wait(both, timeout=self.limits.answer, return_when="FIRST_COMPLETED")
            if waiting in done:
                return waiting.result()
            if gone not in done:
                raise Failed(503, "the network is too busy; try again later")
        except asyncio.CancelledError:
            if not waiting.cancelled():
                raise
            raise Failed(503, "the server is about to end") from None
        except HTTPException:
            raise
        except Exception as error:  # of the network; the worker has told it
            sentence = (
                str(error) if isinstance(error, Refused) else "the network failed; the server's terminal shows why"
            )
            raise Failed(500, sentence) from error
        finally:
            waiting.cancel()
            gone.cancel()
        raise ClientDisconnect


async def disconnected(request: Request) -> None:
    """Ends when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def check_query(request: Request, names: Collection[str]) -> None:
    """Raises Failed for a parameter of the query that is none of ``names``."""
    for name in request.query_params:
        if name not in names:
            raise Failed(400, f"there is no parameter {shortened(name, 20)!r}; the server knows {' and '.join(names)}")


def number(request: Request, name: str, usual: int, low: int, high: int) -> int:
    """A whole number of the query. Raises Failed for another value."""
    text = request.query_params.get(name, str(usual))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise Failed(400, f"{name} is {shortened(text, 20)!r}; give a whole number from {low} to {high}")
    return int(text)


async def refusal(request: Request, error: Exception) -> Response:
    """A known error as JSON."""
    assert isinstance(error, HTTPException)
    if isinstance(error, Failed):
        return Answer(error.problem, error.status_code, error.headers)
    sentences = {404: "there is nothing under this path; see /openapi.json", 405: "this path takes another method"}
    return Answer(Problem(sentences.get(error.status_code, error.detail)), error.status_code, error.headers)


async def fault(request: Request, error: Exception) -> Response:
    """A bug as JSON; its traceback goes to standard error."""
    return Answer(Problem(FAULT), 500)


def file_handler(name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that sends a file of ``templates/``, read once."""
    content = (TEMPLATES / name).read_bytes()

    async def send_file(request: Request) -> Response:
        return Response(content, media_type=kind)

    return send_file


def application(network: Classifier, limits: Limits | None = None, host: str = "127.0.0.1") -> Starlette:
    """The server for ``network`` as an ASGI application, which starts and stops its worker.

    ``host`` is the address that it will listen at: it decides which Host headers are answered.
    """
    limits = limits or Limits()
    worker = Worker(network, limits.waiting)
    about = About(
        name=Path(network.name).name,
        classes=list(network.classes),
        megabytes=limits.megabytes,
        explains=hasattr(network, "explain"),
    )
    service = Service(about, worker, limits)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(worker.stop)

    own = {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"} - {""}
    remote = host not in LOOPBACK
    hosts = frozenset({*LOOPBACK, host.lower(), *(own if remote else ())})
    return Starlette(
        routes=[
            *(Route(path, file_handler(*file)) for path, file in FILES.items()),
            Route("/network", service.network),
            Route("/openapi.json", service.description),
            Route("/predict", service.predict, methods=["POST"]),
        ],
        exception_handlers={HTTPException: refusal, Exception: fault},
        middleware=[Middleware(Guard, hosts=hosts, any_address=remote, linger=limits.linger)],
        lifespan=lifespan,
    )


def warm_up(network: Classifier) -> None:
    """One picture, so that the first user does not wait for what is built once. Raises what the network raises."""
    network.predict([Pillow.new("RGB", (256, 256), (128, 128, 128))], top_k=1)
