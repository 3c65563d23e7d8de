"""What this machine lends to the process; asking changes nothing."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
    limits = [cores, _quota(), *map(_whole, ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"))]
    return max(1, min(limit for limit in limits if limit))


def _whole(name: str) -> int | None:
    """The variable ``name`` of the environment where it is a number above 0; OMP_NUM_THREADS may be a list."""
    word = os.environ.get(name, "").split(",")[0].strip()
    return int(word) if word.isdecimal() and int(word) else None


def _quota() -> int | None:
    """Cores that the cgroup's quota of processor time is worth, rounded up; None without one."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        path = next((line.split("::", 1)[1].strip("/") for line in own if line.startswith("0::")), "")
        folders = [CGROUP / path, *(CGROUP / path).parents]
        found = []
        for folder in folders:
            if folder == CGROUP.parent:
                break
            file = folder / "cpu.max"
            if file.is_file():
                quota, period = file.read_text(encoding="utf-8").split()
                if quota != "max":
                    found.append(math.ceil(int(quota) / int(period)))
        first = CGROUP / "cpu" / "cpu.cfs_quota_us"  # cgroup 1
        if first.is_file() and (quota_us := int(first.read_text(encoding="utf-8"))) > 0:
            period_us = int((CGROUP / "cpu" / "cpu.cfs_period_us").read_text(encoding="utf-8"))
            found.append(math.ceil(quota_us / period_us))
        return min(found, default=None)
    except (OSError, ValueError, ZeroDivisionError):  # not there, or not as Linux writes it
        return None
