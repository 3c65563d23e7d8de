"""How long a training takes is told within its first steps, and telling it changes nothing."""

from __future__ import annotations

import dataclasses
import re

import pytest

from finetune101.config import AugmentConfig, TrainConfig
from finetune101.training.forecast import in_words
from finetune101.training.job import prepare
from finetune101.training.loop import fit

TIMES = {"seconds", "val_seconds", "images_per_s"}


def test_the_time_left_is_told_early_and_changes_no_number(
    small: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    optim = dataclasses.replace(small.optim, epochs=4, ema=0.9)
    config = dataclasses.replace(small, optim=optim, augment=AugmentConfig(train_sizes=(32, 48), crop_scale=0.5))
    silent = list(fit(prepare(config), quiet=True))
    assert "to go" not in capsys.readouterr().out
    epochs = fit(prepare(config, overwrite=True))
    loud = [next(epochs)]
    out = capsys.readouterr().out
    loud += list(epochs)
    assert len(re.findall(r"^About \d+ (seconds?|minutes) to go", out, flags=re.MULTILINE)) == 1
    assert "to go" not in capsys.readouterr().out  # once
    for one, other in zip(silent, loud, strict=True):
        assert {k: v for k, v in one.items() if k not in TIMES} == {k: v for k, v in other.items() if k not in TIMES}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 second"), (40, "40 seconds"), (720, "12 minutes"), (59_400, "16.5 hours"), (400_000, "4.6 days")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
