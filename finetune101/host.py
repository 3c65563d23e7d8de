"""Cores, place among the processes of torchrun, and GPU of this process; asking changes nothing."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from finetune101.errors import Refused

GPU_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA, WSL, AMD
CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """How many cores the process may use, at least 1: affinity, the quota of its cgroup, and SLURM's share of a task.

    ``OMP_NUM_THREADS`` is a wish of the user, not a property of the machine: a smaller one counts as well.
    """
    process_count = getattr(os, "process_cpu_count", None)  # Python 3.13
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = (process_count() if process_count else os.cpu_count()) or 1
    limits = [cores, _quota(), _whole("SLURM_CPUS_PER_TASK"), _wished_threads()]
    return max(1, min(limit for limit in limits if limit))


@dataclass(frozen=True)
class Place:
    """Rank and number of the processes that torchrun started: all of them, and the ones on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def place() -> Place:
    """The place of this process by the variables that torchrun sets. Raises Refused where one is wrong or missing."""
    size = _variable("WORLD_SIZE", 1)
    if size < 2:
        return Place()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise Refused(f"WORLD_SIZE is {size}, but {missing[0]} is not set; start by torchrun, or unset WORLD_SIZE")
    rank, local_size = _variable("RANK", 0), max(1, _variable("LOCAL_WORLD_SIZE", 1))
    if rank >= size:
        raise Refused(f"RANK is {rank} of WORLD_SIZE {size}; start the processes by torchrun")
    return Place(rank, size, _variable("LOCAL_RANK", rank), local_size)


def thread_count() -> int:
    """How many CPU threads the process computes with: $OMP_NUM_THREADS where the user has set it, as PyTorch does.

    Else its part of the usable cores, which the processes of torchrun on this machine share. Raises Refused as
    ``place`` does.
    """
    return _wished_threads() or max(1, usable_cores() // place().local_size)


def _wished_threads() -> int | None:
    """$OMP_NUM_THREADS, but for the 1 that torchrun sets for each of several processes: nobody asked for that."""
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    return None if by_torchrun else _whole("OMP_NUM_THREADS")


def _variable(name: str, default: int) -> int:
    word = os.environ.get(name, "").strip() or str(default)
    if not word.isdecimal():
        raise Refused(f"{name} is {word}, no whole number; start several processes by torchrun, or unset {name}")
    return int(word)


def _whole(name: str) -> int | None:
    """The environment variable ``name`` as a number above 0, else None; OMP_NUM_THREADS may be a list."""
    word = os.environ.get(name, "").split(",")[0].strip()
    return int(word) if word.isdecimal() and int(word) else None


def _quota() -> int | None:
    """The cgroup's quota of processor time in cores, rounded up; None without a quota."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        path = next((line.split("::", 1)[1].strip("/") for line in own if line.startswith("0::")), "")
        folders = [CGROUP / path, *(CGROUP / path).parents]
        quotas = []
        for folder in folders:
            if folder == CGROUP.parent:
                break
            file = folder / "cpu.max"
            if file.is_file():
                quota, period = file.read_text(encoding="utf-8").split()
                if quota != "max":
                    quotas.append(math.ceil(int(quota) / int(period)))
        first = CGROUP / "cpu" / "cpu.cfs_quota_us"  # cgroup 1
        if first.is_file() and (quota_us := int(first.read_text(encoding="utf-8"))) > 0:
            period_us = int((CGROUP / "cpu" / "cpu.cfs_period_us").read_text(encoding="utf-8"))
            quotas.append(math.ceil(quota_us / period_us))
        return min(quotas, default=None)
    except (OSError, ValueError, ZeroDivisionError):  # not there, or not as Linux writes it
        return None


def has_gpu() -> bool:
    """Whether PyTorch can use a CUDA (or ROCm) GPU here; PyTorch is asked only where the system may have one."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    if sys.platform == "darwin" or (sys.platform == "linux" and not any(map(os.path.exists, GPU_FILES))):
        return False
    import torch

    return torch.cuda.is_available()
