"""Several runs as one classifier: their mean probabilities (Dietterich, 2000)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune101.data import splits
from finetune101.evaluation import metrics
from finetune101.evaluation.evaluate import calibration, scores, subset_logits, write_predictions
from finetune101.evaluation.inference import load_model, world_of
from finetune101.runs import Run, write_json


def ensemble(
    runs: Sequence[Run], out: Path, *, subset: str = "test", data: str | None = None, batch_size: int = 64
) -> dict[str, Any]:
    """Scores the mean probabilities of ``runs`` on ``subset``; "test" is written to ``out`` like an evaluation's.

    The test is counted in the members' own test.json too. Raises ValueError for fewer than two runs, runs of different
    splits, images that are not those of the split, and validation images that a member was trained on.
    """
    if len(runs) < 2:
        raise ValueError("an ensemble needs two runs or more; name them all")
    if batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; give at least 1")
    if (out / "config.json").exists():
        raise ValueError(f"{out} is a run of its own; give the ensemble another --out")
    for run in runs:
        if subset == "val" and run.config().data.fit_on == "train+val":
            raise ValueError(f"{run.path} was trained on the validation images; name runs with --fit-on train")
    manifest = splits.from_json(runs[0].read_json("split.json"))
    for run in runs[1:]:
        if splits.from_json(run.read_json("split.json")).hash() != manifest.hash():
            raise ValueError(f"{run.path} was trained on another split than {runs[0].path}; name runs of one split")

    def outputs(subset: str) -> tuple[Tensor, Tensor]:
        return mean_log_probabilities([_logits(run, manifest, subset, data, batch_size) for run in runs])

    output, labels = outputs(subset)
    result = scores(output, labels)
    if subset == "test":
        result |= {"runs": [str(run.path) for run in runs], "manifest_hash": manifest.hash()}
        result |= {"protocol": manifest.protocol, "calibration": calibration(output, labels)}
        if manifest.subsets["val"] and all(run.config().data.fit_on == "train" for run in runs):
            t = metrics.temperature(*outputs("val"))
            result["calibration_scaled"] = {"temperature": t, **calibration(output / t, labels)}
        for run in runs:  # a test set that is looked at often is no test set
            if run.has("test.json"):
                known = run.read_json("test.json")
                run.write_json("test.json", {**known, "times_scored": known.get("times_scored", 0) + 1})
        before = Run(out).read_json("test.json") if Run(out).has("test.json") else {}
        result["times_scored"] = before.get("times_scored", 0) + 1
        write_json(out / "test.json", result)
        write_predictions(out / "predictions.csv", manifest, output)
    return result


def mean_log_probabilities(outputs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of each network -> log of the mean probabilities, labels."""
    each = torch.stack([torch.log_softmax(output.double(), 1) for output, _ in outputs])
    return (torch.logsumexp(each, 0) - torch.tensor(float(len(each))).log()).float(), outputs[0][1]


def _logits(
    run: Run, manifest: splits.Manifest, subset: str, data: str | None, batch_size: int
) -> tuple[Tensor, Tensor]:
    model, preprocessing, classes = load_model(run)
    if tuple(classes) != manifest.classes:
        raise ValueError(f"{run.best} knows other classes than the split of {run.path}; train the run again")
    source = run.config().data
    source = source if data is None else dataclasses.replace(source, root=data)
    return subset_logits(model, preprocessing, manifest, source, world_of(run), subset, batch_size)
