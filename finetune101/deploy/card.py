"""A model card: what a trained network is, what it was tested on, its limits and licences, with the header of a hub."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from finetune101.config import SETTINGS, Preprocessing, TrainConfig, to_dict
from finetune101.data.images import OFFICIAL_CLASSES, class_of
from finetune101.deploy.released_files import FOLDER, RELEASED, available
from finetune101.errors import Refused, escaped, markdown
from finetune101.evaluation.checkpoint import Info, described, has_frozen_backbone, read_checkpoint
from finetune101.evaluation.tested import Answer, confused_pairs, evaluate_command, read_answers, read_manifest
from finetune101.evaluation.unlike import UNLIKE
from finetune101.files import atomic
from finetune101.models.table import Entry, Package, Timm, lookup
from finetune101.recipes import from_recipe
from finetune101.redaction import redacted
from finetune101.run import Run
from finetune101.training.resume import differences

TEMPLATES = Path(__file__).parent / "templates"
LANGUAGES = ("en", "zh")
FILE = "card.md"
TASK = "image-classification"
Start = Literal["efficientnet-lite", "torchvision", "timm", "file", "random"]
"""Where the weights come from that a training starts with."""
HUB_LICENCES: dict[Start, str] = {"efficientnet-lite": "apache-2.0", "torchvision": "bsd-3-clause"}
"""The licence of the first weights by the name that a hub has for it; of the others no licence is known here."""
OWN_LICENCE = "other"
"""What a hub shows for a network of somebody's own images: only that person can say under which licence it is."""
METRICS = (("accuracy", "Accuracy", "top1"), ("balanced_accuracy", "Mean per-class accuracy", "mean_per_class"))
"""Metrics of a hub: kind, name, and the key in test.json."""
SOME_CALTECH = {"Faces_easy", "accordion", "water_lilly", "yin_yang"}
FEW = 10  # test images of a class, below which its accuracy says little


@dataclass(frozen=True)
class ClassRow:
    """One class: its training images, its test images, those of these that are right, and what it is taken for most."""

    name: str
    train: int
    test: int
    right: int
    taken_for: str

    @property
    def accuracy(self) -> float:
        """Percent of the test images that are right; 0 without test images."""
        return 100 * self.right / self.test if self.test else 0.0


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says; the templates put it into words."""

    name: str
    file: str
    """The name of the file of weights."""
    architecture: str
    start: Start
    source: str
    """Where the first weights came from, as env.json says it."""
    frozen: bool
    random_layers: str
    """The layers beside the output layer that started at random in a pretrained network; "" for none."""
    recipe: str
    settings: tuple[tuple[str, str], ...]
    """(flag, value) of the settings that differ from the recipe."""
    epoch: int | None
    epochs: int
    validation: float | None
    """Top-1 in percent of the epoch that was kept."""
    is_caltech: bool
    data: str
    """The name of the data set: its folder's."""
    classes: tuple[str, ...]
    counts: dict[str, int]
    """Subset -> images."""
    val_use: Literal["epoch", "weights", "nothing"]
    """What the validation images were used for; "weights": they trained the network too."""
    protocol: str
    seed: int
    split_hash: str
    input: Preprocessing | None
    size: int
    temperature: float | None
    temperature_reason: str
    marks_unlike: bool
    """Whether ``predict`` marks images unlike the training images."""
    test: dict[str, Any] | None
    """The content of test.json; None for a run that was not tested."""
    rows: tuple[ClassRow, ...]
    """The classes, where the answers to the test images are there."""
    pairs: tuple[tuple[str, str, int], ...]
    evaluate: str
    """What tests the run."""
    environment: dict[str, Any]
    command: str
    licence: str
    """Of the trained weights, by its name on a hub."""
    notes: tuple[str, ...] = ()

    @property
    def per_class(self) -> tuple[int, int]:
        """The fewest and the most training images of a class."""
        numbers = [row.train for row in self.rows] or [0]
        return min(numbers), max(numbers)

    @property
    def worst(self) -> list[ClassRow]:
        """The five classes of the lowest accuracy among those with enough test images."""
        tested = [row for row in self.rows if row.test >= FEW and row.right < row.test]
        return sorted(tested, key=lambda row: (row.accuracy, row.name))[:5]

    @property
    def rarely_tested(self) -> int:
        """The number of classes with fewer than ``FEW`` test images."""
        return sum(row.test < FEW for row in self.rows)


