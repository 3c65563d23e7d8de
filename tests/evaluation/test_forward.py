"""What predict says of a test image is what predictions.csv says: to the last digit where PyTorch answers."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import SystemConfig
from finetune101.evaluation.checkpoint import read_checkpoint
from finetune101.machine import detect
from finetune101.run import Run

HAS_BF16 = detect(SystemConfig(device="cpu")).precision == "bf16"
WORDS = "--no-pretrain --model efficientnet_lite0 --size 40 --cache-size 48 --batch-size 12 --threads 1 --epochs 1"


@pytest.fixture(
    scope="module",
    params=["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16, reason="no bf16 on this processor"))],
)
def run(request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tested run of one epoch, with a temperature of 2.5."""
    folder = tmp_path_factory.mktemp("forward")
    words = ["--exp", "one", "--runs", str(folder), "--data", str(tiny_data), "--precision", request.param]
    assert main(["train", *words, *WORDS.split()]) == 0
    run = Run(folder / "one")
    state, info = read_checkpoint(run.best)
    assert float(info["temperature"]) == 1  # six validation images tell none
    save_file(state, run.best, {**info, "temperature": "2.5"})
    assert main(["evaluate", str(run.path)]) == 0
    return run


def predicted(network: str, files: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """File -> class and probability of four digits, as the command prints them."""
    capsys.readouterr()
    assert main(["predict", network, *files, "--csv", *words]) == 0
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    return {row["path"]: [row["class_1"], f"{float(row['probability_1']):.4f}"] for row in rows}


def test_predict_gives_what_the_test_gave(run: Run, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run.path / "predictions.csv", newline="") as file:
        tested = {str(tiny_data / row["path"]): [row["prediction"], row["confidence"]] for row in csv.DictReader(file)}
    files, precision = list(tested), run.read_json("env.json")["world"]["precision"]
    moved = run.path.parent / "moved.safetensors"
    shutil.copy(run.best, moved)
    if precision == detect(SystemConfig()).precision:  # PyTorch answers
        assert predicted(str(moved), files, capsys) == tested
    labels = predicted(str(run.path), files, capsys)  # ONNX Runtime answers, in fp32
    if precision == "fp32":
        assert {file: name for file, (name, _) in labels.items()} == {file: name for file, (name, _) in tested.items()}
        for file, (_, share) in labels.items():
            assert float(share) == pytest.approx(float(tested[file][1]), abs=2e-4)


def test_order_and_batch_size_change_no_answer(run: Run, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(map(str, tiny_data.rglob("*.jpg")))[:13]
    labels = predicted(str(run.path), files, capsys)
    assert predicted(str(run.path), files[::-1], capsys, "--batch-size", "2") == labels
    assert predicted(str(run.path), files[3:4], capsys) == {files[3]: labels[files[3]]}
    assert predicted(str(run.best), files, capsys, "--batch-size", "1") == labels


def test_the_batch_size_changes_no_score(run: Run) -> None:
    before = (run.path / "predictions.csv").read_bytes()
    result = run.read_json("test.json")
    for size in ("1", "5"):
        assert main(["evaluate", str(run.path), "--batch-size", size]) == 0
        again = run.read_json("test.json")
        assert {**again, "times_scored": 0} == {**result, "times_scored": 0}
        assert (run.path / "predictions.csv").read_bytes() == before


def test_validation_in_training_is_that_of_evaluate(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run.path), "--subset", "val"]) == 0
    best = [record for record in run.metrics() if record["best"]][-1]
    out = capsys.readouterr().out
    assert f"{best['val_top1']:.2f} %" in out and f"loss: {best['val_loss']:.4f}" in out


def test_the_confidence_is_calibrated(run: Run, tiny_data: Path) -> None:
    test = run.read_json("test.json")
    assert test["temperature"] == test["calibration_scaled"]["temperature"] == 2.5
    with open(run.path / "predictions.csv", newline="") as file:
        mean = torch.tensor([float(row["confidence"]) for row in csv.DictReader(file)]).mean()
    bins = [one for one in test["calibration_scaled"]["bins"] if one["n"]]
    assert float(mean) == pytest.approx(sum(one["n"] * one["confidence"] for one in bins) / test["n"] / 100, abs=1e-4)
