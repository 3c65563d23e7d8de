"""Folders of photos as people have them, and what tests of exported networks share."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from finetune101.deploy import export
from finetune101.deploy.graph import onnx_graph
from finetune101.deploy.parity import LabelledImages
from finetune101.evaluation.checkpoint import TrainedNetwork

SHAPES = ((40, 64), (64, 40), (90, 90), (300, 200), (64, 64), (33, 150))


@pytest.fixture
def six_images(tiny_data: Path, tmp_path: Path) -> Path:
    """Six images in two folders, a text file, and what train ignores without a word."""
    for name in ("ball", "box"):
        (tmp_path / name).mkdir()
        for i in (1, 2, 3):
            shutil.copy(tiny_data / name / f"image_{i:04d}.jpg", tmp_path / name)
    (tmp_path / "box" / "notes.txt").write_text("left alone")
    for junk in (".hidden", "@eaDir"):
        (tmp_path / junk).mkdir()
        shutil.copy(tiny_data / "box" / "image_0004.jpg", tmp_path / junk / "x.jpg")
    return tmp_path


_graphs: dict[tuple[Any, ...], tuple[TrainedNetwork, onnx.ModelProto]] = {}


@pytest.fixture
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exporting takes seconds: a graph that another test has made of the same network is copied."""

    def graph_of(network: TrainedNetwork) -> onnx.ModelProto:
        own = network.preprocessing
        key = (id(network.model), id(network.unlike), network.temperature, own.mean, own.std)
        if key not in _graphs:
            _graphs[key] = network, onnx_graph(network)  # the network, so that its id stays taken
        return copy.deepcopy(_graphs[key][1])

    monkeypatch.setattr(export, "onnx_graph", graph_of)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> LabelledImages:
    """Pictures of several shapes, smooth as photos are."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = []
    for i, (height, width) in enumerate(SHAPES * 2):
        rough = Image.fromarray(rng.integers(0, 256, (7, 5, 3), np.uint8))
        rough.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        files.append(folder / f"{i}.png")
    return LabelledImages(files, "drawn", [i % 3 for i in range(len(files))])
