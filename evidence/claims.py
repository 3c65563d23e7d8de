"""Checks results/claims.json: recomputes accuracies, finds other numbers in their evidence; ``make claims`` runs it.

claims.json is a list of {id, kind, value, unit, n, spread, command, evidence}.

- ``kind`` is "recomputed" where this script computes the value anew from predictions and splits (or from the runs'
  test.json), and "recorded" where a program measured the value: then the evidence names that one number, and the number
  has to be the value, rounded to the value's digits. Three kinds of evidence of a recorded number:
  ``folder/file.json:a.b.0`` is the value under these keys of a JSON file (of a .jsonl file the first key is the line,
  from 0), ``*100`` behind it makes percent of a share; ``folder/file.txt:words {} words`` is the number that stands in
  place of {} in a text; and a folder where a function of ``COMPUTED`` makes the number of the folder's files: times are
  sums of metrics.jsonl, numbers on speed are those that benchmarks/table.py makes of results/speed. Numbers of weights
  (``.parameters``) are not checked: they need the networks.
- ``id`` ends in ``.top1`` (share of right images) or ``.mean_per_class`` (mean over the classes' shares): ``value`` is
  in percent and recomputed; in ids that begin with ``compare.gain.`` it is the difference of two arms, and recomputed
  from the runs that comparison.json names, whose interval must be that of ``spread``. Ids that end in ``.ece`` are
  the mean of their runs' test.json.
- ``n`` is the number of runs behind the value (of a difference, those of the smaller arm); with several, ``value`` is
  their mean and ``spread`` their sample standard deviation.
- ``evidence`` of a recomputed value is a folder below results/ with config.json, test.json and predictions.csv (path,
  label, prediction, confidence), or a folder that holds such folders, one for each run. ``manifest`` of test.json names
  the split: results/splits/<manifest>.json.

A claim that a README or a page of docs/ shows by its id must stand there with its value, on one line with the id. The
numbers that stand in these texts without an id are those of ``texts.py``.
"""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import texts

FIELDS = ("id", "kind", "value", "unit", "n", "spread", "command", "evidence")
ACCURACIES = ("top1", "mean_per_class")
GAIN = "compare.gain."
TOLERANCE = 0.005 + 1e-9  # percent: two decimals
UNCHECKED = (".parameters",)
NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"


def kind_of(name: str) -> str:
    """What the claim ``name`` is: "recomputed" by this script, or "recorded" when it was measured."""
    return "recomputed" if name.rpartition(".")[2] in (*ACCURACIES, "ece") else "recorded"


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


def recompute(folder: Path, metric: str, results: Path) -> list[float]:
    """Accuracy in percent of each run in ``folder``, itself a run or a folder of runs.

    Raises ValueError for evidence that is not whole.
    """
    runs = runs_in(folder)
    if not runs:
        raise ValueError(f"{folder} has no test.json")
    return [_accuracy(run, metric, results) for run in runs]


def runs_in(folder: Path) -> list[Path]:
    """The runs that are evidence in ``folder``: itself, or the folders in it."""
    return [folder] if (folder / "test.json").is_file() else sorted(path.parent for path in folder.glob("*/test.json"))


def _accuracy(run: Path, metric: str, results: Path) -> float:
    read_json(run / "config.json")
    test = read_json(run / "test.json")
    name = test.get("manifest")
    if not isinstance(name, str):
        raise ValueError(f"{run / 'test.json'} names no manifest")
    manifest = read_json(results / "splits" / f"{name}.json")
    if manifest.get("hash") != test.get("manifest_hash"):
        raise ValueError(f"{run} was tested on another split than results/splits/{name}.json")
    if not (run / "predictions.csv").is_file():
        raise ValueError(f"{run} has no predictions")
    return accuracy(read_predictions(run / "predictions.csv", manifest), metric)


