"""A student learns from trained networks, and not from those that would make its result a lie."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from finetune101.config import ModelConfig, Preprocessing, TrainConfig, to_dict
from finetune101.machine import World
from finetune101.run import Run
from finetune101.training.distill import Teachers, distillation_loss
from finetune101.training.job import prepare
from finetune101.training.loop import Trainer, fit


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


def test_the_loss_by_hand() -> None:
    """The student's outputs (1, 0, 0), the teachers' probabilities (.5, .25, .25), the label 1.

    Cross-entropy with the label: log(e + 2) = 1.5514. With the teachers: 1.5514 - .5 = 1.0514. At temperature 2:
    log(e^.5 + 2) - .5 * .5 = 1.0444, times 4.
    """
    output, target, taught = torch.tensor([[1.0, 0, 0]]), torch.tensor([1]), torch.tensor([[0.5, 0.25, 0.25]])
    for share, temperature, expected in ((1.0, 1.0, 1.0514), (1.0, 2.0, 4.1775), (0.25, 2.0, 2.2079)):
        loss = distillation_loss(output, target, taught, share, temperature)
        assert float(loss) == pytest.approx(expected, abs=2e-4)
    mixed = torch.tensor([[0.0, 0.5, 0.5]])  # the shares of a mixed image give the same as the label here
    assert float(distillation_loss(output, mixed, taught, 0.25, 2.0)) == pytest.approx(2.2079, abs=2e-4)
    # a label that is smoothed by .3: .9 * 1.5514 + .1 * .5514; the teachers' part is left as it is
    smooth = distillation_loss(output, target, taught, 0.5, 1.0, label_smoothing=0.3)
    assert float(smooth) == pytest.approx(0.5 * (0.9 * 1.5514 + 0.1 * 0.5514) + 0.5 * 1.0514, abs=2e-4)


def test_without_labels_their_values_do_not_count() -> None:
    output, taught = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
    losses = {float(distillation_loss(output, torch.full((4,), label), taught, 1.0, 2.0)) for label in range(3)}
    assert len(losses) == 1


def test_the_gradient_is_none_where_the_student_agrees_and_alike_at_every_temperature() -> None:
    wanted = torch.tensor([[2.0, -1.0, 0.5]])
    for temperature in (1.0, 4.0):
        output = wanted.clone().requires_grad_()
        taught = (wanted / temperature).softmax(1)
        distillation_loss(output, torch.tensor([0]), taught, 1.0, temperature).backward()
        assert output.grad is not None and float(output.grad.abs().max()) < 1e-6
    sizes = []
    for temperature in (20.0, 40.0):  # at high temperatures, both match the outputs themselves
        output = torch.zeros(1, 3, requires_grad=True)
        distillation_loss(output, torch.tensor([0]), (wanted / temperature).softmax(1), 1.0, temperature).backward()
        assert output.grad is not None
        sizes.append(float(output.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_the_teachers_see_the_mixed_images_of_the_student(small: TrainConfig, teacher: Run) -> None:
    augment = dataclasses.replace(small.augment, mix=1.0, mixup_alpha=1.0)
    config = dataclasses.replace(student(small, teacher_share=1.0, teacher_temperature=2.0), augment=augment)
    job = prepare(change(config, precision="fp32"))
    teachers = Teachers([(Fixed(), job.built.preprocessing)], job.built.preprocessing, job.world)
    trainer = Trainer(dataclasses.replace(job, teachers=teachers))
    trainer.wrap()
    x, y, _ = next(iter(trainer.source.train([1])))
    mixed, shares, taught = trainer.mixed(x, y, 0)
    assert taught is not None and not torch.equal(mixed, x) and shares.shape == taught.shape
    torch.testing.assert_close(taught, teachers.probabilities(mixed, 2.0))
    assert not torch.allclose(taught, teachers.probabilities(x, 2.0))
    _, loss = trainer.step(mixed, shares, taught)
    assert torch.isfinite(loss)


def test_the_probabilities_are_the_mean_of_the_teachers() -> None:
    """A grey image of value 1 in the student's numbers: softmax(1, 0, 0) is .576, .212, .212; of (.5, 0, 0) .452."""
    student = Preprocessing(size=32, cache_size=32, mean=(0,) * 3, std=(1,) * 3, interpolation="bilinear")
    world, teacher = World(torch.device("cpu"), "fp32", False), Fixed()
    x = torch.ones(2, 3, 32, 32)
    teachers = Teachers([(teacher, student)], student, world)
    sure = torch.tensor([0.5761, 0.2119, 0.2119])
    torch.testing.assert_close(teachers.probabilities(x), sure.expand(2, 3), atol=1e-4, rtol=0)
    warm = torch.tensor([0.4519, 0.2741, 0.2741])
    torch.testing.assert_close(teachers.probabilities(x, 2.0), warm.expand(2, 3), atol=1e-4, rtol=0)

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
