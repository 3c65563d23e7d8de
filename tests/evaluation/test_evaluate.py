"""The score of a run says how much of it stands without test images that were trained on in another file."""

from __future__ import annotations

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from finetune101.cli import score_text
from finetune101.config import DataConfig, SystemConfig, TrainConfig
from finetune101.evaluation.evaluate import evaluate
from finetune101.evaluation.inference import mirrored, open_network, world_of
from finetune101.runs import Run
from finetune101.training.loop import fit
from finetune101.training.prepare import prepare
from finetune101.world import detect

START = {"init_source": "random (seed 0)", "init_hash": "sha256:00"}


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


class Edge(torch.nn.Module):
    """Sees the left column only: its mean is the logit of class 0, minus it that of class 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = x[:, 0, :, 0].mean(1)
        return torch.stack([left, -left], 1)


def test_an_image_and_its_mirror_image(small: TrainConfig) -> None:
    """An image that is 3 at the left and 1 at the right: both ways, the edges have a mean of 2."""
    image = torch.tensor([3.0, 0.0, 1.0]).expand(1, 3, 3, 3)
    torch.testing.assert_close(mirrored(Edge())(image), torch.tensor([[2.0, -2.0]]))
    torch.testing.assert_close(mirrored(Edge())(image.flip(3)), torch.tensor([[2.0, -2.0]]))
    job = prepare(dataclasses.replace(small, optim=dataclasses.replace(small.optim, epochs=1)))
    list(fit(job, quiet=True))
    assert evaluate(job.run)["mirror"] is False
    again = evaluate(job.run, mirror=True)
    assert again["mirror"] is True and again["times_scored"] == 2


def test_scoring_and_predicting_keep_the_threads(small: TrainConfig) -> None:
    """As in a study, whose runs share the cores."""
    job = prepare(dataclasses.replace(small, optim=dataclasses.replace(small.optim, epochs=1)))
    list(fit(job, quiet=True))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            evaluate(job.run)
            open_network(job.run)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_number_format_that_this_machine_lacks_is_not_emulated(tmp_path: Path) -> None:
    run, here = Run(tmp_path), detect(SystemConfig())
    for precision, expected in (("fp32", "fp32"), (here.precision, here.precision), ("fp16", here.precision)):
        run.write_json(
            "env.json",
            {"world": {"device": here.device.type, "precision": precision, "channels_last": True}, "model": START},
        )
        assert world_of(run).precision == expected
