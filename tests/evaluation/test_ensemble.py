"""An ensemble is the mean of its members' probabilities, on the images that all of them share."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune101.config import TrainConfig
from finetune101.errors import Refused
from finetune101.evaluation.ensemble import ensemble, mean_log_probabilities
from finetune101.evaluation.evaluate import evaluate
from finetune101.evaluation.result import score_text
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import fit


def trained(config: TrainConfig, exp: str, seed: int = 0, **data: object) -> Run:
    source = dataclasses.replace(config.data, **data)  # type: ignore[arg-type]
    optim, system = dataclasses.replace(config.optim, epochs=1), dataclasses.replace(config.system, seed=seed)
    job = prepare(dataclasses.replace(config, exp=exp, data=source, optim=optim, system=system))
    list(fit(job, quiet=True))
    return job.run


def test_the_mean_of_probabilities() -> None:
    a, b, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([0])
    mean = (torch.softmax(a, 1) + torch.softmax(b, 1)) / 2
    output, same = mean_log_probabilities([(a, labels), (b, labels)], [1.0, 1.0])
    torch.testing.assert_close(output.exp(), mean)
    assert torch.equal(same, labels)


def test_members_are_calibrated_first() -> None:
    a, b, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.tensor([0])
    mean = (torch.softmax(a / 4, 1) + torch.softmax(b / 0.5, 1)) / 2
    output, _ = mean_log_probabilities([(a, labels), (b, labels)], [4.0, 0.5])
    torch.testing.assert_close(output.exp(), mean)


def test_the_folder_holds_the_evidence_of_two_equal_runs(small: TrainConfig, tmp_path: Path) -> None:
    run = trained(small, "one")
    twin = Run(run.path.with_name("twin"))
    shutil.copytree(run.path, twin.path)
    alone, both = evaluate(run), ensemble([run, twin], tmp_path / "both")
    assert run.read_json("test.json")["times_scored"] == 2 and both["times_scored"] == 1
    assert both["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert {k: both[k] for k in ("n", "correct", "top1")} == {k: alone[k] for k in ("n", "correct", "top1")}
    assert json.loads((tmp_path / "both" / "test.json").read_text())["runs"] == [str(run.path), str(twin.path)]
    with open(tmp_path / "both" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["label"] == row["prediction"] for row in rows) == alone["correct"] and len(rows) == alone["n"]


def test_members_with_a_frozen_backbone_are_named(small: TrainConfig, tmp_path: Path) -> None:
    whole = trained(small, "whole")
    frozen = trained(dataclasses.replace(small, model=dataclasses.replace(small.model, freeze=True)), "frozen")
    result = ensemble([whole, frozen], tmp_path / "both", subset="val")
    assert result["frozen_members"] == [str(frozen.path)]
    assert f"only the output layer was trained of {frozen.path}" in score_text(result, "val")


def test_a_run_named_twice_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    run = trained(small, "one")
    evaluate(run)
    (tmp_path / "link").symlink_to(run.path)
    for again in (run, Run(tmp_path / "link")):
        with pytest.raises(Refused, match="twice"):
            ensemble([run, again], tmp_path / "both")
    assert run.read_json("test.json")["times_scored"] == 1 and not (tmp_path / "both").exists()


def test_validation_is_not_written(small: TrainConfig, tmp_path: Path) -> None:
    runs = [trained(small, "one"), trained(small, "two", seed=1)]
    assert ensemble(runs, tmp_path / "out", subset="val")["n"] == 6
    assert not (tmp_path / "out").exists()


def test_what_cannot_work_is_refused(small: TrainConfig, tmp_path: Path) -> None:
    run = trained(small, "one")
    with pytest.raises(ValueError, match="two runs or more"):
        ensemble([run], tmp_path)
    other = trained(small, "other", split_seed=7)
    with pytest.raises(ValueError, match="another split"):
        ensemble([run, other], tmp_path)
    with pytest.raises(ValueError, match="is a run of its own"):
        ensemble([run, other], run.path)
    both = trained(small, "both", fit_on="train+val")
    with pytest.raises(ValueError, match="was trained on the validation images"):
        ensemble([run, both], tmp_path, subset="val")
