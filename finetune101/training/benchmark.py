"""How fast this machine trains: the bare step, the data alone, and the whole epoch, for each precision and layout."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune101.config import AugmentConfig, ModelConfig, OptimConfig, SystemConfig, TrainConfig
from finetune101.data import cache
from finetune101.data.batches import train_batches
from finetune101.data.images import class_of, index_images
from finetune101.errors import Refused
from finetune101.fast import fast_layers, tune_allocator
from finetune101.host import usable_cores
from finetune101.machine import World, join
from finetune101.models.build import Built, build
from finetune101.training.optim import optimizer

FORMATS = (("fp32", "contiguous"), ("fp32", "channels_last"), ("bf16", "contiguous"), ("bf16", "channels_last"))
WARM_UP = 2  # steps before the clock starts
AUGMENT = AugmentConfig(crop_scale=0.5)

Batch = tuple[Tensor, Tensor, int]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """``repeats`` measurements of ``steps`` batches; ``size`` None is the network's own size in pixels."""

    size: int | None = None
    batch_size: int = 64
    steps: int = 10
    repeats: int = 5


def measure_machine(root: Path, models: Sequence[str], work: Workload, every: bool = False) -> dict[str, Any]:
    """Measures ``models`` on images of ``root``: medians of images/s.

    ``step`` is the bare step on batches in memory, ``data`` reading and augmentation alone, ``whole`` both; step and
    whole alternate, so that a slow minute hits both. ``every`` measures each precision and memory format instead of the
    machine's own. Raises Refused for an unknown model or a size that it cannot take.
    """
    tune_allocator()
    rows = []
    formats = FORMATS if every else (("auto", "auto"),)
    for name in models:
        for precision, layout in formats:
            system = SystemConfig(precision=precision, memory_format=layout)  # type: ignore[arg-type]
            rows.append(_measure(root, name, join(system), work))
    return {**machine_facts(), "batch_size": work.batch_size, "rows": rows}


def machine_facts() -> dict[str, Any]:
    """What a measured speed belongs to: {"machine": cores, processor, system, "versions": of the packages}."""
    packages = {name: version(name) for name in ("torch", "torchvision", "timm", "onnxruntime")}
    machine = {"cores": usable_cores(), "processor": _processor(), "system": platform.platform()}
    return {"machine": machine, "versions": packages}


def _measure(root: Path, name: str, world: World, work: Workload) -> dict[str, Any]:
    index = index_images(root)
    built = build(name, len(index.classes), pretrain=False, size=work.size)
    images = cache.open_images(index, built.preprocessing)
    if len(index.paths) < work.batch_size:
        raise Refused(f"{root} has {len(index.paths)} images; give a --batch-size of at most that")
    paths = index.paths[: len(index.paths) // work.batch_size * work.batch_size]  # whole batches only
    labels = [index.classes.index(class_of(path)) for path in paths]
    run = _steps(built, world, name, work.batch_size)

    def data() -> Iterable[Batch]:
        how = {"batch_size": work.batch_size, "config": AUGMENT, "world": world, "seed": 0}
        endless = train_batches(images, paths, labels, epochs=((number, None) for number in count(1)), **how)  # type: ignore[arg-type]
        return islice(endless, work.steps)

    def step(batches: Iterable[Batch]) -> float:
        return work.steps * work.batch_size / run(batches)

    def data_alone() -> float:
        started = time.perf_counter()
        for _ in data():
            pass
        _wait(world)
        return work.steps * work.batch_size / (time.perf_counter() - started)

    resident = next(iter(data()))
    step([resident] * WARM_UP)
    rates: dict[str, list[float]] = {"step": [], "data": [], "whole": []}
    for _ in range(work.repeats):
        rates["step"].append(step(islice(cycle([resident]), work.steps)))
        rates["whole"].append(step(data()))
        rates["data"].append(data_alone())
    shares = [whole / bare for whole, bare in zip(rates["whole"], rates["step"], strict=True)]
    medians = {f"{key}_images_per_s": round(statistics.median(values), 1) for key, values in rates.items()}
    share = {"whole_vs_step": round(statistics.median(shares), 3), "range": [round(f(shares), 3) for f in (min, max)]}
    return {"model": name, "size": built.preprocessing.size, **world.describe(), **medians, **share}


def _steps(built: Built, world: World, name: str, batch_size: int) -> Callable[[Iterable[Batch]], float]:
    """What trains ``built`` on batches and returns the seconds."""
    model = built.model.to(world.device, memory_format=world.memory_format).train()  # type: ignore[call-overload]
    if world.device.type == "cpu":
        fast_layers(model)
    model_config, optim = ModelConfig(name=name, pretrain=False), OptimConfig(lr=1e-4, batch_size=batch_size)
    sgd = optimizer(model, built.head, TrainConfig(exp="benchmark", model=model_config, optim=optim))

    def run(batches: Iterable[Batch]) -> float:
        _wait(world)
        started = time.perf_counter()
        for x, y, _ in batches:
            with world.autocast():
                loss = F.cross_entropy(model(x).float(), y)
            sgd.zero_grad(set_to_none=True)
            loss.backward()
            sgd.step()
        _wait(world)
        return time.perf_counter() - started

    return run


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def benchmark_table(result: dict[str, Any]) -> str:
    """The rows as text."""
    head = f"{'network':22s} {'px':>4s}  {'format':20s} {'step':>8s} {'data':>8s} {'whole':>8s}  whole/step"
    lines = [f"{result['machine']['processor']}, {result['machine']['cores']} cores; images/s", head]
    for row in result["rows"]:
        layout = f"{row['precision']} {'channels_last' if row['channels_last'] else 'contiguous'}"
        rates = " ".join(f"{row[key + '_images_per_s']:8.1f}" for key in ("step", "data", "whole"))
        lines.append(f"{row['model']:22s} {row['size']:4d}  {layout:20s} {rates}  {row['whole_vs_step']:.3f}")
    return "\n".join(lines)
