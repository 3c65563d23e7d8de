"""Kills at random moments cost nothing but the current epoch; ``make stress`` does 200 of them."""

from __future__ import annotations

import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from stress import start, stress


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ps"), reason="needs Linux and ps to find the workers")
def test_three_kills(tmp_path: Path, tiny_data: Path) -> None:
    tally = stress(3, 1, tmp_path, tiny_data)
    assert tally.kills == 3 and (tally.lost, tally.repeated, tally.different) == (0, 0, 0), tally.notes


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path: Path, tiny_data: Path) -> None:
    jobs = 2
    with start(tmp_path, tiny_data, jobs) as search:
        while not list(tmp_path.glob("s/*/metrics.jsonl")):
            assert search.poll() is None
            time.sleep(0.1)
        search.send_signal(signal.SIGINT)
        _, said = search.communicate(timeout=60)
    assert search.returncode == 130 and "Traceback" not in said
    assert said.count("interrupted; the same command goes on from the last epochs") == 1
    with start(tmp_path, tiny_data, jobs) as search:
        _, said = search.communicate(timeout=120)
    assert search.returncode == 0, said
    assert len(list(tmp_path.glob("s/*/config.json"))) == 16
