"""Learning rates follow torch's StepLR exactly, and the published cosine."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import timm.utils
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from finetune101.config import ModelConfig, OptimConfig, TrainConfig
from finetune101.training.optim import Average, factor, optimizer, set_rates

STEPS = 7  # per epoch


class Net(nn.Module):
    """Two layers, of which ``fc`` is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x).relu())


def config(pretrain: bool = True, **optim: object) -> TrainConfig:
    settings = OptimConfig(**optim)  # type: ignore[arg-type]
    return TrainConfig(exp="x", model=ModelConfig(pretrain=pretrain), optim=settings)


def rates(sgd: SGD) -> dict[str, float]:
    return {group["name"]: group["lr"] for group in sgd.param_groups}


@pytest.mark.parametrize(("step_size", "gamma"), [(10, 0.5), (30, 0.1), (1, 0.9), (4, 1.0)])
def test_step_is_torchs_steplr(step_size: int, gamma: float) -> None:
    settings = config(epochs=40, step_size=step_size, gamma=gamma, lr=0.01)
    own, reference = optimizer(Net(), "fc.", settings), optimizer(Net(), "fc.", settings)
    scheduler = StepLR(reference, step_size=step_size, gamma=gamma)
    for epoch in range(settings.optim.epochs):
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            set_rates(own, factor(settings.optim, step, STEPS))
            assert rates(own) == pytest.approx(rates(reference), rel=1e-12)
        reference.step()  # as the original: once per epoch, after its steps
        scheduler.step()


@pytest.mark.parametrize(
    ("pretrain", "ratio", "expected"), [(True, None, 0.001), (False, None, 0.01), (True, 0.5, 0.005), (False, 0, 0)]
)
def test_two_groups_of_parameters(pretrain: bool, ratio: float | None, expected: float) -> None:
    settings = config(pretrain, lr=0.01, backbone_lr_ratio=ratio, momentum=0.9, weight_decay=1e-5)
    model = Net()
    sgd = optimizer(model, "fc.", settings)
    assert rates(sgd) == pytest.approx({"head": 0.01, "backbone": expected})
    held = {group["name"]: {id(p) for p in group["params"]} for group in sgd.param_groups}
    assert held["head"] == {id(p) for p in model.fc.parameters()}
    assert held["backbone"] == {id(p) for p in model.body.parameters()}
    assert all((g["momentum"], g["weight_decay"], g["nesterov"]) == (0.9, 1e-5, False) for g in sgd.param_groups)


def test_cosine_falls_from_one_to_zero() -> None:
    o = OptimConfig(schedule="cosine", epochs=10)
    values = [factor(o, step, STEPS) for step in range(10 * STEPS)]
    assert values[0] == 1 and values == sorted(values, reverse=True)
    assert values[5 * STEPS] == pytest.approx(0.5)
    assert 0 < values[-1] < 0.01
    assert values[13] == pytest.approx(0.5 * (1 + math.cos(math.pi * 13 / 70)))


def test_cosine_warms_up_linearly() -> None:
    o = OptimConfig(schedule="cosine", epochs=10, warmup_epochs=2)
    values = [factor(o, step, STEPS) for step in range(10 * STEPS)]
    rises = [b - a for a, b in itertools.pairwise(values[:15])]
    assert rises == pytest.approx([1 / 15] * 14) and values[0] == pytest.approx(1 / 15) and values[14] == 1
    assert values[14:] == sorted(values[14:], reverse=True)


def test_the_whole_step_is_that_of_the_original() -> None:
    """Ten steps as the original writes them, with torch's own scheduler, move the parameters to the same place."""
    torch.manual_seed(0)
    ours = Net()
    expected = Net()
    expected.load_state_dict(ours.state_dict())
    settings = config(epochs=10, step_size=3, gamma=0.5, lr=0.1, weight_decay=1e-2)
    sgd = optimizer(ours, "fc.", settings)
    groups = [{"params": expected.fc.parameters(), "lr": 0.1}, {"params": expected.body.parameters(), "lr": 0.01}]
    reference = SGD(groups, momentum=0.9, weight_decay=1e-2)
    scheduler = StepLR(reference, step_size=3, gamma=0.5)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    for step in range(10):
        set_rates(sgd, factor(settings.optim, step, 1))
        for model, update in ((ours, sgd), (expected, reference)):
            update.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            update.step()
        scheduler.step()
    for a, b in zip(ours.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_nesterov_reaches_the_optimizer() -> None:
    settings = config(nesterov=True)
    assert optimizer(Net(), "fc.", settings).param_groups[0]["nesterov"]
    plain = dataclasses.replace(settings, optim=OptimConfig())
    assert not optimizer(Net(), "fc.", plain).param_groups[0]["nesterov"]


def test_biases_and_norms_can_be_left_undecayed() -> None:
    sgd = optimizer(Net(), "fc.", config(weight_decay=0.1, norm_weight_decay=False))
    decay = {tuple(p.shape): group["weight_decay"] for group in sgd.param_groups for p in group["params"]}
    assert decay == {(4, 4): 0.1, (3, 4): 0.1, (4,): 0.0, (3,): 0.0}
    assert rates(sgd) == pytest.approx({"head": 0.01, "backbone": 0.001})


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_torch(nesterov: bool) -> None:
    ours, torchs = Net(), Net()
    torchs.load_state_dict(ours.state_dict())
    settings = OptimConfig(lr=0.1, weight_decay=0.01, nesterov=nesterov)
    step = optimizer(ours, "fc.", TrainConfig(exp="a", optim=settings))
    expected = SGD(
        [{"params": torchs.fc.parameters()}, {"params": torchs.body.parameters(), "lr": step.param_groups[1]["lr"]}],
        lr=0.1, momentum=settings.momentum, weight_decay=0.01, nesterov=nesterov,
    )  # fmt: skip
    for seed in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
        for net, one in ((ours, step), (torchs, expected)):
            one.zero_grad()
            net(x).square().mean().backward()
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), torchs.parameters(), strict=True))
    again = optimizer(Net(), "fc.", TrainConfig(exp="a", optim=settings))
    again.load_state_dict(step.state_dict())
    buffers = [one.state_dict()["state"][3]["momentum_buffer"] for one in (again, expected)]
    assert torch.equal(*buffers)


def test_the_average_is_that_of_timm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ours, timms = Average(model), timm.utils.ModelEmaV3(model)
    for seed in range(5):
        model(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad)
        ours.update(model, 0.3)
        timms.apply_update_(model, 0.3)
    for name, tensor in timms.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], tensor), name
    ours.set(model)
    assert all(torch.equal(a, b) for a, b in zip(ours.module.parameters(), model.parameters(), strict=True))
