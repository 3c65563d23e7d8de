"""Mutated files of every kind that the program reads: images, JSON, YAML, checkpoints, archives, ONNX, uploads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults.archives import changed_archive
from faults.bench import SMALL, Bench, Case
from faults.mutations import changed_bytes, changed_json, changed_text
from faults.process import Process, command
from faults.sandbox import Call, run_calls, said

BATCH = 10  # calls of one process
TOGETHER = 10  # images of one call
EPOCH = [*SMALL, "--epochs", "1", "--no-fast-kernels"]
RECIPES = {
    ".yaml": "optim: {lr: 0.01, epochs: 3, schedule: cosine, weight_decay: 1e-4}\n"
    "augment:\n  flip: true\n  crop_scale: 0.5\n  train_sizes: [32, 64]\n"
    "model:\n  name: timm:test_efficientnet\n  pretrain: false\n  size: 32\ndata: {val_size: 0.2}\n",
    ".toml": '[optim]\nlr = 0.01\nepochs = 3\nschedule = "cosine"\n[model]\npretrain = false\nsize = 32\n',
    ".json": '{"optim": {"lr": 0.01, "epochs": 3}, "augment": {"train_sizes": [32, 64]}, "system": {"seed": 1}}',
}
SPACES = {
    ".yaml": "lr: [0.01, 0.02]\ngamma: {low: 0.1, high: 0.5}\nbatch_size: [8, 16]\nschedule: [step, cosine]\n",
    ".toml": "lr = [0.01, 0.02]\nbatch_size = [8, 16]\n",
    ".json": '{"lr": [0.01, 0.02], "nesterov": [true, false], "weight_decay": [0, 1e-4]}',
}
Make = Callable[["Home", random.Random, bool], Callable[[Path], str]]
"""Makes a call with mutated files; with True the files are whole, and the call must succeed."""


class Home:
    """The whole files that are mutated: runs a and b, images, a comparison, an exported network."""

    def __init__(self, bench: Bench) -> None:
        self.folder, self.data = bench.new_folder("whole"), bench.data
        words = [["train", *EPOCH, "--exp", "a"], ["train", *EPOCH, "--exp", "b", "--seed", "1"]]
        self._do(*([*one, "--data", str(self.data)] for one in words))
        self.image = min(self.data.glob("*/*.jpg"))
        self._do(["evaluate", "a"], ["evaluate", "b"], ["compare", "a", "b", "--out", "pair"])
        self._do(["predict", "a", str(self.image)])  # which exports it, and keeps the file
        self.exported = (self.folder / "runs/a/kept_network.onnx").read_bytes()
        self.images = {suffix: self._as(suffix) for suffix in (".jpg", ".png", ".webp", ".bmp")}
        self._read: dict[str, list[str]] = {}
        self._bench = bench

    def _do(self, *argvs: list[str]) -> None:
        ended = Process(command(*argvs), cwd=self.folder).wait()
        if ended.code:
            raise RuntimeError(f"{argvs} failed: {ended.err[-2000:]}")

    def _as(self, suffix: str) -> bytes:
        from PIL import Image

        file = io.BytesIO()
        Image.open(self.image).resize((97, 65)).save(file, {".jpg": "jpeg"}.get(suffix, suffix[1:]))
        return file.getvalue()

    def run_in(self, place: Path) -> Path:
        """A copy of the run a in ``place``."""
        return Path(shutil.copytree(self.folder / "runs/a", place / "runs/a"))

    def files_read(self, words: Sequence[str]) -> list[str]:
        """Names of the text files of the run a that a command reads; it is tried once."""
        key = " ".join(words)
        if key not in self._read:
            place = self._bench.new_folder("reads")
            run, log = self.run_in(place), place / "log"
            names = {file.name for file in run.iterdir() if file.suffix in (".json", ".jsonl", ".csv")}

            def call() -> int:
                sys.addaudithook(lambda event, what: _log_read(run, names, log, event, what))
                return command(list(words))()

            log.touch()
            if (ended := Process(call, cwd=place).wait()).code:
                raise RuntimeError(f"{key} failed: {ended.err[-2000:]}")
            self._read[key] = sorted(set(log.read_text().split()))
        return self._read[key]


def _log_read(run: Path, names: set[str], log: Path, event: str, what: tuple[Any, ...]) -> None:
    """Adds to ``log`` a file of ``run`` that is opened to be read."""
    if event != "open" or not isinstance(what[0], str | os.PathLike) or (what[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return
    path = Path(os.path.abspath(os.fspath(what[0])))
    if path.parent == run and path.name in names:
        with open(log, "a") as lines:
            lines.write(f"{path.name}\n")


def _images(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    suffixes = [rng.choice(list(home.images)) for _ in range(TOGETHER)]
    contents = [home.images[suffix] if whole else changed_bytes(rng, home.images[suffix]) for suffix in suffixes]
    foreign = [rng.choice([*home.images]) if rng.random() < 0.1 else suffix for suffix in suffixes]  # another suffix
    verb = rng.choice(["verify"] * 4 + ["predict"] * 4 + ["csv", "show", "train"])

    def call(place: Path) -> str:
        for number, (suffix, content) in enumerate(zip(foreign, contents, strict=True)):
            file = place / "d" / f"class{number % 2}" / f"{number}{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        if verb == "train":
            for name in ("class0", "class1"):
                for image in sorted(home.data.glob("*/*.jpg"))[:6]:
                    shutil.copy(image, place / "d" / name / f"{image.parent.name}_{image.name}")
        words = {
            "verify": ["data", "verify", "--data", "d"],
            "predict": ["predict", str(home.folder / "runs/a"), "d"],
            "csv": ["predict", str(home.folder / "runs/a"), "d", "--out", "labels.csv", "--into", "sorted"],
            "show": ["data", "show", "--data", "d"],
            "train": ["train", *EPOCH, "--exp", "x", "--data", "d", "--skip-bad-images"],
        }[verb]
        return said(words, (0, 1) if whole else (0, 1, 2))

    return call


def _run_files(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    other, data = str(home.folder / "runs/b"), ["--data", str(home.data)]
    commands = [
        ["evaluate", "a", *data], ["predict", "a", str(home.image)], ["card", "a", "--overwrite"],
        ["compare", "a", other], ["ensemble", "a", other, *data], ["report", "a", "--no-gallery", "--no-explain"],
        ["train", *EPOCH, "--exp", "a", *data, "--resume"], ["evaluate", "a", *data, "--subset", "val"],
    ]  # fmt: skip
    words = rng.choice(commands[:5] * 3 + commands)
    file = home.folder / "runs/a" / rng.choice(home.files_read(words))
    text = file.read_text(encoding="utf-8")
    is_table = file.suffix != ".json" or rng.random() < 0.2
    content = changed_text(rng, text) if is_table else changed_json(rng, json.loads(text)).encode()

    def call(place: Path) -> str:
        run = home.run_in(place)
        if not whole:
            (run / file.name).write_bytes(content)
        return said(words, (0,) if whole else (0, 2))

    return call


def _comparisons(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    file = home.folder / "pair/comparison.json"
    content = file.read_text() if whole else changed_json(rng, json.loads(file.read_text()))

    def call(place: Path) -> str:
        shutil.copytree(home.folder / "runs", place / "runs")
        shutil.copytree(file.parent, place / "pair")
        (place / "pair" / file.name).write_text(content)
        return said(["report", "pair", "--no-gallery", "--no-explain"], (0,) if whole else (0, 2))

    return call


def _searches(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    runs, results = home.folder / "runs", []
    for number in range(8):
        point = {"lr": (0.1, 0.2)[number % 2], "gamma": (0.1, 0.5)[number // 2 % 2]}
        results.append({"point": point, "run": f"r{number}", "state": "complete", "best_val_top1": 50.0 + number})
    value = {"results": results, "space": {"lr": [0.1, 0.2], "gamma": [0.1, 0.5]}}
    content = json.dumps(value) if whole else changed_json(rng, value)

    def call(place: Path) -> str:
        for number in range(8):
            (place / f"s/r{number}").mkdir(parents=True)
            shutil.copy(runs / "ab"[number % 2] / "metrics.jsonl", place / f"s/r{number}")
        (place / "s/search.json").write_text(content)
        return said(["search", "report", "s"], (0,) if whole else (0, 2))

    return call


def _settings(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    is_space = rng.random() < 0.5
    suffix, text = rng.choice(list((SPACES if is_space else RECIPES).items()))
    content = changed_text(rng, text)
    if suffix == ".json" and rng.random() < 0.7:
        content = changed_json(rng, json.loads(text)).encode()

    def call(place: Path) -> str:
        file = place / f"settings{suffix}"
        file.write_bytes(text.encode() if whole else content)
        verb = ["search", "--dry-run", "--space"] if is_space else ["train", "--recipe-file"]
        return said([*verb, str(file), "--exp", "x", "--data", "missing"], (2,))  # no images: read, and no more

    return call


def _checkpoints(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    name = rng.choice(["best.safetensors", "last.pt"])
    content = (home.folder / "runs/a" / name).read_bytes()
    if not whole:
        in_header = name == "best.safetensors" and rng.random() < 0.6
        content = changed_header(rng, content) if in_header else changed_bytes(rng, content)
    as_weights = rng.random() < 0.3
    data = ["--data", str(home.data)]
    words = rng.choice([["predict", "net.safetensors", str(home.image)], ["evaluate", "a", *data]])
    if name == "last.pt":
        words = ["train", *EPOCH, "--exp", "a", *data, "--resume"]
    if as_weights:
        flags = [flag for flag in EPOCH if flag != "--no-pretrain"]
        words = ["train", *flags, "--exp", "x", *data, "--weights", f"runs/a/{name}"]

    def call(place: Path) -> str:
        run = home.run_in(place)
        for file in (run / name, place / "net.safetensors"):
            file.write_bytes(content)
        return said(words, (0, 2) if as_weights or not whole else (0,))

    return call


def changed_header(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header: metadata, shapes, offsets."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"]
    if rng.random() < 0.7:
        key = rng.choice(list(metadata))
        try:
            metadata[key] = changed_json(rng, json.loads(metadata[key]))
        except ValueError:  # plain text
            metadata[key] = changed_json(rng, metadata[key])
        text = json.dumps(header)
    else:
        text = changed_json(rng, header)
    return len(text.encode()).to_bytes(8, "little") + text.encode() + content[8 + length :]


def _exports(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    content = home.exported if whole else changed_bytes(rng, home.exported)

    def call(place: Path) -> str:
        (place / "net.onnx").write_bytes(content)
        return said(["predict", "net.onnx", str(home.image)], (0,) if whole else (0, 1, 2))

    return call


def _splits(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    text = (home.folder / "runs/a/split.json").read_text()
    content = text if whole else changed_json(rng, json.loads(text))

    def call(place: Path) -> str:
        (place / "split.json").write_text(content)
        words = ["train", *EPOCH, "--exp", "x", "--data", str(home.data), "--split", "split.json"]
        return said(words, (0,) if whole else (0, 2))

    return call


def _archives(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    content = changed_archive(rng, home.image.read_bytes(), whole)

    def call(place: Path) -> str:
        from finetune101.data.download import download
        from finetune101.errors import Refused

        (place / "caltech-101.zip").write_bytes(content)
        try:
            download(place, md5=hashlib.md5(content, usedforsecurity=False).hexdigest())
        except Refused as error:
            return f"the whole archive was refused: {error}" if whole else ""
        links = [path.name for path in place.rglob("*") if path.is_symlink()]
        return f"unpacked links: {links}" if links else ""

    return call


def _uploads(home: Home, rng: random.Random, whole: bool) -> Callable[[Path], str]:
    bodies = []
    for _ in range(TOGETHER):
        image = rng.choice(list(home.images.values()))
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        form = head + image + b"\r\n--x--\r\n"
        content, kind = rng.choice([(image, "image/jpeg"), (form, "multipart/form-data; boundary=x")])
        bodies.append((content if whole else changed_bytes(rng, content), kind))

    def call(place: Path) -> str:
        from starlette.testclient import TestClient

        from finetune101.api import load
        from finetune101.serve.app import application
        from finetune101.serve.uploads import Limits

        network = load(str(home.folder / "runs/a"))
        with TestClient(application(network, Limits()), base_url="http://127.0.0.1:8000") as client:
            for content, kind in bodies:
                answer = client.post("/predict", content=content, headers={"content-type": kind})
                if answer.status_code >= 500 or (whole and answer.status_code != 200):
                    return f"status {answer.status_code}: {answer.text[:300]}"
        return ""

    return call


TARGETS: dict[str, tuple[int, int, Make]] = {
    "images": (1060, TOGETHER, _images),
    "files of a run": (700, 1, _run_files),
    "recipes and spaces": (500, 1, _settings),
    "checkpoints": (200, 1, _checkpoints),
    "archives": (150, 1, _archives),
    "uploads": (150, TOGETHER, _uploads),
    "splits": (80, 1, _splits),
    "exported networks": (80, 1, _exports),
    "comparisons": (40, 1, _comparisons),
    "searches": (40, 1, _searches),
}
"""Name -> files of 3,000, files of one call, and what makes the call."""


def hostile(count: int, bench: Bench) -> Iterator[Case]:
    """Mutated files of every kind, in turns; first whole files of each, which must be read and are not counted."""
    home, cache = Home(bench), bench.folder / "cache"
    numbers = {name: count * share // (3000 * files) for name, (share, files, _) in TARGETS.items()}
    for name, number in numbers.items():
        _, files, make = TARGETS[name]
        whole = [Call(name, files, make(home, bench.rng, True)) for _ in range(min(number, 3 if number >= 10 else 1))]
        for _, fault in run_calls(whole, bench.new_folder("hostile"), cache, bench.notes):
            if fault:
                raise RuntimeError(f"{name}: whole files are not read: {fault}")
    for name, number in in_turns(numbers, BATCH):
        _, files, make = TARGETS[name]
        batch = bench.new_folder("hostile")
        calls = [Call(name, files, make(home, bench.rng, False)) for _ in range(number)]
        for one, fault in run_calls(calls, batch, cache, bench.notes):
            bench.notes[one.name] += one.files
            yield from [(one.name, fault), *[(one.name, "")] * (one.files - 1)]
            if fault and bench.keep:
                shutil.copytree(batch / "work", bench.keep / batch.name, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(batch, ignore_errors=True)


def in_turns(numbers: dict[str, int], most: int) -> list[tuple[str, int]]:
    """Batches of at most so many calls of every kind, spread evenly: time that is too short cuts no kind."""
    batches = [
        (start / number, name, min(most, number - start))
        for name, number in numbers.items()
        for start in range(0, number, most)
    ]
    return [(name, size) for _, name, size in sorted(batches, key=lambda batch: batch[0])]
