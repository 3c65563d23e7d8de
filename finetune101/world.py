"""Where the work runs: device, precision and memory format; the only file that knows of several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune101.config import SystemConfig
from finetune101.errors import Refused
from finetune101.machine import usable_cores


@dataclass(frozen=True)
class World:
    """Device and number format of a run. ``precision``: bf16, fp16 or fp32; ``channels_last``: the memory format.

    ``rank`` of ``size`` processes: each takes every ``size``-th image of a batch; only ``rank`` 0 writes. ``workers``
    more of each prepare its training images.
    """

    device: torch.device
    precision: str
    channels_last: bool
    rank: int = 0
    size: int = 1
    workers: int = 0

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def writes(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that every forward pass runs in."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def share(self, count: int) -> slice:
        """This process's part of ``count`` items: every ``size``-th, so that together they are all, each once."""
        return slice(self.rank, count, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """``values`` (on the CPU) summed over all processes."""
        if self.size == 1:
            return values
        shared = values.to(self.device)
        dist.all_reduce(shared)
        return shared.cpu()

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model`` for the training step: gradients are averaged over all processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model)

    def same_buffers(self, model: nn.Module) -> None:
        """Gives every process the buffers of rank 0: batch-norm statistics differ, as each saw other images."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def same_everywhere(self, model: nn.Module, value: Any) -> Any:
        """Gives every process the parameters and buffers of rank 0; returns rank 0's ``value``."""
        if self.size == 1:
            return value
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Rank 0 runs the block before the others: it builds what they then read."""
        if self.size > 1 and not self.writes:
            dist.barrier()
        yield
        if self.size > 1 and self.writes:
            dist.barrier()

    def describe(self) -> dict[str, Any]:
        """What was decided, for env.json."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "processes": self.size,
        }


def detect(system: SystemConfig, recorded: dict[str, Any] | None = None) -> World:
    """The world for ``system``; with ``recorded`` (a resumed run) precision and format are taken from there.

    Under torchrun it joins the other processes. Raises Refused for a device or precision that this machine lacks.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(system.threads or max(1, usable_cores() // local))
    device = _device(system.device)
    if size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank = dist.get_rank() if size > 1 else 0
    workers = _workers() if device.type == "cuda" else 0
    if recorded:
        return World(device, recorded["precision"], recorded["channels_last"], rank, size, workers)
    precision = _precision(device) if system.precision == "auto" else system.precision
    if precision == "fp16" and device.type != "cuda":
        raise Refused(f"--precision fp16 needs a CUDA card, this is {device.type}; use --precision auto")
    if precision == "bf16" and device.type == "mps":
        raise Refused("--precision bf16 is not tried on MPS; use --precision auto")
    channels_last = system.memory_format == "channels_last"
    if system.memory_format == "auto":
        channels_last = precision != "fp32" or device.type == "cpu"
    return World(device, precision, channels_last, rank, size, workers)


def _workers() -> int:
    """One for each thread beside the one that feeds the GPU; none where a process cannot be forked."""
    return min(torch.get_num_threads() - 1, 8) if "fork" in multiprocessing.get_all_start_methods() else 0


def leave() -> None:
    """Parts from the other processes of torchrun, if there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise Refused(f"--device {name} is not available here; use --device auto")
    return torch.device(name)


def _precision(device: torch.device) -> str:
    """The fastest precision that the hardware has natively."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    # emulated bf16 is slower than fp32, so the instruction itself must be there
    try:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):
        return False
