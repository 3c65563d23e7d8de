"""The server: answers of a small network, clients that are wrong, slow or too many."""

from __future__ import annotations

import io
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import msgspec
import pytest
from colours import QUICK, Colours, picture
from PIL import Image
from starlette.testclient import TestClient

from finetune101.serve.answers import About, Answers, Problem
from finetune101.serve.app import MB, Limits, application
from finetune101.serve.worker import Busy, Job, Worker


@pytest.fixture
def network() -> Colours:
    return Colours()


@pytest.fixture
def client(network: Colours) -> Iterator[TestClient]:
    with TestClient(application(network, QUICK), base_url="http://127.0.0.1:8000") as opened:
        yield opened
        network.free.set()


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


def test_a_picture_unlike_the_training_pictures_is_told(client: TestClient) -> None:
    answers = [client.post("/predict", content=picture(colour)).json() for colour in ((255, 255, 255), (200, 20, 20))]
    flags = [(answer["predictions"][0]["unlike"], answer["predictions"][0]["unlike_score"]) for answer in answers]
    assert flags == [(True, 2.0), (False, 0.5)]


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


class Near:
    """A training image."""

    file, label, distance = Path("/somewhere/data/red/one.jpg"), "red", 0.25

    def __init__(self, there: bool) -> None:
        self.there = there

    def thumbnail(self, side: int) -> Image.Image | None:
        return Image.new("RGB", (side, 8)) if self.there else None


class Explaining(Colours):
    """A network that knows where it looked."""

    def explain(self, image: Image.Image) -> Any:
        return SimpleNamespace(overlay=lambda: image, neighbours=[Near(True), Near(False)])


def test_where_it_looked_and_what_is_near_come_when_they_are_asked_for(client: TestClient) -> None:
    assert client.get("/network").json()["explains"] is False
    refused = client.post("/predict?explain=1", content=picture())
    assert refused.status_code == 400 and "cannot show where it looked" in refused.json()["error"]
    with TestClient(application(Explaining(), QUICK), base_url="http://127.0.0.1") as explaining:
        assert explaining.get("/network").json()["explains"] is True
        assert "overlay" not in explaining.post("/predict", content=picture()).json()["predictions"][0]
        answer = explaining.post("/predict?explain=1", content=picture())
        one = msgspec.json.decode(answer.content, type=Answers).predictions[0]
        assert isinstance(one.overlay, str) and one.overlay.startswith("data:image/jpeg;base64,")
        assert isinstance(one.nearest, list) and b"somewhere" not in answer.content
        assert [(near.path, near.name, bool(near.image)) for near in one.nearest] == [
            ("one.jpg", "red", True),
            ("one.jpg", "red", False),
        ]


# clients that are wrong


@pytest.mark.parametrize(
    "query", ["top_k=0", "top_k=-1", "top_k=x", "top_k=1001", "explain=2", "top_k=", "top_k=%C2%B2"]
)
def test_a_wrong_number_is_named(client: TestClient, query: str) -> None:
    assert query.split("=")[0] in problem(client.post(f"/predict?{query}", content=picture()), 400).error


def test_a_parameter_that_is_not_there_is_named(client: TestClient) -> None:
    error = problem(client.post("/predict?topk=2", content=picture()), 400).error
    assert "'topk'" in error and "top_k and explain" in error


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
    assert network.passes == [1, 16, 3]  # who has gone takes no place
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
