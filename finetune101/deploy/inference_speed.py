"""How fast a trained network answers, by each way to run it on this processor."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from finetune101.data.batches import to_input
from finetune101.deploy.graph import RESIZED
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.evaluation.checkpoint import TrainedNetwork
from finetune101.evaluation.forward import Forward
from finetune101.fast import tune_allocator
from finetune101.host import usable_cores
from finetune101.training.benchmark import machine_facts

SECONDS = 0.5  # of one measurement, at least one pass

Pixels = NDArray[np.uint8]
Pass = Callable[[Pixels], Any]
"""A whole forward pass on resized pictures, uint8 (N, size, size, 3)."""


def measure_inference(
    targets: Sequence[str], runs: str = "runs", batch_sizes: Sequence[int] = (1, 32), repeats: int = 8
) -> dict[str, Any]:
    """Milliseconds per image and images/s of each way to run each of ``targets``: runs, released networks, ONNX files.

    A run is measured in PyTorch (fp32, without and with channels_last), by the layers of ``fast`` in fp32 and in the
    machine's own format, and exported by ONNX Runtime and, where it is installed, by OpenVINO. The ways alternate, so
    that a slow minute hits all; the median of ``repeats`` counts. Decoding and resizing are not in it. Raises Refused
    for a target that is not there.
    """
    tune_allocator()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="finetune101_") as folder:
        for target in targets:
            size, ways = _ways(target, runs, Path(folder))
            pixels = np.random.default_rng(0).integers(0, 256, (max(batch_sizes), size, size, 3), np.uint8)
            jobs = [(way, count) for count in batch_sizes for way in ways]
            times: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
            for way, count in jobs:  # warm up
                ways[way](pixels[:count])
            total = repeats * len(jobs)
            with tqdm(total=total, desc=target[-30:], unit="measurement", leave=False, disable=None) as bar:
                for _ in range(repeats):
                    for way, count in jobs:
                        times[way, count].append(_seconds(ways[way], pixels[:count]))
                        bar.update()
            for (way, count), values in times.items():
                ms = 1000 * statistics.median(values) / count
                spread = [round(1000 * bound / count, 3) for bound in (min(values), max(values))]
                row = {"network": target, "size": size, "way": way, "batch": count, "ms_per_image": round(ms, 3)}
                rows.append(row | {"ms_range": spread, "images_per_s": round(1000 / ms, 1)})
    return {**machine_facts(), "repeats": repeats, "rows": rows}


def _seconds(run: Pass, pixels: Pixels) -> float:
    """Seconds of one pass, the mean over ``SECONDS``."""
    started, count = time.perf_counter(), 0
    while True:
        run(pixels)
        count += 1
        elapsed = time.perf_counter() - started
        if elapsed >= SECONDS:
            return elapsed / count


def _ways(target: str, runs: str, folder: Path) -> tuple[int, dict[str, Pass]]:
    """The size of the input of ``target`` in pixels, and its ways by name."""
    if target.endswith(".onnx"):
        exported = OnnxNetwork(target)
        return exported.preprocessing.size, {f"ONNX Runtime {exported.info.precision}": exported.probabilities}
    from finetune101.deploy.network import load

    trained = load(target, runs).trained
    ways = dict(_torch_ways(trained)) | dict(_runtime_ways(trained, folder))
    return trained.preprocessing.size, ways


def _torch_ways(network: TrainedNetwork) -> Iterator[tuple[str, Pass]]:
    own, here = network.preprocessing, dataclasses.replace(network.world, precision="fp32")

    def way(forward: Callable[[torch.Tensor], Any], world: Any) -> Pass:
        def run(pixels: Pixels) -> Any:
            return forward(to_input(torch.from_numpy(pixels).permute(0, 3, 1, 2), own, world))

        return run

    for last in (False, True):
        world = dataclasses.replace(here, channels_last=last)
        model = _copy(network, world)

        def eager(x: torch.Tensor, model: torch.nn.Module = model) -> torch.Tensor:
            with torch.inference_mode():
                output: torch.Tensor = model(x)
            return output

        yield f"PyTorch fp32{' channels_last' if last else ''}", way(eager, world)
    for precision in dict.fromkeys(("fp32", network.world.precision)):
        world = dataclasses.replace(here, precision=precision)
        yield f"fused layers {precision}", way(Forward(_copy(network, world), world), world)


def _copy(network: TrainedNetwork, world: Any) -> torch.nn.Module:
    model = copy.deepcopy(network.model).to(world.device)
    return model.to(memory_format=world.memory_format).eval()


def _runtime_ways(network: TrainedNetwork, folder: Path) -> Iterator[tuple[str, Pass]]:
    """ONNX Runtime, and OpenVINO where it is installed, on the exported graph."""
    from finetune101.deploy.export import Source, export_network

    file = export_network(Source(network), folder / "network.onnx", resized=True, overwrite=True).file
    yield "ONNX Runtime fp32", OnnxNetwork(file).probabilities
    if importlib.util.find_spec("openvino"):
        core = importlib.import_module("openvino").Core()  # nobody needs it but for this table
        core.set_property("CPU", {"INFERENCE_NUM_THREADS": usable_cores()})
        hints = {"fp32": "f32"} | ({"bf16": "bf16"} if network.world.precision == "bf16" else {})
        for name, hint in hints.items():
            compiled = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": hint})
            yield f"OpenVINO {name}", functools.partial(_by_openvino, compiled)


def _by_openvino(compiled: Any, pixels: Pixels) -> Any:
    return compiled({RESIZED: np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})


def inference_table(result: dict[str, Any]) -> str:
    """The rows as text; beside each the speed against PyTorch fp32 of the same network and batch."""
    machine = result["machine"]
    base = {(r["network"], r["batch"]): r["ms_per_image"] for r in result["rows"] if r["way"] == "PyTorch fp32"}
    lines = [
        f"{machine['processor']}, {machine['cores']} cores",
        f"{'network':24s} {'way':28s} {'px':>4s} {'batch':>5s} {'ms/image':>9s} {'images/s':>9s}  times PyTorch fp32",
    ]
    for row in result["rows"]:
        own = base.get((row["network"], row["batch"]))
        ratio = f"{own / row['ms_per_image']:.2f}" if own else ""
        lines.append(
            f"{row['network'][-24:]:24s} {row['way']:28s} {row['size']:4d} {row['batch']:5d} "
            f"{row['ms_per_image']:9.2f} {row['images_per_s']:9.1f}  {ratio}"
        )
    return "\n".join(lines)
