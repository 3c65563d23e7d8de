"""Does the default recipe of ``train`` fine-tune? Its best epochs over seeds, on several data sets.

python evidence/default_recipe.py caltech101='runs/default_s*' ... --probe 'results/study_gain/*/probe/all/*'

Writes results/default_recipe.json: for each set and seed the best epoch and the validation accuracy after every epoch
(0 is the linear probe that the training starts from), and over the first five seeds of the first set how far validation
is above the probe. The test images are not looked at.
"""

from __future__ import annotations

import argparse
import glob
import math
import statistics
from pathlib import Path
from typing import Any

from finetune101.files import write_json
from finetune101.run import Run

RESULTS = Path(__file__).resolve().parent.parent / "results"
SEEDS = 5  # of the comparison with the probe


def read_runs(pattern: str) -> list[Run]:
    """The runs that a glob names, sorted by their seeds."""
    runs = [Run(Path(folder)) for folder in glob.glob(pattern)]
    return sorted(runs, key=lambda run: run.config().system.seed)


def summary_of(run: Run) -> dict[str, Any]:
    """Seed, recipe, best epoch and validation accuracies of one run."""
    records, config = run.metrics(), run.config()
    best = [record for record in records if record["best"]][-1]
    return {
        "seed": config.system.seed,
        "recipe": config.recipe,
        "best_epoch": best["epoch"],
        "val_top1": best["val_top1"],
        "val_top1_by_epoch": [record["val_top1"] for record in records],
    }


def main() -> None:
    """Reads the runs and writes the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="NAME=GLOB of the runs of one data set; globs may be joined by commas")
    parser.add_argument("--probe", required=True, help="glob of the probe's runs on the first set")
    arguments = parser.parse_args()
    sets = {}
    for word in arguments.sets:
        name, _, patterns = word.partition("=")
        rows = [summary_of(run) for pattern in patterns.split(",") for run in read_runs(pattern)]
        sets[name] = sorted(rows, key=lambda row: row["seed"])
    probe = [summary_of(run)["val_top1"] for run in read_runs(arguments.probe)]
    first = [row["val_top1"] for row in next(iter(sets.values()))][:SEEDS]
    value = {
        "fine_tuned": {name: sum(row["best_epoch"] > 0 for row in rows) for name, rows in sets.items()},
        "runs": {name: len(rows) for name, rows in sets.items()},
        "val_top1": statistics.mean(first),
        "val_top1_standard_error": statistics.stdev(first) / math.sqrt(len(first)),
        "probe_val_top1": statistics.mean(probe),
        "above_probe": statistics.mean(first) - statistics.mean(probe),
        "sets": sets,
    }
    write_json(RESULTS / "default_recipe.json", value)
    print(value["fine_tuned"], value["runs"], {key: value[key] for key in list(value)[2:6]})


if __name__ == "__main__":
    main()
