"""A student learns from trained networks, and not from those that would make its result a lie."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from finetune101.config import ModelConfig, Preprocessing, TrainConfig, to_dict
from finetune101.machine import World
from finetune101.run import Run
from finetune101.training.distill import Teachers
from finetune101.training.job import prepare
from finetune101.training.loop import fit


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


class Fixed:
    """A teacher that answers a mean over each image: the larger the first channel, the surer of class 0."""

    def __call__(self, x: Tensor) -> Tensor:
        self.shape, self.mean = x.shape, float(x.mean())
        return torch.stack([x[:, 0].mean((1, 2)), torch.zeros(len(x)), torch.zeros(len(x))], 1)


def test_the_targets_are_the_mean_of_the_teachers_probabilities_and_the_labels() -> None:
    """A grey image of value 1 in the student's numbers: softmax(1, 0, 0) is .576, .212, .212."""
    student = Preprocessing(size=32, cache_size=32, mean=(0,) * 3, std=(1,) * 3, interpolation="bilinear")
    world, teacher = World(torch.device("cpu"), "fp32", False), Fixed()
    x, y = torch.ones(2, 3, 32, 32), torch.tensor([1, 2])
    teachers = Teachers([(teacher, student)], student, world)
    sure = torch.tensor([0.5761, 0.2119, 0.2119])
    torch.testing.assert_close(teachers.targets(x, y, 1.0), sure.expand(2, 3), atol=1e-4, rtol=0)
    expected = torch.tensor([[0.2881, 0.6060, 0.1060], [0.2881, 0.1060, 0.6060]])
    torch.testing.assert_close(teachers.targets(x, y, 0.5), expected, atol=1e-4, rtol=0)
    shares = torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])  # of mixed images
    expected = torch.tensor([[0.2881, 0.3560, 0.3560], [0.7881, 0.1060, 0.1060]])
    torch.testing.assert_close(teachers.targets(x, shares, 0.5), expected, atol=1e-4, rtol=0)

    # a second one that is sure of nothing: the mean of .576 and .333; it expects 2 times the value, 64 px
    other = Preprocessing(size=64, cache_size=64, mean=(0.5,) * 3, std=(0.25,) * 3, interpolation="bilinear")
    flat = Fixed()
    two = Teachers([(teacher, student), (lambda x: flat(x) * 0, other)], student, world)
    expected = torch.tensor([0.4547, 0.2726, 0.2726]).expand(2, 3)
    torch.testing.assert_close(two.probabilities(x), expected, atol=1e-4, rtol=0)
    assert flat.shape == (2, 3, 64, 64) and flat.mean == pytest.approx(2.0)  # (1 - .5) / .25
    assert teacher.shape == (2, 3, 32, 32)


def test_a_larger_image_is_resized_for_the_teacher(small: TrainConfig, teacher: Run) -> None:
    job = prepare(change(student(small), precision="fp32"))
    assert job.teachers
    flat = torch.full((1, 3, 32, 32), 0.7)
    same = torch.nn.functional.interpolate(flat, 48)  # of one colour, so that no filter changes it
    torch.testing.assert_close(job.teachers.probabilities(same), job.teachers.probabilities(flat), atol=1e-5, rtol=0)


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
    both = dataclasses.replace(small, exp="both", data=dataclasses.replace(small.data, fit_on="train+val"))
    train(both)
    with pytest.raises(ValueError, match="validation images"):
        prepare(student(small, teacher=("teacher", "both")))
    fine = dataclasses.replace(student(small, teacher=("both",)), exp="fine", data=both.data)
    assert prepare(fine).teachers  # it validates on nothing either
    with pytest.raises(ValueError, match="no run named nobody"):
        prepare(student(small, teacher=("nobody",)))
    with pytest.raises(ValueError, match="--teacher-share is 2"):
        prepare(student(small, teacher_share=2))
    teacher.write_json("config.json", to_dict(TrainConfig(exp="teacher", model=ModelConfig(pretrain=True))))
    with pytest.raises(ValueError, match="began from ImageNet weights"):
        prepare(student(small))
    assert not (teacher.path.parent / "student").exists()
