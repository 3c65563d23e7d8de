"""Do the intervals and tests of ``finetune101 compare`` keep their promise? A simulation with known truth.

python benchmarks/intervals.py              writes results/compare_coverage/coverage.json (about a minute on one core)
python benchmarks/intervals.py 4000 1000    the same from other random numbers: coverage_1000.json

Image i of arm k has an ability a_ki ~ N(m_k, s^2), correlated between the arms; run r adds its own b_kr ~ N(0, t^2);
the answer is right where a_ki + b_kr + N(0, 1) > 0. So the true accuracies have a closed form: Phi(m / sqrt(1 + s^2 +
t^2)) over images and runs, Phi((m + b) / sqrt(1 + s^2)) for the given run. ``t`` is set so that the true accuracy of
the arm differs by the wanted number of points from run to run.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from finetune101.evaluation import metrics
from finetune101.files import write_json
from finetune101.reports.compare import over_splits

IMAGES = 1770  # the reference split's test images
ALL, STANDARD = 8677, (3030, 2945)  # all images; the standard split's for training and, 50 per class, for the test
SPREAD = 2.0  # s: most images are nearly always right, or nearly always wrong
CORRELATION = 0.7  # of an image's ability in the two arms
ARMS = {"equal, 95 %": (0.95, 0.95), "95 against 93 %": (0.95, 0.93), "95 against 55 %": (0.95, 0.55)}
OUT = Path(__file__).parents[1] / "results" / "compare_coverage" / "coverage.json"


def simulate(
    rng: np.random.Generator, arms: tuple[float, float], runs: int, points: float, images: int = IMAGES
) -> tuple[list[Any], list[Any]]:
    """One experiment: (right answers (runs, images) of each arm, true accuracy of each run in percent)."""
    shared, own = rng.standard_normal(images), rng.standard_normal((2, images))
    correct, truth = [], []
    for k, accuracy in enumerate(arms):
        mean, spread = effect(accuracy, points)
        ability = SPREAD * (np.sqrt(CORRELATION) * shared + np.sqrt(1 - CORRELATION) * own[k])
        level = mean + spread * rng.standard_normal((runs, 1))
        noise = rng.standard_normal((runs, images), dtype=np.float32)
        correct.append(ability + level + noise > 0)
        truth.append(100 * stats.norm.cdf(level[:, 0] / np.sqrt(1 + SPREAD**2)))
    return correct, truth


def effect(accuracy: float, points: float) -> tuple[float, float]:
    """(m, t) for a true ``accuracy`` whose runs differ by a standard deviation of ``points`` (delta method)."""
    z = stats.norm.ppf(accuracy)
    spread = points / 100 * np.sqrt(1 + SPREAD**2) / stats.norm.pdf(z)
    return float(z * np.sqrt(1 + SPREAD**2 + spread**2)), float(spread)


def cell(name: str, runs: int, points: float, repeats: int, seed: int) -> dict[str, Any]:
    """Shares, in percent, of ``repeats`` experiments in which an interval holds the truth or a test rejects it."""
    rng, arms = np.random.default_rng(seed), ARMS[name]
    truth = 100 * (arms[0] - arms[1])
    held = rejected = 0
    for _ in range(repeats):
        (a, b), _true = simulate(rng, arms, runs, points)
        result = metrics.crossed(a, b)
        held += result.interval[0] <= truth <= result.interval[1]
        rejected += result.p < 0.05
    shares = {"arms": name, "runs": runs, "between_runs_points": points, "crossed_coverage": 100 * held / repeats}
    return shares | ({"crossed_false_positive": 100 * rejected / repeats} if truth == 0 else {})


def one_run(name: str, repeats: int, seed: int) -> dict[str, Any]:
    """The same for one run per arm: the bootstrap over images and McNemar's test, both about the given networks."""
    rng, arms = np.random.default_rng(seed), ARMS[name]
    held = rejected = 0
    for _ in range(repeats):
        (a, b), (true_a, true_b) = simulate(rng, arms, 1, 0.0)
        _, low, high = metrics.paired_bootstrap(a[0], b[0], resamples=2000)
        held += bool(low <= true_a[0] - true_b[0] <= high)
        rejected += metrics.mcnemar_exact(a[0], b[0]) < 0.05
    shares = {"arms": name, "runs": 1, "images_coverage": 100 * held / repeats}
    return shares | ({"mcnemar_false_positive": 100 * rejected / repeats} if arms[0] == arms[1] else {})


def several_splits(name: str, splits: int, points: float, repeats: int, seed: int) -> dict[str, Any]:
    """The same for one run per arm on each of several random splits: the interval over splits."""
    rng, arms = np.random.default_rng(seed), ARMS[name]
    truth = 100 * (arms[0] - arms[1])
    held = 0
    for _ in range(repeats):
        (a, b), _true = simulate(rng, arms, splits, points, ALL)
        each = []
        for x, y in zip(a, b, strict=True):
            tested = rng.permutation(ALL)[: STANDARD[1]]
            each.append(100 * (x[tested].mean() - y[tested].mean()))
        low, high = over_splits(each, STANDARD[1] / STANDARD[0])
        held += bool(low <= truth <= high)
    return {"arms": name, "splits": splits, "between_runs_points": points, "splits_held": 100 * held / repeats}


def main(repeats: int = 4000, out: Path = OUT, first_seed: int = 0) -> dict[str, Any]:
    """Runs every cell, prints it and writes all of them to ``out``."""
    started, cells = time.perf_counter(), []
    for seed, (name, runs, points) in enumerate(itertools.product(ARMS, (3, 5), (0.3, 1.0)), first_seed):
        cells.append(cell(name, runs, points, repeats, seed))
        print(cells[-1], flush=True)
    for seed, name in enumerate(ARMS, first_seed + 100):
        cells.append(one_run(name, repeats // 2, seed))
        print(cells[-1], flush=True)
    for seed, (name, splits, points) in enumerate(itertools.product(ARMS, (3, 5), (0.3, 1.0)), first_seed + 200):
        cells.append(several_splits(name, splits, points, repeats // 10, seed))
        print(cells[-1], flush=True)
    covered = [value for c in cells for key, value in c.items() if key.endswith("coverage")]
    wrong = [value for c in cells for key, value in c.items() if key.endswith("false_positive")]
    held = [c["splits_held"] for c in cells if "splits_held" in c]
    summary = {
        "over_splits": [min(held), max(held)],
        "coverage": [min(covered), max(covered)],
        "false_positive": max(wrong),
    }
    seconds = round(time.perf_counter() - started)
    result = {**summary, "images": IMAGES, "repeats": repeats, "seconds": seconds, "cells": cells}
    write_json(out, result)
    print(f"coverage {min(covered):.1f} to {max(covered):.1f} %, false positives up to {max(wrong):.1f} %, {seconds} s")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repeats", type=int, nargs="?", default=4000)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    arguments = parser.parse_args()
    main(arguments.repeats, OUT.with_stem(f"coverage_{arguments.seed}") if arguments.seed else OUT, arguments.seed)
