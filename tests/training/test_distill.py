"""A student learns from trained networks, and not from those that would make its result a lie."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finetune101.config import ModelConfig, TrainConfig, to_dict
from finetune101.data.batches import eval_batches
from finetune101.evaluation.inference import load_model
from finetune101.runs import Run
from finetune101.training.loop import fit
from finetune101.training.prepare import prepare


def train(config: TrainConfig) -> Run:
    job = prepare(config)
    for _ in fit(job, quiet=True):
        pass
    return job.run


@pytest.fixture
def teacher(small: TrainConfig) -> Run:
    return train(dataclasses.replace(small, exp="teacher"))


def student(small: TrainConfig, **optim: object) -> TrainConfig:
    changed = {"teacher": ("teacher",), **optim}
    return dataclasses.replace(small, exp="student", optim=dataclasses.replace(small.optim, **changed))  # type: ignore[arg-type]


def change(config: TrainConfig, **system: object) -> TrainConfig:
    return dataclasses.replace(config, system=dataclasses.replace(config.system, **system))  # type: ignore[arg-type]


def test_the_targets_are_the_teachers_probabilities(small: TrainConfig, teacher: Run) -> None:
    job = prepare(change(student(small), precision="fp32"))
    assert job.teachers
    paths, labels = job.manifest.subsets["train"], job.manifest.labels("train")
    x, y = next(iter(eval_batches(job.images, paths, labels, batch_size=4, world=job.world)))
    with torch.no_grad(), job.world.autocast():
        theirs = load_model(teacher)[0](x).float().softmax(1)
    classes = torch.eye(len(job.manifest.classes))
    for share, target in ((1.0, y), (0.5, y), (0.5, classes[y])):
        expected = share * theirs + (1 - share) * classes[y]
        torch.testing.assert_close(job.teachers.targets(x, target, share), expected, atol=1e-5, rtol=0)
    larger = torch.nn.functional.interpolate(x, 48)
    with torch.no_grad(), job.world.autocast():
        seen = torch.nn.functional.interpolate(larger, 32, mode="bilinear", antialias=True)
        theirs = load_model(teacher)[0](seen).float().softmax(1)
    torch.testing.assert_close(job.teachers.probabilities(larger), theirs, atol=1e-5, rtol=0)


def test_a_student_trains_and_goes_on(small: TrainConfig, teacher: Run) -> None:
    run = train(student(small, epochs=2, label_smoothing=0.1))
    assert [record["epoch"] for record in run.metrics()] == [1, 2]
    assert run.config().optim.teacher == ("teacher",)
    alone = train(dataclasses.replace(student(small, epochs=2, label_smoothing=0.1, teacher=()), exp="alone"))
    assert alone.metrics()[-1]["train_loss"] != run.metrics()[-1]["train_loss"]


def test_two_teachers_are_averaged(small: TrainConfig, teacher: Run) -> None:
    job = prepare(student(small, teacher=("teacher", str(teacher.path))))
    assert job.teachers and len(job.teachers.networks) == 2


def test_refused(small: TrainConfig, teacher: Run) -> None:
    with pytest.raises(ValueError, match="another split"):
        prepare(dataclasses.replace(student(small), data=dataclasses.replace(small.data, split_seed=7)))
    with pytest.raises(ValueError, match="no run named nobody"):
        prepare(student(small, teacher=("nobody",)))
    with pytest.raises(ValueError, match="--teacher-share is 2"):
        prepare(student(small, teacher_share=2))
    teacher.write_json("config.json", to_dict(TrainConfig(exp="teacher", model=ModelConfig(pretrain=True))))
    with pytest.raises(ValueError, match="began from ImageNet weights"):
        prepare(student(small))
    assert not (teacher.path.parent / "student").exists()
