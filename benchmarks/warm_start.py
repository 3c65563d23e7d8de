"""Seconds from ``import torch`` to the start and to the end of the first step of a run whose image cache is there.

``python benchmarks/warm_start.py --data FOLDER`` starts it five times and writes results/speed/warm_start.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "results/speed"
ONCE = """
import sys, time
import torch
started = time.perf_counter()
from finetune101.cli.one_run import training_settings
from finetune101.training import loop
from finetune101.training.job import prepare

class Stepped(Exception): ...

class Bar:
    def update(self, count):
        raise Stepped

class Model(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        self.called = time.perf_counter()  # the first batch is there
        return self.model(x)

config = training_settings(sys.argv[1:])
trainer = loop.Trainer(prepare(config))
trainer.wrapped = Model(trainer.model)
try:
    trainer.train_epoch(1, trainer.source.train([1]), Bar())
except Stepped:
    print(trainer.wrapped.called - started, time.perf_counter() - started)
"""


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    arguments = parser.parse_args()
    flags = ["--recipe", "original", "--model", "efficientnet_lite0", "--data", arguments.data]
    seconds = []
    with tempfile.TemporaryDirectory() as runs:
        for number in range(6):
            command = [sys.executable, "-c", ONCE, "--exp", str(number), "--runs", runs, *flags]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            seconds.append([float(text) for text in out.splitlines()[-1].split()])
    counted = seconds[1:]  # the first may have built the cache
    start, end = (round(statistics.median(column), 2) for column in zip(*counted, strict=True))
    result = {"seconds": start, "first_step_done_seconds": end, "all": counted, "cores": os.cpu_count()}
    (RESULTS / "warm_start.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
