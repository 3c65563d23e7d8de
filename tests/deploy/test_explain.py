"""Maps lie where the object is, in every network; pictures, names and neighbours of ``explain``."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune101 import load
from finetune101.cli.main import main
from finetune101.config import SystemConfig
from finetune101.demo.dataset import picture
from finetune101.deploy import neighbours
from finetune101.deploy.explain import BAR, GAP, LINE, Explainer, Explanation, class_numbers, overlay, picture_names
from finetune101.deploy.neighbours import training_images
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.machine import detect
from finetune101.models.build import build
from finetune101.models.table import lookup, names
from finetune101.run import Run

TIMM = ("timm:resnet10t", "timm:convnext_atto", "timm:vit_tiny_patch16_224")
HALVES: dict[str, Callable[[Any, int], Any]] = {
    "left": lambda values, middle: values[:, :middle],
    "right": lambda values, middle: values[:, -middle:],
    "top": lambda values, middle: values[:middle],
    "bottom": lambda values, middle: values[-middle:],
}


def linear_in_its_image(name: str, size: int) -> nn.Module:
    """The network ``name`` with random weights, in which a blank place has no effect.

    No layer adds a constant to its input, and attention mixes tokens in the last block alone. So only the place of an
    object can speak for a class, and a map that lies elsewhere is turned, mirrored or of the wrong tokens.
    """
    torch.manual_seed(0)
    model = build(name, 8, pretrain=False, size=size).model.eval()
    attentions = [
        key for key in model.state_dict() if re.search(r"(self_attention\.out_proj|attn\.proj)\.weight$", key)
    ]
    with torch.no_grad():
        for key, value in model.named_parameters():
            mixes = key in attentions[:-1]
            if mixes or key.endswith("bias") or "pos" in key or "cls_token" in key:
                value.zero_()
            elif not value.any():  # a layer that begins at 0
                nn.init.normal_(value, std=0.02)
    return model


def scene(size: int, half: str) -> torch.Tensor:
    """(1, 3, size, size): noise in the middle of one half, 0 elsewhere."""
    quarter = size // 4
    object_in_left = torch.randn(3, 2 * quarter, quarter, generator=torch.Generator().manual_seed(1))
    x = torch.zeros(1, 3, size, size)
    x[0, :, quarter : 3 * quarter, :quarter] = object_in_left
    x = x if half in ("left", "right") else x.transpose(2, 3)
    return x if half in ("left", "top") else x.flip(3 if half == "right" else 2)


@pytest.mark.parametrize("name", [*names(), *TIMM])
def test_the_map_lies_on_the_half_with_the_object(name: str) -> None:
    """An object in one half, the other half blank; the four halves tell a map that is turned or mirrored."""
    size = 224 if "vit" in name else 128
    model = linear_in_its_image(name, size)
    trained = TrainedNetwork(
        model=model,
        preprocessing=lookup(name).preprocessing,
        classes=list("abcdefgh"),
        world=detect(SystemConfig(device="cpu")),
        architecture=name,
    )
    explainer = Explainer(trained)
    for half, part in list(HALVES.items())[:: 2 if name == "vit_b_16" else 1]:
        x = scene(size, half)
        with torch.no_grad():
            best = int(model(x).argmax())
        (values,) = explainer.maps(x, [best])
        middle = len(values) // 2
        there = part(values, middle)
        assert there.max() == 1 and there.sum() / values.sum() > 0.75, half


@pytest.mark.parametrize("kind", ["umbrella", "anchor"])
def test_a_released_network_looks_at_the_object(kind: str) -> None:
    network = load("released_finetune")
    thing = picture(kind, np.random.default_rng(3)).resize((160, 160))
    for left in (0, 160):
        scene = Image.new("RGB", (320, 160), (124, 116, 104))
        scene.paste(thing, (left, 0))
        (values,) = network.explain(scene).maps
        half = values[:, : len(values) // 2] if left == 0 else values[:, len(values) // 2 :]
        assert half.max() == 1 and half.sum() / values.sum() > 0.7


def test_several_classes_and_a_class_that_is_not_there(runs: Path, tiny_data: Path) -> None:
    network = load(runs / "a")
    explanation = network.explain(tiny_data / "ball/image_0001.jpg", ["box", "ball"])
    assert [name for name, _ in explanation.classes] == ["box", "ball"] and explanation.maps.shape[0] == 2
    predicted = dict(network.predict(tiny_data / "ball/image_0001.jpg").classes)  # type: ignore[union-attr]
    assert dict(explanation.classes) == pytest.approx({name: predicted[name] for name in ("box", "ball")}, abs=1e-6)
    assert explanation.maps.min() >= 0 and explanation.maps.max() <= 1
    assert explanation._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(Refused, match=r"there is no class 'bal'; did you mean ball\?"):
        network.explain(tiny_data / "ball/image_0001.jpg", "bal")
    assert class_numbers(["b"], ["a", "b"]) == [1]


def test_the_overlay_colours_only_where_the_map_is() -> None:
    values = np.zeros((8, 8), np.float32)
    values[:, 6:] = 1
    pixels = np.asarray(overlay(Image.new("RGB", (64, 64), (90, 120, 200)), values)).astype(int)
    left, right = pixels[:, :30], pixels[:, 52:]
    assert (left.max(2) == left.min(2)).all() and (right[..., 0] - right[..., 2] > 80).all()


def test_the_picture_says_what_its_colours_mean() -> None:
    values = np.ones((1, 8, 8), np.float32)
    explanation = Explanation(Image.new("RGB", (320, 100), (9, 9, 9)), (("cat", 0.5),), values)
    pixels = np.asarray(explanation.picture()).astype(int)
    legend = pixels[-2 * LINE :]
    scale = legend[LINE // 2, GAP : GAP + BAR]
    assert np.ptp(scale[0]) == 0 and scale[-1, 0] - scale[-1, 2] > 100  # from grey to yellow
    assert (legend[:, GAP + BAR :].min(2) < 100).sum() > 200  # words
    assert len(pixels) == GAP + 100 + LINE + GAP // 2 + 2 * LINE


def test_names_of_pictures_are_safe_and_different(tmp_path: Path) -> None:
    files = ["a/cat.jpg", "b/cat.png", "c/Cat.gif", "a/..%2f\n<x>.jpg", "é.jpg", "nul.jpg"]
    pictures = picture_names(files, tmp_path)
    assert [picture.name for picture in pictures.values()] == [
        "cat.png",
        "cat_2.png",
        "Cat_3.png",
        "2f_x0a_x.png",
        "é.png",
        "image_nul.png",
    ]
    (tmp_path / "cat_2.png").touch()
    with pytest.raises(Refused, match=r"cat_2\.png is there"):
        picture_names(files, tmp_path)
    assert picture_names(files, tmp_path, overwrite=True) == pictures


def test_explain_writes_a_picture_and_names_the_nearest(
    runs: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Run(runs / "a").read_json("split.json")["subsets"]["train"][0]
    words = ["explain", str(runs / "a"), str(tiny_data / trained), "--out", str(tmp_path / "out")]
    assert main([*words, "--target", "box", "--target", "ball", "--neighbours", "3"]) == 0
    lines = capsys.readouterr().out
    assert re.search(rf"0\.000  {trained.split('/')[0]}  {re.escape(str(tiny_data / trained))}", lines)
    assert len(re.findall(r"^ +\d\.\d{3}  ", lines, re.M)) == 3 and "box" in lines
    (file,) = (tmp_path / "out").iterdir()
    with Image.open(file) as picture:
        assert picture.format == "PNG" and picture.width > 480
    assert main(words) == 2 and "is there; give another --out, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--neighbours", "0"]) == 0
    assert main([*words, "--overwrite", "--target", "boxes"]) == 2
    assert "did you mean box?" in capsys.readouterr().err


def test_an_image_that_cannot_be_read_does_not_end_the_others(
    runs: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    good = tiny_data / "ball/image_0001.jpg"
    words = [str(bad), str(good), "--out", str(tmp_path / "out"), "--neighbours", "0"]
    assert main(["explain", str(runs / "a"), *words]) == 1
    assert "failed: " in capsys.readouterr().err and (tmp_path / "out/image_0001.png").is_file()


def test_at_most_some_training_images_of_each_class_are_passed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of them where their features are kept already."""
    monkeypatch.setenv("FINETUNE101_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(neighbours, "PER_CLASS", 2)
    run = Run(runs / "a")
    some, again = training_images(run), training_images(run)
    assert [path.split("/")[0] for path in some.paths] == ["ball", "ball", "box", "box", "stripes", "stripes"]
    assert some.paths == again.paths and "6 of " in str(some)
    words = ["explain", str(run.path), str(some.root / some.paths[0]), "--out", str(tmp_path / "out")]
    assert main(words) == 0 and "at most 2 of each class" in capsys.readouterr().err
    monkeypatch.setattr(neighbours, "PER_CLASS", 100)
    training_images(run)
    monkeypatch.setattr(neighbours, "PER_CLASS", 2)
    everything = training_images(run)
    assert len(everything.paths) == everything.total > 6 and "all" in str(everything)


def test_neighbours_of_what_names_no_training_images(runs: Path) -> None:
    training = training_images(Run(runs / "a"))
    assert len(training.paths) == len(Run(runs / "a").read_json("split.json")["subsets"]["train"])
    with pytest.raises(Refused, match="which images it was trained on"):
        training_images("best.safetensors")
