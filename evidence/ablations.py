"""What each ingredient of the recipes is worth: trains both recipes whole and without one ingredient at a time.

python evidence/ablations.py --jobs 2          trains what is missing in runs/ablations, then writes the table
python evidence/ablations.py --table           writes the table only

Reduced sizes and lengths, on the validation images of the reference split; results/ablations/ keeps configuration and
curve of every run, results/ablations.md is the table.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from publish import RESULTS, keep_config

from finetune101.cli.one_run import training_settings
from finetune101.run import Run
from finetune101.training.resume import as_started, check_same

RUNS, SEEDS = Path("runs") / "ablations", (0, 1, 2)
KEPT = ("config.json", "metrics.jsonl")
ARMS = {
    "finetune": (
        "--recipe finetune --epochs 3 --size 96 --cache-size 112 --train-sizes 80",
        {
            "linear probe first": "--head random",
            "its strong penalty": "--probe-l2 0.003",
            "sharp crops": "--cache-size 96",
            "batch-norm statistics kept": "--no-freeze-norm",
            "random resized crops": "--crop-scale 1",
            "label smoothing": "--label-smoothing 0",
        },
    ),
    "scratch": (
        "--recipe scratch --no-pretrain --epochs 12 --warmup-epochs 1 --train-sizes 64 --size 64"
        " --ema 0.99 --val-every 3",
        {
            "TrivialAugment": "--policy none",
            "random erasing": "--erasing 0",
            "averaged weights (EMA)": "--ema 0",
            "label smoothing": "--label-smoothing 0",
            "no weight decay on norms": "--norm-weight-decay",
        },
    ),
}
"""Recipe -> its reduced form, and the flags that leave out one ingredient each."""
NOTE = """The whole `scratch` has 140 epochs (82.1 %), the table's 12: what strong augmentation costs here says that
twelve epochs are too few for it, not what it gains in 140. `scratch_fast` (25 epochs) does without."""


def runs() -> Iterator[tuple[str, list[str]]]:
    """Every run: its folder below ``RUNS``, and its flags. Seeds come last, so that all have one before any has two."""
    for seed, (recipe, (base, ingredients)) in itertools.product(SEEDS, ARMS.items()):
        for ingredient, without in {"nothing": "", **ingredients}.items():
            yield f"{recipe}/without {ingredient}/seed{seed}", [*base.split(), *without.split(), "--seed", str(seed)]


def train(name: str, flags: list[str], jobs: int) -> None:
    """Trains one run, or goes on with it; what ended is kept in results/. Raises ValueError for other settings."""
    run, kept = RUNS / name, RESULTS / "ablations" / name
    if all((kept / file).is_file() for file in KEPT):
        asked = training_settings([*flags, "--exp", f"ablations/{name}"])
        check_same(Run(kept), as_started(asked, Run(kept)))
        return
    command = [sys.executable, "-m", "finetune101", "train", "--exp", f"ablations/{name}"]
    threads = ["--threads", "1"] if jobs > 1 else []
    command += ["--resume"] if (run / "config.json").is_file() else [*flags, *threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "metrics.jsonl", kept / "metrics.jsonl")
    keep_config(run, kept)
    print(name, f"{score(kept)[0]:.2f} %", flush=True)


def score(folder: Path) -> tuple[float, float]:
    """Validation accuracy (percent) after the last epoch, and the seconds of the quickest: others were disturbed."""
    records = [record for record in Run(folder).metrics() if record["epoch"]]  # the probe is epoch 0
    return records[-1]["val_top1"], min(record["seconds"] for record in records)


def table() -> str:
    """The table in Markdown, from what results/ holds."""
    lines = ["# What each ingredient is worth", "", "Made by `python evidence/ablations.py`. EfficientNet-Lite0,"]
    lines[-1] += " validation accuracy on the reference split (904 images), reduced sizes and lengths:"
    lines += [*(f"`{base}`." for base, _ in ARMS.values()), ""]
    lines.append("Gain: whole recipe minus the recipe without the ingredient, seed by seed; SE: its standard error.")
    for recipe, (_, ingredients) in ARMS.items():
        folder = RESULTS / "ablations" / recipe
        seeds = [seed for seed in SEEDS if (folder / "without nothing" / f"seed{seed}").is_dir()]
        whole = {seed: score(folder / "without nothing" / f"seed{seed}") for seed in seeds}
        lines += [
            "",
            f"## {recipe}",
            "",
            "| without | top-1, % | gain, points | SE | n | time |",
            "|---|---|---|---|---|---|",
        ]
        lines.append(
            f"| nothing: the whole recipe | {spread([top1 for top1, _ in whole.values()])} | | | {len(whole)} | 1 |"
        )
        for ingredient in ingredients:
            mine = folder / f"without {ingredient}"
            found = {seed: score(mine / f"seed{seed}") for seed in seeds if (mine / f"seed{seed}").is_dir()}
            if not found:
                continue
            gains = [whole[seed][0] - top1 for seed, (top1, _) in found.items()]
            error = f"{statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else "–"
            time = min(seconds for _, seconds in whole.values()) / min(seconds for _, seconds in found.values())
            top1 = spread([top1 for top1, _ in found.values()])
            lines.append(
                f"| {ingredient} | {top1} | {statistics.mean(gains):+.2f} | {error} | {len(gains)} | {time:.2f} |"
            )
    lines += [
        "",
        "Time: the quickest epoch of the whole recipe, as a multiple of that without the ingredient; the probe,",
    ]
    lines += ["which comes before the first epoch, is not in it.", "", NOTE]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if not arguments.table:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            for future in [pool.submit(train, name, flags, arguments.jobs) for name, flags in runs()]:
                future.result()
    (RESULTS / "ablations.md").write_text(table(), encoding="utf-8")
