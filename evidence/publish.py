"""Copies the evidence of a tested run to results/ and enters its accuracy in claims.json.

python evidence/publish.py RUN CLAIM_ID --command "python train.py ..."
python evidence/publish.py RUN RUN ... CLAIM_ID --command "..." --name FOLDER      an arm's runs, in results/FOLDER
python evidence/publish.py ENSEMBLE CLAIM_ID --command "finetune101 ensemble ..." --members results/A results/B ...
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from claims import kind_of

from finetune101.files import write_json
from finetune101.reports.groups import mean_sd
from finetune101.run import Run

KEPT = ("metrics.jsonl", "predictions.csv", "curves.png")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def publish(runs: Sequence[Path], claim: str, command: str, members: Sequence[Path] = (), name: str = "") -> None:
    """Copies ``runs`` to results/ and adds or replaces ``claim``; its metric is the id's last part.

    One run becomes results/<its name>/, several lie in results/``name``/. ``members``: the published runs that a single
    ensemble is made of.
    """
    folder = RESULTS / (name or runs[0].name)
    if members:
        tests = [keep_ensemble(runs[0], folder, members)]
    else:
        tests = [keep_run(run, folder / run.name if len(runs) > 1 else folder, command) for run in runs]
    metric = claim.rsplit(".", 1)[1]
    mean, spread = mean_sd([test[metric] for test in tests])
    entry = {"id": claim, "value": mean, "unit": "%", "n": len(runs), "spread": spread}
    if claim.endswith(".top1") and len(runs) == 1:  # the interval over images
        entry["spread"] = tests[0]["top1_interval"]
    enter([entry], command, folder.name)


def keep_run(run: Path, folder: Path, command: str) -> dict[str, Any]:
    """Copies the evidence of a tested run to ``folder`` and its split to results/splits; returns its test.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (run / name).is_file():  # runs of a study have no picture of their own
            shutil.copyfile(run / name, folder / name)
    keep_config(run, folder)
    # where one machine keeps its images means nothing on another
    env = {name: value for name, value in Run(run).read_json("env.json").items() if name != "data"}
    write_json(folder / "env.json", {**env, "command": command})
    manifest, test = keep_split(run), Run(run).read_json("test.json")
    write_json(folder / "test.json", {**test, "manifest": manifest})
    return test


def keep_ensemble(ensemble: Path, folder: Path, members: Sequence[Path]) -> dict[str, Any]:
    """Copies predictions and test.json of ``ensemble`` to ``folder``; its config.json names the published members.

    Raises ValueError when the members were not tested on its split.
    """
    test = Run(ensemble).read_json("test.json")
    of = {Run(member).read_json("test.json")["manifest_hash"] for member in members}
    if of != {test["manifest_hash"]} or len(members) != len(test["runs"]):
        raise ValueError(f"{ensemble} is not an ensemble of these {len(members)} members; name those it was made of")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ensemble / "predictions.csv", folder / "predictions.csv")
    names = [member.resolve().relative_to(RESULTS).as_posix() for member in members]
    write_json(folder / "config.json", {"members": names, "mirror": test["mirror"]})
    manifest = Run(members[0]).read_json("test.json")["manifest"]
    write_json(folder / "test.json", {**test, "runs": names, "manifest": manifest})
    return test


def keep_config(run: Path, folder: Path) -> None:
    """Writes the configuration of ``run`` to ``folder``."""
    config = Run(run).read_json("config.json")
    # where one machine keeps its runs, images and splits, means nothing on another
    data = {**config["data"], "root": None, "split": None}
    write_json(folder / "config.json", {**config, "runs": "runs", "data": data})


def enter(entries: Sequence[dict[str, Any]], command: str, evidence: str, digits: int = 2) -> None:
    """Adds ``entries`` to claims.json, or replaces those of the same id, with that many decimals."""
    claims = {old["id"]: old for old in json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))}
    for entry in entries:
        spread = entry["spread"]
        spread = (
            [round(bound, digits) for bound in spread]
            if isinstance(spread, Sequence)
            else spread and round(spread, digits)
        )
        value = round(entry["value"], digits)
        stands_on = {"kind": kind_of(entry["id"]), "command": command, "evidence": evidence}
        claims[entry["id"]] = {**entry, "value": value, "spread": spread, **stands_on}
        print(f"{entry['id']} = {value} {entry['unit']}, evidence in {RESULTS / evidence}")
    write_json(RESULTS / "claims.json", sorted(claims.values(), key=lambda one: str(one["id"])))


def keep_split(run: Path) -> str:
    """Writes the split of ``run`` to results/splits and returns its name; ValueError where that is another split."""
    split = Run(run).read_json("split.json")
    options = split["options"]
    name = f"{split['protocol']}{options.get('train_per_class', '')}"
    name += "_all" if options.get("val_per_class") == 0 else ""  # all train, none validates
    name += f"_test{options['max_test_per_class']}" if options.get("max_test_per_class") else ""
    name += f"_seed{split['seed']}"
    file = RESULTS / "splits" / f"{name}.json"
    if file.is_file() and Run(file.parent).read_json(file.name) != split:
        raise ValueError(f"{file} is another split than that of {run}; earlier claims stand on it")
    write_json(file, split)
    return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("claim")
    parser.add_argument("--command", required=True)
    parser.add_argument("--name", default="", help="folder in results/")
    parser.add_argument("--members", type=Path, nargs="+", default=())
    arguments = parser.parse_args()
    if len(arguments.runs) > 1 and not arguments.name:
        parser.error("several runs need a --name for their folder in results/")
    publish(arguments.runs, arguments.claim, arguments.command, arguments.members, arguments.name)
