"""Kills at random moments cost nothing but the current epoch; ``make stress`` does 200 of them."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.bench import Bench
from faults.searches import searches, start, workers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ps"), reason="needs Linux and ps to find the workers")
def test_three_kills(tmp_path: Path, tiny_data: Path) -> None:
    faults = [fault for _, fault in searches(3, Bench(tmp_path, tiny_data, random.Random(1)))]
    assert faults == [""] * 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ps"), reason="needs Linux and ps to find the workers")
def test_workers_end_with_a_killed_driver_and_the_same_command_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    grid = ["--grid", "lr=0.01,0.02,0.03"]
    with start(tmp_path, tiny_data, grid=grid) as search:
        begun(search, tmp_path)
        processes = workers(search.pid)
        search.kill()
    assert processes
    until = time.monotonic() + 20
    while any(is_alive(pid) for pid in processes):
        assert time.monotonic() < until, "the workers outlive their driver"
        time.sleep(0.1)
    with start(tmp_path, tiny_data, grid=grid) as search:
        _, said = search.communicate(timeout=120)
    assert search.returncode == 0, said
    assert [len(file.read_text().splitlines()) for file in tmp_path.glob("s/*/metrics.jsonl")] == [3] * 3


def begun(search: subprocess.Popen[str], folder: Path) -> None:
    """Waits until the first epoch of the search is recorded."""
    while not list(folder.glob("s/*/metrics.jsonl")):
        assert search.poll() is None
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether the process works, rather than is gone or waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    grid = ["--grid", "lr=0.01,0.02,0.03"]
    with start(tmp_path, tiny_data, grid=grid) as search:
        begun(search, tmp_path)
        search.send_signal(signal.SIGINT)
        _, said = search.communicate(timeout=60)
    assert search.returncode == 130 and "Traceback" not in said
    assert said.count("interrupted; the same command goes on from the last epochs") == 1
    with start(tmp_path, tiny_data, grid=grid) as search:
        _, said = search.communicate(timeout=120)
    assert search.returncode == 0, said
    assert len(list(tmp_path.glob("s/*/config.json"))) == 3
