"""What the scripts of all peers share: the work that is asked for, and a clock. No package but Python's own.

``python run_PEER.py WORK.json`` reads one work, does it the peer's way and writes the clock's values to the file "out".
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

WORKERS = (0, 1, 2)  # of the peer's loader, for the work "screen"

Work = dict[str, Any]
"""task (train, screen or predict), network, classes (names), data (folder with train/ and val/), photos (folder),
weights (file or None), recipe ("same" for all peers, or the peer's "own"), epochs, workers, batch_size, mean, std,
bf16 (whether the processor has it and may use it), folder, out (file), started (Unix time)."""


class Clock:
    """When what happened, in seconds; ``started`` is the Unix time at which the command was started."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.values: dict[str, Any] = {"first_step_s": None, "train_s": [], "val_s": [], "val_top1": []}

    def step(self) -> None:
        """A training step has ended; only the first one counts."""
        if self.values["first_step_s"] is None:
            self.values["first_step_s"] = round(time.time() - self.started, 3)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The seconds of the block go to the list ``name``: train_s or val_s."""
        began = time.perf_counter()
        yield
        self.values[name].append(round(time.perf_counter() - began, 3))

    def top1(self, right: float, images: int) -> None:
        """Share of the validation images whose class is right, in percent."""
        self.values["val_top1"].append(round(100 * float(right) / images, 2))


def write_labels(work: Work, photos: Sequence[Path], labels: Sequence[int], scores: Sequence[float]) -> None:
    """The table of labels that every peer ends with: path, class and probability of each photo."""
    with (Path(work["folder"]) / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "class_1", "probability_1"))
        for photo, label, score in zip(photos, labels, scores, strict=True):
            writer.writerow((photo.name, work["classes"][int(label)], round(float(score), 6)))


def do(train: Callable[[Work, Clock], None], **others: Callable[[Work], None]) -> None:
    """Does the work of the file that the command names: ``train``, "screen", or one of ``others`` by its name."""
    work: Work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    clock = Clock(work["started"])
    values: dict[str, Any] = {}
    if work["task"] == "screen":  # the first pass only warms up
        seconds = []
        for workers in (0, *WORKERS):
            clock = Clock(work["started"])
            train({**work, "workers": workers}, clock)
            seconds.append(sum(clock.values["train_s"]))
        values["seconds_of_workers"] = dict(zip(WORKERS, seconds[1:], strict=True))
    elif work["task"] == "train":
        train(work, clock)
        values = clock.values
    else:
        others[work["task"]](work)
    Path(work["out"]).write_text(json.dumps(values), encoding="utf-8")
