"""8-bit integers instead of floats: a smaller and faster file, with the layers that lose too much left as they are."""

from __future__ import annotations

import contextlib
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from tqdm import tqdm

from finetune101.deploy.graph import MEANS, RESIZED
from finetune101.host import usable_cores

LAYERS = ("Conv", "Gemm", "MatMul")
QUANTIZED = [*LAYERS, "Add", "Clip", "Relu", "AveragePool", "GlobalAveragePool", "MaxPool", "Concat"]
FROM, TRIED = 128, 48  # images: those whose ranges are taken, and others on which layers are compared
LOSS = 1e-3  # nats: Kullback-Leibler divergence of all answers that is good enough
SECONDS = 1.0  # of measuring the speed
AT_ONCE = 4  # images, so that the outputs of all layers fit into memory

Pixels = NDArray[np.uint8]
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Quantized:
    """The 8-bit graph, and the layers that stay in fp32 with the divergence (nats) that each would cost alone."""

    graph: onnx.ModelProto
    kept: dict[str, float]
    layers: int
    """Layers with weights, in 8 bits or not."""
    divergence: float
    """How far (nats) the answers are from those in floats."""
    milliseconds: tuple[float, float]
    """What one picture takes on this machine: in floats, in 8 bits."""


def quantized(graph: onnx.ModelProto, pixels: Pixels) -> Quantized:
    """``graph`` (its input: ``RESIZED``) in 8 bits: static ranges, weights per channel, QuantizeLinear nodes.

    Ranges are those of the first ``FROM`` of ``pixels`` (N, 3, size, size), training images of all classes, mixed. On
    ``TRIED`` others the answers are compared with those of ``graph``. Where they differ by more than ``LOSS``, each
    layer is quantized alone, and the worst stay in fp32, one more until the rest is good enough, at most a quarter.
    Weights have 7 bits: with 8, processors without 8-bit dot products (AVX2) would overflow.
    """
    with tempfile.TemporaryDirectory(prefix="finetune101_") as name, _quiet():
        folder = Path(name)
        whole = folder / "whole.onnx"
        onnx.save(graph, whole)
        quant_pre_process(str(whole), str(whole), skip_symbolic_shape=True)
        trial = _Trial(folder, whole, pixels)
        nodes = onnx.load(whole).graph.node
        trial.never = [node.name for node in nodes if MEANS in node.input]
        layers = [node.name for node in nodes if node.op_type in LAYERS and node.name not in trial.never]
        kept: dict[str, float] = {}
        divergence = trial.divergence(keep=())
        if divergence > LOSS:
            bar = tqdm(layers, desc="layers", unit="layer", leave=False, disable=None)
            costs = {layer: trial.divergence(only=layer) for layer in bar}
            for layer in sorted(costs, key=lambda layer: -costs[layer])[: max(1, len(layers) // 4)]:
                kept[layer] = costs[layer]
                divergence = trial.divergence(keep=tuple(kept))
                if divergence <= LOSS:
                    break
        file = trial.quantize(keep=tuple(kept))
        milliseconds = _milliseconds(whole, file, pixels[:1])
        return Quantized(onnx.load(file), kept, len(layers), divergence, milliseconds)


def _milliseconds(whole: Path, small: Path, pixels: Pixels) -> tuple[float, float]:
    """What a pass of ``pixels`` takes in each of two files: the median of passes that alternate for ``SECONDS``."""
    sessions = [_session(file) for file in (whole, small)]
    times: list[list[float]] = [[], []]
    for session in sessions:  # warm up
        session.run(None, {RESIZED: pixels})
    end = time.perf_counter() + SECONDS
    while not times[1] or time.perf_counter() < end:
        for session, values in zip(sessions, times, strict=True):
            started = time.perf_counter()
            session.run(None, {RESIZED: pixels})
            values.append(time.perf_counter() - started)
    return 1000 * statistics.median(times[0]), 1000 * statistics.median(times[1])


def _session(file: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = usable_cores(), 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


class _Trial:
    """Quantizes the graph in ``whole`` in parts, and compares the answers."""

    def __init__(self, folder: Path, whole: Path, pixels: Pixels) -> None:
        self.folder, self.whole = folder, whole
        cut = min(FROM, max(1, len(pixels) * 4 // 5))
        self.ranges, self.others = pixels[:cut], (pixels[cut:] if len(pixels) > cut else pixels)[:TRIED]
        self.reference = self._answers(whole)
        self.never: list[str] = []  # nodes that are no part of the network

    def divergence(self, *, keep: Sequence[str] = (), only: str | None = None) -> float:
        """Mean Kullback-Leibler divergence (nats) of the answers without quantization from those with it."""
        answers = self._answers(self.quantize(keep=keep, only=only))
        own = self.reference.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(own > 0, own * (np.log(own) - np.log(np.maximum(answers, 1e-12))), 0.0)
        return float(terms.sum(1).mean())

    def quantize(self, *, keep: Sequence[str] = (), only: str | None = None) -> Path:
        """The file of the graph with every layer quantized but ``keep``, or ``only`` one."""
        file = self.folder / "quantized.onnx"
        quantize_static(
            self.whole,
            file,
            _Reader(self.ranges),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=QUANTIZED,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=[only] if only else None,
            nodes_to_exclude=[*keep, *self.never],
            calibrate_method=CalibrationMethod.MinMax,
            calibration_cache_path=self.folder / "ranges.json",
        )
        return file

    def _answers(self, file: Path) -> Numbers:
        session = _session(file)
        parts = [self.others[i : i + 16] for i in range(0, len(self.others), 16)]
        answers: Numbers = np.concatenate([session.run(["probabilities"], {RESIZED: part})[0] for part in parts])
        return answers


class _Reader(CalibrationDataReader):
    """Training images, ``AT_ONCE`` at a time."""

    def __init__(self, pixels: Pixels) -> None:
        self.parts = iter([pixels[i : i + AT_ONCE] for i in range(0, len(pixels), AT_ONCE)])

    def get_next(self) -> dict[str, Any] | None:
        """One input of the graph, None at the end."""
        part = next(self.parts, None)
        return None if part is None else {RESIZED: part}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that the library logs at every call."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
