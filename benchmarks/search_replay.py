"""What samplers and pruners would have cost on a recorded grid: ``python benchmarks/search_replay.py RUNS/EXP``.

RUNS/EXP is a finished grid (search.json and its run directories): the truth. Each strategy is replayed over many seeds
on the recorded curves until it has seen an accuracy within 0.5 points of the grid's best; the cost is its training
steps as a share of the whole grid's. A strategy that never gets there counts as the whole grid, which would have to be
run after all, and is counted as missed. "quarter" is the share of seeds that got there within a quarter of the steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from recorded import record

from finetune101.experiments.replay import Curve, Pruner, replay
from finetune101.experiments.stage import Sampler
from finetune101.experiments.trials import read_trials

STRATEGIES: dict[str, tuple[Sampler, Pruner]] = {
    "random": ("random", "none"),
    "asha": ("grid", "asha"),
    "median": ("grid", "median"),
    "tpe": ("tpe", "none"),
    "tpe+asha": ("tpe", "asha"),
}


def shares(curves: tuple[Curve, ...], sampler: Sampler, pruner: Pruner, seeds: int, target: float) -> dict[str, Any]:
    """Steps to ``target`` as shares of the whole grid's steps, one for each seed, and how many seeds missed it."""
    whole = sum(curve.steps[-1] for curve in curves)
    costs, missed = [], 0
    for seed in range(seeds):
        replayed = replay(curves, sampler, pruner, seed)
        steps = replayed.steps_to(target)
        missed += steps is None
        costs.append(1.0 if steps is None else steps / whole)
    low, median, high = np.quantile(costs, [0.25, 0.5, 0.75])
    return {
        "mean": float(np.mean(costs)),
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "missed": missed,
        "quarter": float(np.mean(np.array(costs) <= 0.25)),
        "shares": costs,
    }


def main() -> int:
    """Prints a line per strategy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--within", type=float, default=0.5, help="points of the best that are good enough")
    parser.add_argument("--out", type=Path, help="write everything to this JSON file")
    arguments = parser.parse_args()
    curves = read_trials(arguments.folder).complete
    best = max(curve.best for curve in curves)
    good = sum(curve.best >= best - arguments.within for curve in curves)
    print(f"{len(curves)} points, best {best:.2f} %, {good} within {arguments.within} points of it")
    values: dict[str, Any] = {"points": len(curves), "best": best, "within": arguments.within, "good_points": good}
    values |= {"steps_of_the_grid": sum(curve.steps[-1] for curve in curves), "seeds": arguments.seeds}
    for name, (sampler, pruner) in STRATEGIES.items():
        cost = shares(curves, sampler, pruner, arguments.seeds, best - arguments.within)
        values[name] = cost
        print(
            f"{name:9s} mean {cost['mean']:.3f}  median {cost['median']:.3f}  "
            f"quartiles {cost['quartiles'][0]:.3f} to {cost['quartiles'][1]:.3f}  missed {cost['missed']}  "
            f"within a quarter {cost['quarter']:.2f}"
        )
    record(values, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
