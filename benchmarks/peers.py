"""finetune101 beside fastai, timm, torchvision, transformers and Ultralytics, on the same images, one after the other.

``python benchmarks/peers.py`` installs the peers into an environment of their own (some 7 GB), gives all the same
images and ImageNet weights, and runs each one's own way (``benchmarks/peers/run_*.py``) with its fastest switch and
its best number of loader workers. finetune101 runs between them; afterwards finetune101 and the fastest peer go on
alternately. Every run is kept in results/peers.json as soon as it is there (with --isa native in peers_native.json): a
run that was cut goes on with the same command. ``benchmarks/peers_table.py`` writes results/peers.md and the claims.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peers_prepare import LITE, PHOTOS, ROOT, install, prepare, versions_of, write_predictor
from peers_process import Finished, limits, run_process, wrap_compiler
from peers_table import FILES, column, write_tables

from finetune101.errors import Refused
from finetune101.files import cache_dir, read_json, write_json
from finetune101.host import usable_cores
from finetune101.machine import has_precision

OURS = "finetune101"
PEERS = ("timm", "torchvision", "transformers", "fastai", "ultralytics")
BATCH, EPOCHS, TWO_MINUTES = 32, 2, 120.0
LIMIT = 1200.0  # seconds that one command may take

Row = dict[str, Any]


def can(peer: str, task: str, network: str) -> bool:
    """Whether the peer has the network, and the task belongs to it."""
    return peer != "ultralytics" or (network != LITE and task == "train")


class Measurement:
    """The runs so far, and how to make another one."""

    def __init__(self, options: argparse.Namespace, python: Path, prepared: dict[str, Any], result: Row) -> None:
        self.options, self.python, self.networks, self.result = options, python, prepared["networks"], result
        self.rows: list[Row] = result["runs"]
        self.failed: set[tuple[str, str, str]] = set()

    def of(self, task: str, network: str, peer: str) -> list[Row]:
        """The finished runs of one kind."""
        wanted = (task, network, peer)
        return [row for row in self.rows if (row["task"], row["network"], row["peer"]) == wanted]

    def peers(self, task: str, network: str) -> list[str]:
        """The peers that take part."""
        return [
            peer for peer in self.options.peers if can(peer, task, network) and (task, network, peer) not in self.failed
        ]

    def fastest(self, task: str, network: str) -> list[str]:
        """The peer whose whole command took the least time, and the one with the shortest epoch: often the same."""
        peers = {peer: rows for peer in self.peers(task, network) if (rows := self.of(task, network, peer))}
        names = []
        for key in ("seconds", "train_s"):
            medians = {peer: statistics.median(values) for peer, rows in peers.items() if (values := column(rows, key))}
            names += [min(medians, key=lambda peer: medians[peer])] if medians else []
        return list(dict.fromkeys(names))

    def workers(self, peer: str) -> int:
        """The number of loader workers that was the quickest for a peer."""
        if self.options.workers is not None:
            return int(self.options.workers)
        for row in self.of("screen", self.options.networks[0], peer):
            seconds: dict[str, float] = row["seconds_of_workers"]
            return int(min(seconds, key=lambda workers: seconds[workers]))
        return 0

    def first_round(self, task: str, network: str) -> Iterator[str]:
        """Everybody once, finetune101 before every second peer; what is there already is not run again."""
        turns: dict[str, int] = {}
        peers = self.peers(task, network)
        order = [name for i, peer in enumerate(peers) for name in ((OURS, peer) if i % 2 == 0 else (peer,))]
        for name in order or [OURS]:
            turns[name] = turns.get(name, 0) + 1
            if len(self.of(task, network, name)) < turns[name]:
                yield name

    def next_rounds(self, task: str, network: str) -> Iterator[str]:
        """The fastest peer and finetune101 in turn, until there are as many runs of each as asked for."""
        while True:
            names = [*self.fastest(task, network), OURS]
            short = [name for name in names if len(self.of(task, network, name)) < self.options.repeats]
            if not short or any((task, network, name) in self.failed for name in short):
                return
            yield from short

    def plan(self) -> Iterator[tuple[str, str, str]]:
        """(task, network, peer) of one run after the other, what matters most first."""
        networks = self.options.networks
        for peer in self.peers("train", networks[0]) if self.options.workers is None else ():
            if not self.of("screen", networks[0], peer):
                yield "screen", networks[0], peer
        others = [("train", network) for network in networks[1:]]
        for task, network in [("train", networks[0]), ("predict", LITE), *others, ("predict_one", LITE)]:
            if network in networks:
                yield from ((task, network, name) for name in self.first_round(task, network))
                if task != "predict_one":
                    yield from ((task, network, name) for name in self.next_rounds(task, network))
        if LITE in networks:
            yield from (("two_minutes", LITE, name) for name in self.two_minutes())

    def two_minutes(self) -> Iterator[str]:
        """Everybody whose epoch has been measured."""
        for name in (OURS, *self.peers("two_minutes", LITE)):
            if self.of("train", LITE, name) and not self.of("two_minutes", LITE, name):
                yield name

    def epochs(self, task: str, peer: str) -> int:
        """How many epochs a task of a peer has."""
        return self.epochs_of_two_minutes(peer) if task == "two_minutes" else 1 if task == "screen" else EPOCHS

    def epochs_of_two_minutes(self, peer: str) -> int:
        """How many epochs of the peer's own recipe fit into two minutes, by the epochs that were measured; at least 1.

        timm and torchvision validate once, at the end; fastai trains the new head alone for an epoch before.
        """
        rows = self.of("train", LITE, peer)
        times = 2  # as many images as in the epochs that were measured
        epoch = times * statistics.median(seconds for row in rows for seconds in row["train_s"])
        val = times * statistics.median(seconds for row in rows for seconds in row["val_s"])
        start = statistics.median(row["seconds"] - sum(row["train_s"]) - sum(row["val_s"]) for row in rows)
        if peer in ("timm", "torchvision"):
            return max(1, int((TWO_MINUTES - start - val) / epoch))
        extra = {"fastai": epoch + val, OURS: 5 * val}.get(peer, 0.0)  # ours: the probe sees all images once, at 256 px
        return max(1, int((TWO_MINUTES - start - extra) / (epoch + val)))

    def run(self, task: str, network: str, peer: str) -> None:
        """One run; a peer that fails does not run this task again before the next start of this script."""
        folder = self.options.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in self.images(task, network).glob("*.cache"):  # Ultralytics writes them beside train/
            file.unlink()
        row: Row = {"task": task, "network": network, "peer": peer, "load": round(os.getloadavg()[0], 2)}
        row["at"] = datetime.now(UTC).isoformat(timespec="seconds")
        print(f"{row['at']} {task} {network} {peer} ...", end=" ", flush=True)
        done, values = (run_ours if peer == OURS else run_peer)(self, task, network, peer, folder)
        if done.code:
            self.failed.add((task, network, peer))
            error = self.without_places(done.output[-2000:])
            self.result["failures"].append({**row, "command": self.without_places(done.command), "error": error})
            print(f"failed: {done.output.strip().splitlines()[-1:]}", flush=True)
        else:
            row |= {"command": self.without_places(done.command), "seconds": round(done.seconds, 2)}
            row |= {"memory_mb": done.memory_mb, **values}
            self.rows.append(row)
            shown = {
                key: row[key]
                for key in ("seconds", "train_s", "val_top1", "right", "workers", "seconds_of_workers")
                if row.get(key)
            }
            print(shown, flush=True)
        write_json(self.options.out, self.result)
        shutil.rmtree(folder, ignore_errors=True)

    def without_places(self, text: str) -> str:
        """``text`` with names in place of this machine's folders."""
        places = {self.options.work: "WORK", self.python: "PEERS_PYTHON", sys.executable: "python", f"{ROOT}/": ""}
        for place, name in places.items():
            text = text.replace(str(place), name)
        return text

    def images(self, task: str, network: str) -> Path:
        """The folder with the images of a task."""
        names = {"two_minutes": "two_minutes", "screen": "screen", "predict": "photos", "predict_one": "photo"}
        return Path(self.options.work) / "images" / names.get(task, network)

    def precision(self) -> list[str]:
        """Flags of finetune101 for --isa."""
        return ["--precision", "fp32"] if self.options.isa == "avx2" else []

    def environment(self, task: str, folder: Path) -> dict[str, str]:
        """Environment of every command: no network, folders of its own, the instructions that --isa allows.

        Prediction is not limited: ONNX Runtime has no such switch, so nobody gets one.
        """
        offline = {"HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true", "MPLBACKEND": "Agg"}
        cache = (self.options.work / "predict" if task.startswith("predict") else folder) / "cache"
        own = {"HF_HOME": folder / "hf", "YOLO_CONFIG_DIR": folder / "yolo", "FINETUNE101_CACHE": cache}
        isa = {} if task.startswith("predict") else limits(self.options.isa, self.options.work)
        return {**os.environ, **offline, **{key: str(value) for key, value in own.items()}, **isa}


