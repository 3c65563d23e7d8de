"""One place decides device and number format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from finetune101.config import SystemConfig
from finetune101.world import World, detect


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def cpu(**settings: object) -> World:
    return detect(SystemConfig(device="cpu", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_asked_for_is_taken(precision: str, layout: str) -> None:
    world = cpu(precision=precision, memory_format=layout)
    assert world == World(torch.device("cpu"), precision, layout == "channels_last")
    assert world.memory_format == (torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def test_auto_takes_bf16_only_where_the_processor_has_it() -> None:
    world = cpu()
    assert world.precision in ("bf16", "fp32")
    with contextlib.suppress(FileNotFoundError), open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = file.read()
        assert (world.precision == "bf16") == ("avx512_bf16" in flags or "amx_tile" in flags)


def test_threads() -> None:
    cpu(threads=1)
    assert torch.get_num_threads() == 1
    cpu()
    assert torch.get_num_threads() == os.cpu_count()


def test_a_recorded_world_is_kept() -> None:
    for precision in ("fp32", "bf16"):
        for channels_last in (False, True):
            recorded = World(torch.device("cpu"), precision, channels_last).describe()
            assert cpu().describe().keys() == recorded.keys()
            assert detect(SystemConfig(device="cpu"), recorded).describe() == recorded


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast(precision: str, dtype: torch.dtype) -> None:
    with World(torch.device("cpu"), precision, False).autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_fp16_needs_a_cuda_card() -> None:
    with pytest.raises(ValueError, match="--precision fp16 needs a CUDA card, this is cpu; use --precision auto"):
        cpu(precision="fp16")


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_a_device_that_is_not_there(name: str) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[name]:
        assert detect(SystemConfig(device=name)).device.type == name  # type: ignore[arg-type]
        return
    with pytest.raises(ValueError, match=f"--device {name} is not available here; use --device auto"):
        detect(SystemConfig(device=name))  # type: ignore[arg-type]
