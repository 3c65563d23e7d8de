"""Several processes on the CPU (gloo): the same numbers as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--model timm:test_vit --size 160 --no-pretrain --recipe original --epochs 2 --batch-size 6 --lr 0.01 --threads 1 "
    "--crop-scale 0.5 --precision fp32 --val-size 0.2"
)


def train(data: Path, folder: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = ["-m", "finetune101", "train", "--exp", "run", "--runs", str(folder), "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, *words, *FLAGS.split(), *more], env=environment, capture_output=True, text=True, check=False
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_numbers(tiny_data: Path, tmp_path: Path) -> None:
    """Without batch norm, on numbers of images that 2 and 3 processes cannot share evenly."""
    runs = {}
    for processes in (1, 2, 3):
        done = train(tiny_data, tmp_path / str(processes), processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("epoch   2/2") == 1  # one process speaks
        runs[processes] = records(tmp_path / str(processes))
    for processes in (2, 3):
        for one, several in zip(runs[1], runs[processes], strict=True):
            for key in ("train_loss", "train_top1", "val_loss", "val_top1"):
                assert several[key] == pytest.approx(one[key], rel=2e-4), (processes, key)
    refused = train(tiny_data, tmp_path / "bad", 2, "--batch-size", "7")
    assert refused.returncode != 0 and "give a multiple of 2" in refused.stderr