def run_peer(own: Measurement, task: str, network: str, peer: str, folder: Path) -> tuple[Finished, Row]:
    """One run of a peer's script."""
    work, values = own.options.work, own.networks[network]
    predicts = task.startswith("predict")
    weights = work / "predict/weights.safetensors" if predicts else work / f"weights/{network}.safetensors"
    job = {
        "task": "predict" if predicts else "train" if task == "two_minutes" else task,
        "network": network,
        "classes": classes_of(work / "images/two_minutes" if predicts else own.images(task, network)),
        "data": str(work / "images/two_minutes" if predicts else own.images(task, network)),
        "photos": str(own.images(task, network)),
        "weights": str(weights) if weights.is_file() else None,
        "export": str(work / "predict/export.pkl"),
        "recipe": "own" if task == "two_minutes" else "same",
        "epochs": own.epochs(task, peer),
        "workers": own.workers(peer),
        "batch_size": 64 if predicts else BATCH,
        "bf16": own.options.isa == "native" and own.result["settings"]["machine"]["bf16"],
        "mean": values["mean"],
        "std": values["std"],
        "folder": str(folder),
        "out": str(folder / "clock.json"),
    }
    script = ROOT / f"benchmarks/peers/run_{peer}.py"
    environment = own.environment(task, folder)
    if peer == "fastai" and predicts and not Path(str(job["export"])).is_file():  # not part of what is measured
        write_json(folder / "work.json", {**job, "task": "export", "started": time.time()})
        run_process([own.python, script, folder / "work.json"], environment, LIMIT)
    write_json(folder / "work.json", {**job, "started": time.time()})
    done = run_process([own.python, script, folder / "work.json"], environment, LIMIT)
    if done.code:
        return done, {}
    row = {"workers": job["workers"], "epochs": job["epochs"], **read_json(folder / "clock.json", dict, remedy="")}
    return done, row | ({"right": right_labels(folder / "labels.csv")} if predicts else {})


