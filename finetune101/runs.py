"""A run directory on disk: enough to resume, test, compare, predict and reproduce."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune101 import config as cfg
from finetune101.errors import Refused
from finetune101.files import FORMAT, as_json, atomic, checked, parse_json, read_json, write_json
from finetune101.schemas import SCHEMAS, Record

WRITTEN = (
    "config.json",
    "env.json",
    "split.json",
    "test.json",
    "metrics.jsonl",
    "curves.png",
    "last.pt",
    "best.safetensors",
    "predictions.csv",
    "temperature.json",
    "test_*.json",
    "predictions_*.csv",
    "events.out.tfevents.*",
)


class Run:
    """The folder of one training run and what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The run's name: its folder's."""
        return self.path.name

    @property
    def best(self) -> Path:
        """Weights of the best epoch (safetensors, with class names and preprocessing)."""
        return self.path / "best.safetensors"

    @property
    def last(self) -> Path:
        """State after the last finished epoch: what ``--resume`` continues from."""
        return self.path / "last.pt"

    def has(self, name: str) -> bool:
        """Whether the file ``name`` is there."""
        return (self.path / name).is_file()

    def read_json(self, name: str) -> Any:
        """The content of the JSON file ``name``, without its version.

        Raises Refused when it is missing, not JSON or not what ``schemas.SCHEMAS`` says.
        """
        if not self.has(name):
            raise Refused(f"{self.path} has no {name}; is it the folder of a finished run?")
        value = read_json(self.path / name, SCHEMAS.get(name, Any), remedy="train the run again")
        return {key: own for key, own in value.items() if key != "format"} if isinstance(value, dict) else value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes the JSON file ``name`` with the version of its form, whole or not at all."""
        write_json(self.path / name, {"format": FORMAT, **value})

    def config(self) -> cfg.TrainConfig:
        """The configuration that the run was started with."""
        return cfg.from_dict(self.read_json("config.json"), f"{self.path / 'config.json'}")

    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch. Raises Refused for a damaged file: each is written whole."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        remedy = "train the run again"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{file} cannot be read ({error}); {remedy}") from error
        return [checked(parse_json(s, f"{file}", remedy), Record, f"{file}", remedy=remedy) for s in lines if s]

    def seconds(self) -> float:
        """Seconds of training and validation over all finished epochs."""
        return float(sum(r["seconds"] + r.get("val_seconds", 0.0) for r in self.metrics()))

    def epochs_left(self) -> int:
        """Epochs that the training has still to do; 0 for published evidence without records."""
        records = self.metrics()
        return self.config().optim.epochs - records[-1]["epoch"] if records else 0

    def stopped(self) -> str:
        """Where a training that did not come to its end stands and what goes on with it, in words; "" for others."""
        if not self.has("config.json") or self.epochs_left() <= 0:
            return ""
        config = self.config()
        folder = "" if config.runs == "runs" else f" --runs {config.runs}"
        return (
            f"{self.path} stands at epoch {config.optim.epochs - self.epochs_left()} of {config.optim.epochs}; "
            f"go on with: finetune101 train --exp {config.exp}{folder} --resume (in a study: with the study's command)"
        )

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by ``records``, one line each."""
        with atomic(self.path / "metrics.jsonl") as part:
            part.write_text("".join(as_json(r) + "\n" for r in records), encoding="utf-8")

    def clear(self) -> None:
        """Removes what a run wrote, nothing else."""
        for file in [path for name in WRITTEN for path in self.path.glob(name)]:
            file.unlink()


def create_run(config: cfg.TrainConfig, *, resume: bool, overwrite: bool) -> Run:
    """The folder for ``config``: new, or, with ``resume``, the existing one.

    Raises Refused when it exists and neither ``resume`` nor ``overwrite`` is given, or there is nothing to resume.
    Nothing is removed or written yet.
    """
    run = Run(Path(config.runs) / config.exp)
    if run.path.exists() and not run.path.is_dir():
        raise Refused(f"{run.path} is a file; choose another --exp or --runs")
    exists = run.has("config.json")
    if resume and not exists:
        raise Refused(f"there is no run {run.path} to resume; start it without --resume")
    if exists and not resume and not overwrite:
        raise Refused(f"{run.path} exists; add --resume to continue it or --overwrite to start anew")
    return run


def file_name(exp: str) -> str:
    """``exp`` as a part of the original's file names, which lie in one folder."""
    return exp.replace("/", "_")


def find_run(name: str, runs: str = "runs") -> Run | None:
    """The existing run ``name``, if there is one: a folder, or a name below ``runs``."""
    paths = (Path(name), Path(runs) / name)
    return next((Run(path) for path in paths if (path / "config.json").is_file()), None)


def open_run(name: str, runs: str = "runs") -> Run:
    """The existing run ``name``: a folder, or a name below ``runs``. Raises Refused naming the runs that exist."""
    if run := find_run(name, runs):
        return run
    found = [path.parent for path in Path(runs).glob("**/config.json")]
    names = [path.relative_to(runs).as_posix() for path in found if not (path.parent / "optuna.journal").exists()]
    known = sorted(names, key=lambda name: (name.count("/"), name))  # trials of searches have no name of their own
    if folder := next((path for path in (Path(name), Path(runs) / name) if path.is_dir()), None):
        raise Refused(f"{folder} is no run: it has no config.json; name a run, or train one first")
    if near := difflib.get_close_matches(name, known, n=3):
        raise Refused(f"no run named {name}; did you mean {' or '.join(near)}?")
    more = ", …" if len(known) > 10 else ""
    hint = f"there are: {', '.join(known[:10])}{more}" if known else f"there is none yet in {runs}; train one first"
    raise Refused(f"no run named {name}; {hint}")


def check_folder(out: Path) -> None:
    """Raises Refused when ``out`` cannot be a folder, before the work for it begins."""
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise Refused(f"{file} is a file; give --out a folder")


def save_with(path: Path, save: Callable[[Path], None]) -> None:
    """Calls ``save(temporary path)`` and puts the result at ``path``; libraries' own write errors become Refused."""
    from safetensors import SafetensorError

    try:
        with atomic(path) as part:
            save(part)
    except (RuntimeError, SafetensorError) as error:
        raise Refused(f"cannot write {path}: {error}; free some space, then continue with --resume") from error
