"""Several processes on the CPU (gloo): the same numbers as one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune101.cli.main import main
from finetune101.evaluation.checkpoint import open_network
from finetune101.run import Run
from finetune101.training.job import prepare
from finetune101.training.loop import Trainer

FLAGS = (
    "--model timm:test_vit --size 160 --no-pretrain --recipe original --epochs 2 --batch-size 6 --lr 0.01 --threads 1 "
    "--crop-scale 0.5 --precision fp32 --val-size 0.2"
)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(data: Path, folder: Path, processes: int, *more: str) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = ["-m", "finetune101", "train", "--exp", "run", "--runs", str(folder), "--data", str(data)]
    return [*launch, *words, *more]


def train(data: Path, folder: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    words = command(data, folder, processes, *FLAGS.split(), *more)
    environment = ENVIRONMENT | {"FINETUNE101_CACHE": str(folder / "cache")}
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_any_number_of_processes_gives_the_same_numbers(tiny_data: Path, tmp_path: Path) -> None:
    """Without batch norm, on a number of images that 3 processes cannot share evenly, one of them unreadable.

    The first process alone decodes and prints; the temperature is that of all validation images.
    """
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    (data / "ball/broken.jpg").write_bytes(b"no image")
    runs, temperatures = {}, {}
    for processes in (1, 3):
        done = train(data, tmp_path / str(processes), processes, "--skip-bad-images")
        assert done.returncode == 0, done.stderr
        for line in ("Left out 1 unreadable image", "Decoding 36 images once", "epoch   2/2"):
            assert done.stdout.count(line) == 1, line
        runs[processes] = records(tmp_path / str(processes))
        temperatures[processes] = open_network(Run(tmp_path / str(processes) / "run")).temperature
    assert temperatures[1] is not None and temperatures[3] == pytest.approx(temperatures[1], rel=1e-2)
    for one, several in zip(runs[1], runs[3], strict=True):
        for key in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert several[key] == pytest.approx(one[key], rel=2e-4), key
    refused = train(tiny_data, tmp_path / "bad", 2, "--batch-size", "7")
    assert refused.returncode != 0 and "give a multiple of 2" in refused.stderr


NORMS = (
    "--model resnet18 --size 32 --no-pretrain --recipe original --head probe --probe-l2 0.01 0.1 --epochs 2"
    " --batch-size 10 --lr 0.0001 --threads 1 --precision fp32 --val-size 0.2"
)


@pytest.mark.slow
def test_batch_norm_and_the_probe_in_two_processes(tiny_data: Path, tmp_path: Path) -> None:
    """21 training images in batches of 10 and 11, 9 that validate: no process has a single one, nor as many as another.

    The probe is that of one process. Afterwards batch norms have seen other images in each process: all validate with
    the statistics of the first, which are in the checkpoint.
    """
    words = command(tiny_data, tmp_path / "two", 2, *NORMS.split(), "--test-size", "0.15")
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    places = ["--exp", "run", "--runs", str(tmp_path / "one"), "--data", str(tiny_data)]
    assert main(["train", *places, *NORMS.split(), "--test-size", "0.15"]) == 0
    two, one = records(tmp_path / "two"), records(tmp_path / "one")
    for key in ("train_loss", "train_top1", "probe_l2", "val_loss", "val_top1"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-4), key
    assert [record["step"] for record in two] == [record["step"] for record in one]
    run = Run(tmp_path / "one/run")
    trainer = Trainer(prepare(run.config(), resume=True))
    trainer.model.load_state_dict(torch.load(tmp_path / "two/run/last.pt", weights_only=True)["model"])
    again = trainer.validate(epoch=2)
    assert again["val_loss"] == pytest.approx(two[-1]["val_loss"], rel=1e-4)
    assert again["val_top1"] == pytest.approx(two[-1]["val_top1"])
    assert abs(again["val_loss"] - one[-1]["val_loss"]) > 1e-3 * again["val_loss"]  # norms of half batches


def processes_of(parent: int) -> list[int]:
    """The children of the process ``parent``."""
    children = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = file.read_text().rsplit(")", 1)[1].split()
            children += [int(file.parent.name)] if int(words[1]) == parent and words[0] != "Z" else []
    return sorted(children)


def wait_for(what: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("killed", ["a process", "torchrun"])
def test_who_is_left_ends_with_a_sentence(tiny_data: Path, tmp_path: Path, killed: str) -> None:
    words = command(tiny_data, tmp_path, 2, *FLAGS.split(), "--epochs", "1000")
    with open(tmp_path / "errors", "w") as errors:
        launcher = subprocess.Popen(words, env=ENVIRONMENT, stdout=errors, stderr=errors, start_new_session=True)
    ranks: list[int] = []
    try:
        metrics = tmp_path / "run/metrics.jsonl"
        wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 2)  # both are training
        ranks = processes_of(launcher.pid)
        assert len(ranks) == 2
        os.kill(launcher.pid if killed == "torchrun" else ranks[1], signal.SIGKILL)
        wait_for(lambda: not any(rank in processes_of(1) + processes_of(launcher.pid) for rank in ranks), 30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    lines = (tmp_path / "errors").read_text().splitlines()
    assert any("--resume" in line for line in lines)  # of the lost process, or of torchrun's SIGTERM if that is sooner
    assert all("--resume" in line for line in lines if line.startswith("error:"))
    assert len(records(tmp_path)) < 1000


@pytest.mark.slow
def test_the_originals_train_py_in_two_processes(tiny_data: Path, tmp_path: Path) -> None:
    """The first process alone writes EXP_best.pth and the curves."""
    script = Path(__file__).parents[2] / "train.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    words = [*launch, "--exp", "two", "--data", str(tiny_data), *FLAGS.split(), "--epochs", "1"]
    environment = ENVIRONMENT | {"FINETUNE101_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two_best.pth").is_file() and done.stdout.count("Test it:") == 1
