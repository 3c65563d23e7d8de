"""The run folder of 0.1.0 that is kept in tests/: this version reads it, or refuses it and names the version."""

from __future__ import annotations

import csv
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from faults.bench import Bench, Case
from faults.process import Process, command

KEPT = Path(__file__).parents[2] / "tests" / "run_0_1_0.tar.xz"
"""``runs/old`` as 0.1.0 wrote it, and the 24 ``images`` that it was trained on."""


def unpack_old(folder: Path) -> Path:
    """Unpacks the run into ``folder``; its folder."""
    with tarfile.open(KEPT) as file:
        file.extractall(folder, filter="data")
    return folder / "runs" / "old"


def old(count: int, bench: Bench) -> Iterator[Case]:
    """The run of 0.1.0: every verb that reads a run, and the answers that 0.1.0 gave."""
    for _ in range(count):
        folder = bench.new_folder("old")
        yield "the run of 0.1.0", _fault(folder, bench)
        shutil.rmtree(folder, ignore_errors=True)


def _fault(folder: Path, bench: Bench) -> str:
    before = predictions(unpack_old(folder))
    data = ["--data", "images"]
    shutil.copytree(folder / "runs" / "old", folder / "runs" / "other")
    for words in (
        ["evaluate", "old", *data],
        ["predict", "old", "images"],
        ["card", "old"],
        ["compare", "old", "other"],
        ["ensemble", "old", "other", *data],
        ["report", "old", *data, "--no-explain"],
        ["embed", "old", "images", "--out", "features.npz"],
    ):
        ended = Process(command(words), cwd=folder).wait()
        if fault := ended.fault():
            return f"{words[0]}: {fault}"
        if ended.code and "0.1.0" not in ended.err:
            return f"{words[0]} is refused without the version: {ended.err[-300:]}"
        bench.notes[f"{words[0]}: {'refused' if ended.code else 'done'}"] += 1
    after = predictions(folder / "runs" / "old")
    return "" if before == after else "evaluate gives other predictions than 0.1.0 gave"


def predictions(run: Path) -> list[list[str]]:
    """Path, label and prediction of every test image."""
    with open(run / "predictions.csv", newline="", encoding="utf-8") as file:
        return [row[:3] for row in list(csv.reader(file))[1:]]