def run_ours(own: Measurement, task: str, network: str, peer: str, folder: Path) -> tuple[Finished, Row]:
    """One run of finetune101, with an empty cache of images where it trains."""
    environment = own.environment(task, folder)
    environment["PYTHONPATH"] = str(ROOT)
    if task.startswith("predict"):
        run = predictor(own)
        command = [sys.executable, "-m", "finetune101", "predict", run, own.images(task, network)]
        done = run_process([*command, "--out", folder / "labels.csv"], environment, LIMIT)
        return done, {} if done.code else {"right": right_labels(folder / "labels.csv")}
    flags = ["--exp", "run", "--runs", folder, "--data", own.images(task, network), "--protocol", "folders"]
    flags += own.precision()
    epochs = min(5, own.epochs(task, peer))  # the default recipe's own number is 5
    if task == "two_minutes":
        flags += ["--epochs", str(epochs)]
    else:
        flags += ["--recipe", "original", "--model", network, "--epochs", str(epochs), "--batch-size", str(BATCH)]
        flags += ["--crop-scale", "0.35", "--backbone-lr-ratio", "1"]
        flags += [] if own.networks[network]["weights"] != "random" else ["--no-pretrain"]
    first, script = folder / "first_step", ROOT / "benchmarks/peers/run_finetune101.py"
    done = run_process([sys.executable, script, first, str(time.time()), "train", *flags], environment, LIMIT)
    if done.code:
        return done, {}
    lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records: list[Row] = [json.loads(line) for line in lines]
    values = {
        "epochs": epochs,
        "first_step_s": float(first.read_text()) if first.is_file() else None,
        "train_s": [record["seconds"] for record in records],
        "val_s": [record["val_seconds"] for record in records],
        "val_top1": [round(record["val_top1"], 2) for record in records],
    }
    return done, values


