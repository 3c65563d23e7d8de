"""Parity: a file whose answers are not those of its network is not kept, and what the answers are compared on."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from random_networks import kept_network
from torch import Tensor, nn

from finetune101.data.decode import decode
from finetune101.deploy import export
from finetune101.deploy.export import Source, export_network
from finetune101.deploy.graph import onnx_graph
from finetune101.deploy.onnx_network import Difference, Parity
from finetune101.deploy.parity import (
    LabelledImages,
    cached_batches,
    check_8_bits,
    check_parity,
    parity_text,
    whole_picture,
)
from finetune101.errors import Refused
from finetune101.evaluation.unlike import fit_unlike
from finetune101.models.table import lookup

pytestmark = pytest.mark.usefixtures("exported_once")


class _OtherWhenExported(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.model(x)
        return -output if torch.compiler.is_compiling() else output


def test_a_file_with_other_answers_is_not_kept(pictures: LabelledImages, tmp_path: Path) -> None:
    network = kept_network("squeezenet1_1")
    entry = lookup("squeezenet1_1")
    odd = _OtherWhenExported(network.model)
    odd.classifier = network.model.classifier  # type: ignore[assignment]
    assert entry.head.startswith("classifier.")
    with pytest.raises(Refused, match="another class"):
        export_network(Source(dataclasses.replace(network, model=odd), pictures), tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_how_many_answers_may_change() -> None:
    def parity(images: int, changed: int) -> Parity:
        return Parity(images=images, of="drawn", resized=Difference(largest=0.001, changed=changed))

    check_parity(parity(900, 1))
    check_parity(parity(3000, 3))
    for images, changed in ((900, 2), (3000, 4)):
        with pytest.raises(Refused, match=f"{changed} of {images}"):
            check_parity(parity(images, changed))


def test_how_far_answers_may_be_apart() -> None:
    """A temperature that is missing, or another score, changes no class."""

    def parity(**numbers: float) -> Parity:
        return Parity(images=100, of="drawn", resized=Difference(**{"largest": 0.0, "changed": 0} | numbers))  # type: ignore[arg-type]

    check_parity(parity(largest=0.009, unlike=0.009))
    with pytest.raises(Refused, match=r"probabilities .* 0\.020 away"):
        check_parity(parity(largest=0.02))
    with pytest.raises(Refused, match=r"unlike scores .* 0\.020 away"):
        check_parity(parity(unlike=0.02))
    check_8_bits(parity(largest=0.4, changed=5, unlike=0.4, marks_changed=5))
    with pytest.raises(Refused, match="6 of 100 pictures have another class"):
        check_8_bits(parity(changed=6))
    labelled = dataclasses.replace(parity(changed=6), top1=90.0, top1_network=91.0)
    check_8_bits(labelled)
    with pytest.raises(Refused, match=r"right on 88\.0 %"):
        check_8_bits(dataclasses.replace(labelled, top1=88.0))


def test_another_temperature_or_score_is_noticed(
    pictures: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = kept_network("squeezenet1_1")
    rng, width = np.random.default_rng(0), network.width
    unlike = fit_unlike(rng.random((30, width)), np.arange(30) % 3, rng.random((40, width)), rng.normal(size=(40, 3)))
    scored = dataclasses.replace(network, unlike=unlike)
    graph = onnx_graph(scored)
    monkeypatch.setattr(export, "onnx_graph", lambda network: copy.deepcopy(graph))
    opposite = dataclasses.replace(unlike, means=-unlike.means)
    for name, change in {"probabilities": {"temperature": None}, "unlike scores": {"unlike": opposite}}.items():
        with pytest.raises(Refused, match=name):
            export_network(Source(dataclasses.replace(scored, **change), pictures), tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []
    parity = export_network(Source(scored, pictures), tmp_path / "network.onnx").parity
    assert parity and parity.resized.unlike is not None and parity.resized.unlike < 1e-3
    assert parity.resized.marks_changed == 0 and "marked otherwise" in parity_text(parity)


def test_the_ranges_of_eight_bits_come_from_all_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class has a brightness of its own; the files are in the order of their classes."""
    files, labels = [], []
    for label in range(20):
        for number in range(12):
            files.append(tmp_path / f"{label:02d}_{number}.png")
            labels.append(label)
            Image.new("L", (8, 8), 10 * label).save(files[-1])
    pixels: list[Any] = []
    monkeypatch.setattr(export, "quantized", lambda graph, values: pixels.append(values))
    source = Source(kept_network("squeezenet1_1"), training=LabelledImages(files, "training", labels))
    for _ in range(2):
        export._in_8_bits(onnx.ModelProto(), source)
    assert np.array_equal(*pixels) and len(pixels[0]) == export.FROM + export.TRIED
    brightness = pixels[0].mean((1, 2, 3)).round().astype(int).tolist()
    for part in (brightness[: export.FROM], brightness[export.FROM :]):  # the ranges, and what is compared
        assert set(part) == {10 * label for label in range(20)}
        assert max(part.count(value) - part.count(other) for value in part for other in part) <= 1


def test_a_large_photo_is_compared_whole(tmp_path: Path) -> None:
    """``predict`` decodes a large JPEG at a part of its size; a program that uses the file does not."""
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 41, 3), np.uint8))
    rough.resize((4100, 3000)).save(tmp_path / "large.jpg")
    file, network = tmp_path / "large.jpg", kept_network("squeezenet1_1")
    assert whole_picture(file).shape == (3000, 4100, 3)
    ((_, cached),) = cached_batches(LabelledImages([file], "drawn"), network)
    own = network.preprocessing
    assert np.array_equal(cached[0], decode(file, own.cache_size, own.interpolation))


def test_a_picture_that_cannot_be_read_ends_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "bad.jpg").write_text("no image")
    network = kept_network("squeezenet1_1")
    with pytest.raises(Refused, match=r"bad\.jpg .*; repair it, or take it out of the folder of --parity"):
        export_network(Source(network), tmp_path / "network.onnx", parity=str(folder))
    validation = LabelledImages([folder / "bad.jpg"], "validation", [0])
    with pytest.raises(Refused, match=r"bad\.jpg .*; repair it, or compare the answers on other pictures"):
        export_network(Source(network, validation), tmp_path / "network.onnx")
    with pytest.raises(Refused, match=r"bad\.jpg .*; repair it$"):
        export_network(Source(network, training=validation), tmp_path / "network.onnx", format="onnx-int8")
