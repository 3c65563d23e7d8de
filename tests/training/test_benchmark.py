"""The benchmark measures what it says, on small images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune101.cli.main import main
from finetune101.recipes import RECIPES


def test_a_row_per_format(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    words = f"benchmark --models resnet18 --data {tiny_data} --size 32 --batch-size 8 --steps 1 --repeats 1 --every"
    assert main([*words.split(), "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    formats = {(row["precision"], row["channels_last"]) for row in result["rows"]}
    assert len(formats) == 4 and result["machine"]["cores"] and result["versions"]["torch"]
    for row in result["rows"]:
        assert row["step_images_per_s"] > 0 and row["data_images_per_s"] > 0 and row["whole_images_per_s"] > 0
        whole, step = row["whole_images_per_s"], row["step_images_per_s"]
        rounding = 0.05 / whole + 0.05 / step  # they have one decimal, and a busy machine is slow
        assert row["whole_vs_step"] == pytest.approx(whole / step, rel=0.01 + rounding)
    assert "resnet18" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--batch-size", "1000"], ["--steps", "0"], ["--models", "resnet17"]])
def test_bad_values_are_one_sentence(words: list[str], tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "--data", str(tiny_data), *words]) == 2
    assert capsys.readouterr().err.count("error:") == 1


def test_every_recipe_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name}\n" in said and f"--recipe {name}" in (recipe.__doc__ or "")
