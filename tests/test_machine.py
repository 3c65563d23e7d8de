"""One place decides device and number format, and only ``join`` acts on it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from finetune101 import host, machine
from finetune101.cli.main import main
from finetune101.config import SystemConfig
from finetune101.errors import Refused
from finetune101.host import Place, place, usable_cores
from finetune101.machine import World, detect, join


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of torchrun's variables."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def cpu(**settings: object) -> World:
    return detect(SystemConfig(device="cpu", **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_asked_for_is_taken(precision: str, layout: str) -> None:
    world = cpu(precision=precision, memory_format=layout)
    assert world == World(torch.device("cpu"), precision, layout == "channels_last")
    assert world.memory_format == (torch.channels_last if layout == "channels_last" else torch.contiguous_format)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs the list of what the processor can do")
def test_auto_takes_bf16_only_where_the_processor_has_it() -> None:
    flags = set(re.findall(r"\bavx512_bf16\b|\bamx_tile\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")))
    assert cpu().precision == ("bf16" if flags else "fp32")


def test_asking_changes_nothing() -> None:
    torch.set_num_threads(1)
    assert cpu(threads=3) == cpu()
    assert torch.get_num_threads() == 1


def test_joining_sets_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join(SystemConfig(device="cpu", threads=3)) == cpu()
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(host, "usable_cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.use_cores()
    assert torch.get_num_threads() == 7
    torchrun = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    machine.use_cores()  # three processes share this machine
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # of each process, and more than its cores: as PyTorch takes it
    machine.use_cores()
    assert torch.get_num_threads() == 5
    machine.use_cores(4)  # --threads is for this run
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that binds processes to cores")
@pytest.mark.parametrize("variables", [{}, {"SLURM_CPUS_PER_TASK": "1"}])
def test_threads_are_the_cores_that_the_process_may_use(variables: dict[str, str]) -> None:
    """In a process of its own: as taskset, a container's cpuset, SLURM or the user say."""
    bind = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n" if not variables else ""
    code = bind + (
        "import torch\nfrom finetune101.config import SystemConfig\nfrom finetune101.machine import join\n"
        "join(SystemConfig(device='cpu')); print(torch.get_num_threads())"
    )
    names = ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS")
    environment = {key: value for key, value in os.environ.items() if key not in names} | variables
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]


def test_a_single_thread_by_torchrun_is_no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sets it where the user says nothing, and several processes would compute on one core each."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = usable_cores()
    for name, value, expected in (("OMP_NUM_THREADS", "1", 1), ("TORCHELASTIC_RUN_ID", "x", cores)):
        monkeypatch.setenv(name, value)
        assert usable_cores() == expected


def test_the_program_begins_with_the_cores_that_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for wish in ("", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
        if not wish:
            monkeypatch.delenv("OMP_NUM_THREADS")
        cores = usable_cores()
        monkeypatch.setattr(sys, "argv", ["finetune101", "recipes"])
        assert main() == 0
        assert os.environ["OMP_NUM_THREADS"] == (wish or str(cores))


def test_the_place_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place() == Place(0, 1, 0, 1)
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert place() == Place(3, 4, 3, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert place() == Place(3, 4, 1, 2)
    assert (cpu().rank, cpu().size) == (3, 4)


@pytest.mark.parametrize(
    ("variables", "token"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
    ],
)
def test_wrong_variables_of_torchrun(variables: dict[str, str], token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=token):
        cpu()


def test_a_lost_process_is_told_in_a_sentence() -> None:
    several = World(torch.device("cpu"), "fp32", False, rank=1, size=2)
    with pytest.raises(Refused, match="--resume"), several.together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    for world in (several, cpu()):
        with pytest.raises(RuntimeError, match="shapes"), world.together():  # a bug keeps its traceback
            raise RuntimeError("shapes do not fit")


def test_a_recorded_world_is_kept() -> None:
    for precision in ("fp32", "bf16"):
        for channels_last in (False, True):
            recorded = World(torch.device("cpu"), precision, channels_last).describe()
            assert cpu().describe().keys() == recorded.keys()
            assert detect(SystemConfig(device="cpu", precision=precision), recorded).describe() == recorded  # type: ignore[arg-type]


def test_a_run_does_not_go_on_in_a_precision_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_cpu_has_bf16", lambda: False)
    for precision in ("bf16", "fp16"):
        recorded = {"device": "cuda", "precision": precision, "channels_last": True}
        with pytest.raises(Refused, match=precision):
            detect(SystemConfig(device="cpu"), recorded)
    recorded = {"device": "cpu", "precision": "bf16", "channels_last": True}
    assert detect(SystemConfig(device="cpu", precision="bf16"), recorded).precision == "bf16"  # asked for, emulated
    monkeypatch.setattr(machine, "_cpu_has_bf16", lambda: True)
    assert detect(SystemConfig(device="cpu"), recorded).precision == "bf16"


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