def check_difference(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with a difference of two arms' mean accuracies, all runs of which have evidence of their own."""
    folder, metric = results / claim["evidence"], claim["id"].rpartition(".")[2]
    try:
        pair = read_json(folder / "comparison.json")
        a, b = (
            np.mean([_accuracy((folder / run["path"]).resolve(), metric, results) for run in pair[arm]["runs"]])
            for arm in ("a", "b")
        )
    except (KeyError, ValueError) as error:
        return [f"cannot be recomputed: {error}"]
    problems = []
    if abs(a - b - claim["value"]) > TOLERANCE:
        problems.append(f"claims {claim['value']}, the predictions give {a - b:.4f}")
    runs = min(len(pair[arm]["runs"]) for arm in ("a", "b"))
    if claim["n"] != runs:
        problems.append(f"claims n = {claim['n']} run(s), the smaller arm has {runs}")
    if metric == "top1":
        crossed = pair.get("crossed") or {}
        interval = pair.get("over_splits") or crossed.get("interval") or pair.get("difference_interval")
        if interval is None or not np.allclose(interval, claim["spread"] or [], rtol=0, atol=TOLERANCE):
            problems.append(f"claims the interval {claim['spread']}, the comparison has {interval}")
    return problems


def check_ece(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with a claim on the expected calibration error: the mean over the runs in its evidence."""
    errors = [read_json(run / "test.json")["calibration_scaled"]["ece"] for run in runs_in(results / claim["evidence"])]
    if len(errors) != claim["n"] or not math.isclose(
        np.mean(errors), claim["value"], rel_tol=0, abs_tol=0.00005 + 1e-9
    ):
        return [f"claims {claim['value']} over {claim['n']} run(s), the runs have {errors}"]
    return []


def check_recorded(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with a number that was measured: the one that its evidence names has to be it."""
    name, value, evidence = claim["id"], claim["value"], claim["evidence"]
    if name.endswith(UNCHECKED):
        return []
    compute = next((compute for pattern, compute in COMPUTED.items() if re.fullmatch(pattern, name)), None)
    try:
        number = compute(name, results / evidence, results) if compute else named_number(evidence, results)
    except (LookupError, TypeError, ValueError, OSError) as error:
        return [f"has no number at {evidence} ({error!r})"]
    return [] if number is not None and same(number, value) else [f"claims {value}, {evidence} gives {number}"]


def named_number(evidence: str, results: Path) -> float:
    """The number that ``evidence`` ("file:keys" or "file:words {} words") names. Raises ValueError where it is none."""
    name, _, where = evidence.partition(":")
    file = results / name
    if not where:
        raise ValueError("the evidence of a recorded number is file:keys or file:words {} words")
    if file.suffix in (".json", ".jsonl"):
        keys, _, factor = where.partition("*")
        lines = file.suffix == ".jsonl"
        value: Any = [json.loads(line) for line in file.read_text().splitlines()] if lines else read_json(file)
        for key in keys.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        return float(value) * float(factor or 1)
    pattern = re.escape(where).replace(re.escape("{}"), f"({NUMBER})")
    text = file.read_text(encoding="utf-8")
    numbers = {match[1] for match in re.finditer(rf"(?<![\w.]){pattern}(?![\w.]*\w)", text)}
    if len(numbers) != 1:
        raise ValueError(f"{len(numbers)} numbers fit these words")
    return float(numbers.pop().replace(",", ""))


def same(number: float, value: float) -> bool:
    """Whether ``number``, with as many digits as ``value`` has, is it."""
    mantissa, _, power = str(value).partition("e")
    digits = len(mantissa.partition(".")[2])
    return f"{number:.{digits}{'e' if power else 'f'}}" == f"{value:.{digits}{'e' if power else 'f'}}"


def search_number(name: str, folder: Path, results: Path) -> float:
    """Of the search in ``folder``, by the end of ``name``: ``lead`` is the best trial's over the second, in points;
    ``standard_error`` that of its accuracy, in points; ``overhead`` what two workers took beyond the training, in %."""
    search = read_json(folder / "search.json")
    best, second, *_ = sorted((one["best_val_top1"] for one in search["results"] if one["run"]), reverse=True)
    if name.endswith(".lead"):
        return float(best - second)
    if name.endswith(".standard_error"):
        images = len(read_json(results / "splits" / f"{search['manifest']}.json")["subsets"]["val"])
        return math.sqrt(best * (100 - best) / images)
    records = [json.loads(line) for file in folder.glob("*/metrics.jsonl") for line in file.read_text().splitlines()]
    trained = sum(one["seconds"] + one["val_seconds"] for one in records)
    return float(100 * (2 * sum(command["wall_seconds"] for command in search["commands"]) / trained - 1))


def curve_number(name: str, folder: Path, results: Path) -> float:
    """The images per class with which fine-tuning reaches random initialisation with the most, of a study's cells."""
    import publish_study

    return float(next(publish_study.curve(read_json(folder / "study.json")["cells"]))["value"])


def minutes(folder: Path, results: Path) -> int | None:
    """Minutes of one training of the runs in ``folder``, or of all members of an ensemble; None where a cache spared
    each of them its features."""
    from finetune101.experiments.costs import features_cached, mean_seconds
    from finetune101.run import Run

    runs = [Run(path) for path in runs_in(folder)]
    members = [Run(results / name) for name in read_json(runs[0].path / "config.json").get("members", ())]
    cached = features_cached(members or runs)
    if not members:
        seconds = mean_seconds(runs, cached)
        return None if seconds is None else max(1, round(seconds / 60))
    total = 0.0
    for member in members:  # runs of one folder are one arm: where a cache spared one its features, another paid
        arm = [one for one in members if one.path.parent == member.path.parent]
        seconds = mean_seconds([member], cached) or mean_seconds(arm, cached)
        if seconds is None:
            return None
        total += seconds
    return round(total / 60)


@functools.cache
def speed(results: Path) -> dict[str, float]:
    """The claims that benchmarks/table.py makes of results/speed, by their id."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        import table
    finally:
        sys.path.pop(0)
    return {one["id"]: one["value"] for one in table.rows(results / "speed")[1]}


def auto_number(name: str, folder: Path, results: Path) -> float:
    """What an ``auto`` took by its output, timed by the shell: ``seconds``, or the ``budget`` that it used, in %."""
    output = (folder / "output.txt").read_text(encoding="utf-8")
    took = re.search(r"^real\s+(\d+)m([\d.]+)s$", output, re.M)
    budget = re.search(r"\[1/6\] .*\((\d+) minutes left", output)
    if not took or not budget:
        raise ValueError("output.txt lacks the budget or the time")
    seconds = 60 * int(took[1]) + float(took[2])
    return seconds if name.endswith("seconds") else 100 * seconds / (60 * int(budget[1]))


def unlike_number(name: str, folder: Path, results: Path) -> float:
    """Of the scores of test and background images in the CSV files of ``folder``, one per network, the mean over the
    networks: the AUROC, or for ``fpr95`` the percent of background images kept where 95 % of the test images are."""
    from finetune101.evaluation.metrics import auroc, false_positive_rate

    numbers = []
    for file in sorted(folder.glob("*.csv")):
        scores: dict[str, list[float]] = {"test": [], "background": []}
        with open(file, newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                scores[row["subset"]].append(float(row["score"]))
        rate = 100 * false_positive_rate(scores["background"], scores["test"])
        numbers.append(rate if ".fpr95." in name else auroc(scores["background"], scores["test"]))
    return float(np.mean(numbers))


def load_number(name: str, folder: Path, results: Path) -> float:
    """Of a server under load, by the end of ``name``: ``errors``, ``rate`` (answers per second), ``p50``, ``p99``."""
    record = read_json(folder / "load.json")
    latencies = [float(line) for line in (folder / "latencies.txt").read_text(encoding="utf-8").split()]
    if len(latencies) != record["requests"]:
        raise ValueError(f"latencies.txt holds {len(latencies)} requests, load.json {record['requests']}")
    kind = name.rpartition(".")[2]
    if kind == "rate":
        return len(latencies) / float(record["seconds"])
    return float(np.percentile(latencies, int(kind[1:]))) if kind[0] == "p" else sum(record["errors_by_kind"].values())


def export_number(name: str, folder: Path, results: Path) -> float:
    """Of exported networks, counted over predictions.csv: ``changed`` answers, points of accuracy lost, size, speed.

    ``use.onnx.changed`` compares the exported file, given whole pictures, with predict; ``.fp32`` with predict in fp32,
    ``.resized`` the file given resized pictures with predict in fp32. Speeds are those of inference.json.
    """
    if ".speedup" in name:
        return inference_number(name, read_json(folder / "inference.json")["rows"])
    if name.endswith(".size"):
        facts = read_json(folder / "export.json")
        return float(facts["int8"]["bytes"]) / float(facts["onnx"]["bytes"])
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    if name.startswith("use.int8.loss"):
        right = {way: np.mean([row[way] == row["label"] for row in rows]) for way in ("onnx_resized", "int8_resized")}
        return float(100 * (right["onnx_resized"] - right["int8_resized"]))
    ours, others = {
        "use.onnx.changed": ("onnx_pictures", "predict"),
        "use.onnx.changed.fp32": ("onnx_pictures", "predict_fp32"),
        "use.onnx.changed.resized": ("onnx_resized", "predict_fp32"),
    }[name]
    return float(sum(row[ours] != row[others] for row in rows))


def inference_number(name: str, rows: Sequence[dict[str, Any]]) -> float:
    """How many times as fast one way answers as another; ``name`` ends in .batch_1 or .batch_32."""
    kind, batch = name.split(".")[1], int(name.rpartition("_")[2])
    ours, other = {
        "onnx": ("ONNX Runtime fp32", "PyTorch fp32"), "int8": ("ONNX Runtime int8", "ONNX Runtime fp32")
    }[kind]  # fmt: skip

    def milliseconds(way: str) -> float:
        own = [row for row in rows if row["way"] == way and row["batch"] == batch]
        return float(own[-1 if kind == "int8" else 0]["ms_per_image"])  # 8 bits beside the other file, the last row

    return milliseconds(other) / milliseconds(ours)


def pointing_number(name: str, folder: Path, results: Path) -> float:
    """The share of pictures whose map is largest on the object's mask (or ``outline``, ``box``: the end of ``name``),
    counted over the points of pointing.json. Raises ValueError where a class has no picture."""
    points = read_json(folder / "pointing.json")["points"]
    classes = Counter(one["class"] for one in points)
    if len(classes) < 12 or len(set(classes.values())) > 1:
        raise ValueError(f"pointing.json has the pictures {dict(classes)}, not as many of each of 12 classes")
    measure = name.rpartition(".")[2]
    return float(np.mean([one["mask" if measure == "pointing" else measure] for one in points]))


COMPUTED: dict[str, Callable[[str, Path, Path], float | None]] = {
    r"auto\.(small\.)?(seconds|budget)": auto_number,
    r".*\.minutes": lambda name, folder, results: minutes(folder, results),
    r"speed\..*": lambda name, folder, results: speed(results)[name],
    r"search\..*(lead|standard_error)|search\.overhead.*": search_number,
    r"compare\.curve": curve_number,
    r"ood\.(auroc|fpr95)\.background": unlike_number,
    r"serve\.load\..*": load_number,
    r"use\.explain\.pointing.*": pointing_number,
    r"use\.(onnx|int8)\..*": export_number,
    r"report\.size\.study": lambda name, folder, results: (folder / "report" / "report.html").stat().st_size / 1e6,
}
"""Pattern of an id -> what makes its number of (id, folder of the evidence, results/)."""


def check_claim(claim: dict[str, Any], results: Path) -> list[str]:
    """What is wrong with one claim: empty when it holds."""
    if missing := [field for field in FIELDS if field not in claim]:
        return [f"lacks {', '.join(missing)}"]
    if claim["kind"] != kind_of(claim["id"]):
        return [f"is called {claim['kind']}, it is {kind_of(claim['id'])}"]
    place = (results / claim["evidence"].partition(":")[0]).resolve()
    if not place.exists() or results.resolve() not in place.parents:
        return [f"evidence {claim['evidence']} is no file or folder below {results}"]
    metric = claim["id"].rpartition(".")[2]
    if metric == "ece":
        return check_ece(claim, results)
    if metric not in ACCURACIES:
        return check_recorded(claim, results)
    if claim["id"].startswith(GAIN):
        return check_difference(claim, results)
    try:
        values = recompute(results / claim["evidence"], metric, results)
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


def check_page(claim: dict[str, Any], text: str) -> bool:
    """Whether the text is silent about the claim, or gives its value on a line that names it."""
    if claim["id"] not in text:
        return True
    name = re.compile(rf"(?<![\w.]){re.escape(claim['id'])}(?![\w.]*\w)")
    lines = [line for line in text.splitlines() if name.search(line)]
    forms = {str(claim["value"]), f"{claim['value']:.2f}"}
    number = re.compile(rf"(?<![\d.])({'|'.join(map(re.escape, sorted(forms)))})(?!\.?\d)")
    return not lines or any(number.search(line) for line in lines)


def check_claims(root: Path) -> tuple[Counter[str], list[str]]:
    """(claims of each kind, problems) of the project at ``root``."""
    results = root / "results"
    claims = read_json(results / "claims.json")
    ids = [claim.get("id") for claim in claims]
    problems = [f"{name}: claimed twice" for name in sorted({str(name) for name in ids if ids.count(name) > 1})]
    pages = [(page, re.sub(r"<!--.*?-->", "", text)) for page, text in texts.pages(root)]
    for claim in claims:
        wrong = check_claim(claim, results)
        problems += [f"{claim.get('id')}: {problem}" for problem in wrong]
        if not wrong:
            problems += [
                f"{claim['id']}: {page} names it without its value {claim['value']}"
                for page, text in pages
                if not check_page(claim, text)
            ]
    problems += texts.differences(root, {claim["id"]: claim for claim in claims if set(FIELDS) <= claim.keys()})
    kinds = ("not checked" if str(one.get("id")).endswith(UNCHECKED) else str(one.get("kind")) for one in claims)
    return Counter(kinds), problems


def main(root: Path = Path(__file__).parents[1]) -> int:
    """Prints what differs; 0 when every claim holds, else 1."""
    try:
        count, problems = check_claims(root)
    except ValueError as error:
        count, problems = Counter(), [str(error)]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(
            f"All {count.total()} claims hold: {count['recomputed']} recomputed from predictions, {count['recorded']} "
            f"recorded in their evidence, {count['not checked']} not checked (numbers of weights)."
        )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
