"""The score of a run says how much of it stands without test images that were trained on in another file."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from finetune101.cli.main import main
from finetune101.config import DataConfig, SystemConfig, TrainConfig
from finetune101.data import splits
from finetune101.errors import Refused
from finetune101.evaluation import evaluate as evaluation
from finetune101.evaluation.checkpoint import open_network, read_checkpoint, world_of
from finetune101.evaluation.evaluate import evaluate
from finetune101.evaluation.forward import Forward
from finetune101.evaluation.result import score_text
from finetune101.machine import World, detect
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import fit


@pytest.mark.parametrize("copies", [0, 1])
def test_images_with_a_near_duplicate_in_training(
    small: TrainConfig, tiny_data: Path, tmp_path: Path, copies: int
) -> None:
    for name in ("ball", "box"):
        for i, path in enumerate(sorted((tiny_data / name).iterdir())):
            part = ("train", "train", "val", "test")[i % 4]
            (tmp_path / "data" / part / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, tmp_path / "data" / part / name / path.name)
    if copies:
        with Image.open(tiny_data / "ball/image_0001.jpg") as image:  # trained on
            image.resize((80, 60)).save(tmp_path / "data/test/ball/again.jpg", quality=80)
        shutil.copyfile(tiny_data / "box/image_0003.jpg", tmp_path / "data/test/box/validated.jpg")
    optim = dataclasses.replace(small.optim, epochs=1)
    data = DataConfig(root=str(tmp_path / "data"), protocol="folders")
    job = prepare(dataclasses.replace(small, data=data, optim=optim))
    list(fit(job, quiet=True))
    result = evaluate(job.run)
    with open(job.run.path / "predictions.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "again" not in row["path"]]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert result["n"] == 6 + 2 * copies and len(rows) == 6 + copies
    assert result["without_duplicates"] == {"n": len(rows), "top1": pytest.approx(100 * right / len(rows))}
    assert ("Without the 1 that have a near-duplicate in training: " in score_text(result)) == bool(copies)


class Left(torch.nn.Module):
    """Sees how bright the left half of an image is: class 0, and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = x[..., : x.shape[-1] // 2].mean((1, 2, 3))
        return torch.stack([left, torch.zeros_like(left)], 1)


def test_an_image_and_its_mirror_image() -> None:
    x = torch.zeros(3, 3, 8, 8)
    x[0, ..., :4], x[1, ..., 4:] = 6.0, 2.0  # bright on the left, a little on the right, dark
    world = World(torch.device("cpu"), "fp32", channels_last=True)
    assert Forward(Left(), world)(x)[:, 0].tolist() == [6.0, 0.0, 0.0]
    assert Forward(Left(), world, mirror=True)(x)[:, 0].tolist() == [3.0, 1.0, 0.0]


def test_each_look_at_the_test_is_counted(small: TrainConfig) -> None:
    run = trained(small)
    assert evaluate(run)["mirror"] is False
    twice = evaluate(run, mirror=True)
    assert twice["mirror"] is True and twice["times_scored"] == 2


def test_scoring_and_predicting_keep_the_threads(small: TrainConfig) -> None:
    """As in a study, whose runs share the cores."""
    run = trained(small)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            evaluate(run)
            open_network(run)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_number_format_that_this_machine_lacks_is_fp32() -> None:
    here = detect(SystemConfig())
    lacking = {"fp16"} if here.device.type != "cuda" else set()
    for device in ("cpu", "cuda", "mps"):  # whatever kind of device the run was trained on
        for precision in ("fp32", "bf16", "fp16"):
            world = world_of({"device": device, "precision": precision, "channels_last": True})
            has = precision in ("fp32", here.precision) and precision not in lacking
            assert (world.device, world.precision) == (here.device, precision if has else "fp32")


def trained(config: TrainConfig, **optim: object) -> Run:
    """A run of one epoch."""
    wanted = dataclasses.replace(config.optim, epochs=1, **optim)  # type: ignore[arg-type]
    job = prepare(dataclasses.replace(config, optim=wanted))
    list(fit(job, quiet=True))
    return job.run


def spoil(run: Run, value: float) -> None:
    """Writes ``value`` into the weights of the best epoch."""
    state, info = read_checkpoint(run.best)
    name = next(iter(state))
    state[name].view(-1)[0] = value
    save_file(state, run.best, info)


def test_a_run_of_before_gets_its_temperature_at_its_test(
    small: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint holds none, and stays as it is."""
    run = trained(small)
    state, info = read_checkpoint(run.best)
    save_file(state, run.best, {key: value for key, value in info.items() if key != "temperature"})
    whole = run.best.read_bytes()
    photo = str(next(Path(str(small.data.root)).glob("*/*.jpg")))
    assert main(["predict", str(run.path), photo]) == 0
    assert "not calibrated" in capsys.readouterr().err
    result = evaluate(run)
    assert result["temperature"] == 1 and "too few" in score_text(result)
    kept = run.read_json("temperature.json")
    assert kept["temperature"] == 1 and run.best.read_bytes() == whole
    run.write_json("temperature.json", {**kept, "temperature": 2.0})
    assert evaluate(run)["temperature"] == 2
    assert main(["predict", str(run.path), photo]) == 0
    assert "not calibrated" not in capsys.readouterr().err


@pytest.mark.parametrize("fit_on", ["train", "train+val"])
def test_what_is_said_of_a_temperature(small: TrainConfig, fit_on: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Known when the training ends, with its reason where it is 1; never where nothing was kept from training."""
    data = dataclasses.replace(small.data, fit_on=fit_on)
    job = prepare(dataclasses.replace(small, data=data, optim=dataclasses.replace(small.optim, epochs=1)))
    list(fit(job))
    photo = str(next(Path(str(small.data.root)).glob("*/*.jpg")))
    capsys.readouterr()
    for _ in range(2):  # before and after the test
        network = open_network(job.run)
        assert main(["predict", str(job.run.path), photo]) == 0
        errors = capsys.readouterr().err
        if fit_on == "train":
            assert network.temperature == 1 and "not calibrated" not in errors
            assert evaluate(job.run)["temperature_reason"] == "6 validation images are too few to find a temperature"
        else:
            assert network.temperature is None and "trained on its validation images" in errors
            assert "no validation images were kept" in evaluate(job.run)["temperature_reason"]
    assert not job.run.has("temperature.json")


def test_checkpoints_of_before_say_why_their_temperature_is_one(small: TrainConfig) -> None:
    run = trained(small)
    state, info = read_checkpoint(run.best)
    save_file(state, run.best, {**info, "temperature": "1.000000"})  # without the reason
    assert evaluate(run)["temperature_reason"] == "6 validation images are too few to find a temperature"


def test_a_temperature_is_kept_for_the_weights_that_were_scored(
    small: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process overwrites the run meanwhile."""
    run = trained(small)
    scored = run.best.read_bytes()
    real = evaluation.scores

    def overwrite(*arguments: object) -> object:
        spoil(run, 7.0)
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "scores", overwrite)
        evaluate(run)
    assert run.best.read_bytes() != scored
    assert run.read_json("temperature.json")["weights"] == hashlib.sha256(scored).hexdigest()
    assert open_network(run).temperature is None
    run.best.write_bytes(scored)
    assert open_network(run).temperature == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_test_as_it_was(
    small: TrainConfig, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(small)
    evaluate(run)
    before = {name: (run.path / name).read_bytes() for name in ("test.json", "predictions.csv")}
    spoil(run, value)
    photo = str(next(Path(str(small.data.root)).glob("*/*.jpg")))
    for words in (["evaluate", str(run.path)], ["evaluate", str(run.path), "--subset", "val"]):
        assert main(words) == 2
        assert "not finite" in capsys.readouterr().err
    assert main(["predict", str(run.path), photo]) == 2
    streams = capsys.readouterr()
    assert "not finite" in streams.err and not streams.out
    assert before == {name: (run.path / name).read_bytes() for name in before}


def test_files_of_a_test_do_not_contradict_each_other(small: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while they are written leaves both as they were, or a test that is counted."""
    run = trained(small)
    evaluate(run)
    before = [(run.path / name).read_bytes() for name in ("test.json", "predictions.csv")]
    real = os.replace

    def crash(fatal: str, source: Path, target: Path) -> None:
        if Path(target).name == fatal:
            raise KeyboardInterrupt
        real(source, target)

    for fatal, counted in (("test.json", 1), ("predictions.csv", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", functools.partial(crash, fatal))
            with pytest.raises(KeyboardInterrupt):
                evaluate(run, mirror=True)
        assert run.read_json("test.json")["times_scored"] == counted
        assert (run.path / "predictions.csv").read_bytes() == before[1]
    assert not list(run.path.glob("*.part"))


def test_a_frozen_backbone_is_told(small: TrainConfig) -> None:
    assert "frozen_backbone" not in evaluate(trained(small))
    for changes in ({"freeze": True}, {"head": "probe"}):
        model = dataclasses.replace(small.model, name="resnet18", **changes)  # type: ignore[arg-type]
        # a step of nothing: the start remains the best
        run = trained(dataclasses.replace(small, exp=str(next(iter(changes))), model=model), lr=1e-12)
        result = evaluate(run)
        assert result["frozen_backbone"] is True and run.read_json("test.json")["frozen_backbone"] is True
        assert "rozen backbone" in score_text(result)


def test_a_split_without_test_images_is_scored_on_validation(
    small: TrainConfig, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(small)
    split = run.read_json("split.json")
    split["subsets"]["train"] += split["subsets"].pop("test")
    manifest = splits.from_json({**split, "subsets": {**split["subsets"], "test": []}})
    run.write_json("split.json", manifest.to_json())
    assert main(["evaluate", str(run.path)]) == 0
    streams = capsys.readouterr()
    assert "no test images" in streams.err and streams.out.startswith("Val")
    assert not run.has("test.json")
    with pytest.raises(Refused, match="--as-test"):
        evaluate(run)


def test_validation_images_that_were_trained_on_are_no_test(small: TrainConfig) -> None:
    data = dataclasses.replace(small.data, fit_on="train+val")
    job = prepare(dataclasses.replace(small, data=data, optim=dataclasses.replace(small.optim, epochs=1)))
    list(fit(job, quiet=True))
    with pytest.raises(Refused, match="--as-test"):
        evaluate(job.run, subset="val")
