"""Mutation testing of splits, metrics and comparisons: ``python evidence/mutation.py`` (``make mutate``).

mutmut changes one place of a function at a time (a mutant) and runs the tests that reach the function: a mutant that
fails none survives. ``--ending`` tries a part of the mutants, such as those whose number ends in 3 or 8; results of
earlier runs stand while their function is unchanged. The counts and every survivor go to results/mutation.json, with
the SHA-256 of each mutated file, and what is known of survivors. results/mutation_notes.json has that by the text of
the change, as the number of a mutant changes with its function. The exit code is 1 where less than 85 % are killed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT, NOTES = ROOT / "results" / "mutation.json", ROOT / "results" / "mutation_notes.json"
MODULES = ("data/splits", "evaluation/metrics", "reports/compare")
LEAST = 85.0  # percent killed
KILLED = (1, 3)  # exit codes of pytest: tests failed, or it broke
OUT_OF_TIME = (-24, 24, 36, 152, 255)


def status_of(code: int | None) -> str:
    """In a word what became of a mutant, by the exit code that mutmut keeps."""
    if code is None:
        return "not tried"
    return "killed" if code in KILLED else "out of time" if code in OUT_OF_TIME else "survived"


def change_of(mutant: str) -> list[str]:
    """The lines that the mutant takes away (-) and puts there (+)."""
    words = [sys.executable, "-m", "mutmut", "show", mutant]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [
        line[0] + " " + line[1:].strip()
        for line in shown.splitlines()
        if re.match(r"[-+](?![-+]{2})", line) and not re.match(r"[-+]def x", line)
    ]


def key_of(mutant: str, change: list[str]) -> str:
    """Where the note of a survivor stands: its function and its change, without its number."""
    return "\n".join([mutant.removeprefix("finetune101.").partition("__mutmut_")[0], *change])


def sha256_of(module: str) -> str:
    """SHA-256 of the file that is mutated."""
    return hashlib.sha256((ROOT / "finetune101" / f"{module}.py").read_bytes()).hexdigest()


def selection_of(codes: dict[str, dict[str, int | None]]) -> str:
    """Which mutants were tried, in words, by the last digit of their numbers."""
    digits: dict[bool, set[str]] = {True: set(), False: set()}
    for own in codes.values():
        for name, code in own.items():
            digits[code is not None].add(name[-1])
    if not digits[False]:
        return "all mutants"
    if digits[True] & digits[False]:
        return "some mutants"
    return f"the mutants whose number ends in {' or '.join(sorted(digits[True]))}"


def counted(
    codes: dict[str, dict[str, int | None]], notes: dict[str, str], change: Callable[[str], list[str]] = change_of
) -> dict[str, Any]:
    """Counts by module, and each survivor its change and note; ``codes``: module -> mutant -> exit code."""
    modules: dict[str, dict[str, Any]] = {}
    survivors: dict[str, dict[str, Any]] = {}
    for module, own in codes.items():
        number = Counter(status_of(code) for code in own.values())
        tried = len(own) - number["not tried"]
        caught = number["killed"] + number["out of time"]
        modules[f"finetune101/{module}.py"] = {
            "mutants": len(own), "tried": tried, "killed": number["killed"], "out_of_time": number["out of time"],
            "survived": number["survived"], "percent": round(100 * caught / tried, 1) if tried else None,
            "sha256": sha256_of(module),
        }  # fmt: skip
        for mutant in (name for name, code in own.items() if status_of(code) == "survived"):
            name = mutant.removeprefix("finetune101.")
            lines = change(mutant)
            survivors[name] = {"change": lines, "note": notes.get(key_of(name, lines), "")}
    tried = sum(m["tried"] for m in modules.values())
    caught = sum(m["killed"] + m["out_of_time"] for m in modules.values())
    percent = round(100 * caught / tried, 1) if tried else None
    mutants = sum(m["mutants"] for m in modules.values())
    return {
        "percent": percent, "mutants": mutants, "tried": tried, "killed": caught, "selection": selection_of(codes),
        "mutmut": importlib.metadata.version("mutmut"), "modules": modules, "survivors": survivors,
    }  # fmt: skip


def main() -> int:
    """Runs mutmut, and writes what it found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ending", nargs="*", default=[], help="only the mutants whose number ends so, such as 3 8")
    parser.add_argument("--keep", action="store_true", help="run nothing: count what earlier runs left")
    parser.add_argument("--processes", type=int, default=1)
    flags = parser.parse_args()
    if not flags.keep:
        words = [sys.executable, "-m", "mutmut", "run", "--max-children", str(flags.processes)]
        environment = {"FINETUNE101_EXAMPLES": "20", **os.environ}  # of a fuzzing test: they run for each survivor
        environment.pop("FINETUNE101_DATA", None)  # no test that reads all of Caltech-101
        subprocess.run([*words, *(f"*__mutmut_*{end}" for end in flags.ending)], cwd=ROOT, env=environment, check=True)
    metas = {module: ROOT / "mutants" / "finetune101" / f"{module}.py.meta" for module in MODULES}
    if absent := [module for module, meta in metas.items() if not meta.is_file()]:
        print(
            f"mutmut has no mutants of {', '.join(absent)}: delete the folder mutants and start again", file=sys.stderr
        )
        return 1
    codes = {module: json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"] for module, meta in metas.items()}
    result = counted(codes, json.loads(NOTES.read_text(encoding="utf-8")) if NOTES.exists() else {})
    RESULT.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for module, row in result["modules"].items():
        print(f"{module:36} {row['killed'] + row['out_of_time']} of {row['tried']} killed ({row['percent']} %)")
    print(f"{result['percent']} % killed; {len(result['survivors'])} survivors in {RESULT.relative_to(ROOT)}")
    return int((result["percent"] or 0) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