def write_card(name: str, run: Run | None, out: Path | None, lang: str = "en", overwrite: bool = False) -> Path:
    """Writes the card of ``run``, or of the released network ``name`` without one; returns its file.

    ``out`` is by default card.md in the folder of the run, or here. Raises Refused for a file that exists, unless
    ``overwrite``, for an unknown language, and for a run that has no finished epoch.
    """
    if lang not in LANGUAGES:
        raise Refused(f"--lang is {lang}; give {' or '.join(LANGUAGES)}")
    file = out or (run.path / FILE if run else Path(FILE))
    if file.is_dir():
        raise Refused(f"--out {escaped(str(file))} is a folder; name a file")
    if file.exists() and not overwrite:
        raise Refused(f"{escaped(str(file))} exists; name another file by --out, or give --overwrite")
    text = card_text(card_of(run), lang) if run else released_card(name, lang)
    with atomic(file) as part:
        part.write_text(text, encoding="utf-8")
    return file


def released_card(name: str, lang: str = "en") -> str:
    """The card that lies beside the weights of a released network. Raises Refused where there is none."""
    if name not in available():
        raise Refused(f"this package does not hold {name}; it holds {', '.join(available()) or 'none'}")
    if lang != "en":
        raise Refused(f"the card of {name} is in English; leave --lang {lang} out")
    return (FOLDER / f"{RELEASED[name]}.md").read_text(encoding="utf-8")


def released_score(name: str) -> tuple[float, int] | None:
    """Top-1 in percent of a released network's file, and the number of test images, as its card says them."""
    score = re.search(r"on the same (\d+) test images, this file has (\d+\.\d+) %", released_card(name))
    return (float(score[2]), int(score[1])) if score else None


def card_of(run: Run) -> Card:
    """What there is to say of ``run``: published evidence without weights will do where it is tested.

    Raises Refused for a run without a finished epoch, and for damaged files.
    """
    if not run.best.is_file() and not run.has("test.json"):
        raise Refused(run.stopped() or f"no epoch of {run.path} has finished yet; train it first")
    info = described(read_checkpoint(run.best)[1], run.best) if run.best.is_file() else None
    config, manifest, environment = run.config(), read_manifest(run), run.read_json("env.json")
    test = run.read_json("test.json") if run.has("test.json") else None
    answers = read_answers(run) if test else {}
    records = run.metrics()
    best = next((record for record in reversed(records) if record["best"]), None)
    epoch = info.epoch if info and info.epoch is not None else best["epoch"] if best else None
    entry = lookup(config.model.name)
    start = start_of(config, entry)
    is_caltech = len(manifest.classes) == OFFICIAL_CLASSES and set(manifest.classes) >= SOME_CALTECH
    return Card(
        name=run.name,
        file=run.best.name,
        architecture=config.model.name,
        start=start,
        source=environment["model"]["init_source"],
        frozen=has_frozen_backbone(config, epoch),
        random_layers=", ".join(config.model.random_layers),
        recipe=Path(config.recipe or "").name,
        settings=changed_settings(config),
        epoch=epoch,
        epochs=config.optim.epochs,
        validation=best["val_top1"] if best else None,
        is_caltech=is_caltech,
        data=Path(run.image_folder() or environment.get("data") or "").name,
        classes=manifest.classes,
        counts={subset: len(paths) for subset, paths in manifest.subsets.items()},
        val_use="weights" if config.data.fit_on == "train+val" else "epoch" if manifest.subsets["val"] else "nothing",
        protocol=manifest.protocol,
        seed=manifest.seed,
        split_hash=manifest.hash(),
        input=info.preprocessing if info else None,
        size=info.preprocessing.size if info else config.model.size or entry.preprocessing.size,
        **_temperature(info, test),
        marks_unlike=run.has(UNLIKE),
        test=test,
        rows=_class_rows(manifest.classes, manifest.subsets["train"], answers),
        pairs=tuple(confused_pairs(answers)),
        evaluate=escaped(evaluate_command(Run(Path(run.name)))),
        environment=environment,
        command=escaped(_without_folders(redacted(environment.get("command", "")))),
        licence=HUB_LICENCES.get(start, "unknown") if is_caltech else OWN_LICENCE,
    )


