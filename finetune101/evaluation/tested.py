"""What a tested run holds: its answers, its split, and whether they belong together; reads files only."""

from __future__ import annotations

import csv
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.evaluation.predictions import read_rows
from finetune101.files import read_json
from finetune101.run import Run, kind_of, winner_command
from finetune101.schemas import Split

PAIRS = 12  # of confused classes


class Answer(NamedTuple):
    """What a run says about one test image; both are class names."""

    label: str
    prediction: str
    confidence: float

    @property
    def right(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.prediction


def is_inside(path: str) -> bool:
    """Whether ``path`` stays below the folder that it is joined to, on any system."""
    kinds = (PurePosixPath(path), PureWindowsPath(path))
    return not any(kind.anchor or ".." in kind.parts for kind in kinds) and "\0" not in path


def manifest_file(run: Run) -> Path:
    """Where the split of ``run`` is: its split.json, or, of published evidence, the file that test.json names."""
    name = None if run.has("split.json") else run.read_json("test.json").get("manifest")
    if not isinstance(name, str) or not is_inside(name):
        return run.path / "split.json"
    files = [folder / "splits" / f"{name}.json" for folder in run.path.absolute().parents]
    return next((file for file in files if file.is_file()), files[0])


def read_manifest(run: Run) -> splits.Manifest:
    """The split of ``run``. Raises Refused when its file is missing or damaged."""
    file = manifest_file(run)
    if file.parent == run.path:
        return splits.from_json(run.read_json(file.name))
    return splits.from_json(read_json(file, Split, remedy="restore it from the repository"))


def evaluate_command(run: Run) -> str:
    """What tests ``run``."""
    return shlex.join(["finetune101", "evaluate", str(run.path)])


def read_answers(run: Run) -> dict[str, Answer]:
    """predictions.csv of an evaluated run by path, sorted.

    Raises Refused when the run has not been evaluated, or the file is broken.
    """
    file = run.path / "predictions.csv"
    try:
        rows = read_rows(file)
        answers = {r["path"]: Answer(r["label"], r["prediction"], float(r["confidence"])) for r in rows}
    except FileNotFoundError:
        if kind_of(run.path.parent) == "search":
            raise Refused(f"{run.path} is a trial of a search; {winner_command(run.path.parent)}") from None
        untested = f"{run.path} has not been tested; run: {evaluate_command(run)}"
        raise Refused(run.stopped() or untested) from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise Refused(f"{file} is damaged ({error}); run: {evaluate_command(run)}") from error
    again = f"run: {evaluate_command(run)}"
    if not rows or len(answers) < len(rows) or any(None in answer for answer in answers.values()):
        raise Refused(f"{file} is empty, cut off or names an image twice; {again}")
    if not all(0 <= answer.confidence <= 1.0001 for answer in answers.values()):
        raise Refused(f"{file} has a confidence that is not from 0 to 1; {again}")
    return dict(sorted(answers.items()))


def confused_pairs(answers: Mapping[str, Answer], most: int = PAIRS) -> list[tuple[str, str, int]]:
    """(true class, prediction, images) of the ``most`` frequent kinds of mistakes, most frequent first."""
    wrong = Counter((answer.label, answer.prediction) for answer in answers.values() if not answer.right)
    ranked = sorted(wrong.items(), key=lambda one: (-one[1], one[0]))
    return [(label, prediction, count) for (label, prediction), count in ranked[:most]]
