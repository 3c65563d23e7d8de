"""Copies the evidence of a tested run to results/ and enters its accuracy in claims.json.

python scripts/publish.py RUN CLAIM_ID --command "python train.py ..."
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from finetune101.runs import Run, write_json

KEPT = ("metrics.jsonl", "predictions.csv", "curves.png")
RESULTS = Path(__file__).resolve().parent.parent / "results"


def publish(run: Path, claim: str, command: str) -> None:
    """Copies ``run`` to results/<its name>/ and adds or replaces ``claim``; its metric is the id's last part."""
    folder = RESULTS / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(run / name, folder / name)
    config, env = Run(run).read_json("config.json"), Run(run).read_json("env.json")
    # where one machine keeps its runs and images, means nothing on another
    write_json(folder / "config.json", {**config, "runs": "runs", "data": {**config["data"], "root": None}})
    write_json(folder / "env.json", {**env, "command": command})
    manifest, test = keep_split(run), Run(run).read_json("test.json")
    write_json(folder / "test.json", {**test, "manifest": manifest})
    claims = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))
    value = round(test[claim.rsplit(".", 1)[1]], 2)
    entry = {"id": claim, "value": value, "unit": "%", "n": 1, "spread": None, "command": command}
    if claim.endswith(".top1"):  # of a single run: the interval over images
        entry["spread"] = [round(bound, 2) for bound in test["top1_interval"]]
    claims = [old for old in claims if old["id"] != claim] + [{**entry, "evidence": run.name}]
    write_json(RESULTS / "claims.json", sorted(claims, key=lambda one: str(one["id"])))
    print(f"{claim} = {value} %, evidence in {folder}")


def keep_split(run: Path) -> str:
    """Writes the split of ``run`` to results/splits and returns its name; ValueError where that is another split."""
    split = Run(run).read_json("split.json")
    name = f"{split['protocol']}{split['options'].get('train_per_class', '')}_seed{split['seed']}"
    known = RESULTS / "splits" / f"{name}.json"
    if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != split:
        raise ValueError(f"{known} is another split than that of {run}; earlier claims stand on it")
    write_json(known, split)
    return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("claim")
    parser.add_argument("--command", required=True)
    arguments = parser.parse_args()
    publish(arguments.run, arguments.claim, arguments.command)
