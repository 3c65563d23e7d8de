"""The verb serve: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest
from commands import refused
from exported import save, small_model
from starlette.testclient import TestClient

from finetune101.cli.serve import open_classifier
from finetune101.errors import Refused
from finetune101.serve.answers import Answers
from finetune101.serve.app import application
from finetune101.serve.listen import addresses_of, listening, own_address

ROOT = Path(__file__).parents[2]


def test_a_port_that_is_taken_and_other_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        assert addresses_of(server) == [f"http://127.0.0.1:{port}/"]
        assert "taken" in refused(capsys, "serve", "released_finetune", "--port", str(port))
    assert "--port" in refused(capsys, "serve", "--port", "70000")
    assert "--max-mb" in refused(capsys, "serve", "--max-mb", "0")
    assert "--host" in refused(capsys, "serve", "--host", "203.0.113.1", "--port", "0")
    refused(capsys, "serve", "no_such_run", "--port", "0")


def test_a_page_for_others_names_an_address_that_they_can_open() -> None:
    with listening("0.0.0.0", 0) as server:
        port, own = server.getsockname()[1], own_address()
        here, *elsewhere = addresses_of(server)
        assert here == f"http://localhost:{port}/" and elsewhere == [f"http://{own}:{port}/"] * bool(own)
        for host in ("localhost", own or "127.0.0.1"):
            socket.create_connection((host, port), timeout=10).close()


def test_the_nearest_training_images_of_a_run_are_shown(runs: Path, tiny_data: Path, here: Path) -> None:
    network = open_classifier(str(runs / "a"), "runs", neighbours=True, data=str(tiny_data))
    photo = (tiny_data / "box/image_0003.jpg").read_bytes()
    with TestClient(application(network), base_url="http://127.0.0.1") as client:
        answer = client.post("/predict?explain=1", content=photo).json()["predictions"][0]
    assert answer["overlay"].startswith("data:image/jpeg;base64,")
    assert len(answer["nearest"]) == 5 and all(one["image"] for one in answer["nearest"])
    with pytest.raises(Refused, match="its run"):
        open_classifier(str(save(small_model(), here / "small.onnx")), "runs", neighbours=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_says_where_it_is_and_ends_cleanly(number: signal.Signals, code: int, here: Path) -> None:
    file = save(small_model(), here / "small.onnx")
    command = [sys.executable, "-W", "error", "-m", "finetune101", "serve", str(file), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
        assert address
        with urllib.request.urlopen(address[0], timeout=10) as page:
            assert b"<title>" in page.read()
        with socket.create_connection(("127.0.0.1", urlsplit(address[0]).port), timeout=10) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n\r\n1")
            time.sleep(0.2)
            process.send_signal(number)
            assert process.wait(20) == code
            assert slow.recv(1000).startswith(b"HTTP/1.1 503")
        errors = process.stderr.read()
        assert "Traceback" not in errors and "the page is closed" in errors


@pytest.mark.skipif(not shutil.which("bash") or not shutil.which("curl"), reason="needs bash and curl")
def test_the_example_of_its_page_runs(here: Path, tiny_data: Path) -> None:
    block = re.search(r"^```sh server\n(.*?)^```", (ROOT / "docs/serve.md").read_text(encoding="utf-8"), re.S | re.M)
    assert block
    shutil.copyfile(tiny_data / "box/image_0001.jpg", here / "photo.jpg")
    save(small_model(), here / "network.onnx")
    command = here / "bin" / "finetune101"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m finetune101 "$@"\n')
    command.chmod(0o755)
    with listening("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    script = block[1].replace("8000", str(port))
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(["bash", "-ec", script + "wait %1 || true"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    texts = re.findall(r'\{"predictions".*?"failed":\[\]\}', ran.stdout)
    answers = [msgspec.json.decode(text, type=Answers) for text in texts]
    assert [len(answer.predictions[0].classes) for answer in answers] == [2, 1]
    assert answers[0].predictions[0].path == "photo.jpg" and "the page is closed" in ran.stderr
