"""The verb serve: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from commands import refused
from exported import save, small_model

from finetune101.deploy.listen import address_of, listening


def test_a_port_that_is_taken_and_other_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with listening("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        assert address_of(server) == f"http://127.0.0.1:{port}/"
        assert "taken" in refused(capsys, "serve", "released_finetune", "--port", str(port))
    assert "--port" in refused(capsys, "serve", "--port", "70000")
    assert "--max-mb" in refused(capsys, "serve", "--max-mb", "0")
    assert "--host" in refused(capsys, "serve", "--host", "203.0.113.1", "--port", "0")
    refused(capsys, "serve", "no_such_run", "--port", "0")


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
        process.send_signal(number)
        assert process.wait(20) == code
        errors = process.stderr.read()
        assert errors.count("\n") == 2 and "the page is closed" in errors
