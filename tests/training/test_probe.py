"""The linear head: its optimum, its choice by validation, and the run that it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finetune101.config import AugmentConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig
from finetune101.data import store
from finetune101.evaluation.evaluate import evaluate
from finetune101.training.job import prepare
from finetune101.training.loop import fit
from finetune101.training.probe import solve


@pytest.fixture
def base(small: TrainConfig) -> TrainConfig:
    model = ModelConfig(name="resnet18", pretrain=False, size=32, head="probe")
    return dataclasses.replace(small, exp="probe", model=model, optim=OptimConfig(epochs=0, batch_size=8))


def test_solve_finds_where_the_gradient_is_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=generator), torch.randint(3, (60,), generator=generator)
    weight = solve(x, y, 3, 0.1).requires_grad_()
    loss = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + 0.05 * (weight[:-1] ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3


def test_the_head_alone_changes_and_the_run_can_be_tested(base: TrainConfig) -> None:
    job = prepare(base)
    before = {key: value.clone() for key, value in job.built.model.state_dict().items()}
    records = list(fit(job, quiet=True))
    assert [record["epoch"] for record in records] == [0] and records[0]["best"]
    assert records[0]["probe_l2"] in base.model.probe_l2 and records[0]["train_top1"] > 60
    changed = [key for key, value in job.built.model.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["fc.weight", "fc.bias"]
    assert evaluate(job.run, subset="val")["top1"] == pytest.approx(records[0]["val_top1"])


def test_epochs_after_the_probe_start_from_it(base: TrainConfig) -> None:
    config = dataclasses.replace(base, optim=OptimConfig(epochs=1, batch_size=8, lr=1e-9))
    first, second = fit(prepare(config), quiet=True)
    assert (first["epoch"], second["epoch"], second["step"]) == (0, 1, 3)


def test_cached_features_train_as_the_frozen_network_does(base: TrainConfig) -> None:
    """The same order, steps and rates: only what the network sees of an image is not computed anew."""
    model = dataclasses.replace(base.model, head="random", freeze=True)
    config = dataclasses.replace(
        base,
        model=model,
        optim=OptimConfig(epochs=3, batch_size=8, lr=0.05, weight_decay=1e-3),
        augment=AugmentConfig(flip=False),
        system=SystemConfig(threads=1, precision="fp32"),
    )
    cached = dataclasses.replace(config, exp="cached", model=dataclasses.replace(model, cached_features=True))
    plain, fast = prepare(config), prepare(cached)
    for a, b in zip(fit(plain, quiet=True), fit(fast, quiet=True), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
        assert b["val_loss"] == pytest.approx(a["val_loss"], rel=1e-4)
    states = [job.built.model.state_dict() for job in (plain, fast)]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-4)
    assert evaluate(fast.run, subset="val")["top1"] == pytest.approx(fast.run.metrics()[-1]["val_top1"])


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("model", {"head": "random", "cached_features": True}, "--cached-features needs --freeze"),
        ("model", {"freeze": True, "cached_features": True}, "--cached-features needs --head random"),
        ("model", {"name": "squeezenet1_1"}, "linear layer"),
        ("data", {"fit_on": "train+val"}, "--probe-l2"),
        ("model", {"head": "random"}, "--epochs is 0"),
        ("augment", {"train_sizes": (16,)}, "--train-sizes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    base: TrainConfig, part: str, values: dict[str, object], message: str
) -> None:
    config = dataclasses.replace(base, **{part: dataclasses.replace(getattr(base, part), **values)})
    with pytest.raises(ValueError, match=message):
        prepare(config)
    assert not Path(config.runs).exists()


def recorded(config: TrainConfig, exp: str) -> tuple[float, list[float | None]]:
    """Seconds of the first record, and the validation losses."""
    records = list(fit(prepare(dataclasses.replace(config, exp=exp)), quiet=True))
    return records[0]["seconds"], [record["val_loss"] for record in records]


@pytest.mark.parametrize("cached_features", [False, True])
def test_cached_features_cost_what_they_took(
    base: TrainConfig, cached_features: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    if cached_features:
        model = dataclasses.replace(base.model, head="random", freeze=True, cached_features=True)
        optim = OptimConfig(epochs=2, batch_size=8)
        base = dataclasses.replace(base, model=model, optim=optim, augment=AugmentConfig(flip=False))
    first, losses = recorded(base, "first")
    (file,) = (tmp_path / "cache").glob("features_*")
    (entry,) = [one for one in store.cache_entries() if one.file == file]
    assert entry.note and 0 < entry.note.seconds < first
    # as if computing had taken 1000 seconds on the day of the first run
    values = np.load(file)
    store.keep_array(store.Place(file.name, values.shape, np.float32), [values], "features", 1000.0)
    second, same = recorded(base, "second")
    assert 1000 < second < 1000 + 60 and same == losses


@pytest.mark.parametrize("content", [b"hello"])
def test_damaged_features_are_computed_anew(
    base: TrainConfig,
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    _, losses = recorded(base, "first")
    (file,) = (tmp_path / "cache").glob("features_*")
    file.write_bytes(content)
    assert recorded(base, "second")[1] == losses == recorded(base, "third")[1]
    said = capsys.readouterr().out
    assert said.count("is damaged (") == 1 and file.name in said