def start_of(config: TrainConfig, entry: Entry) -> Start:
    """Where the weights come from that a training by ``config`` starts with."""
    if not config.model.pretrain:
        return "random"
    if config.model.weights:
        return "file"
    if isinstance(entry.weights, Timm):
        return "timm"
    return "efficientnet-lite" if isinstance(entry.weights, Package | tuple) else "torchvision"


def changed_settings(config: TrainConfig) -> tuple[tuple[str, str], ...]:
    """(flag, value) of the settings of ``config`` that differ from those of its recipe; none without a known recipe."""
    try:
        recipe = from_recipe(config.recipe or "original", config.exp, pretrain=config.model.pretrain)
    except Refused:
        return ()
    names = {(setting.part, setting.field): flag.replace("_", "-") for flag, setting in SETTINGS.items()}
    values, changed = to_dict(config), [tuple(name.split(".")) for name in differences(recipe, config)]
    changed = [name for name in changed if name not in (("model", "pretrain"), ("system", "seed"))]  # told elsewhere
    return tuple((names[part, field], _value_text(values[part][field])) for part, field in changed)


def card_text(card: Card, lang: str = "en") -> str:
    """The card as Markdown with the header that a hub reads."""
    # Markdown, no HTML: its texts go through the filter md
    environment = Environment(  # nosec B701
        loader=FileSystemLoader(TEMPLATES), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        undefined=StrictUndefined, autoescape=False,
    )  # fmt: skip
    environment.filters["md"] = markdown
    twins = card.test["n"] - card.test.get("without_duplicates", card.test)["n"] if card.test else 0
    body = environment.get_template(f"card.{lang}.md").render(card=card, few=FEW, twins=twins)
    return f"---\n{hub_header(card)}---\n\n{body}"


def hub_header(card: Card) -> str:
    """The YAML header of a card on the Hugging Face hub: library, task, licence, data and, of a tested run, results."""
    from huggingface_hub import EvalResult, ModelCardData

    name = escaped(card.data) or "images"
    dataset, title = ("caltech101", "Caltech-101") if card.is_caltech else ("imagefolder", name)
    results = [
        EvalResult(
            task_type=TASK, task_name="Image Classification", dataset_type=dataset, dataset_name=title,
            dataset_split="test", metric_type=kind, metric_name=metric, metric_value=round(card.test[key] / 100, 4),
        )
        for kind, metric, key in METRICS if card.test
    ]  # fmt: skip
    data = ModelCardData(
        library_name="finetune101", pipeline_tag=TASK, license=card.licence, datasets=[dataset],
        metrics=[kind for kind, _, _ in METRICS] if results else None, tags=[escaped(card.architecture)],
        model_name=escaped(card.name), eval_results=results or None,
    )  # fmt: skip
    return data.to_yaml().rstrip("\n") + "\n"


def _temperature(info: Info | None, test: dict[str, Any] | None) -> dict[str, Any]:
    """The temperature of a checkpoint or of a test, and why it is 1 or None."""
    scaled = (test or {}).get("calibration_scaled", {})
    value = info.temperature if info and info.temperature else scaled.get("temperature")
    reason = (test or {}).get("temperature_reason") or (info.temperature_reason if info else "")
    return {"temperature": value, "temperature_reason": reason}


def _class_rows(classes: tuple[str, ...], train: tuple[str, ...], answers: dict[str, Answer]) -> tuple[ClassRow, ...]:
    trained = Counter(map(class_of, train))
    tested = Counter(answer.label for answer in answers.values())
    right = Counter(answer.label for answer in answers.values() if answer.right)
    taken: dict[str, str] = {}
    for label, prediction, _ in confused_pairs(answers, most=len(answers)):
        taken.setdefault(label, prediction)
    return tuple(ClassRow(name, trained[name], tested[name], right[name], taken.get(name, "")) for name in classes)


def _value_text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _without_folders(command: str) -> str:
    """``command`` with the last part of every absolute path alone: folders of a machine are nobody else's business."""
    try:
        words = shlex.split(command)
    except ValueError:  # recorded by somebody else
        return ""
    parts = [word.rpartition("=") for word in words]
    short = [
        (flag, sign, os.path.basename(value.rstrip("/")) if os.path.isabs(value) else value)
        for flag, sign, value in parts
    ]
    return shlex.join("".join(part) for part in short)
