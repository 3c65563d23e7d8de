"""Kills at random moments cost nothing but the current epoch; ``make stress`` does 200 of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from stress import stress


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("ps"), reason="needs Linux and ps to find the workers")
def test_five_kills(tmp_path: Path, tiny_data: Path) -> None:
    tally = stress(5, 1, tmp_path, tiny_data)
    assert tally.kills == 5 and (tally.lost, tally.repeated, tally.different) == (0, 0, 0), tally.notes
