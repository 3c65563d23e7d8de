"""Recomputes every accuracy in results/claims.json from its predictions and its split; ``make claims`` runs it.

claims.json is a list of {id, value, unit, n, spread, command, evidence}.

- ``id`` ends in ``.top1`` (share of right images) or ``.mean_per_class`` (mean over the classes' shares): ``value`` is
  in percent and recomputed; so is the difference of two runs in ids that end in ``.points``. Other ids are not
  accuracies; of those only the evidence must be there.
- ``n`` is the number of runs behind the value; with several, ``value`` is their mean and ``spread`` their sample
  standard deviation.
- ``evidence`` is a folder below results/ with config.json, test.json and predictions.csv (path, label, prediction,
  confidence), or predictions_seed*.csv for several runs. test.json's ``manifest`` names the split:
  results/splits/<manifest>.json.

A claim that a README mentions by its id must stand there with its value, on one line with the id.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIELDS = ("id", "value", "unit", "n", "spread", "command", "evidence")
ACCURACIES = ("top1", "mean_per_class")
READMES = ("README.md", "README.zh-CN.md")
TOLERANCE = 0.005 + 1e-9  # percent: two decimals


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises ValueError, naming it, when it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None


def read_predictions(file: Path, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, prediction) of every test image. Raises ValueError unless the file holds exactly the split's test set."""
    with open(file, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"path", "label", "prediction", "confidence"} <= rows[0].keys():
        raise ValueError(f"{file} has no rows or lacks a column of path,label,prediction,confidence")
    paths, wanted = [row["path"] for row in rows], manifest["subsets"]["test"]
    if len(set(paths)) < len(paths):
        raise ValueError(f"{file} has an image twice")
    if different := sorted(set(paths) ^ set(wanted)):
        where = "not in the split's test set" if different[0] in paths else "missing"
        raise ValueError(f"{file} is not of the split's {len(wanted)} test images: {different[0]} is {where}")
    for row in rows:
        if row["label"] != row["path"].split("/")[-2]:
            raise ValueError(f"{file} labels {row['path']} as {row['label']}")
        if row["prediction"] not in manifest["classes"]:
            raise ValueError(f"{file} predicts {row['prediction']}, which is no class of the split")
    return [(row["label"], row["prediction"]) for row in rows]


def accuracy(pairs: Sequence[tuple[str, str]], metric: str) -> float:
    """Percent right of (label, prediction): over all images (top1), or the mean over classes (mean_per_class)."""
    labels = np.array([label for label, _ in pairs])
    right = np.array([label == prediction for label, prediction in pairs])
    if metric == "top1":
        return 100 * float(right.mean())
    return 100 * float(np.mean([right[labels == name].mean() for name in np.unique(labels)]))


def recompute(claim: dict[str, Any], results: Path) -> list[float]:
    """The claim's accuracy in percent, once for each of its runs. Raises ValueError for evidence that is not whole."""
    folder = results / claim["evidence"]
    read_json(folder / "config.json")
    name = read_json(folder / "test.json").get("manifest")
    if not isinstance(name, str):
        raise ValueError(f"{folder / 'test.json'} names no manifest")
    manifest = read_json(results / "splits" / f"{name}.json")
    if manifest.get("hash") != read_json(folder / "test.json").get("manifest_hash"):
        raise ValueError(f"{folder} was tested on another split than results/splits/{name}.json")
    files = [folder / "predictions.csv"] if (folder / "predictions.csv").is_file() else []
    files += sorted(folder.glob("predictions_seed*.csv"))
    if not files:
        raise ValueError(f"{folder} has no predictions")
    return [accuracy(read_predictions(file, manifest), claim["id"].rpartition(".")[2]) for file in files]


def check_difference(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with a difference of two runs' top-1 accuracies, both of which have evidence of their own."""
    try:
        arms = read_json(results / claim["evidence"] / "comparison.json")
        a, b = (recompute({"id": "x.top1", "evidence": arms[arm]["name"]}, results)[0] for arm in ("a", "b"))
    except (KeyError, ValueError) as error:
        return [f"cannot be recomputed: {error}"]
    wrong = abs(a - b - claim["value"]) > TOLERANCE
    return [f"claims {claim['value']}, the predictions give {a - b:.4f}"] if wrong else []


def check_claim(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with one claim: empty when it holds."""
    if missing := [field for field in FIELDS if field not in claim]:
        return [f"lacks {', '.join(missing)}"]
    folder = (results / claim["evidence"]).resolve()
    if not folder.is_dir() or results.resolve() not in folder.parents:
        return [f"evidence {claim['evidence']} is no folder below {results}"]
    if claim["id"].endswith(".points"):
        return check_difference(claim, results)
    if claim["id"].rpartition(".")[2] not in ACCURACIES:
        return []
    try:
        values = recompute(claim, results)
    except ValueError as error:
        return [str(error)]
    problems = []
    if not math.isclose(np.mean(values), claim["value"], rel_tol=0, abs_tol=TOLERANCE):
        problems.append(f"claims {claim['value']}, the predictions give {np.mean(values):.4f}")
    if claim["n"] != len(values):
        problems.append(f"claims n = {claim['n']} run(s), the evidence has {len(values)}")
    if len(values) > 1:
        spread = float(np.std(values, ddof=1))
        if not isinstance(claim["spread"], int | float) or abs(spread - claim["spread"]) > TOLERANCE:
            problems.append(f"claims a spread of {claim['spread']}, the predictions give {spread:.4f}")
    return problems


def check_readme(claim: dict[str, Any], text: str) -> bool:
    """Whether the text is silent about the claim, or gives its value on a line that names it."""
    lines = [line for line in text.splitlines() if re.search(rf"(?<![\w.]){re.escape(claim['id'])}(?![\w.]*\w)", line)]
    shown = {str(claim["value"]), f"{claim['value']:.2f}"}
    number = re.compile(rf"(?<![\d.])({'|'.join(map(re.escape, sorted(shown)))})(?!\.?\d)")
    return not lines or any(number.search(line) for line in lines)


def check(root: Path) -> tuple[int, list[str]]:
    """(number of claims, problems) of the project at ``root``."""
    results = root / "results"
    claims = read_json(results / "claims.json")
    ids = [claim.get("id") for claim in claims]
    problems = [f"{name}: claimed twice" for name in sorted({str(name) for name in ids if ids.count(name) > 1})]
    for claim in claims:
        wrong = check_claim(claim, results)
        problems += [f"{claim.get('id')}: {problem}" for problem in wrong]
        if not wrong:
            problems += [
                f"{claim['id']}: {readme} names it without its value {claim['value']}"
                for readme in READMES
                if (root / readme).is_file() and not check_readme(claim, (root / readme).read_text(encoding="utf-8"))
            ]
    return len(claims), problems


def main(root: Path = Path(__file__).parents[1]) -> int:
    """Prints what differs; 0 when every claim holds, else 1."""
    try:
        count, problems = check(root)
    except ValueError as error:
        count, problems = 0, [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"All {count} claims hold.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
