"""Where the work runs: the one place that decides device, precision and memory format."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from finetune101.config import SystemConfig


@dataclass(frozen=True)
class World:
    """Device and number format of a run. ``precision``: bf16, fp16 or fp32; ``channels_last``: the memory format."""

    device: torch.device
    precision: str
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolution weights."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context that every forward pass runs in."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def describe(self) -> dict[str, Any]:
        """What was decided, for env.json."""
        return {"device": str(self.device), "precision": self.precision, "channels_last": self.channels_last}


def detect(system: SystemConfig, recorded: dict[str, Any] | None = None) -> World:
    """The world for ``system``; with ``recorded`` (a resumed run) precision and format are taken from there.

    Raises ValueError for a device or precision that this machine does not have.
    """
    torch.set_num_threads(system.threads or os.cpu_count() or 1)
    device = _device(system.device)
    if recorded:
        return World(device, recorded["precision"], recorded["channels_last"])
    precision = _precision(device) if system.precision == "auto" else system.precision
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"--precision fp16 needs a CUDA card, this is {device.type}; use --precision auto")
    if precision == "bf16" and device.type == "mps":
        raise ValueError("--precision bf16 is not tried on MPS; use --precision auto")
    if system.memory_format == "auto":
        return World(device, precision, precision != "fp32" or device.type == "cpu")
    return World(device, precision, system.memory_format == "channels_last")


def _device(name: str) -> torch.device:
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if has[kind])
    if not has[name]:
        raise ValueError(f"--device {name} is not available here; use --device auto")
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
