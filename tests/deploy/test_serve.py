"""The server: answers of a small network, clients that are wrong, slow or too many."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import uvicorn
from commands import refused
from PIL import Image
from starlette.testclient import TestClient

from finetune101.config import Preprocessing
from finetune101.deploy.answers import About, Answers, Problem
from finetune101.deploy.listen import Timed, address_of, listening
from finetune101.deploy.prediction import Prediction
from finetune101.deploy.serve import MB, Limits, application
from finetune101.deploy.worker import Busy, Job, Worker

QUICK = Limits(megabytes=1, pictures=4, head=0.5, pause=0.3, upload=1, answer=5, linger=0.5)


class Colours:
    """A network that knows the brightest channel; ``pause`` holds it up, ``wrong`` makes it fail."""

    name = "/somewhere/runs/colours"
    classes = ("red", "green", "blue")
    preprocessing = Preprocessing(size=32, cache_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")

    def __init__(self) -> None:
        self.free, self.wrong, self.passes = threading.Event(), False, list[int]()
        self.free.set()

    def predict(self, images: list[Image.Image], top_k: int = 5) -> list[Prediction]:
        self.free.wait(10)
        if self.wrong:
            raise RuntimeError("the network is broken")
        self.passes.append(len(images))
        return [self._one(image, top_k) for image in images]

    def _one(self, image: Image.Image, top_k: int) -> Prediction:
        pixel = image.resize((1, 1)).getpixel((0, 0))
        total = sum(pixel) or 1
        ranked = sorted(zip(self.classes, (value / total for value in pixel), strict=True), key=lambda one: -one[1])
        return Prediction(tuple(ranked[:top_k]), image)


def picture(colour: Any = (200, 20, 20), kind: str = "png", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


@pytest.fixture
def network() -> Colours:
    return Colours()


@pytest.fixture
def client(network: Colours) -> Iterator[TestClient]:
    with TestClient(application(network, QUICK), base_url="http://127.0.0.1:8000") as opened:
        yield opened
        network.free.set()


@contextlib.contextmanager
def running(network: Colours, limits: Limits) -> Iterator[tuple[str, int]]:
    """A real server in a thread."""
    server = listening("127.0.0.1", 0)
    config = uvicorn.Config(
        application(network, limits),
        http=type("Protocol", (Timed,), {"limits": limits}),
        ws="none",
        log_config=None,
        log_level="error",
        timeout_graceful_shutdown=1,
    )
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: runner.run(sockets=[server]))
    thread.start()
    try:
        yield server.getsockname()[:2]
    finally:
        runner.should_exit = True
        thread.join()
        server.close()


def problem(answer: Any, status: int) -> Problem:
    assert answer.status_code == status, answer.text
    return msgspec.json.decode(answer.content, type=Problem)


# what it answers


def test_raw_bytes_and_forms_give_the_same_answer(client: TestClient) -> None:
    raw = client.post("/predict?top_k=2", content=picture())
    form = client.post("/predict?top_k=2", files={"file": ("red.png", picture())})
    one, other = (msgspec.json.decode(answer.content, type=Answers).predictions[0] for answer in (raw, form))
    assert one.classes == other.classes and [share.name for share in one.classes] == ["red", "green"]
    assert (one.path, other.path) == ("", "red.png")


def test_of_several_pictures_the_good_ones_are_answered(client: TestClient) -> None:
    files = [
        ("a", ("red.png", picture())),
        ("b", ("no.jpg", b"text")),
        ("c", ("blue.jpg", picture((0, 0, 255), "jpeg"))),
    ]
    answer = client.post("/predict", files=[*files, ("d", ("empty.jpg", b""))]).json()
    assert [(one["path"], one["classes"][0]["class"]) for one in answer["predictions"]] == [
        ("red.png", "red"),
        ("blue.jpg", "blue"),
    ]
    assert [one["path"] for one in answer["failed"]] == ["no.jpg", "empty.jpg"]


def test_a_picture_lies_as_a_viewer_shows_it_and_on_white(client: TestClient, network: Colours) -> None:
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(file, "png")
    shares = client.post("/predict", content=file.getvalue()).json()["predictions"][0]["classes"]
    assert {share["probability"] for share in shares} == {1 / 3}


def test_the_interface_is_described_as_it_answers(client: TestClient) -> None:
    description = client.get("/openapi.json").json()
    responses = description["paths"]["/predict"]["post"]["responses"]
    answers = [
        client.post("/predict", content=picture()),
        client.post("/predict", content=b"text"),
        client.post("/predict", content=b""),
        client.post("/predict", content=bytes(2 * MB)),
        client.post("/predict", headers={"origin": "http://evil.example"}, content=picture()),
        client.post("/predict", headers={"host": "evil.example"}, content=picture()),
    ]
    assert [answer.status_code for answer in answers] == [200, 422, 400, 413, 403, 421]
    for answer in answers:
        schema = responses[str(answer.status_code)]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": description["components"]})
    schema = description["paths"]["/network"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(client.get("/network").json(), {**schema, "components": description["components"]})


def test_the_page_and_its_files_are_there_and_nothing_else(client: TestClient) -> None:
    for path, kind in {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in (
        "/page.html",
        "/../serve.py",
        "/%2e%2e/serve.py",
        "//etc/passwd",
        "/predict/x",
        "/runs/best.safetensors",
    ):
        problem(client.get(path), 404)
    problem(client.get("/predict"), 405)
    about = msgspec.json.decode(client.get("/network").content, type=About)
    assert (about.name, about.classes, about.megabytes) == ("colours", ["red", "green", "blue"], 1)


def test_a_name_of_the_client_is_never_a_path(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture((0, 255, 0)))
    answer = client.post("/predict", files={"file": (str(secret), picture())}).json()["predictions"][0]
    assert answer["classes"][0]["class"] == "red"
    assert problem(client.post("/predict", files={"file": (str(secret), b"")}), 422).failed


# clients that are wrong


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=-1", "top_k=x", "top_k=1001", "explain=2", "top_k=", "top_k=%C2%B2"]
)
def test_a_wrong_number_is_named(client: TestClient, query: str) -> None:
    assert query.split("=")[0] in problem(client.post(f"/predict?{query}", content=picture()), 400).error


def test_what_is_no_picture_is_told(client: TestClient) -> None:
    assert "no image format" in problem(client.post("/predict", content=b"text"), 422).error
    assert "empty" in problem(client.post("/predict", content=b""), 400).error
    whole = picture(kind="jpeg", size=(300, 300))
    assert "truncated" in problem(client.post("/predict", content=whole[: len(whole) // 2]), 422).error
    field = b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--\r\n"
    assert "no file" in problem(client.post("/predict", content=field, headers=FORM), 400).error
    for body in (b"", b"--x", b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\nc", b"rubbish"):
        problem(client.post("/predict", content=body, headers=FORM), 400)
    problem(client.post("/predict", content=body, headers={"content-type": "multipart/form-data"}), 400)
    files = [("file", (f"{i}.png", picture())) for i in range(5)]
    assert "4" in problem(client.post("/predict", files=files), 400).error


FORM = {"content-type": "multipart/form-data; boundary=x"}


def test_bombs_do_not_go_off(client: TestClient) -> None:
    lines = zlib.compress(bytes(30001 * 100), 9)  # 100 of 30,000: the header promises 900 megapixels

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = (30000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")
    assert "megapixels" in problem(client.post("/predict", content=bomb), 422).error
    text = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 * MB), 9))
    problem(client.post("/predict", content=text), 422)
    zipped = zlib.compress(bytes(100 * MB), 9)
    problem(client.post("/predict", content=zipped, headers={"content-encoding": "deflate"}), 422)


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_pages_of_other_origins_are_refused(client: TestClient, headers: dict[str, str]) -> None:
    problem(client.post("/predict", content=picture(), headers=headers), 403)


def test_own_pages_and_programs_are_not(client: TestClient) -> None:
    for headers in ({}, {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}):
        assert client.post("/predict", content=picture(), headers=headers).status_code == 200
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=linked).status_code == 200


def test_only_its_own_hosts_are_answered(network: Colours) -> None:
    hosts = ["localhost", "127.0.0.1:1", "[::1]:8000", "evil.example", "192.168.1.7", "", "[", "127.0.0.1.evil.example"]
    answered = {}
    for address in ("127.0.0.1", "0.0.0.0"):
        with TestClient(application(network, QUICK, address), base_url="http://127.0.0.1") as client:
            answered[address] = [client.get("/", headers={"host": host}).status_code == 200 for host in hosts]
    assert answered["127.0.0.1"] == [True, True, True, False, False, False, False, False]
    assert answered["0.0.0.0"] == [True, True, True, False, True, False, False, False]


# the worker


def test_a_fault_of_the_network_is_an_answer_and_the_next_one_is_right(
    client: TestClient, network: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    network.wrong = True
    assert "terminal" in problem(client.post("/predict", content=picture()), 500).error
    assert "the network is broken" in capsys.readouterr().err
    network.wrong = False
    assert client.post("/predict", content=picture()).status_code == 200


def test_waiting_requests_share_a_pass_and_too_many_are_told_to_come_again(network: Colours) -> None:
    worker = Worker(network, most_waiting=20)
    network.free.clear()
    worker.start()
    first = worker.submit(Job([("", picture())]))
    while not first.running():
        time.sleep(0.001)
    others = [worker.submit(Job([("", picture((0, 0, 255)))], top_k=1 + i % 2)) for i in range(20)]
    with pytest.raises(Busy):
        worker.submit(Job([("", picture())]))
    others[3].cancel()  # its client has gone
    network.free.set()
    answers = [future.result(10) for future in others if not future.cancelled()]
    worker.stop()
    assert network.passes == [1, 15, 4]
    assert [len(answer.predictions[0].classes) for answer in answers[:3]] == [1, 2, 1]
    assert first.result().predictions[0].classes[0].name == "red"
    assert {answer.predictions[0].classes[0].name for answer in answers} == {"blue"}


def test_a_full_queue_is_503_with_retry_after(network: Colours) -> None:
    with TestClient(application(network, Limits(waiting=1, answer=0.2)), base_url="http://127.0.0.1") as client:
        network.free.clear()
        codes = []

        def post() -> None:
            codes.append(client.post("/predict", content=picture()))

        threads = [threading.Thread(target=post) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        network.free.set()
    assert all(problem(answer, 503) and answer.headers["retry-after"] == "1" for answer in codes)


# real sockets: clients that are slow or send too much


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
        told, _ = exchange(address, head("Content-Length: 1000000000"))
        assert told.startswith(b"HTTP/1.1 413") and b"1 MB" in told
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


# the verb


def test_a_port_that_is_taken_and_other_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        assert address_of(server) == f"http://127.0.0.1:{port}/"
        assert "taken" in refused(capsys, "serve", "released_finetune", "--port", str(port))
    assert "--port" in refused(capsys, "serve", "--port", "70000")
    assert "--max-mb" in refused(capsys, "serve", "--max-mb", "0")
    assert "--host" in refused(capsys, "serve", "--host", "203.0.113.1", "--port", "0")
    refused(capsys, "serve", "no_such_run", "--port", "0")
