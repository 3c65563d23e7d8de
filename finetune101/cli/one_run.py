"""The verbs of one run: train, evaluate, predict, card, lr-find. A signature is its flags; bodies import lazily."""

from __future__ import annotations

import collections
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from finetune101.cli.console import watched
from finetune101.cli.images import end_of_images, say_which
from finetune101.cli.parse import Flag, RecipeFile, arguments
from finetune101.config import Flat, TrainConfig
from finetune101.errors import Refused
from finetune101.host import place

if TYPE_CHECKING:
    from finetune101.deploy.inputs import Inputs
    from finetune101.deploy.onnx_network import OnnxNetwork
    from finetune101.deploy.prediction import Prediction
    from finetune101.evaluation.checkpoint import TrainedNetwork
    from finetune101.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a training does with a run that exists, and where its settings begin."""

    recipe_file: RecipeFile = None
    """Start from a recipe file such as a search's winner.yaml."""
    resume: Flag = False
    """Continue an interrupted run."""
    overwrite: Flag = False
    """Replace an existing run of this name."""


USUAL_TRAINING = TrainingOptions()


def train(config: Annotated[TrainConfig, Flat], options: Annotated[TrainingOptions, Flat] = USUAL_TRAINING) -> int:
    """Train a network and keep everything about it in RUNS/EXP."""
    run = train_watched(config, options)
    if place().rank == 0:
        print(f"Test it: {shlex.join(['finetune101', 'evaluate', str(run.path)])}")
    return 0


def training_settings(argv: Sequence[str], model: str = "") -> TrainConfig:
    """The settings that the flags ``argv`` of ``finetune101 train`` make (of train.py with its ``model``)."""
    positional, named = arguments(train, argv, prog="finetune101 train", model=model)
    config: TrainConfig = named.get("config") or positional[0]
    return config


def train_watched(config: TrainConfig, options: TrainingOptions) -> Run:
    """``api.run_training``; stopped, it says where the run stands, and a bug's traceback is kept in the run."""
    from finetune101.run import Run

    run = Run(Path(config.runs) / config.exp)
    before = _changed(run)
    with watched(run.path, lambda: standing(run, begun=options.resume or _changed(run) not in (None, before))):
        from finetune101 import api

        return api.run_training(config, resume=options.resume, overwrite=options.overwrite)


def _changed(run: Run) -> int | None:
    """When the settings of ``run`` were written, in nanoseconds; None without any."""
    file = run.path / "config.json"
    return file.stat().st_mtime_ns if file.is_file() else None


def standing(run: Run, begun: bool) -> str:
    """Where the training of ``run`` stands, and what goes on with it."""
    if not begun:
        return "nothing of it was begun"
    finished = f"all epochs of {run.path} are done" if run.metrics() else f"no epoch of {run.path} is finished"
    return run.stopped() or f"{finished}; go on with: {run.resume_command()}"


