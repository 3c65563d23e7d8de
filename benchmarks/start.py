"""How long commands take to begin, each in fresh processes: the first training step, help, import, one photo.

``python benchmarks/start.py --data FOLDER --photo FILE --repeats 5`` writes results/start/start.json. A training counts
from the command to the end of its first step of 32 images, with decoded images, weights and kernels in place: a run
that is not counted puts them there. With --bundle FOLDER --bundle-python PYTHON the exported bundle labels the photo as
well. Prediction is measured again with nothing in the page cache where the system lets this process empty it. The
commands take turns, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "results/start/start.json"
MODELS = ("efficientnet_lite0", "resnet18")
BATCH = 32
DROP = Path("/proc/sys/vm/drop_caches")
PROGRAM = [sys.executable, "-m", "finetune101"]
STEP = "first step:"
DRIVER = """
import os, sys, time
from finetune101.cli import main as program
dispatch = program.dispatch

def end(*_):
    print("\\nfirst step:", time.monotonic(), flush=True)
    os._exit(0)

def watched(words):
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(end)
    return dispatch(words)

program.dispatch = watched
sys.exit(program.main())
"""


@dataclass(frozen=True)
class Once:
    """One fresh process: seconds of its work and its peak memory (resident, with mapped files)."""

    seconds: float
    peak_mb: float


@dataclass
class Command:
    """What is measured: ``words`` of a command line, and what came of each repetition."""

    words: list[str]
    until_step: bool = False
    """Whether the end is that of the first training step, and not of the process."""
    cold: bool = False
    """Whether the page cache is emptied before each repetition."""
    times: list[Once] = field(default_factory=list)

    def run(self) -> Once:
        """Runs the command once in a process of its own. Ends this program where it fails."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as out:
            started = time.monotonic()
            process = subprocess.Popen(self.words, stdout=out, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            ended = time.monotonic()
            process.returncode = os.waitstatus_to_exitcode(status)
            out.seek(0)
            lines = out.read().splitlines()
        if self.until_step:
            ended = next((float(line.rpartition(STEP)[2]) for line in lines if STEP in line), -1.0)
        if process.returncode or ended < 0:
            raise SystemExit(f"{' '.join(self.words)} failed:\n" + "\n".join(lines[-20:]))
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        return Once(ended - started, usage.ru_maxrss * unit / 1e6)

    def summary(self) -> dict[str, Any]:
        """Medians and every measurement, for the JSON file."""
        seconds, memory = [one.seconds for one in self.times], [one.peak_mb for one in self.times]
        return {
            "median_s": round(statistics.median(seconds), 3),
            "median_peak_mb": round(statistics.median(memory), 1),
            "seconds": [round(value, 3) for value in seconds],
            "peak_mb": [round(value, 1) for value in memory],
        }


def why_never_cold() -> str:
    """Why the page cache cannot be emptied here; "" where it can. Emptying it is tried once."""
    try:
        empty_page_cache()
    except OSError as error:
        return f"not measured: the page cache cannot be emptied here ({error.strerror})"
    return ""


def empty_page_cache() -> None:
    """Makes the next process read all files from the disk. Raises OSError where the system does not allow it."""
    os.sync()
    DROP.write_text("3\n")


def training(model: str, has_weights: bool, data: Path, runs: Path) -> Command:
    """The command that ends after the first training step of ``model``; random weights where it has none here."""
    words = [sys.executable, "-c", DRIVER, "train", "--recipe", "original", "--model", model, "--size", "224"]
    words += ["--batch-size", str(BATCH), "--data", str(data), "--exp", model, "--runs", str(runs), "--overwrite"]
    return Command(words if has_weights else [*words, "--no-pretrain"], until_step=True)


def facts_of(models: list[str]) -> dict[str, Any]:
    """Machine and versions, and which of ``models`` have ImageNet weights here: asked in a process of its own.

    This process stays small, as the peak memory of a new process begins with that of the process that starts it.
    """
    code = (
        "import json, sys; from finetune101.models.build import is_installed;"
        "from finetune101.training.benchmark import machine_facts;"
        "pretrained = {model: is_installed(model) for model in sys.argv[1:]};"
        "print(json.dumps({**machine_facts(), 'pretrained': pretrained}))"
    )
    done = subprocess.run([sys.executable, "-c", code, *models], capture_output=True, text=True, check=True)
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def environment_mb(python: str) -> float:
    """Megabytes of all files of the environment that ``python`` belongs to, links not followed."""
    code = "import sys; print(sys.prefix)"
    prefix = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    files = (file for file in Path(prefix).rglob("*") if file.is_file() and not file.is_symlink())
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def commands(
    arguments: argparse.Namespace, pretrained: dict[str, bool], runs: Path, can_be_cold: bool
) -> dict[str, Command]:
    """Everything that is measured, by name."""
    measured = {
        "python": Command([sys.executable, "-c", "pass"]),
        "import": Command([sys.executable, "-c", "import finetune101"]),
        "help": Command([*PROGRAM, "--help"]),
    }
    if arguments.data:
        measured |= {f"train_{one}": training(one, has, arguments.data, runs) for one, has in pretrained.items()}
    labels = {"predict": [*PROGRAM, "predict", "released_finetune", str(arguments.photo)]}
    if arguments.bundle:
        labels["bundle"] = [arguments.bundle_python, str(arguments.bundle / "predict.py"), str(arguments.photo)]
    for name, words in labels.items():
        measured[name] = Command(words)
        if can_be_cold:
            measured[f"{name}_cold"] = Command(words, cold=True)
    return measured


def measure(measured: dict[str, Command], repeats: int, say: Callable[[str], None] = print) -> None:
    """Runs every command once without counting it, then ``repeats`` times in turns."""
    for number in range(repeats + 1):
        for name, command in measured.items():
            if command.cold:
                empty_page_cache()
            once = command.run()
            if number:
                command.times.append(once)
                say(f"{name} {number}/{repeats}: {once.seconds:.2f} s, {once.peak_mb:.0f} MB")


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="images to train on; without it no training is measured")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--bundle-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-only", action="store_true", help="leave the page cache of the machine alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    never_cold = "not measured: --warm-only" if arguments.warm_only else why_never_cold()
    with tempfile.TemporaryDirectory() as folder:
        facts = facts_of(arguments.models)
        measured = commands(arguments, facts["pretrained"], Path(folder), not never_cold)
        measure(measured, arguments.repeats)
    rows = {name: command.summary() for name, command in measured.items()}
    if arguments.bundle:
        facts["bundle_environment_mb"] = environment_mb(arguments.bundle_python)
    values = {**facts, "repeats": arguments.repeats, "batch": BATCH, "cold": never_cold or "measured", "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        print(f"{name}: {row['median_s']:.2f} s, {row['median_peak_mb']:.0f} MB")


if __name__ == "__main__":
    main()
