"""Several runs as one classifier: their mean probabilities (Dietterich, 2000)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.evaluation import metrics
from finetune101.evaluation.evaluate import (
    calibrations,
    check_batch_size,
    check_not_trained,
    open_scored,
    prediction_rows,
    scores,
    times_scored,
)
from finetune101.evaluation.metrics import Calibrated
from finetune101.evaluation.predictions import write_pair
from finetune101.files import FORMAT
from finetune101.run import Run


def ensemble(
    runs: Sequence[Run],
    out: Path,
    *,
    subset: str = "test",
    data: str | None = None,
    batch_size: int = 64,
    mirror: bool = False,
) -> dict[str, Any]:
    """Scores the mean of the calibrated probabilities of ``runs`` on ``subset``; "test" is written to ``out``.

    The test is counted in the members' own test.json too. Raises Refused for fewer than two runs, a run named twice,
    runs of different splits, images that are not those of the split, and validation images that a member was trained
    on.
    """
    if len(runs) < 2:
        raise Refused("an ensemble needs two runs or more; name them all")
    places = [run.path.resolve() for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise Refused(f"{twice.path} is named twice; name each run once")
    check_batch_size(batch_size)
    if (out / "config.json").exists():
        raise Refused(f"{out} is a run of its own; give the ensemble another --out")
    for run in runs:
        check_not_trained(run, subset)
    hashes = [splits.from_json(run.read_json("split.json")).hash() for run in runs]
    for run, other in zip(runs, hashes, strict=True):
        if other != hashes[0]:
            raise Refused(f"{run.path} was trained on another split than {runs[0].path}; name runs of one split")
    first = open_scored(runs[0], data, mirror=mirror)
    members = [first, *(open_scored(run, data, first.index, mirror) for run in runs[1:])]

    temperatures = [member.calibrated(batch_size).temperature for member in members]

    def outputs(subset: str) -> tuple[Tensor, Tensor]:
        return mean_log_probabilities([member.logits(subset, batch_size) for member in members], temperatures)

    output, labels = outputs(subset)
    result = scores(output, labels)
    if frozen := [str(run.path) for run, member in zip(runs, members, strict=True) if member.network.frozen_backbone]:
        result["frozen_members"] = frozen
    if layers := {layer for run in runs for layer in run.config().model.random_layers}:
        result["random_layers"] = sorted(layers)
    if subset == "test":
        result |= {"runs": [str(run.path) for run in runs], "manifest_hash": hashes[0], "mirror": mirror}
        result["protocol"] = first.manifest.protocol
        chosen = all(member.chosen_on_val for member in members)
        reason = "a member was trained on the validation images, or there are none"
        calibrated = metrics.calibrate(*outputs("val")) if chosen else Calibrated(temperature=1.0, reason=reason)
        result |= calibrations(output, labels, calibrated, chosen)
        for run in runs:
            if run.has("test.json"):
                run.write_json("test.json", {**run.read_json("test.json"), "times_scored": times_scored(run) + 1})
        result["times_scored"] = times_scored(Run(out)) + 1
        rows = prediction_rows(first.manifest, output, calibrated.temperature)
        write_pair(out, "", {"format": FORMAT, **result}, rows)
    return result


def mean_log_probabilities(
    outputs: Sequence[tuple[Tensor, Tensor]], temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Logits (N, classes) and labels (N,) of each network, its temperature -> log of the mean probabilities, labels."""
    pairs = zip(outputs, temperatures, strict=True)
    each = torch.stack([torch.log_softmax(output.double() / t, 1) for (output, _), t in pairs])
    return (torch.logsumexp(each, 0) - torch.tensor(float(len(each))).log()).float(), outputs[0][1]
