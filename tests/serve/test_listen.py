"""A real server: clients that are slow, that send too much, that go."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from colours import QUICK, Colours, picture

from finetune101.serve.app import application
from finetune101.serve.listen import http_server, listening
from finetune101.serve.uploads import Limits
from finetune101.serve.worker import Job, Worker


@pytest.fixture
def network() -> Colours:
    return Colours()


@contextlib.contextmanager
def running(network: Colours, limits: Limits) -> Iterator[tuple[str, int]]:
    """A real server in a thread."""
    server = listening("127.0.0.1", 0)
    runner = http_server(application(network, limits), limits)
    thread = threading.Thread(target=lambda: runner.run(sockets=[server]))
    thread.start()
    try:
        yield server.getsockname()[:2]
    finally:
        runner.should_exit = True
        thread.join()
        server.close()


def exchange(address: tuple[str, int], *pieces: bytes, pause: float = 0.0) -> tuple[bytes, float]:
    """All that the server answers to ``pieces``, and the seconds until it closed the connection."""
    begin = time.perf_counter()
    with socket.create_connection(address, timeout=10) as connection:
        with contextlib.suppress(OSError):
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
    return answer, time.perf_counter() - begin


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /predict HTTP/1.1", "Host: 127.0.0.1", *lines, "", ""]).encode()


def test_slow_clients_are_sent_away_while_others_are_answered(network: Colours) -> None:
    with running(network, QUICK) as address:
        slow: dict[str, tuple[bytes, float]] = {}

        def start(name: str, *pieces: bytes) -> threading.Thread:
            def talk() -> None:
                slow[name] = exchange(address, *pieces, pause=0.1)

            thread = threading.Thread(target=talk)
            thread.start()
            return thread

        length = head("Content-Length: 1000")
        letters = [bytes([byte]) for byte in length[:30]]
        threads = [
            start("silent"),
            start("slow head", *letters),
            start("no body", length),
            start("slow body", length, *[b"x"] * 15),
        ]
        content = picture()
        good, _ = exchange(address, head(f"Content-Length: {len(content)}", "Connection: close") + content)
        assert good.startswith(b"HTTP/1.1 200")
        for thread in threads:
            thread.join()
        assert slow["silent"][0] == slow["slow head"][0] == b""
        assert slow["no body"][0].startswith(b"HTTP/1.1 408") and slow["slow body"][0].startswith(b"HTTP/1.1 408")
        assert max(seconds for _, seconds in slow.values()) < 6


def test_a_gigabyte_is_refused_while_it_comes(network: Colours) -> None:
    with running(network, QUICK) as address:
        refused, _ = exchange(address, head("Content-Length: 1000000000"))
        assert refused.startswith(b"HTTP/1.1 413") and b"1 MB" in refused
        # without a length nothing tells but the bytes themselves
        piece = b"%x\r\n" % 65536 + bytes(65536) + b"\r\n"
        chunked, seconds = exchange(address, head("Transfer-Encoding: chunked"), *[piece] * 1000)
        assert chunked.startswith(b"HTTP/1.1 413") and seconds < 6
        form = b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\n"
        lines = head("Transfer-Encoding: chunked", "Content-Type: multipart/form-data; boundary=x")
        part, _ = exchange(address, lines + b"%x\r\n" % len(form) + form + b"\r\n", *[piece] * 40)
        assert part.startswith(b"HTTP/1.1 413")
        content = picture()
        good, _ = exchange(address, head(f"Content-Length: {len(content)}", "Connection: close") + content)
        assert json.loads(good.split(b"\r\n\r\n", 1)[1])["predictions"]


def test_all_uploads_together_are_bounded(network: Colours) -> None:
    limits = Limits(megabytes=1, together=1, pause=5, linger=0.5)
    with running(network, limits) as address, socket.create_connection(address, timeout=10) as first:
        first.sendall(head("Content-Length: 900000") + bytes(800_000))
        time.sleep(0.2)
        second, _ = exchange(address, head("Content-Length: 300000", "Connection: close") + bytes(300_000))
        assert second.startswith(b"HTTP/1.1 503") and b"retry-after: 1" in second
        first.sendall(bytes(100_000))
        assert first.recv(65536).startswith(b"HTTP/1.1 422")
        third, _ = exchange(address, head("Content-Length: 300000", "Connection: close") + bytes(300_000))
        assert third.startswith(b"HTTP/1.1 422")


def test_a_client_that_goes_is_forgotten(network: Colours) -> None:
    network.free.clear()
    with running(network, QUICK) as address:
        content = picture()
        for _ in range(2):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(head(f"Content-Length: {len(content)}") + content)
                time.sleep(0.1)
        time.sleep(0.1)
        network.free.set()
        good, _ = exchange(address, head(f"Content-Length: {len(content)}", "Connection: close") + content)
        assert good.startswith(b"HTTP/1.1 200")
        assert sum(network.passes) == 2  # the first was at work already


@pytest.mark.parametrize("origin", ["http://[::1", "null", "http://elsewhere.example"])
def test_a_client_that_goes_at_a_refusal_leaves_a_server_that_answers(network: Colours, origin: str) -> None:
    with running(network, QUICK) as address:
        with socket.create_connection(address, timeout=10) as gone:
            gone.sendall(head(f"Origin: {origin}", "Content-Length: 1000") + b"x")
            assert gone.recv(65536).startswith(b"HTTP/1.1 403")
        content = picture()
        good, seconds = exchange(address, head(f"Content-Length: {len(content)}", "Connection: close") + content)
        assert good.startswith(b"HTTP/1.1 200") and seconds < 5


def test_a_cancelled_job_holds_no_pictures(network: Colours) -> None:
    worker = Worker(network, 4)  # not started: jobs wait
    job = Job([("a", picture())])
    answer = worker.submit(job)
    assert job.pictures and answer.cancel() and not job.pictures
