"""A weights file may lack some layers: they start at random, and whoever shows the numbers of the network says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torchvision

from finetune101.cli.main import main
from finetune101.run import Run


def train(name: str, *words: str) -> int:
    common = "--recipe original --model squeezenet1_1 --size 32 --batch-size 8 --threads 1 --epochs 1 --runs runs"
    return main(["train", "--exp", name, *common.split(), *words])


def test_a_random_layer_is_told_everywhere(tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torchvision.models.squeezenet1_1().state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(("features.12.", "classifier."))}
    safetensors.torch.save_file(state, "part.safetensors")
    random_layers = ["--weights", "part.safetensors", "--random-layers", "features.12"]
    assert train("part", "--data", str(tiny_data), *random_layers) == 0
    assert train("scratch", "--data", str(tiny_data), "--no-pretrain") == 0
    run = Run(here / "runs" / "part")
    assert run.config().model.random_layers == ("features.12",)
    assert run.read_json("env.json")["model"]["init_source"].endswith("; features.12 at random (seed 0)")
    capsys.readouterr()

    told = "started at random, not from ImageNet weights: features.12"
    for name in ("part", "scratch"):
        assert main(["evaluate", name, "--runs", "runs"]) == 0
        assert (told in capsys.readouterr().out) is (name == "part")
    assert run.read_json("test.json")["random_layers"] == ["features.12"]
    assert main(["compare", "runs/part", "runs/scratch", "--out", "comparison"]) == 0
    text = capsys.readouterr().out
    assert f"part: beside the output layer, these layers {told}" in text and text.count(told) == 1
    for target in ("runs/part", "comparison"):
        for lang, sentence in {"en": told, "zh": "features.12。"}.items():
            out = f"page_{lang}"
            assert main(["report", target, "--out", out, "--lang", lang, "--no-gallery", "--no-explain"]) == 0
            assert sentence in Path(out, "report.md").read_text(encoding="utf-8")


def test_what_contradicts_a_random_layer_is_refused(
    tiny_data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, problem in {
        "--no-pretrain": "--no-pretrain starts every layer at random; leave --random-layers out",
        "--freeze": "--freeze would keep --random-layers as they start",
    }.items():
        assert train("a", "--data", str(tiny_data), "--random-layers", "features.12", *words.split()) == 2
        assert problem in capsys.readouterr().err
    assert not Path("runs").exists()
