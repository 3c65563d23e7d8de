"""Kills, signals, full disks, hostile files: ``python benchmarks/stress.py [--part NAME] [--count N]``.

Every part does to the program what its docstring says, as often as ``--count`` says, and counts how often something was
lost, changed or badly said. Results go to results/stress.json, where each part replaces its own unless it has fewer
cases than the part there and than by default; ``--out`` writes any. All parts take about an hour. Linux with gcc only:
a small shim before the C library makes the disk full.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: commands are forked from this process

from faults import folders, hostile, old, ranks, searches, stops, twice
from faults.bench import Bench, Case, warm_up
from faults.disk import disk
from recorded import record

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "stress.json"
LOADED = "FINETUNE101_STRESS_SHIM"  # set where the shim is loaded
MOST_TOLD = 20  # failures of a part in the results

Part = Callable[[int, Bench], Iterator[Case]]
PARTS: dict[str, tuple[int, Part]] = {
    "kills": (100, stops.kills),
    "signals": (50, stops.signals),
    "disk": (100, disk),
    "folders": (101, folders.folders),
    "twice": (40, twice.twice),
    "ranks": (20, ranks.ranks),
    "hostile": (3000, hostile.hostile),
    "old": (1, old.old),
    "searches": (200, searches.searches),
}
"""Name -> how many cases by default, and the part."""
DRAW = {"kills": 2, "signals": 1, "disk": 1, "folders": 2, "twice": 1, "ranks": 1, "hostile": 40, "old": 1}
"""The same for the tests, in about a minute."""


def run_part(name: str, count: int, seed: int, bench: Bench, minutes: float = math.inf) -> Iterator[dict[str, Any]]:
    """Runs a part for so many cases or minutes; after each case, what came of all of them, for the results."""
    started, failures = time.monotonic(), list[str]()
    about = {"seed": seed, "machine": machine(), "version": version()}
    bench.rng, bench.notes = random.Random(f"{name} {seed}"), type(bench.notes)()
    for cases, (what, fault) in enumerate(PARTS[name][1](count, bench), 1):
        if fault:
            failures.append(f"{what}: {fault}")
        if fault or cases % max(1, count // 20) == 0:
            print(f"{name} {cases}/{count}, {len(failures)} failures", failures[-1] if fault else "", flush=True)
        seconds = time.monotonic() - started
        sums = {"count": cases, "failures": len(failures), "seconds": round(seconds)}
        yield {**sums, **about, "notes": dict(sorted(bench.notes.items())), "failed": failures[:MOST_TOLD]}
        if seconds > 60 * minutes:
            return


def machine() -> str:
    """Processor and cores, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a processor")
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def version() -> str:
    """Version of the program, and the commit where git knows it."""
    import finetune101

    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return f"{finetune101.__version__} {done.stdout.strip()}".strip()


def merged(out: Path, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results in ``out`` with these parts replaced, and the sums over all parts; above them, of which versions."""
    both = {**published(out), **parts}
    ordered = {name: both[name] for name in PARTS if name in both}
    sums = {key: sum(part[key] for part in ordered.values()) for key in ("count", "failures", "seconds")}
    versions = sorted({part["version"] for part in ordered.values()})
    several = {
        "several_versions": f"the parts were run with {len(versions)} versions of the program; each says with which"
    }
    return {
        **(several if len(versions) > 1 else {}), "versions": versions, "faults": sums["count"],
        "failures": sums["failures"], "seconds": sums["seconds"], "parts": ordered,
    }  # fmt: skip


def published(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> result of each part in ``out``."""
    parts: dict[str, dict[str, Any]] = json.loads(out.read_text())["parts"] if out.is_file() else {}
    return parts


def enough(part: str, out: Path) -> int:
    """How many cases of a part its published result in ``out`` may be replaced by: as many, or the part's default."""
    return min(PARTS[part][0], published(out).get(part, {"count": 1})["count"])


def with_shim(argv: list[str]) -> int:
    """This program again, with the shim loaded into it and all that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "shim.so"
        build = ["gcc", "-O1", "-shared", "-fPIC", str(HERE / "faults" / "shim.c"), "-o", str(shim), "-ldl"]
        try:
            subprocess.run(build, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"error: the shim for full disks cannot be built ({error}); install gcc", file=sys.stderr)
            return 2
        os.chmod(folder, 0o755)  # other users load it as well
        preload = " ".join(filter(None, (str(shim), os.environ.get("LD_PRELOAD", ""))))
        environment = {**os.environ, "LD_PRELOAD": preload, LOADED: "1"}
        return subprocess.run([sys.executable, __file__, *argv], env=environment, check=False).returncode


def main(argv: list[str]) -> int:
    """1 when anything was lost, changed or badly said."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="this part only; may be repeated")
    parser.add_argument("--count", type=int, help="cases of each part")
    parser.add_argument("--minutes", type=float, default=math.inf, help="time of each part; then it has fewer cases")
    parser.add_argument("--draw", action="store_true", help="a few cases of each part, for the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for hostile files that were not read well")
    parser.add_argument(
        "--out",
        type=Path,
        help="results of all parts, as JSON; without it, results/stress.json, which never loses cases",
    )
    arguments = parser.parse_args(argv)
    if sys.platform != "linux":
        print("error: these faults are made by Linux only", file=sys.stderr)
        return 2
    if LOADED not in os.environ:
        return with_shim(argv)
    from finetune101.demo.dataset import draw

    counts = DRAW if arguments.draw else {name: count for name, (count, _) in PARTS.items()}
    names = arguments.part or list(counts)
    out = arguments.out or RESULTS
    with tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        bench = Bench(folder, draw(folder / "images", classes=3, images_per_class=12), random.Random(), arguments.keep)
        warm_up(bench, kernels=not arguments.draw)
        failures = 0
        for part in names:
            least = 1 if arguments.out else enough(part, out)
            for result in run_part(part, arguments.count or counts[part], arguments.seed, bench, arguments.minutes):
                if result["count"] >= least:
                    record(merged(out, {part: result}), out)  # each time: a part may be interrupted
            failures += result["failures"]
            if result["count"] < least:
                print(f"{out.name} keeps its {least} cases or more of {part}; give --out FILE for a result of fewer")
            print(f"{part}: {result['count']} cases, {result['failures']} failures, {result['seconds']} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