def predictor(own: Measurement) -> Path:
    """The run that everybody predicts with, trained once: an output layer on frozen features; its ONNX file is made."""
    runs = own.options.work / "predict"
    run = Path(runs) / "run"
    if (runs / "weights.safetensors").is_file():
        return run
    shutil.rmtree(runs, ignore_errors=True)
    environment = {**own.environment("predict", runs), "PYTHONPATH": str(ROOT)}
    flags = ["--exp", "run", "--runs", runs, "--recipe", "probe", "--model", LITE, "--protocol", "folders"]
    flags += ["--data", own.options.work / "images/two_minutes", *own.precision()]
    command = [sys.executable, "-m", "finetune101"]
    trained = run_process([*command, "train", *flags], environment, LIMIT)
    once = run_process([*command, "predict", run, own.images("predict_one", LITE)], environment, LIMIT)
    if trained.code or once.code:
        raise Refused(f"the network to predict with cannot be made:\n{trained.output}\n{once.output}")
    write_predictor(run, runs / "weights.safetensors")
    own.result["first_predict_s"] = round(once.seconds, 2)
    return run


def classes_of(folder: Path) -> list[str]:
    """Names of the classes of a folder with train/."""
    return sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())


def right_labels(table: Path) -> float:
    """Percent of the photos CLASS__FILE whose first class is theirs."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = [(Path(row["path"]).name.partition("__")[0], row["class_1"]) for row in csv.DictReader(file)]
    return round(100 * sum(truth == label for truth, label in rows) / len(rows), 2)


def machine() -> Row:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": usable_cores(),
        "bf16": has_precision(torch.device("cpu"), "bf16"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def opened(options: argparse.Namespace, python: Path, prepared: dict[str, Any]) -> Row:
    """The results so far. Raises Refused where they were measured otherwise."""
    ours = versions_of(Path(sys.executable))
    settings = {"share": options.share, "isa": options.isa, "machine": machine(), "networks": prepared["networks"]}
    settings |= {"versions": {"peers": versions_of(python), OURS: ours}, "photos": round(PHOTOS * options.share)}
    if not options.out.is_file():
        return {"settings": settings, "runs": [], "failures": []}
    result = dict(read_json(options.out, dict, remedy="remove it, or give another --out"))
    for name in ("share", "isa", "machine", "versions"):
        if result["settings"][name] != settings[name]:
            raise Refused(f"{options.out} was measured with another {name}; remove it, or give another --out")
    return {**result, "failures": []}


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = cache_dir() / "peers"
    parser.add_argument("--data", type=Path, default=os.environ.get("FINETUNE101_DATA", "data/101_ObjectCategories"))
    parser.add_argument("--environment", type=Path, default=home / "environment", help="of the peers; made if needed")
    parser.add_argument("--work", type=Path, default=home / "work", help="folder for images, weights and runs")
    parser.add_argument("--out", type=Path, help="default: results/peers.json, or peers_native.json by --isa")
    parser.add_argument("--networks", nargs="+", choices=(LITE, "resnet18"), default=[LITE, "resnet18"])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5, help="runs of finetune101 and of the fastest peer")
    parser.add_argument("--share", type=float, default=1.0, help="share of classes and photos, for a quick trial")
    parser.add_argument("--isa", choices=("native", "avx2"), default="avx2", help="avx2: AVX2 and fp32 for all")
    parser.add_argument("--workers", type=int, help="of every peer's loader; default: the quickest of 0, 1 and 2")
    parser.add_argument("--minutes", type=float, default=35.0, help="begin no run after so many minutes")
    parser.add_argument("--install-only", action="store_true", help="make the peers' environment and stop")
    options = parser.parse_args()
    options.out = options.out or FILES[options.isa == "native"]
    return options


def main() -> None:
    """Installs, prepares, measures, and writes the table."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on"))  # ends the command, too
    began = time.monotonic()
    python = install(options.environment)
    if options.install_only:
        return
    options.work = options.work.resolve() / f"{options.isa}_{options.share}"
    prepared = prepare(Path(options.data), options.share, options.work)
    wrap_compiler(options.isa, options.work)
    measurement = Measurement(options, python, prepared, opened(options, python, prepared))
    left = []
    for task, network, peer in measurement.plan():
        if time.monotonic() - began > 60 * options.minutes:
            left.append(f"{task} {network} {peer}")
            break
        measurement.run(task, network, peer)
    measurement.result["not_reached"] = left
    write_json(options.out, measurement.result)
    print(f"Not reached within {options.minutes:g} minutes: {left[0]} and what follows" if left else "All is measured.")
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")
    write_tables(options.out)


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        sys.exit(str(error))
