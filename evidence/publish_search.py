"""Copies the evidence of a finished search to results/: ranking, curves of every trial, winner and report page.

python evidence/publish_search.py RUNS/EXP
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from publish import RESULTS, keep_split

from finetune101.files import write_json
from finetune101.reports.search_page import write_search_report
from finetune101.run import Run


def publish(search: Path) -> Path:
    """Copies ``search`` to results/search_<its name>/, so that ``search report`` and the replay work there."""
    folder = RESULTS / f"search_{search.name}"
    saved = Run(search).read_json("search.json")
    for entry in saved["results"]:
        if entry["run"]:
            entry["run"] = f"runs/{search.name}/{Path(entry['run']).name}"
            source, target = search / Path(entry["run"]).name, folder / Path(entry["run"]).name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "metrics.jsonl", target / "metrics.jsonl")
    winner = search / Path(saved["winner"]["run"]).name
    name = keep_split(winner)
    # where one machine keeps its images and splits, means nothing on another
    data = {**saved["base"]["data"], "root": None, "split": None}
    saved["winner"]["run"] = f"runs/{search.name}/{winner.name}"
    saved["base"] = {**saved["base"], "runs": "runs", "data": data}
    write_json(folder / "search.json", {**saved, "manifest": name})
    rows = [[entry["point"], entry["best_val_top1"]] for entry in saved["results"]]
    write_json(folder / f"gridsearch_results_{search.name}.json", rows)
    lines = (search / "winner.yaml").read_text(encoding="utf-8").splitlines()
    lines = ["  split: null" if line.startswith("  split: ") else line for line in lines]  # its settings make the same
    lines[1] = f"# finetune101 train --config results/{folder.name}/winner.yaml --exp NAME"
    (folder / "winner.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copyfile(winner / "split.json", folder / winner.name / "split.json")
    page = write_search_report(folder)
    (folder / winner.name / "split.json").unlink()  # stands in results/splits
    print(f"{folder}, page {page}, best {json.dumps(saved['winner']['point'])}")
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", type=Path)
    publish(parser.parse_args().search)
