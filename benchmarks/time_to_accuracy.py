"""Wall time from the start of a command to a model of a given accuracy, cache building and compiling included.

``python benchmarks/time_to_accuracy.py --data FOLDER -- --recipe probe`` runs ``finetune101 train`` with these flags in
an empty cache folder, and writes results/speed/<exp>.json: seconds from the start of the process to every epoch's
record and to its end. ``--goal`` (validation accuracy, percent) names the first epoch that reaches it. The test set is
not touched; ``--warm`` runs the command a second time and measures the time to its first record with the cache there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results/speed"


def timed(flags: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Runs the training; seconds to each epoch and to the end of the process."""
    command = [sys.executable, "-u", "-m", "finetune101", "train", *flags]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    epochs = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.match(r"epoch +(\d+)/.*val [\d.]+ +([\d.]+) %", line):
            epoch = {"epoch": int(match[1]), "val_top1": float(match[2])}
            epochs.append({**epoch, "seconds": round(time.perf_counter() - started, 1)})
    if process.wait():
        raise SystemExit(process.returncode)
    return {"epochs": epochs, "seconds": round(time.perf_counter() - started, 1)}


def main() -> None:
    """Measures one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--exp", required=True)
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--goal", type=float, default=0.0, help="validation accuracy, percent")
    parser.add_argument("--warm", action="store_true", help="keep the user's own cache")
    parser.add_argument("flags", nargs="*")
    arguments = parser.parse_args()
    flags = ["--exp", arguments.exp, "--runs", arguments.runs, "--data", arguments.data, *arguments.flags]
    with tempfile.TemporaryDirectory() as cache:
        own = {} if arguments.warm else {"FINETUNE101_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        result = timed(flags, {**os.environ, **own})
    reached = next((epoch for epoch in result["epochs"] if epoch["val_top1"] >= arguments.goal), None)
    command = "finetune101 train " + " ".join(["--exp", arguments.exp, *arguments.flags])
    result |= {"command": command, "goal_val_top1": arguments.goal, "reached": reached, "cores": os.cpu_count()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{arguments.exp}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{arguments.goal} % reached: {reached}; whole command {result['seconds']} s")


if __name__ == "__main__":
    main()
