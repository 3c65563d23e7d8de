"""A training step beside the least time that this machine needs for it (Williams et al., 2009: the roofline).

``python benchmarks/limit.py --models efficientnet_lite0 resnet18`` measures in one run how fast the machine multiplies
matrices and copies memory, then a training step of finetune101, of PyTorch, and of PyTorch with channels_last memory.
``--isa avx2`` keeps PyTorch, oneDNN, MKL and our kernels to AVX2. It writes results/limit/NETWORK_PRECISION.json
(NETWORK_PRECISION_avx2.json) and a table of all such files, results/limit/README.md.

Each layer is counted as if it ran alone, with cold caches and nothing wasted. A convolution or linear layer has three
passes (output, gradient of the input, gradient of the weights), each with as many operations; a pass reads two of
input, weights and output once and writes the third. A batch norm with its activation reads its input and writes its
output; its gradient reads two and writes one. The rest (pooling, additions, loss, optimizer) has no limit here. All
three steps run with the memory allocator that ``fast.tune_allocator`` sets up.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune101.config import SystemConfig
from finetune101.fast import fast_layers, kernels, tune_allocator
from finetune101.files import read_json, write_json
from finetune101.machine import World, join
from finetune101.models.build import build
from finetune101.training.benchmark import machine_facts

OUT = Path(__file__).resolve().parent.parent / "results" / "limit"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
STEPS = 2  # of one measurement
CLASSES = 101
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardtanh)
WAYS = ("ours", "plain", "plain_channels_last")
MACHINE_SECONDS = 0.2  # of one measurement of the machine

Key = tuple[str, str]  # kind of layer; forward or backward
JOINT = ("depthwise and batch norm", "backward")  # one function of ours computes both
Seconds = dict[Key, float]
Pass = tuple[Key, float, float, float]  # operations, bytes of activations, bytes of weights


def gemm_rate(dtype: torch.dtype) -> float:
    """Operations per second of a product of two large matrices (a multiplication and an addition are two)."""
    size = 2048
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    return 2 * size**3 * _times_per_second(lambda: torch.mm(a, b, out=out))


def copy_rate() -> float:
    """Bytes per second that are read and written while 256 MiB are copied."""
    source = torch.zeros(2**26)
    target = torch.zeros_like(source)
    return 2 * source.nbytes * _times_per_second(lambda: target.copy_(source))


def _times_per_second(work: Callable[[], Any]) -> float:
    work()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < MACHINE_SECONDS:
        work()
        count += 1
    return count / (time.perf_counter() - started)


def kind_of(module: nn.Module) -> str | None:
    """The kind of layer; None for what has no limit here, or consists of other layers."""
    if isinstance(module, nn.Conv2d):
        return "depthwise" if module.groups == module.in_channels > 1 else "convolution"
    if isinstance(module, nn.BatchNorm2d):  # timm's has its activation inside
        return "batch norm"
    if isinstance(module, nn.Linear):
        return "linear"
    return "activation" if isinstance(module, ACTIVATIONS) else None


def joined(seconds: Seconds) -> Seconds:
    """``seconds`` with one sum for the gradients of batch norms and depthwise convolutions, where there are both."""
    pair = ("depthwise", "backward"), ("batch norm", "backward")
    if not all(key in seconds for key in pair):
        return seconds
    rest = {key: value for key, value in seconds.items() if key not in pair}
    return rest | {JOINT: seconds[pair[0]] + seconds[pair[1]]}


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(kind, layer) of every layer that has a kind."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    inside = {child for norm in norms for child in norm.modules() if child is not norm}
    return [(kind, module) for module in model.modules() if module not in inside and (kind := kind_of(module))]


def passes(model: nn.Module, x: Tensor, item_bytes: int) -> list[Pass]:
    """Every pass of a training step on ``x`` (N, 3, H, W)."""
    rows: list[Pass] = []
    normed: set[int] = set()  # addresses of outputs of batch norms, whose activation costs nothing more

    def count(kind: str, module: nn.Module, source: Tensor, output: Tensor) -> None:
        read, written = source.numel() * item_bytes, output.numel() * item_bytes
        if kind in ("convolution", "depthwise", "linear"):
            weight = module.weight.numel() * item_bytes  # type: ignore[operator]
            operations = 2 * output.numel() * module.weight[0].numel()  # type: ignore[index]
            backward = 2 if source.requires_grad else 1
            one = float(operations), float(read + written), float(weight)
            rows.extend([((kind, "forward"), *one), *[((kind, "backward"), *one)] * backward])
        elif kind == "batch norm" or source.data_ptr() not in normed:
            rows.extend([((kind, "forward"), 0.0, 2.0 * read, 0.0), ((kind, "backward"), 0.0, 3.0 * read, 0.0)])
        if kind == "batch norm":
            normed.add(output.data_ptr())

    outputs = []  # kept, so that no address is used twice
    hooks = []
    for kind, module in layers(model):

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, kind: str = kind) -> None:
            count(kind, module, inputs[0], output)
            outputs.append(output)

        hooks.append(module.register_forward_hook(hook))
    model(x)
    for handle in hooks:
        handle.remove()
    return rows


def timed(model: nn.Module, seconds: Seconds) -> None:
    """Adds the time of every layer of ``model``, forward and backward, to ``seconds``; for the rest of its life.

    Forward functions are wrapped and not hooked: a hooked batch norm leaves its clamp to the activation.
    """
    begun: dict[str, float] = {}

    def before(*_: Any) -> None:
        begun["at"] = time.perf_counter()

    for kind, module in layers(model):

        def after(*_: Any, kind: str = kind) -> None:
            seconds[kind, "backward"] += time.perf_counter() - begun["at"]

        def forward(x: Tensor, kind: str = kind, inner: Any = module.forward, after: Any = after) -> Tensor:
            started = time.perf_counter()
            output: Tensor = inner(x)
            seconds[kind, "forward"] += time.perf_counter() - started
            seconds[kind, "backward"] += 0.0
            nodes, end = [output.grad_fn], x.grad_fn
            while nodes:  # from the output back to the input
                node = nodes.pop()
                if node is None or node is end or node.name().endswith("AccumulateGrad"):
                    continue
                notes: dict[str, bool] = node.metadata  # type: ignore[assignment]
                if notes.setdefault("timed", False):  # one of our functions goes on behind the layer before
                    continue
                notes["timed"] = True
                node.register_prehook(before)
                node.register_hook(after)
                nodes.extend(following for following, _ in node.next_functions)
            return output

        module.forward = forward


def trained(model: nn.Module, world: World, batch: tuple[Tensor, Tensor]) -> Callable[[], float]:
    """What takes one optimizer step on ``batch`` and returns its seconds."""
    model.to(memory_format=world.memory_format).train()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    x, y = batch[0].contiguous(memory_format=world.memory_format), batch[1]

    def step() -> float:
        started = time.perf_counter()
        with world.autocast():
            loss = F.cross_entropy(model(x).float(), y)
        sgd.zero_grad(set_to_none=True)
        loss.backward()
        sgd.step()
        return time.perf_counter() - started

    return step


def measure(name: str, precision: str, batch_size: int, repeats: int) -> dict[str, Any]:
    """Medians of ``repeats``: the machine, then a step of each way, and so on in turns."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    built = build(name, CLASSES, pretrain=False)
    size = built.preprocessing.size
    batch = torch.randn(batch_size, 3, size, size), torch.randint(CLASSES, (batch_size,))
    counted = passes(copy.deepcopy(built.model).train(), batch[0][:2], dtype.itemsize)
    steps: dict[str, list[Callable[[], float]]] = {}
    kinds: dict[str, Seconds] = {}
    for way in WAYS:
        layout = "contiguous" if way == "plain" else "channels_last"
        world = join(SystemConfig(device="cpu", precision=precision, memory_format=layout))  # type: ignore[arg-type]
        pair = [copy.deepcopy(built.model) for _ in range(2)]
        if way == "ours":
            for model in pair:
                fast_layers(model)
        kinds[way] = defaultdict(float)
        timed(pair[1], kinds[way])
        steps[way] = [trained(model, world, batch) for model in pair]
        for step in steps[way]:
            step()
    rates: dict[str, list[float]] = {"gemm": [], "copy": []}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    layered: dict[str, list[tuple[float, Seconds]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        rates["gemm"].append(gemm_rate(dtype))
        rates["copy"].append(copy_rate())
        for way in WAYS:
            whole, by_kind = steps[way]
            seconds[way].append(sum(whole() for _ in range(STEPS)) / STEPS)
            kinds[way].clear()
            step_seconds = by_kind()
            layered[way].append((step_seconds, joined(dict(kinds[way]))))
    machine = {key: statistics.median(values) for key, values in rates.items()}
    least = joined(least_seconds(counted, batch_size / 2, machine["gemm"], machine["copy"]))
    return {
        **machine_facts(),
        "model": name,
        "precision": precision,
        "size": size,
        "batch_size": batch_size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "gemm_gflops": round(machine["gemm"] / 1e9, 1),
        "copy_gb_per_s": round(machine["copy"] / 1e9, 1),
        "limit_images_per_s": round(batch_size / sum(least.values()), 2),
        "ways": {way: summary(least, seconds[way], layered[way], batch_size) for way in WAYS},
    }


def least_seconds(counted: list[Pass], times: float, gemm: float, copying: float) -> Seconds:
    """The least seconds of each kind of layer for ``times`` as many images as were ``counted``."""
    least: Seconds = defaultdict(float)
    for key, operations, activations, weights in counted:
        least[key] += max(times * operations / gemm, (times * activations + weights) / copying)
    return least


def summary(
    least: Seconds, seconds: list[float], layered: list[tuple[float, Seconds]], batch_size: int
) -> dict[str, Any]:
    """Images per second, the share of the limit in percent, and both for each kind of layer."""
    median = statistics.median(seconds)
    shares = [100 * sum(least.values()) / value for value in seconds]
    kinds = {}
    for key in sorted({key for _, by_kind in layered for key in by_kind} | set(least)):
        spent = statistics.median(by_kind.get(key, 0.0) for _, by_kind in layered)
        of_step = statistics.median(100 * by_kind.get(key, 0.0) / whole for whole, by_kind in layered)
        share = round(100 * least.get(key, 0.0) / spent, 1) if spent else None
        kinds[" ".join(key)] = {"seconds": spent, "least_seconds": least.get(key, 0.0), "share": share}
        kinds[" ".join(key)]["of_step"] = round(of_step, 1)
    rest = statistics.median(100 * (1 - sum(by_kind.values()) / whole) for whole, by_kind in layered)
    return {
        "images_per_s": round(batch_size / median, 2),
        "share": round(statistics.median(shares), 1),
        "share_range": [round(min(shares), 1), round(max(shares), 1)],
        "step_seconds": seconds,
        "kinds": kinds,
        "rest_of_step": round(rest, 1),
    }


def table(results: list[dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = [
        "# A training step beside the least time for it",
        "",
        "Made by `benchmarks/limit.py`; see there what is counted.",
    ]
    for result in results:
        head = f"{result['model']}, {result['precision']}" + (", AVX2 only" if result["isa"] == "avx2" else "")
        machine = result["machine"]
        lines += [
            f"\n## {head}\n",
            f"{machine['processor']}, {result['threads']} threads, {result['size']} px, batches of"
            f" {result['batch_size']}, medians of {result['repeats']}: matrix product {result['gemm_gflops']} GFLOP/s,"
            f" copying {result['copy_gb_per_s']} GB/s (read and written), limit {result['limit_images_per_s']}"
            " images/s.\n",
            "| | finetune101 | PyTorch, channels_last | PyTorch |",
            "|---|---|---|---|",
        ]
        ways = [result["ways"][way] for way in ("ours", "plain_channels_last", "plain")]
        lines.append(f"| images/s | {' | '.join(str(way['images_per_s']) for way in ways)} |")
        lines.append(f"| **share of the limit, %** | {' | '.join(str(way['share']) for way in ways)} |")
        for kind in ways[0]["kinds"]:
            cells = [way["kinds"].get(kind) for way in ways]
            texts = ["–" if cell is None else f"{cell['share']} ({cell['of_step']} % of the step)" for cell in cells]
            lines.append(f"| {kind} | {' | '.join(texts)} |")
        rests = [f"({way['rest_of_step']} % of the step)" for way in ways]
        lines.append(f"| rest | {' | '.join(rests)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures every network asked for, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["efficientnet_lite0", "resnet18"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--isa", choices=["native", "avx2"], default="native")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.isa == "avx2":
        if arguments.precision == "bf16":
            parser.error("AVX2 has no bf16")
        if any(os.environ.get(name) != value for name, value in AVX2.items()):  # read when torch is loaded
            os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
        kernels.FLAGS = tuple(flag.replace("native", "haswell") for flag in kernels.FLAGS)  # type: ignore[assignment]
    tune_allocator()
    ending = "_avx2" if arguments.isa == "avx2" else ""
    for name in arguments.models:
        result = {"isa": arguments.isa, **measure(name, arguments.precision, arguments.batch_size, arguments.repeats)}
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / f"{name}_{arguments.precision}{ending}.json", result)
        print(table([result]))
    results = [read_json(file, remedy="measure it again") for file in sorted(arguments.out.glob("*.json"))]
    (arguments.out / "README.md").write_text(table(results))


if __name__ == "__main__":
    main()
