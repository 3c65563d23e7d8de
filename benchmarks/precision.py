"""bf16 against fp32 fine-tuning, and bf16 with PyTorch's kernels: paired validation accuracies, same seeds.

``python benchmarks/precision.py --data FOLDER`` fine-tunes EfficientNet-Lite0 at 96 px for 3 epochs with both and with
3 seeds, and writes results/speed/precision.json: mean paired difference in points, and the spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Trains, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    flags = ["--recipe", "original", "--model", "efficientnet_lite0", "--size", "96", "--epochs", "3", "--lr", "0.05"]
    rows = []
    with tempfile.TemporaryDirectory() as runs:
        for seed in range(arguments.seeds):
            row: dict[str, float] = {"seed": seed}
            for kind in ("bf16", "fp32", "bf16_plain_kernels"):
                name, precision = f"{kind}{seed}", kind[:4]
                train = [sys.executable, "-m", "finetune101", "train", "--exp", name, "--runs", runs]
                more = ["--data", arguments.data, "--seed", str(seed), "--precision", precision]
                more += ["--no-fast-kernels"] if kind.endswith("kernels") else []
                subprocess.run([*train, *flags, *more], check=True, stdout=subprocess.DEVNULL)
                records = (Path(runs) / name / "metrics.jsonl").read_text().splitlines()
                row[kind] = max(json.loads(record)["val_top1"] for record in records)
            print(row, flush=True)
            rows.append(row)
    differences = [row["bf16"] - row["fp32"] for row in rows]
    plain = [row["bf16_plain_kernels"] - row["fp32"] for row in rows]
    mean, sd = statistics.mean(differences), statistics.stdev(differences)
    result = {"flags": flags, "mean_difference": round(mean, 3), "sd": round(sd, 3), "runs": rows}
    result |= {"plain_kernels": round(statistics.mean(plain), 3), "plain_sd": round(statistics.stdev(plain), 3)}
    (HERE.parent / "results/speed/precision.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result)


if __name__ == "__main__":
    main()
