"""A run directory on disk: enough to resume, test, compare, predict and reproduce."""

from __future__ import annotations

import difflib
import io
import json
import os
import shlex
from pathlib import Path
from typing import Any

from finetune101 import config as cfg
from finetune101.errors import Refused
from finetune101.files import as_json, atomic, check_writable, checked, parse_json, read_json, read_text, write_json
from finetune101.host import place
from finetune101.schemas import MOST_BYTES, REMEDIES, SCHEMAS, Record, Split

KEPT, KEPT_RECORD = "kept_network.onnx", "kept_network.json"
"""The exported network of a run, and what it was made of: see ``deploy.kept``."""
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
    "unlike.safetensors",
    KEPT,
    KEPT_RECORD,
    "test_*.json",
    "predictions_*.csv",
    "events.out.tfevents.*",
    "card.md",
    "error.log",
)
MOST_CONFIG = 2**20  # bytes
SEARCH = ("search.json", "optuna.journal", "auto.json")  # each makes a folder without a run a search's


class Run:
    """The folder of one training run and what lies in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        if not self.has("config.json"):
            return f"Run({self.path}: not begun)"
        settings, records = self.config(), self.metrics()
        best = next((record for record in reversed(records) if record["best"]), None)
        score = f", validation top-1 {best['val_top1']:.2f} %" if best and best["val_top1"] is not None else ""
        epoch = f"best epoch {best['epoch']} of {settings.optim.epochs}" if best else "no epoch finished"
        return f"Run({self.path}: {settings.model.name}, recipe {settings.recipe}, {epoch}{score})"

    def _repr_png_(self) -> bytes | None:
        """The curves of loss and accuracy, for notebooks."""
        return (self.path / "curves.png").read_bytes() if self.has("curves.png") else None

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
        kind, remedy = SCHEMAS.get(name, Any), REMEDIES.get(name, "train the run again")
        most = {} if kind is Split else {"most": MOST_BYTES}
        value = read_json(self.path / name, kind, remedy=remedy, **most)
        return {key: own for key, own in value.items() if key != "format"} if isinstance(value, dict) else value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Writes the JSON file ``name``, whole or not at all."""
        write_json(self.path / name, value)

    def config(self) -> cfg.TrainConfig:
        """The configuration that the run was started with."""
        return cfg.from_dict(self.read_json("config.json"), f"{self.path / 'config.json'}")

    def image_folder(self, data: str | None = None) -> str | None:
        """The folder of the run's images: ``data``, else the one of its settings, else where they were at the start.

        None where $FINETUNE101_DATA or the usual places are to be looked at.
        """
        named = data if data is not None else self.config().data.root
        if named is not None or os.environ.get("FINETUNE101_DATA") or not self.has("env.json"):
            return named
        recorded = self.read_json("env.json").get("data")
        return recorded if recorded and Path(recorded).is_dir() else None

    def metrics(self) -> list[dict[str, Any]]:
        """One record per finished epoch. Raises Refused for a damaged file: each is written whole."""
        file = self.path / "metrics.jsonl"
        if not file.is_file():
            return []
        remedy = "train the run again"
        lines = [line for line in read_text(file, remedy).split("\n") if line]
        records = [parse_json(line, f"{file}", remedy) for line in lines]
        return [checked(record, Record, f"{file}", remedy=remedy) for record in records]

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
        epochs = self.config().optim.epochs
        stands = f"{self.path} stands at epoch {epochs - self.epochs_left()} of {epochs}"
        if kind_of(self.path.parent) == "search":
            return f"{stands}; it is a trial of a search, and goes on with the search's command"
        return f"{stands}; go on with: {self.resume_command()} (in a study: with the study's command)"

    def resume_command(self) -> str:
        """What continues the run, wherever its folder is now."""
        exp, path = self.config().exp, self.path
        # by its name below RUNS, as study and search name runs; by its folder where it was renamed or moved
        runs = next((folder for folder in path.parents if folder / exp == path), path.parent)
        where = [] if runs == Path("runs") else ["--runs", str(runs)]
        return shlex.join(["finetune101", "train", "--exp", path.relative_to(runs).as_posix(), *where, "--resume"])

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl by ``records``, one line each."""
        with atomic(self.path / "metrics.jsonl", make_folder=False) as part:
            part.write_text("".join(as_json(r) + "\n" for r in records), encoding="utf-8")

    def clear(self) -> None:
        """Removes what a run wrote, nothing else."""
        for file in [path for name in WRITTEN for path in self.path.glob(name)]:
            file.unlink()


def create_run(config: cfg.TrainConfig, *, resume: bool, overwrite: bool) -> Run:
    """The folder for ``config``: new, or, with ``resume``, the existing one.

    Raises Refused when it exists and neither ``resume`` nor ``overwrite`` is given, there is nothing to resume, or it
    cannot be written.
    Nothing is removed or written yet.
    """
    if resume and overwrite:
        raise Refused("--resume continues a run and --overwrite replaces it; give one of them")
    run = Run(Path(config.runs) / config.exp)
    if run.path.exists() and not run.path.is_dir():
        raise Refused(f"{run.path} is a file; choose another --exp or --runs")
    if (kind := kind_of(run.path)) in ("search", "study"):
        raise Refused(f"{run.path} is the folder of a {kind}; choose another --exp")
    exists = kind == "run"
    if run.has("config.json") and not exists:
        raise Refused(f"{run.path} holds the config.json of another program; choose another --exp")
    if resume and not exists:
        raise Refused(f"there is no run {run.path} to resume; start it without --resume")
    above = [Path(config.runs) / part for part in Path(config.exp).parents[:-1]]
    inside = next((folder for folder in above if is_run(folder)), None)
    if inside and not exists:
        raise Refused(f"{inside} is the folder of a run, in which no other run may be; choose another --exp")
    if exists and not resume and not overwrite:
        raise Refused(f"{run.path} exists; add --resume to continue it or --overwrite to start anew")
    if place().rank == 0:  # the only one that writes
        check_writable(run.path, run.path, "--runs")
    return run


def kind_of(folder: Path) -> str:
    """What ``folder`` holds: "run", "search", "study" or "" for none of them."""
    if is_run(folder):
        return "run"
    if any((folder / name).is_file() for name in SEARCH):
        return "search"
    return "study" if (folder / "study.json").is_file() else ""


def is_run(folder: Path) -> bool:
    """Whether ``folder`` is that of a run: its config.json is ours, also where it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size < MOST_CONFIG else None
    except (OSError, ValueError, RecursionError):  # refused when it is read
        return True
    return not isinstance(values, dict) or bool({"exp", "recipe", "optim", "format"} & values.keys())


