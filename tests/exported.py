"""A small network in an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx

from finetune101.config import Preprocessing
from finetune101.deploy.onnx_network import ExportedInfo

CLASSES = ("=1+1", "bee, wasp", "猫", "dog", "eel", "fox")


def small_model() -> onnx.ModelProto:
    """The mean colours of 4 x 4 blocks, one linear layer, softmax; for pictures of any size."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 4, (48, len(CLASSES))).astype(np.float32)
    body = """
        <ir_version: 10, opset_import: ["" : 18]>
        small (uint8[N, H, W, 3] images) => (float[N, 6] probabilities, float[N, 48] features)
        {
            real = Cast <to = 1> (images)
            scaled = Div (real, white)
            channels = Transpose <perm = [0, 3, 1, 2]> (scaled)
            small = Resize <mode = "linear", antialias = 1, axes = [2, 3]> (channels, , , size)
            blocks = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (small)
            features = Reshape (blocks, flat)
            logits = MatMul (features, weight)
            probabilities = Softmax <axis = 1> (logits)
        }
    """
    model = onnx.parser.parse_model(body)
    for name, value in {
        "white": np.array(255, np.float32),
        "size": np.array([32, 32], np.int64),
        "flat": np.array([0, 48], np.int64),
        "weight": weight,
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return model


def save(model: onnx.ModelProto, file: Path, kind: Literal["images", "resized"] = "images") -> Path:
    """Writes ``model`` as ``finetune101 export`` writes a file."""
    own = Preprocessing(size=32, cache_size=32, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear")
    info = ExportedInfo(name="small", model="tiny", classes=CLASSES, preprocessing=own, input=kind)
    onnx.helper.set_model_props(model, info.to_metadata())
    onnx.save(model, file)
    return file
