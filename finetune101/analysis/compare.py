"""Two finished runs on the same test images: how far apart they are, and how sure that is."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune101.data import splits
from finetune101.evaluation import metrics
from finetune101.runs import Run

Predictions = dict[str, tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the two runs; accuracies in percent, over the test images."""

    name: str
    network: str
    init_source: str
    init_hash: str
    epoch: int
    correct: int
    top1: float
    top1_interval: tuple[float, float]
    mean_per_class: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The two arms and their paired difference (a minus b, percentage points) over the same ``n`` test images."""

    a: Arm
    b: Arm
    n: int
    manifest_hash: str
    difference: float
    difference_interval: tuple[float, float]
    mcnemar_p: float
    only_a: int
    only_b: int


def compare(run_a: Run, run_b: Run) -> Comparison:
    """Compares the test predictions of two runs, image by image.

    Every number is computed from predictions.csv and must agree with test.json. Raises ValueError when a run has not
    been evaluated, its files contradict each other, or the two were split differently.
    """
    if run_a.path.resolve() == run_b.path.resolve():
        raise ValueError(f"{run_a.path} cannot be compared with itself; name two runs")
    split_a, split_b = (splits.from_json(run.read_json("split.json")).hash() for run in (run_a, run_b))
    if split_a != split_b:
        raise ValueError(
            f"{run_a.path} and {run_b.path} were split differently; train one of them again with "
            f"--split {(run_a.path / 'split.json').as_posix()}"
        )
    predictions_a, predictions_b = read_predictions(run_a), read_predictions(run_b)
    if {path: label for path, (label, _) in predictions_a.items()} != {
        path: label for path, (label, _) in predictions_b.items()
    }:
        raise ValueError(f"{run_a.path} and {run_b.path} were tested on different images; evaluate both again")
    for run in (run_a, run_b):
        best = [record["epoch"] for record in run.metrics() if record["best"]]
        if best and best[-1] != run.read_json("test.json")["epoch"]:
            raise ValueError(f"{run.path} was trained on after its test; evaluate it again")
    names = (run_a.name, run_b.name) if run_a.name != run_b.name else (run_a.path.as_posix(), run_b.path.as_posix())
    paths = sorted(predictions_a)
    right_a = np.array([predictions_a[path][0] == predictions_a[path][1] for path in paths])
    right_b = np.array([predictions_b[path][0] == predictions_b[path][1] for path in paths])
    difference, low, high = metrics.paired_bootstrap(right_a, right_b)
    return Comparison(
        a=_arm(run_a, names[0], predictions_a, split_a),
        b=_arm(run_b, names[1], predictions_b, split_b),
        n=len(paths),
        manifest_hash=split_a,
        difference=difference,
        difference_interval=(low, high),
        mcnemar_p=metrics.mcnemar_exact(right_a, right_b),
        only_a=int(np.sum(right_a & ~right_b)),
        only_b=int(np.sum(right_b & ~right_a)),
    )


def read_predictions(run: Run) -> Predictions:
    """predictions.csv of an evaluated run: {path: (label, prediction)}, both class names.

    Raises ValueError when the run has not been evaluated, or the file is broken.
    """
    file = run.path / "predictions.csv"
    try:
        with open(file, newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened, strict=True))
        predictions = {row["path"]: (row["label"], row["prediction"]) for row in rows}
    except FileNotFoundError:
        raise ValueError(f"{run.path} has not been tested; run: finetune101 evaluate {run.path}") from None
    except (KeyError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); run: finetune101 evaluate {run.path}") from error
    if not rows or len(predictions) < len(rows) or any(None in pair for pair in predictions.values()):
        raise ValueError(f"{file} is empty, cut off or names an image twice; run: finetune101 evaluate {run.path}")
    return predictions


def _arm(run: Run, name: str, predictions: Predictions, manifest_hash: str) -> Arm:
    """What one run contributes. Raises ValueError when test.json does not belong to its predictions and split."""
    test, env = run.read_json("test.json"), run.read_json("env.json")
    classes = {label: i for i, label in enumerate(sorted({name for pair in predictions.values() for name in pair}))}
    labels = [classes[label] for label, _ in predictions.values()]
    predicted = [classes[prediction] for _, prediction in predictions.values()]
    correct = sum(label == prediction for label, prediction in predictions.values())
    if (test.get("n"), test.get("correct"), test.get("manifest_hash")) != (len(predictions), correct, manifest_hash):
        raise ValueError(
            f"test.json of {run.path} does not belong to its predictions.csv and split.json; "
            f"run: finetune101 evaluate {run.path}"
        )
    return Arm(
        name=name,
        network=run.config().model.name,
        init_source=env["model"]["init_source"],
        init_hash=env["model"]["init_hash"],
        epoch=test["epoch"],
        correct=correct,
        top1=100 * correct / len(predictions),
        top1_interval=metrics.wilson(correct, len(predictions)),
        mean_per_class=metrics.mean_per_class(predicted, labels, len(classes)),
    )


def text(comparison: Comparison) -> str:
    """The comparison as lines for a terminal."""
    c = comparison
    width = max(len(c.a.name), len(c.b.name), len("difference"))
    low, high = c.difference_interval
    lines = [
        f"Tested on the same {c.n} images (95 % intervals)",
        "",
        f"{'':{width}}  {'right answers':26}  mean per class",
        *(_row(arm, width, c.n) for arm in (c.a, c.b)),
        f"{'difference':{width}}  {_points(c.difference)} points ({_points(low)} to {_points(high)})",
        "",
        f"Only {c.a.name} is right: {_images(c.only_a)}. Only {c.b.name} is right: {_images(c.only_b)}.",
        f"McNemar's exact test that both are equally good: p = {c.mcnemar_p:.2g}.",
        _verdict(c),
        "This is one training run each: another seed or split would give somewhat other numbers.",
    ]
    for arm in (c.a, c.b):
        lines += [
            "",
            f"{arm.name}: {arm.network}, weights of epoch {arm.epoch}",
            f"  started from: {arm.init_source}",
            f"  initial state: {arm.init_hash[:19]}",
        ]
    if c.a.network != c.b.network:
        lines += ["", "The networks differ, so the difference does not come from the start of training alone."]
    return "\n".join(lines)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain JSON types."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(comparison)))
    return values


def _row(arm: Arm, width: int, n: int) -> str:
    low, high = arm.top1_interval
    interval = f"({low:.2f} to {high:.2f})"
    return f"{arm.name:{width}}  {arm.top1:6.2f} % {interval:17}  {arm.mean_per_class:6.2f} %    {arm.correct} of {n}"


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _verdict(c: Comparison) -> str:
    if c.mcnemar_p >= 0.05:
        return "So these images do not tell the two apart."
    better = c.a.name if c.difference > 0 else c.b.name
    return f"So {better} is better, by more than the choice of test images explains."
