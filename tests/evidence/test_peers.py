"""The order in which finetune101 and its peers run, and the ratios that the table shows."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import OURS, Measurement
from peers_prepare import LITE
from peers_process import run_process
from peers_table import claims_of, ratios, two_minutes_table


def row(peer: str, seconds: float, task: str = "train", epochs: tuple[float, float] = (2.0, 4.0)) -> dict[str, Any]:
    fields = {"train_s": list(epochs), "val_s": [0.5, 0.5], "val_top1": [10.0, 20.0], "right": 50.0}
    return {"task": task, "network": LITE, "peer": peer, "seconds": seconds, "memory_mb": 1, "epochs": 2, **fields}


def measurement(rows: list[dict[str, Any]], peers: list[str], repeats: int = 3) -> Measurement:
    options = argparse.Namespace(peers=peers, repeats=repeats, networks=[LITE], workers=0)
    return Measurement(options, Path("python"), {"networks": {}}, {"runs": rows, "failures": []})


def test_everybody_runs_once_then_the_fastest_peer_and_ours_in_turn() -> None:
    seconds = {OURS: 5.0, "timm": 10.0, "fastai": 20.0, "transformers": 15.0}
    rows: list[dict[str, Any]] = []
    plan = measurement(rows, ["timm", "transformers", "fastai"])
    order = []
    for task, _, peer in plan.plan():
        order.append((task, peer))
        rows.append(row(peer, seconds[peer], task))
    trained = [peer for task, peer in order if task == "train"]
    assert trained == [OURS, "timm", "transformers", OURS, "fastai", "timm", OURS, "timm"]
    assert {peer for task, peer in order if task == "two_minutes"} == set(seconds)
    again = list(measurement(rows, ["timm", "transformers", "fastai"]).plan())
    assert again == []  # what is there is not measured twice


def test_a_peer_that_failed_does_not_hold_up_the_others() -> None:
    plan = measurement([], ["timm", "fastai"])
    tasks = []
    for task, network, peer in plan.plan():
        tasks.append((task, peer))
        if peer == "timm":
            plan.failed.add((task, network, peer))
        else:
            plan.rows.append(row(peer, 9.0, task))
        assert len(tasks) < 40
    assert tasks.count(("train", "timm")) == 1 and tasks.count(("train", "fastai")) == 3


def test_two_minutes_hold_whole_epochs() -> None:
    own = measurement([row("timm", 17.0), row("transformers", 17.0)], [])
    # start 10 s, an epoch of twice the images 6 s, its validation 1 s
    assert own.epochs_of_two_minutes("timm") == 18
    assert own.epochs_of_two_minutes("transformers") == 15


def test_ratios_compare_medians_with_the_peer_that_is_fastest_in_each() -> None:
    rows = [row(OURS, 10.0), row("timm", 30.0, epochs=(6.0, 8.0)), row("fastai", 25.0, epochs=(9.0, 9.0))]
    result: dict[str, Any] = {"runs": rows, "settings": {"isa": "avx2"}}
    result["ratios"] = ratios(result)
    command, epoch = result["ratios"]["command"][LITE], result["ratios"]["epoch"][LITE]
    assert (command["value"], command["fastest"], epoch["value"], epoch["fastest"]) == (2.5, "fastai", 2.33, "timm")
    claim = next(claim for claim in claims_of(result) if claim["id"] == f"peers.epoch.{LITE}")
    assert (claim["value"], claim["n"], claim["evidence"]) == (2.33, 1, f"peers.json:ratios.epoch.{LITE}.value")


def test_two_minutes_are_judged_by_the_best_epoch_of_each() -> None:
    rows = [{**row(peer, 99.0, "two_minutes"), "val_top1": top1} for peer, top1 in ((OURS, [30, 20]), ("timm", [40]))]
    lines = [line for line in two_minutes_table({"runs": rows}) if line.startswith(("| timm", "| **"))]
    assert [line.split("|")[2].strip() for line in lines] == ["40.0", "30.0"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_command_is_measured_and_ended_when_it_takes_too_long() -> None:
    done = run_process([sys.executable, "-c", "print('x')"], {}, limit=60)
    assert (done.code, done.output) == (0, "x\n") and done.seconds > 0 and (done.memory_mb or 0) > 1
    assert run_process([sys.executable, "-c", "import time; time.sleep(60)"], {}, limit=0.2).code < 0