def evaluate(
    run: tyro.conf.Positional[str],
    *,
    subset: Literal["test", "val", "train"] = "test",
    mirror: Flag = False,
    data: str | None = None,
    as_test: Flag = False,
    batch_size: int = 64,
    runs: str = "runs",
) -> int:
    """Score a run's best epoch on its test images; writes test.json and predictions.csv.

    Args:
        run: Folder or name of a run.
        subset: Which images.
        mirror: See each image and its mirror image, and take the mean.
        data: Where the images are, if not where the run found them.
        as_test: Score all images of --data, another folder of labelled images; writes test_NAME.json and
            predictions_NAME.csv.
        batch_size: Images per step.
        runs: Folder of all runs.
    """
    from finetune101 import api
    from finetune101.run import open_run

    opened = open_run(run, runs)
    with watched(opened.path, lambda: "no score was written"):
        if as_test:
            if subset != "test":
                raise Refused(f"--as-test scores all images of --data; leave --subset {subset} out")
            from finetune101.evaluation.other_data import other_text

            other = api.evaluate_on(opened, data, batch_size=batch_size, mirror=mirror)
            print(f"{other}\n{other_text(dict(other.record))}")
            return 0
        evaluation = api.evaluate(opened, subset=subset, data=data, batch_size=batch_size, mirror=mirror)
    print(evaluation)
    if reason := opened.stopped():
        print(f"Not the end of its training: {reason}")
    if evaluation.folder:
        print(f"Every prediction: {evaluation.folder / 'predictions.csv'}")
    return 0


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How predict writes the labels; without any as text."""

    csv: Flag = False
    """Print CSV."""
    json: Flag = False
    """Print JSON."""
    out: str | None = None
    """Write a table into this file instead: .csv, .json or .parquet."""
    overwrite: Flag = False
    """Replace the file of --out."""

    def file(self) -> Path | None:
        """The file to write. Raises Refused for options that contradict each other, and a file that cannot be."""
        from finetune101.deploy.tables import check_table_file

        if (self.csv and self.json) or (self.out and (self.csv or self.json)):
            raise Refused("--csv, --json and --out each choose how the labels are written; give one of them")
        if self.out:
            check_table_file(Path(self.out), self.overwrite)
        return Path(self.out) if self.out else None


@dataclass(frozen=True, kw_only=True)
class SortingOptions:
    """Whether predict sorts the image files, and how."""

    into: str | None = None
    """Copy every image into a folder of its class in this folder; no file is overwritten."""
    link: Flag = False
    """With --into, make links instead of copies."""
    unsure_below: float | None = None
    """With --into, images whose best class has a lower probability go into the folder unsure. Default: 0.5."""

    def check(self) -> None:
        """Raises Refused for options that need --into."""
        if (self.link or self.unsure_below is not None) and not self.into:
            raise Refused("--link and --unsure-below need --into FOLDER, the folder to sort the images into")


AS_TEXT, UNSORTED = TableOptions(), SortingOptions()


def predict(
    inputs: tyro.conf.Positional[tuple[str, ...]],
    *,
    top_k: int = 5,
    table: Annotated[TableOptions, Flat] = AS_TEXT,
    sorting: Annotated[SortingOptions, Flat] = UNSORTED,
    reject: Flag = False,
    batch_size: int = 64,
    runs: str = "runs",
) -> int:
    """Label images with a run's best epoch, or with a network that comes with this package.

    The exit code is 1 when an image could not be read.

    Args:
        inputs: Images, folders or globs, @FILE with a path per line, or - for paths from standard input; before them a
            run (folder or name), a best.safetensors, an exported FILE.onnx, or released_finetune, released_random or
            released_probe. Without: released_finetune.
        top_k: Classes to show for each image.
        reject: Give no label to images unlike the training pictures.
        batch_size: Images per step; an exported network takes 4 at most.
        runs: Folder of all runs.
    """
    from finetune101.deploy import tables
    from finetune101.deploy.choose import choose
    from finetune101.deploy.inputs import image_inputs
    from finetune101.deploy.kept import answering_network
    from finetune101.deploy.predict import predict_files
    from finetune101.deploy.sorting import SortedFolder

    file = table.file()
    sorting.check()
    chosen = choose(inputs, runs)
    say_which(chosen)
    images = image_inputs(chosen.inputs)
    network, folder = answering_network(chosen, len(images.files)), None
    if sorting.into:
        folder = SortedFolder(Path(sorting.into), network.classes, sorting.link, sorting.unsure_below)
        folder.check(images)
    if reject and network.unlike is None:
        raise Refused(
            f"--reject cannot tell which images are unlike the training pictures: {network.unlike_reason}; leave"
            " --reject out, or train with more images"
        )
    _print_notes(network)
    prints_rows = not file and (table.csv or table.json or not folder)
    show_progress = not (prints_rows and sys.stdout.isatty())  # on a terminal the rows themselves show it
    predictions = predict_files(network, images, top_k, batch_size, show_progress)
    if reject:
        predictions = (one.without_label() for one in predictions)
    if folder:
        predictions = folder.add_all(predictions)
    width = min(top_k, len(network.classes))
    if file:
        tables.write_table_file(predictions, file, images, width)
        print(f"{images.readable} images: {file}")
    elif prints_rows:
        _print_rows(predictions, images, width, table)
    else:
        collections.deque(predictions, maxlen=0)  # the images are sorted as they come
    if folder:
        print(folder.summary(), file=sys.stderr if table.csv or table.json else sys.stdout)
    return end_of_images(images)


def _print_rows(predictions: Iterator[Prediction], images: Inputs, width: int, table: TableOptions) -> None:
    """Prints ``predictions`` as they come."""
    from finetune101.deploy import tables

    if table.json:
        tables.write_json(predictions, sys.stdout, images)
    elif table.csv:
        tables.write_csv(predictions, sys.stdout, width)
    else:
        tables.write_text(predictions, sys.stdout)


def _print_notes(network: TrainedNetwork | OnnxNetwork) -> None:
    """Prints to standard error what a user should know of the network that labels the images."""
    from finetune101.evaluation.result import FROZEN

    if network.temperature is None:
        print(f"Probabilities are not calibrated: {network.temperature_reason}", file=sys.stderr)
    if network.unlike is None:
        print(f"Images unlike the training pictures are not marked: {network.unlike_reason}", file=sys.stderr)
    if network.frozen_backbone:
        print(FROZEN, file=sys.stderr)


def card(
    run: tyro.conf.Positional[str],
    *,
    out: str | None = None,
    lang: Literal["en", "zh"] = "en",
    overwrite: Flag = False,
    runs: str = "runs",
) -> int:
    """Write a model card about a run or a released network: data, accuracy, limits, licences and use.

    Its header is the one that the Hugging Face hub reads: there the card is the README.md of the network.

    Args:
        run: Folder or name of a run, or released_finetune, released_random or released_probe.
        out: File to write. Default: card.md in the folder of the run, or here.
        lang: Language of the card.
        overwrite: Replace the file.
        runs: Folder of all runs.
    """
    from finetune101.deploy.card import write_card
    from finetune101.deploy.released_files import RELEASED
    from finetune101.run import open_run

    opened = None if run in RELEASED else open_run(run, runs)
    print(f"Card: {write_card(run, opened, Path(out) if out else None, lang, overwrite)}")
    if opened and not opened.has("test.json"):
        from finetune101.evaluation.tested import evaluate_command

        print(f"It says that the run is not tested; test it: {evaluate_command(opened)}")
    return 0


def lr_find(
    config: Annotated[TrainConfig, Flat],
    *,
    recipe_file: RecipeFile = None,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 100,
    out: str = "lr_find.png",
) -> int:
    """Learning-rate range test: trains a few steps at growing rates, draws the loss, suggests --lr.

    Args:
        recipe_file: Start from a recipe file such as a search's winner.yaml.
        low: First learning rate of the output layer.
        high: Last learning rate of the output layer.
        steps: Steps from --low to --high.
        out: Picture to write.
    """
    from tempfile import TemporaryDirectory

    from finetune101.data.download import ensure_data
    from finetune101.reports.figures import draw_range_test as draw
    from finetune101.training.job import elsewhere, prepare
    from finetune101.training.lr_find import range_test

    ensure_data(config.data)
    with TemporaryDirectory() as runs:  # a job has a run, which nobody needs afterwards
        result = range_test(prepare(elsewhere(config, runs)), low, high, steps)
    print(f"Picture: {draw(result.rates, result.losses, result.suggestion, result.lowest, Path(out))}")
    print(f"--lr {result.suggestion:.2g}: {result.reason}.")
    return 0
