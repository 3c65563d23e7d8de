"""Export: the file gives the answers of the network, whatever the network, and says of which classes it is."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from random_networks import CLASSES, kept_network, random_network
from safetensors.torch import save_file

from finetune101.api import load
from finetune101.cli.main import main
from finetune101.config import Preprocessing
from finetune101.data.batches import resized, to_input
from finetune101.deploy import export
from finetune101.deploy.card import released_card
from finetune101.deploy.export import Source, export_network, open_source
from finetune101.deploy.graph import _refused, onnx_graph, program
from finetune101.deploy.network import Network
from finetune101.deploy.onnx_network import Accuracy, OnnxNetwork
from finetune101.deploy.parity import LabelledImages
from finetune101.deploy.released_files import available
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import open_file
from finetune101.evaluation.features import FeatureExtractor
from finetune101.evaluation.unlike import fit_unlike
from finetune101.models.table import names
from finetune101.standalone import METADATA, resize_pixels

TIMM = ("timm:resnetv2_50x1_bit", "timm:vit_tiny_patch16_224", "timm:convnext_atto")
pytestmark = pytest.mark.usefixtures("exported_once")
FAMILY = {
    "resnet34": "resnet18",
    "resnet50": "resnet18",
    "mobilenet_v3_large": "mobilenet_v3_small",
    "efficientnet_lite1": "efficientnet_lite0",
    "efficientnet_lite2": "efficientnet_lite0",
    "efficientnet_lite012": "efficientnet_lite02",
}
"""Larger network -> the network of its family that is exported in full."""
KEPT = ("squeezenet1_1", "resnet18", "mobilenet_v3_small")
"""Small networks that several tests export."""


@pytest.mark.parametrize("name", [name for name in (*names(), *TIMM) if name not in FAMILY])
def test_every_family_gives_the_same_answers(
    name: str, pictures: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name not in KEPT:
        monkeypatch.setattr(export, "onnx_graph", onnx_graph)
    network = kept_network(name) if name in KEPT else random_network(name)
    if name == "vit_b_16":  # twelve equal blocks, of which two will do
        network.model.encoder.layers = network.model.encoder.layers[:2]  # type: ignore[union-attr, index]
    exported = export_network(Source(network, pictures), tmp_path / "network.onnx")
    assert exported.parity and exported.parity.pictures
    assert exported.parity.resized.largest < 1e-4
    assert exported.parity.resized.changed == 0
    assert exported.parity.pictures.largest < 0.05  # a level of brightness here and there
    runtime = OnnxNetwork(exported.file)
    pixels = np.random.default_rng(1).integers(0, 256, (3, *[network.preprocessing.size] * 2, 3), np.uint8)
    probabilities, features, scores = runtime.outputs(pixels)
    assert scores is None
    x = to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), network.preprocessing, network.world)
    np.testing.assert_allclose(features, FeatureExtractor(network)(x)[0].numpy(), atol=1e-3, rtol=1e-3)
    assert features.shape == (3, network.width)
    assert np.ptp(probabilities, axis=0).max() > 1e-4  # images differ, so that equal answers say something
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_a_larger_network_has_no_operation_that_its_family_has_not(name: str) -> None:
    """So its operations are exported as those of the smaller one are."""
    assert _operations(name) <= _operations(FAMILY[name])


@functools.cache
def _operations(name: str) -> set[str]:
    nodes = program(random_network(name)).graph.nodes
    return {str(node.target) for node in nodes if node.op == "call_function"}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pictures_are_resized_as_in_training(interpolation: str, pictures: LabelledImages, tmp_path: Path) -> None:
    network = kept_network("squeezenet1_1", cache_size=80)
    own = dataclasses.replace(network.preprocessing, interpolation=interpolation)
    network = dataclasses.replace(network, preprocessing=own)
    exported = export_network(Source(network, pictures), tmp_path / "network.onnx")
    assert exported.parity and exported.parity.pictures
    assert exported.parity.pictures.largest < 0.02
    assert exported.parity.resized.largest < 1e-4
    small = export_network(Source(network, pictures), tmp_path / "small.onnx", resized=True)
    pixels = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), np.uint8)
    ours, theirs = (OnnxNetwork(file).probabilities(pixels) for file in (exported.file, small.file))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)  # a picture of the network's own size stays as it is


@pytest.mark.parametrize(("source", "size"), [(288, 256), (80, 64), (64, 80), (400, 160), (97, 96)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_second_resize_is_that_of_training(source: int, size: int, interpolation: Any) -> None:
    pixels = np.random.default_rng(size).integers(0, 256, (source, source, 3), np.uint8)
    own = Preprocessing(size=size, cache_size=source, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation=interpolation)
    expected = resized(torch.from_numpy(pixels).permute(2, 0, 1)[None], own)[0].permute(1, 2, 0)
    assert np.array_equal(resize_pixels(pixels, own.size, own.interpolation), expected.numpy())


def test_the_file_says_what_it_is(pictures: LabelledImages, tmp_path: Path) -> None:
    exported = export_network(Source(kept_network("squeezenet1_1"), pictures), tmp_path / "network.onnx")
    info = OnnxNetwork(exported.file).info
    assert (info.classes, info.temperature, info.model, info.precision) == (CLASSES, 1.7, "squeezenet1_1", "fp32")
    assert info.parity == exported.parity
    raw = {one.key: one.value for one in onnx.load(exported.file).metadata_props}
    assert json.loads(raw[METADATA])["preprocessing"]["size"] == 64
    assert not any(node.doc_string or node.metadata_props for node in onnx.load(exported.file).graph.node)


def test_the_score_for_unlike_images_travels_with_the_file(pictures: LabelledImages, tmp_path: Path) -> None:
    network = kept_network("mobilenet_v3_small")
    rng, width = np.random.default_rng(0), network.width
    unlike = fit_unlike(rng.random((30, width)), np.arange(30) % 3, rng.random((40, width)), rng.normal(size=(40, 3)))
    network = dataclasses.replace(network, unlike=unlike)
    for name, options in (("a.onnx", {}), ("b.onnx", {"resized": True})):
        exported = OnnxNetwork(export_network(Source(network, pictures), tmp_path / name, **options).file)
        assert exported.unlike == pytest.approx(unlike.threshold)
        ours = exported.predict(list(map(str, pictures.files)))
        theirs = Network(network).predict(list(map(str, pictures.files)))
        assert isinstance(ours, list) and isinstance(theirs, list)
        for one, other in zip(ours, theirs, strict=True):
            assert one.unlike_score == pytest.approx(other.unlike_score, abs=2e-3)
        assert len({round(one.unlike_score or 0, 3) for one in ours}) > 3


def test_our_own_assertions_keep_their_traceback() -> None:
    with pytest.raises(AssertionError), _refused("a network"):
        exec(compile("assert False", export.__file__, "exec"))
    with pytest.raises(Refused, match="cannot be exported"), _refused("a network"):
        raise AssertionError("of the exporter")


@pytest.mark.parametrize("name", available())
def test_a_released_network_says_its_accuracy(name: str, here: Path) -> None:
    accuracy = open_source(name).accuracy
    assert isinstance(accuracy, Accuracy) and accuracy.n == 1770
    assert f"{accuracy.top1:.2f} %" in released_card(name)


def test_eight_bits_are_smaller_and_nearly_as_good(pictures: LabelledImages, tmp_path: Path) -> None:
    source = Source(kept_network("resnet18"), pictures, training=pictures)
    whole = export_network(source, tmp_path / "whole.onnx")
    small = export_network(source, tmp_path / "small.onnx", format="onnx-int8")
    assert small.file.stat().st_size < 0.5 * whole.file.stat().st_size
    runtime = OnnxNetwork(small.file)
    assert runtime.info.precision == "int8"
    assert runtime.info.parity == small.parity
    assert small.parity and small.parity.resized.largest < 0.2
    assert "ms here" in str(small)
    kinds = [node.op_type for node in onnx.load(small.file).graph.node]
    assert "QuantizeLinear" in kinds
    with pytest.raises(Refused, match="training images"):
        export_network(Source(source.network, pictures), tmp_path / "no.onnx", format="onnx-int8")


def test_torch_export_and_safetensors(pictures: LabelledImages, tmp_path: Path) -> None:
    network = kept_network("squeezenet1_1")
    source = Source(network, pictures)
    program = export_network(source, tmp_path / "network.pt2", format="torch-export")
    extra = {METADATA: ""}
    module = torch.export.load(program.file, extra_files=extra).module()
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    own = network.preprocessing
    mean, std = (torch.tensor(value).view(3, 1, 1) * 255 for value in (own.mean, own.std))
    with torch.no_grad():
        expected = torch.softmax(network.model((pixels - mean) / std) / 1.7, 1)
        torch.testing.assert_close(module(pixels)[0], expected, atol=1e-5, rtol=1e-4)
    assert json.loads(extra[METADATA])["classes"] == list(CLASSES)
    weights = export_network(source, tmp_path / "network.safetensors", format="safetensors")
    again = open_file(weights.file)
    assert (again.classes, again.temperature, again.preprocessing) == (list(CLASSES), 1.7, own)
    with torch.no_grad():
        torch.testing.assert_close(again.model(pixels.float()), network.model(pixels.float()))


def test_a_run_from_the_command_line_and_from_python(
    runs: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = next(path for path in sorted(runs.iterdir()) if (path / "best.safetensors").is_file())
    assert main(["export", str(run), "--out", "a.onnx"]) == 0
    assert "validation images" in capsys.readouterr().out
    assert main(["export", str(run), "--out", "a.onnx"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    network = load(str(run))
    exported = network.export("b.onnx", resized=True)
    assert exported.parity and exported.parity.pictures is None
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    for file in ("a.onnx", "b.onnx"):
        ours, own = OnnxNetwork(file).predict(picture), network.predict(picture)
        assert not isinstance(ours, list) and not isinstance(own, list)
        assert ours.label == own.label
        assert ours.probability == pytest.approx(own.probability, abs=0.02)
    source = open_source(str(run))
    assert source.validation and source.validation.of in ("validation", "training")


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "damaged"), (b"no network", "damaged"), (None, "there is no file")]
)
def test_files_that_are_no_networks(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "network.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Refused, match=reason):
        OnnxNetwork(file)


def test_a_network_of_another_program(tmp_path: Path) -> None:
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [one], [other])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(Refused, match="classes"):
        OnnxNetwork(tmp_path / "other.onnx")


def test_a_checkpoint_without_images_says_so(tmp_path: Path, pictures: LabelledImages) -> None:
    network = kept_network("squeezenet1_1")
    export_network(Source(network), tmp_path / "network.safetensors", format="safetensors")
    source = open_source(str(tmp_path / "network.safetensors"))
    exported = export_network(source, tmp_path / "network.onnx")
    assert exported.parity is None and "NOT compared" in str(exported)
    folder = str(pictures.files[0].parent)
    assert export_network(source, tmp_path / "other.onnx", parity=folder).parity
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(Refused):
        open_source(str(tmp_path / "bare.safetensors"))


def test_an_exported_network_needs_no_torch(pictures: LabelledImages, tmp_path: Path) -> None:
    exported = export_network(Source(kept_network("squeezenet1_1"), pictures), tmp_path / "network.onnx")
    code = (
        "import sys; from finetune101.deploy.onnx_network import OnnxNetwork;"
        f"print(OnnxNetwork({str(exported.file)!r}).predict({str(pictures.files[0])!r}).label);"
        "assert not {'torch', 'onnx', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() in CLASSES