def runs_below(folder: Path) -> list[Path]:
    """The folders of the runs in ``folder``, itself among them, sorted; trials of a search are none."""
    folders = []
    for path, names, _ in os.walk(folder):
        names.sort()
        kind = kind_of(Path(path))
        if kind == "run":
            folders.append(Path(path))
        if kind in ("run", "search"):
            names.clear()
    return folders


def file_name(exp: str) -> str:
    """``exp`` as a part of the original's file names, which lie in one folder."""
    return exp.replace("/", "_")


def plots_folder(config: cfg.TrainConfig) -> str:
    """The original's folder for the curves of an arm."""
    return "training_plots_finetune" if config.model.pretrain else "training_plots_random"


def find_run(name: str, runs: str = "runs") -> Run | None:
    """The existing run ``name``, if there is one: a name below ``runs``, or a folder."""
    paths = [Path(runs) / name, Path(name)]
    if len(Path(name).parts) > 1 or name.startswith("."):  # it names a folder rather than a run
        paths.reverse()
    return next((Run(path) for path in paths if is_run(path)), None)


def open_run(name: str, runs: str = "runs", anywhere: bool = True) -> Run:
    """The existing run ``name``: a name below ``runs``, or, ``anywhere``, a folder.

    Raises Refused naming the runs that exist.
    """
    below = Path(runs) / name
    if run := find_run(name, runs) if anywhere else (Run(below) if is_run(below) else None):
        return run
    if name.endswith(".onnx"):
        raise Refused(f"{name} is an exported file; name the run that it was made of")
    names = [path.relative_to(runs).as_posix() for path in runs_below(Path(runs))]
    existing = sorted(names, key=lambda name: (name.count("/"), name))
    if folder := next((path for path in (Path(name), below)[not anywhere :] if path.is_dir()), None):
        if (kind := kind_of(folder)) == "search":
            raise Refused(f"{folder} is a search, not a run; {winner_command(folder)}")
        what = f"a {kind}, not a run" if kind else "no run: it has no config.json of ours"
        within = [path.relative_to(folder).as_posix() for path in runs_below(folder)[:3]]
        near = f"; in it there are {', '.join(within)}" if within else ""
        raise Refused(f"{folder} is {what}{near}; name a run, or train one first")
    if close := difflib.get_close_matches(name, existing, n=3):
        raise Refused(f"no run named {name}; did you mean {' or '.join(close)}?")
    hint = f"there is none yet in {runs}; train one first"
    if existing:
        hint = f"there are: {', '.join(existing[:10])}" + ", …" * (len(existing) > 10)
    raise Refused(f"no run named {name}; {hint}")


def run_name(run: Any) -> str:
    """The name that a person gives a run by, as text. Raises Refused for what is no name."""
    if not isinstance(run, str | os.PathLike):
        raise Refused(f"{type(run).__name__} is neither a name nor a path; give text")
    return os.fspath(run)


def winner_command(search: Path) -> str:
    """What to do with the search in the folder ``search``: its trials are never tested, its winner is trained."""
    words = ["finetune101", "train", "--config", str(search / "winner.yaml"), "--exp"]
    return f"its trials are never tested: train its winner with {shlex.join(words)} NAME"


def check_folder(out: Path) -> None:
    """Raises Refused when ``out`` cannot be a folder, or be written, before the work for it begins."""
    if file := next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None):
        raise Refused(f"{file} is a file; give --out a folder")
    check_writable(out, out, "--out")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` by torch into the existing folder of ``path``. Raises Refused as ``atomic`` does."""
    import torch

    buffer = io.BytesIO()  # torch's own writing to a file tells of a full disk by a line number
    torch.save(state, buffer)
    with atomic(path, make_folder=False) as part:
        part.write_bytes(buffer.getbuffer())


def save_checkpoint(path: Path, tensors: dict[str, Any], info: dict[str, str]) -> None:
    """Writes tensors and metadata as safetensors into the existing folder of ``path``: equal ones as equal bytes.

    safetensors puts the metadata in random order. Raises Refused as ``atomic`` does.
    """
    from safetensors.torch import save

    data = save({key: value.contiguous() for key, value in tensors.items()}, info)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8, as safetensors itself does it
    with atomic(path, make_folder=False) as part, open(part, "wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text, memoryview(data)[8 + length :]):
            file.write(piece)
