"""What each verb does, without a command line: finetune101's own verbs, the demo, the original's scripts and notebooks.

A user's mistake raises ``Refused``, one sentence that says what to do. Everything prints what a person wants to see.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm import tqdm

from finetune101.config import TrainConfig, change, check_name, validate
from finetune101.data.download import ensure_data
from finetune101.deploy.network import Network, load
from finetune101.deploy.prediction import Image, Prediction
from finetune101.deploy.released import score_released
from finetune101.deploy.released_files import RELEASED
from finetune101.errors import Refused
from finetune101.evaluation.checkpoint import has_frozen_backbone, open_network
from finetune101.evaluation.result import Evaluation
from finetune101.evaluation.unlike_run import keep_unlike
from finetune101.files import typed
from finetune101.machine import leave
from finetune101.recipes import fitted, from_recipe, recipe_line, usual
from finetune101.run import Run, check_folder, create_run, open_run, run_name
from finetune101.training.job import prepare
from finetune101.training.log import log_records
from finetune101.training.loop import fit

if TYPE_CHECKING:
    from finetune101.reports.comparison import Comparison

Subset = Literal["test", "val", "train"]


def train(
    data: str | os.PathLike[str] | None = None,
    *,
    exp: str,
    recipe: str | None = None,
    pretrain: bool | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **settings: Any,
) -> Run:
    """Trains a network on a folder of images and keeps everything about it in RUNS/EXP.

    Args:
        data: a folder with one folder per class; by default Caltech-101 where ``finetune101 data download`` put it.
        exp: name of the run.
        recipe: a named recipe (see ``RECIPES``) or a recipe file; by default what suits the network and the machine.
        pretrain: start from ImageNet weights, or with False from random ones; a recipe file may say so itself.
        resume: go on with a run that was interrupted.
        overwrite: replace a run of this name.
        settings: any setting by the name of its flag, such as ``lr=0.02, epochs=3, model="resnet18", runs="runs"``.

    Returns the run; its ``path`` holds the weights, curves and records. Raises Refused for settings, data or weights
    that cannot work, and for a name that is taken.
    """
    pretrain, resume = typed(bool | None, pretrain, "pretrain is"), typed(bool, resume, "resume is")
    overwrite = typed(bool, overwrite, "overwrite is")
    if resume:
        if recipe is not None or pretrain is not None:
            raise Refused("a run that is resumed keeps its recipe and its start; leave recipe and pretrain out")
        runs = run_name(settings.get("runs", "runs"))
        recorded = open_run(run_name(exp), runs, anywhere=False).config()
        config = dataclasses.replace(recorded, exp=run_name(exp), runs=runs)  # it may have moved or been renamed
    else:
        model, device = str(settings.get("model", "")), str(settings.get("device", "auto"))
        name = usual(model, device, pretrain=pretrain is not False) if recipe is None else run_name(recipe)
        config = from_recipe(name, run_name(exp), pretrain=pretrain)
    changes = settings if data is None else settings | {"data": data}
    return run_training(fitted(change(config, changes), changes), resume=resume, overwrite=overwrite)


def run_training(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Trains ``config``, printing a line per epoch; writes TensorBoard events and curves.png as well.

    At the end the score for images unlike the training images is fitted (see ``evaluation.unlike_run``).
    Under torchrun every process calls it; rank 0 prints and writes. Raises Refused as ``train`` does.
    """
    validate(config)  # before anything is downloaded
    create_run(config, resume=resume, overwrite=overwrite)
    ensure_data(config.data)
    job = prepare(config, resume=resume, overwrite=overwrite)
    if not job.world.writes:
        for _ in fit(job):
            pass
        leave()
        return job.run
    print(f"Recipe {recipe_line(config.recipe)}; --recipe NAME takes another (see finetune101 recipes)")
    for line in job.notes:
        print(line)
    images = ", ".join(f"{len(paths)} {name}" for name, paths in job.manifest.subsets.items())
    print(f"{config.model.name} from {job.built.init_source}, {len(job.manifest.classes)} classes, images: {images}")
    layout = ", channels_last" if job.world.channels_last else ""
    print(f"{job.world.device}, {job.world.precision}{layout} -> {job.run.path}")
    for record in log_records(job.run, fit(job)):
        tqdm.write(epoch_line(record, config.optim.epochs), file=sys.stdout)
    _draw_curves(job.run)
    leave()
    if unlike := keep_unlike(job.run, open_network(job.run), job.manifest, lambda: job.images):
        print(f"Unlike the training pictures: a score above {unlike.threshold:.3f} ({unlike.images} validation images)")
    return job.run


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in a line of text."""
    val = "" if record["val_top1"] is None else f"   val {record['val_loss']:.4f} {record['val_top1']:6.2f} %"
    star = " *" if record["best"] and val else ""
    return (
        f"epoch {record['epoch']:3d}/{epochs}   train {record['train_loss']:.4f} {record['train_top1']:6.2f} %{val}"
        f"   {record['images_per_s']:.0f} img/s{star}"
    )


def _draw_curves(run: Run) -> None:
    """Draws the curves of ``run`` and says which epoch is the best."""
    from finetune101.reports.figures import draw_curves

    records = run.metrics()
    draw_curves(records, run.path / "curves.png", run.name)
    best = [record for record in records if record["best"]][-1]
    score = f", validation top-1 {best['val_top1']:.2f} %" if best["val_top1"] is not None else ""
    linear = has_frozen_backbone(run.config(), best["epoch"])
    start = ", a frozen backbone: only the linear output layer was trained" if linear else ""
    print(f"Best epoch {best['epoch']}{start}{score}. Curves: {run.path / 'curves.png'}")


def evaluate(
    run: Run | str | Path,
    *,
    subset: Subset = "test",
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    mirror: bool = False,
    runs: str = "runs",
) -> Evaluation:
    """Scores a run's best epoch on a subset of its own split.

    Args:
        run: the run, its folder or its name below ``runs``.
        subset: "test" (written to test.json and predictions.csv of the run), "val" or "train". Where the split has no
            test images, the validation images are scored, and a line says so.
        data: where the images are, if not where the run found them.
        batch_size: images per forward pass.
        mirror: see each image and its mirror image, and take the mean.

    Raises Refused when the images are not those of the split, before anything is written.
    """
    from finetune101.evaluation.evaluate import evaluate as score

    check_subset(subset)
    mirror = typed(bool, mirror, "mirror is")
    if isinstance(run, str) and run in RELEASED:
        if subset != "test":
            raise Refused(f"{run} is scored on its test images only; leave subset {subset} out")
        return Evaluation.of(score_released(run, _text(data), batch_size))
    opened = _opened(run, runs)
    held = opened.read_json("split.json")["subsets"]
    if subset == "test" and not held["test"] and held["val"]:
        subset = "val"
        note = "The split has no test images: the validation images are scored, which chose the epoch."
        print(note, file=sys.stderr)
    record = score(
        opened, subset=subset, data=_text(data), batch_size=batch_size, mirror=mirror, with_unlike=subset == "test"
    )
    return Evaluation.of(record, subset, opened.path if subset == "test" else None)


def evaluate_on(
    run: Run | str | Path,
    data: str | os.PathLike[str] | None,
    *,
    batch_size: int = 64,
    mirror: bool = False,
    runs: str = "runs",
) -> Evaluation:
    """Scores a run's best epoch on all images of ``data``, another folder of labelled images.

    Writes test_NAME.json and predictions_NAME.csv into the run. Raises Refused when no image has a class of the run.
    """
    from finetune101.evaluation.other_data import evaluate_other

    opened, mirror = _opened(run, runs), typed(bool, mirror, "mirror is")
    record = evaluate_other(opened, _text(data), batch_size=batch_size, mirror=mirror)
    return Evaluation.of(record, "test", opened.path)


def predict(
    run: Run | str | Path | Network, images: Image | Sequence[Image], top_k: int = 5, runs: str = "runs"
) -> Prediction | list[Prediction]:
    """Labels an image, or each of a list, with a run or a released network; see ``Network.predict``."""
    return load(run, runs).predict(images, top_k)


def ensemble(
    members: Sequence[Run | str | Path],
    out: str | os.PathLike[str] = "ensemble",
    *,
    subset: Subset = "val",
    data: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
    mirror: bool = False,
    runs: str = "runs",
) -> Evaluation:
    """Scores the mean probabilities of several runs of one split; writes test.json and predictions.csv into ``out``."""
    from finetune101.evaluation.ensemble import ensemble as score

    check_subset(subset)
    mirror = typed(bool, mirror, "mirror is")
    opened = [_opened(run, runs) for run in members]
    record = score(opened, Path(out), subset=subset, data=_text(data), batch_size=batch_size, mirror=mirror)
    return Evaluation.of(record, subset, Path(out) if subset == "test" else None)


def auto(
    data: str | os.PathLike[str] | None = None,
    *,
    exp: str = "auto",
    budget: str = "30m",
    models: Sequence[str] = (),
    seed: int = 0,
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto",
    runs: str = "runs",
    lang: Literal["en", "zh"] = "en",
) -> Run:
    """Makes the best network for a folder of images that fits into a time, and decides everything itself.

    It looks at the images, splits them, probes the installed networks, searches the settings of fine-tuning, tests the
    winner once and writes a page that says what was decided and why. Interrupted, the best network so far is the run
    ``exp``, and the same call goes on.

    Args:
        data: a folder with one folder per class; by default Caltech-101 where ``finetune101 data download`` put it.
        exp: name of the run. The probes and the search are in the folder of that name with _search.
        budget: the whole work ends within this time, such as "90s", "30m" or "2h".
        models: networks to choose from; by default all whose ImageNet weights are installed.
        seed: fixes everything random.
        device: where to train.
        runs: folder of all runs.
        lang: language of the page.

    Returns the run; its ``path`` holds the weights, auto.json with the decisions, and the page report/report.html.
    Raises Refused for data, names or a budget that cannot work.
    """
    from finetune101.experiments.auto import Auto, AutoSettings
    from finetune101.experiments.runner import LocalWorkers
    from finetune101.experiments.search_plan import seconds
    from finetune101.reports.figures import draw_curves
    from finetune101.reports.page import decision_text

    config = change(TrainConfig(exp=run_name(exp)), {"data": data, "seed": seed, "device": device, "runs": runs})
    check_name(config.exp)
    settings = AutoSettings(
        exp=config.exp, data=config.data, budget=seconds(typed(str, budget, "budget is")), runs=config.runs,
        models=tuple(models), system=config.system,
    )  # fmt: skip
    work = Auto(settings, lambda decision: print(decision_text(decision.to_json()), flush=True))
    page = work.run.path / "report" / "report.html"
    with work.alone():
        if work.is_done():
            print(f"{work.run.path} is there and tested; its page: {page}")
            return work.run
        run = work.tested() or work.find(LocalWorkers, draw_curves)
        work.stage(5)
        if not run.has("test.json"):  # of a command that was interrupted afterwards: the images are used once
            evaluate(run)
        tested = run.read_json("test.json")
        work.decide("test", f"{tested['top1']:.2f} %", "test_once", n=tested["n"])
        work.stage(6)
        work.save()
        report(run, run.path / "report", lang=lang, explain=False)  # its pass of all training images is not planned
        work.save(is_done=True)
    print(f"Page: {page}\nLabel a photo: {shlex.join(['finetune101', 'predict', str(run.path)])} PHOTO")
    return run


def compare(*groups: Run | str | Path, out: str | os.PathLike[str] | None = None, runs: str = "runs") -> Comparison:
    """Compares two tested runs, or two groups of runs that differ in seed and split, on the same test images.

    Args:
        groups: runs (objects, folders or names), folders that hold runs, globs; with more than two, the comparison of
            the first two is returned.
        out: folder for comparison.json and comparison.png; None writes nothing.

    Returns the paired difference in percentage points (first minus second) with its interval. Raises Refused when a
    run is not tested, or the runs have different test images.
    """
    from finetune101.many_runs import run_comparison
    from finetune101.reports.groups import open_group

    if out is not None:
        check_folder(Path(out))
    named = [open_group(one.path.as_posix() if isinstance(one, Run) else run_name(one), runs) for one in groups]
    return run_comparison(named, None if out is None else Path(out))


def report(
    target: Run | str | os.PathLike[str],
    out: str | os.PathLike[str] = "report",
    *,
    style: Literal["full", "assignment"] = "full",
    lang: Literal["en", "zh"] = "en",
    gallery: bool = True,
    explain: bool = True,
    data: str | os.PathLike[str] | None = None,
    search: str | os.PathLike[str] | None = None,
    runs: str = "runs",
) -> Path:
    """Makes one self-contained page about a tested run, a comparison, a study or a search; returns its file.

    Args:
        target: a run, or the folder that compare, study or search wrote.
        out: folder for report.html, report.md and the pictures.
        style: assignment is a shorter page for a printer, assignment.html, with what a lab report has to say.
        lang: language of the page.
        gallery: show example images, which must be there.
        explain: show beside confident mistakes where the network looked, and the nearest training images.
        data: where the images are, if not where the run found them.
        search: of an assignment, the folder (or name) of a search whose result it tells as well.

    Raises Refused for a folder that holds none of these, and for a style that its page does not have.
    """
    gallery, explain = typed(bool, gallery, "gallery is"), typed(bool, explain, "explain is")
    name = str(target.path.resolve()) if isinstance(target, Run) else run_name(target)
    if style not in ("full", "assignment"):
        raise Refused(f"--style is {style}; give full or assignment")
    if search is not None and style != "assignment":
        raise Refused("--search is a part of an assignment; add --style assignment")
    if folder := _search_folder(name, runs):
        from finetune101.reports.search_page import write_search_report

        if style != "full":
            raise Refused(f"{folder} is a search: give the run or comparison as target, and --search {folder}")
        return write_search_report(folder, out=Path(out), lang=lang)
    options: dict[str, Any] = {"runs": runs, "lang": lang, "gallery": gallery, "data": _text(data)}
    if style == "assignment":
        from finetune101.reports.assignment import write_assignment

        place = None if search is None else _search_folder(str(search), runs) or Path(search)
        return write_assignment(name, Path(out), search=place, **options)
    from finetune101.reports.pages import write_report

    return write_report(name, Path(out), explain=explain, **options)


def _search_folder(name: str, runs: str) -> Path | None:
    """The folder of the search ``name``, if there is one."""
    return next((place for place in (Path(name), Path(runs) / name) if (place / "search.json").is_file()), None)


def check_subset(subset: str) -> None:
    """Raises Refused for a name that is no subset of a split."""
    if subset not in get_args(Subset):
        raise Refused(f"subset is {subset!r}; give {' or '.join(get_args(Subset))}")


def _opened(run: Run | str | Path, runs: str) -> Run:
    return run if isinstance(run, Run) else open_run(run_name(run), runs)


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else run_name(path)
