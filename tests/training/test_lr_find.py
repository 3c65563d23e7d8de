"""The range test: rates grow as asked, the suggestion follows from the curve, nothing is written."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from finetune101.cli.main import main
from finetune101.config import TrainConfig
from finetune101.training.job import prepare
from finetune101.training.loop import fit
from finetune101.training.lr_find import judge, range_test


def test_rates_grow_evenly_on_a_log_scale_until_the_loss_explodes(small: TrainConfig) -> None:
    # without the dropout of SqueezeNet, whose noise hides on a few images that the loss falls
    model = dataclasses.replace(small.model, name="resnet18")
    test = range_test(prepare(dataclasses.replace(small, model=model)), 1e-4, 100.0, 40)
    ratios = [b / a for a, b in zip(test.rates, test.rates[1:], strict=False)]
    assert ratios == pytest.approx([(1e6) ** (1 / 39)] * len(ratios))
    assert test.rates[0] == pytest.approx(1e-4) and all(math.isfinite(loss) for loss in test.losses)
    assert test.lowest == test.rates[test.losses.index(min(test.losses))]
    assert test.suggestion == pytest.approx(test.lowest / 10) and f"{test.suggestion:.2g}" in test.reason


def test_the_same_job_gives_the_same_curve(small: TrainConfig) -> None:
    one, two = (range_test(prepare(dataclasses.replace(small, exp=name)), 1e-3, 3.0, 20) for name in "ab")
    assert one == two


@pytest.mark.parametrize(
    ("losses", "stopped", "said"),
    [([4, 3, 2, 1, 2], False, "from there it grows"), ([5, 4, 3, 2], True, "grows"), ([4, 3, 2, 1], False, "too low")],
)
def test_what_a_curve_says(losses: list[float], stopped: bool, said: str) -> None:
    test = judge([10.0**n for n in range(len(losses))], losses, stopped=stopped)
    assert test.suggestion == 100.0 and said in test.reason


def test_it_starts_from_a_random_output_layer(small: TrainConfig) -> None:
    """The probe of the fine-tuning recipes leaves no loss to fall, so that its curve said nothing."""
    model = dataclasses.replace(small.model, name="resnet18", freeze_norm=True)
    probed = dataclasses.replace(small, exp="solved", model=dataclasses.replace(model, head="probe"))
    job = prepare(probed)
    before = {k: v.clone() for k, v in job.built.model.state_dict().items()}
    result = range_test(job, 1e-4, 100.0, 40)
    after = job.built.model.state_dict()
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert result.losses[0] == pytest.approx(math.log(3), abs=0.6) and "random output layer" in result.reason
    with pytest.raises(ValueError, match="has no epoch to find a rate for"):
        none = dataclasses.replace(small.optim, epochs=0)
        range_test(
            prepare(dataclasses.replace(small, exp="none", optim=none, model=dataclasses.replace(model, head="probe")))
        )


def test_a_flat_curve_says_nothing() -> None:
    for losses in ([2.00, 2.01, 2.0, 1.99, 1.985, 1.98, 2.0], [0.010, 0.0101, 0.00995, 0.0099, 0.0098, 0.02]):
        with pytest.raises(ValueError, match="no rate to find"):
            judge([10.0**n for n in range(len(losses))], losses, stopped=True)


def test_with_a_teacher(small: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Found by its name in the folder of runs, though the test itself trains in a temporary one."""
    teacher = dataclasses.replace(small, exp="teacher", optim=dataclasses.replace(small.optim, epochs=1))
    list(fit(prepare(teacher), quiet=True))
    words = "--recipe original --no-pretrain --model resnet18 --size 32 --batch-size 8 --threads 1 --teacher teacher"
    places = ["--runs", small.runs, "--data", str(small.data.root), "--out", str(tmp_path / "lr.png")]
    assert main(["lr-find", *words.split(), *places, "--steps", "20", "--low", "1e-4"]) == 0
    assert "--lr" in capsys.readouterr().out and (tmp_path / "lr.png").is_file()
    assert [path.name for path in Path(small.runs).iterdir()] == ["teacher"]


def test_what_cannot_work_is_refused(small: TrainConfig) -> None:
    job = prepare(small)
    for low, high, steps, said in ((1.0, 0.1, 20, "range"), (0.0, 1.0, 20, "range"), (0.1, 1.0, 5, "--steps")):
        with pytest.raises(ValueError, match=said):
            range_test(job, low, high, steps)
    with pytest.raises(ValueError, match="never fell"):
        judge([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], stopped=True)
