"""Seconds from ``import torch`` to the end of the first step of a run whose image cache is there.

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
from finetune101.cli import parse_train
from finetune101.training.loop import Trainer
from finetune101.training.prepare import prepare

class Stepped(Exception): ...

class Bar:
    def update(self, count):
        raise Stepped

config = parse_train(sys.argv[1:], prog="train").config
try:
    Trainer(prepare(config)).train_epoch(1, Bar())
except Stepped:
    print(time.perf_counter() - started)
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
            seconds.append(float(out.splitlines()[-1]))
    counted = seconds[1:]  # the first may have built the cache
    result = {"seconds": round(statistics.median(counted), 2), "all": counted, "cores": os.cpu_count()}
    (RESULTS / "warm_start.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
