"""Where the work runs: device, precision, memory format, processes. ``detect`` asks, ``join`` acts."""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finetune101.config import SystemConfig
from finetune101.errors import Refused
from finetune101.host import place, thread_count

Value = TypeVar("Value")
SILENCE = 300.0  # seconds after which a process that does not answer is given up; $FINETUNE101_TIMEOUT changes it
PATIENCE = timedelta(days=2)  # for what rank 0 does while the others wait, such as decoding a million images
_patient: Any = None  # the group of processes that waits for ``PATIENCE``


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
        """Rank 0 enters the block before the others, for example to build a cache that they then read.

        Rank 0 alone prints: what Python code prints on the others in the block is lost.
        """
        if self.writes:
            yield
            if self.size > 1:
                dist.barrier(_patient)
            return
        dist.barrier(_patient)
        with contextlib.ExitStack() as silence:
            nowhere = silence.enter_context(open(os.devnull, "w", encoding="utf-8"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What ``make`` returns on rank 0, on every process; the others do not call it, and wait as long as it takes.

        The value travels as a pickle, between these processes only.
        """
        if self.size == 1:
            return make()
        values = [make() if self.writes else None]
        dist.broadcast_object_list(values, 0, group=_patient)
        return values[0]  # type: ignore[return-value]

    def gathered(self, value: Value) -> list[Value]:
        """The ``value`` of every process by rank, on rank 0; an empty list on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.writes else None
        dist.gather_object(value, values, 0, group=_patient)
        return values or []

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raises Refused, in one sentence, where torch says that another process has ended or does not answer."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or re.search(r"gloo|nccl|connection|timed out", str(error), re.I)
            if self.size == 1 or not lost:
                raise
            raise Refused(
                f"process {self.rank} of {self.size} has lost another one, which ended or did not answer; see what that"
                " one said, then continue with --resume and as many processes"
            ) from error

    def describe(self) -> dict[str, Any]:
        """What was decided, for env.json."""
        return {
            "device": self.device.type,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "processes": self.size,
        }


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """For the first import of torchvision or timm: PyTorch's compiler (torch._dynamo) is loaded at its first use only.

    The two libraries use two functions of it when they are imported, to mark what must not be compiled. Loading it
    takes two seconds, and nothing here is compiled. In the block a stand-in has the two functions; whoever asks for
    anything else of the compiler gets the compiler itself.
    """

    def disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
        return torch._disable_dynamo(function, recursive)  # the mark that loads the compiler when it is called

    def is_compile_supported(device: str) -> Any:
        return compiler_itself("torch._dynamo.utils").is_compile_supported(device)

    functions: dict[str, Callable[..., Any]] = {"torch._dynamo": disable, "torch._dynamo.utils": is_compile_supported}
    stand_ins = {name: types.ModuleType(name) for name in functions}

    def remove() -> None:
        for name, module in stand_ins.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def compiler_itself(name: str) -> types.ModuleType:
        remove()
        return importlib.import_module(name)

    def attribute_of(module: str) -> Callable[[str], Any]:
        def attribute(name: str) -> Any:
            if name.startswith("__") and (module, name) != ("torch._dynamo", "__path__"):  # inspect asks for __file__
                raise AttributeError(name)
            return getattr(compiler_itself(module), name)

        return attribute

    if not stand_ins.keys() & sys.modules.keys():
        for name, module in stand_ins.items():
            vars(module).update({functions[name].__name__: functions[name], "__getattr__": attribute_of(name)})
        sys.modules.update(stand_ins)
    try:
        yield
    finally:
        remove()


def detect(system: SystemConfig, recorded: dict[str, Any] | None = None) -> World:
    """The world for ``system``; with ``recorded`` (a resumed run) precision and format are taken from there.

    Asking changes nothing: ``join`` sets threads and joins other processes. Raises Refused for a device or precision
    that this machine lacks.
    """
    own, device = place(), _device(system.device)
    if own.size > 1 and device.type == "cuda":
        device = torch.device("cuda", own.local_rank)
    workers = _workers(system.threads or thread_count()) if device.type == "cuda" else 0
    if recorded:
        _check_recorded(device, recorded["precision"], system.precision)
        return World(device, recorded["precision"], recorded["channels_last"], own.rank, own.size, workers)
    precision = _precision(device) if system.precision == "auto" else system.precision
    if precision == "fp16" and device.type != "cuda":
        raise Refused(f"--precision fp16 needs a CUDA card, this is {device.type}; use --precision auto")
    if precision == "bf16" and device.type == "mps":
        raise Refused("--precision bf16 is not tried on MPS; use --precision auto")
    channels_last = system.memory_format == "channels_last"
    if system.memory_format == "auto":
        channels_last = precision != "fp32" or device.type == "cpu"
    return World(device, precision, channels_last, own.rank, own.size, workers)


def join(system: SystemConfig, recorded: dict[str, Any] | None = None) -> World:
    """``detect``, and then what training needs: threads are set, the GPU is taken, torchrun's processes are joined.

    Raises Refused as ``detect`` does, and when the other processes cannot be reached.
    """
    world = detect(system, recorded)
    use_cores(system.threads)
    if world.size == 1:
        return world
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not dist.is_initialized():
        _end_with_torchrun()
        silence = os.environ.get("FINETUNE101_TIMEOUT", "").strip() or str(SILENCE)
        try:
            seconds = float(silence)
        except ValueError:
            seconds = 0.0
        if not (seconds > 0 and math.isfinite(seconds)):
            raise Refused(f"FINETUNE101_TIMEOUT is {silence}; give seconds, such as 300")
        with world.together():
            backend = "nccl" if world.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=seconds))
            global _patient
            _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return world


def use_cores(threads: int | None = None) -> None:
    """Lets torch compute with ``threads`` CPU threads, by default with ``host.thread_count()``."""
    torch.set_num_threads(threads or thread_count())


def _end_with_torchrun() -> None:
    """Ends this process when its torchrun is killed: a resumed run would otherwise train beside it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        print("error: torchrun has ended, and so does this process; continue with --resume", file=sys.stderr)
        os._exit(1)

    if "TORCHELASTIC_RUN_ID" in os.environ and os.name == "posix":
        threading.Thread(target=watch, daemon=True).start()


def has_precision(device: torch.device, precision: str) -> bool:
    """Whether ``device`` computes in ``precision`` (bf16, fp16, fp32) itself; elsewhere that is refused or emulated."""
    return precision == "fp32" or precision == _precision(device) or (precision == "fp16" and device.type == "cuda")


def _check_recorded(device: torch.device, precision: str, wished: str) -> None:
    """Raises Refused for a run that cannot go on here as it began; emulated bf16 is allowed where it was asked for."""
    emulated = precision == wished == "bf16" and device.type == "cpu"
    if not has_precision(device, precision) and not emulated:
        raise Refused(
            f"this run was begun in {precision}, which this {device.type} lacks; continue it on a machine like its"
            " first, or start it anew here with --overwrite"
        )


def _workers(threads: int) -> int:
    """One for each thread beside the one that feeds the GPU; none where a process cannot be forked."""
    return min(threads - 1, 8) if "fork" in multiprocessing.get_all_start_methods() else 0


def leave() -> None:
    """Parts from the other processes of torchrun, if there are any."""
    global _patient
    if dist.is_available() and dist.is_initialized():
        _patient = None
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
