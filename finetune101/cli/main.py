"""The command line: {verb: function}; bodies import lazily, so that --help does not load torch."""

from __future__ import annotations

import dataclasses
import difflib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune101.cli.console import expanded, guarded, watched
from finetune101.cli.parse import (
    DemoArguments,
    DownloadArguments,
    EvaluateArguments,
    PredictArguments,
    SearchArguments,
    SearchReportArguments,
    ShowArguments,
    VerifyArguments,
    parse,
    parse_train,
)
from finetune101.config import TrainConfig, validate
from finetune101.errors import Refused, escaped
from finetune101.host import place, usable_cores
from finetune101.redaction import has_password

if TYPE_CHECKING:
    from finetune101.run import Run


def train(argv: Sequence[str]) -> int:
    """``finetune101 train``."""
    arguments = parse_train(argv, prog="finetune101 train")
    run = run_training(arguments.config, resume=arguments.resume, overwrite=arguments.overwrite)
    print(f"Test it: {shlex.join(['finetune101', 'evaluate', str(run.path)])}")
    return 0


def run_training(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Run:
    """Trains ``config``, printing a line per epoch; writes TensorBoard events and curves.png as well."""
    from tqdm import tqdm

    from finetune101.machine import leave
    from finetune101.run import create_run, is_run
    from finetune101.training.job import prepare
    from finetune101.training.log import log
    from finetune101.training.loop import fit

    validate(config)  # before anything is downloaded
    run = create_run(config, resume=resume, overwrite=overwrite)
    job, new = None, not is_run(run.path)
    with watched(run.path, lambda: standing(run, begun=bool(job) or resume or (new and is_run(run.path)))):
        ensure_data(config)
        job = prepare(config, resume=resume, overwrite=overwrite)
        if not job.world.writes:  # one of torchrun's processes: it computes, and says nothing
            for _ in fit(job):
                pass
            leave()
            raise SystemExit(0)
        print(f"Recipe {recipe_line(config.recipe)}; --recipe NAME takes another (see finetune101 recipes)")
        for line in job.notes:
            print(line)
        images = {name: len(paths) for name, paths in job.manifest.subsets.items()}
        print(f"{config.model.name} from {job.built.init_source}, {len(job.manifest.classes)} classes, {images}")
        layout = ", channels_last" if job.world.channels_last else ""
        print(f"{job.world.device}, {job.world.precision}{layout} -> {job.run.path}")
        for record in log(job.run, fit(job)):
            tqdm.write(epoch_line(record, config.optim.epochs), file=sys.stdout)
        finish(job.run)
        leave()
    return job.run


def standing(run: Run, begun: bool) -> str:
    """Where the training of ``run`` stands, and what goes on with it."""
    if not begun:
        return "nothing of it was begun"
    finished = f"all epochs of {run.path} are done" if run.metrics() else f"no epoch of {run.path} is finished"
    return run.stopped() or f"{finished}; go on with: {run.resume_command()}"


def recipe_line(name: str | None) -> str:
    """A recipe's name, and what it is made for where the machine decides."""
    suits = {"scratch_fast": "for a CPU; scratch_long is for a GPU", "scratch_long": "for a GPU"}
    return f"{name} ({suits[name]})" if name in suits else f"{name}"


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch in a line of text."""
    val = "" if record["val_top1"] is None else f"   val {record['val_loss']:.4f} {record['val_top1']:6.2f} %"
    star = " *" if record["best"] and val else ""
    return (
        f"epoch {record['epoch']:3d}/{epochs}   train {record['train_loss']:.4f} {record['train_top1']:6.2f} %{val}"
        f"   {record['images_per_s']:.0f} img/s{star}"
    )


def finish(run: Run) -> None:
    """Draws the curves of ``run`` and says where everything is."""
    from finetune101.report.figures import curves

    records = run.metrics()
    curves(records, run.path / "curves.png", run.name)
    best = [record for record in records if record["best"]][-1]
    score = f", validation top-1 {best['val_top1']:.2f} %" if best["val_top1"] is not None else ""
    start = ", a frozen backbone: the linear output layer that training started from" if best["epoch"] == 0 else ""
    print(f"Best epoch {best['epoch']}{start}{score}. Curves: {run.path / 'curves.png'}")


def ensure_data(config: TrainConfig) -> None:
    """Downloads Caltech-101 when no data set is there and the user agrees (or gave --download)."""
    from finetune101.data.download import download
    from finetune101.data.images import find_data

    try:
        find_data(config.data.root)
    except Refused:
        if config.data.root is not None or os.environ.get("FINETUNE101_DATA"):
            raise  # a place was named: another one would not be looked at
        agreed = config.data.download
        if not agreed and sys.stdin is not None and sys.stdin.isatty():
            agreed = input("No data set found. Download Caltech-101 (137 MB) to data/? [y/N] ").lower().strip() == "y"
        if not agreed:
            raise
        download(Path("data"))


def evaluate(argv: Sequence[str]) -> int:
    """``finetune101 evaluate``."""
    a = parse(EvaluateArguments, argv, prog="finetune101 evaluate")
    from finetune101.evaluation.evaluate import evaluate as score
    from finetune101.run import open_run

    run = open_run(a.run, a.runs)
    with watched(run.path, lambda: "no score was written"):
        if a.as_test:
            if a.subset != "test":
                raise Refused(f"--as-test scores all images of --data; leave --subset {a.subset} out")
            from finetune101.evaluation.other_data import evaluate_other, other_text

            other = evaluate_other(run, a.data, batch_size=a.batch_size, mirror=a.mirror)
            print(f"{score_text(other)}\n{other_text(other)}")
            return 0
        subset, held = a.subset, run.read_json("split.json")["subsets"]
        if subset == "test" and not held["test"] and held["val"]:
            subset = "val"
            note = "The split has no test images: the validation images are scored, which chose the epoch."
            print(note, file=sys.stderr)
        result = score(run, subset=subset, data=a.data, batch_size=a.batch_size, mirror=a.mirror)
    print(score_text(result, subset))
    if told := run.stopped():
        print(f"Not the end of its training: {told}")
    if subset == "test":
        print(f"Every prediction: {run.path / 'predictions.csv'}")
    return 0


def score_text(result: dict[str, Any], subset: str = "test") -> str:
    """The numbers of one evaluation as a person reads them."""
    low, high = result["top1_interval"]
    alone = result.get("without_duplicates", {"n": result["n"]})
    twins, without = result["n"] - alone["n"], ""
    if twins and alone["n"]:
        without = f"\nWithout the {twins} that have a near-duplicate in training: {alone['top1']:.2f} %"
    return (
        f"{subset.capitalize()} loss: {result['loss']:.4f}\n"
        f"{subset.capitalize()} accuracy: {result['top1']:.2f} % ({result['correct']}/{result['n']}, "
        f"95 % interval {low:.2f} to {high:.2f} %)\n"
        f"Top-5 accuracy: {result['top5']:.2f} %\n"
        f"Mean per-class accuracy: {result['mean_per_class']:.2f} %{without}{_confidence_text(result)}"
    )


def _confidence_text(result: dict[str, Any]) -> str:
    """What an evaluation says of its confidences and of a frozen backbone; each on a line of its own."""
    lines = []
    if reason := result.get("temperature_reason"):
        lines.append(f"Confidence is not calibrated (temperature 1): {reason}")
    elif "calibration_scaled" in result:
        before, after, t = result["calibration"]["ece"], result["calibration_scaled"]["ece"], result["temperature"]
        lines.append(
            f"Confidence is calibrated: temperature {t:.2f}, calibration error {after:.3f} ({before:.3f} without)"
        )
    if result.get("frozen_backbone"):
        lines.append("Frozen backbone: only the output layer of this network was trained")
    return "".join(f"\n{line}" for line in lines)


def predict(argv: Sequence[str]) -> int:
    """``finetune101 predict``; 1 when an image could not be read."""
    arguments = parse(PredictArguments, argv, prog="finetune101 predict")
    from finetune101.deploy import predict as deploy
    from finetune101.deploy.released import choose

    if arguments.csv and arguments.json:
        raise Refused("--csv and --json cannot both be printed; leave one of them out")
    chosen = choose(arguments.inputs, arguments.runs)
    if not chosen.named:
        print(f"No run was named: {chosen.network.name} answers (Caltech-101's classes)", file=sys.stderr)
    if chosen.network.temperature is None:
        print(f"Probabilities are not calibrated: {chosen.network.temperature_reason}", file=sys.stderr)
    rows, failed = deploy.predict(chosen.network, chosen.inputs, top_k=arguments.top_k, batch_size=arguments.batch_size)
    if arguments.json:
        print(deploy.as_json(rows, failed))
    else:
        print(deploy.as_csv(rows) if arguments.csv else deploy.as_text(rows))
    for path, reason in failed:
        print(escaped(f"failed: {path}: {reason}"), file=sys.stderr)
    return 1 if failed else 0


def search(argv: Sequence[str]) -> int:
    """``finetune101 search`` and ``finetune101 search report``."""
    if list(argv[:1]) == ["report"]:
        return search_report(argv[1:])
    arguments = parse_train(argv, prog="finetune101 search", kind=SearchArguments)
    folder = Path(arguments.config.runs) / arguments.config.exp
    return run_search(arguments, folder / f"gridsearch_results_{folder.name}.json", folder)


def run_search(arguments: Any, table: Path, plots: Path, usual: dict[str, Any] | None = None) -> int:
    """Searches; ``usual`` is the space without --grid and --space. Nothing is imported before the flags are checked.

    1 where a point failed by a fault of the program or the machine.
    """
    from finetune101.experiments import space as spaces

    config: TrainConfig = arguments.config
    if arguments.stage == "probe":
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, head="random", freeze=True, cached_features=True)
        )
    given = arguments.grid or arguments.space or not usual
    space = spaces.parse(arguments.grid, arguments.space) if given else spaces.make(usual or {})
    validate(config)
    spaces.check(config, space)  # before anything is downloaded

    from finetune101.experiments import search as searching
    from finetune101.experiments.processes import check_kind
    from finetune101.experiments.queue import Plan, check
    from finetune101.report.figures import curves

    timeout = None if arguments.timeout is None else searching.seconds(arguments.timeout)
    plan = Plan(
        base=config,
        space=space,
        sampler=arguments.sampler,
        pruner=arguments.pruner,
        trials=arguments.trials,
        timeout=timeout,
        jobs=arguments.jobs,
        storage=arguments.storage,
    )
    check(plan)
    check_kind(plan.folder, "search")
    if plan.storage and has_password(plan.storage):
        print("note: others can read a password in a command; PGPASSWORD keeps it out", file=sys.stderr)
    ensure_data(config)
    if arguments.dry_run:
        print(searching.dry_run(plan))
        return 0
    plots /= "training_plots_finetune" if config.model.pretrain else "training_plots_random"
    with watched(plan.folder, lambda: "the same command goes on from the last epochs"):
        return searching.run_search(plan, table, plots, curves, arguments.finalists, arguments.seeds)


def search_report(argv: Sequence[str]) -> int:
    """``finetune101 search report``."""
    arguments = parse(SearchReportArguments, argv, prog="finetune101 search report")
    from finetune101.report.search_page import report

    print(f"Page: {report(Path(arguments.folder), [tuple(pair.split(',')) for pair in arguments.pair])}")
    return 0


def data_download(argv: Sequence[str]) -> int:
    """``finetune101 data download``."""
    arguments = parse(DownloadArguments, argv, prog="finetune101 data download")
    from finetune101.data.download import download

    print(f"Caltech-101 is in {download(Path(arguments.target))}")
    return 0


def data_verify(argv: Sequence[str]) -> int:
    """``finetune101 data verify``; 1 when an image cannot be read."""
    arguments = parse(VerifyArguments, argv, prog="finetune101 data verify")
    from finetune101.data import verify
    from finetune101.data.images import find_data

    report = verify.verify(find_data(arguments.data))
    print(report.text())
    return 1 if report.bad else 0


def data_show(argv: Sequence[str]) -> int:
    """``finetune101 data show``."""
    arguments = parse(ShowArguments, argv, prog="finetune101 data show")
    from finetune101.data import sheet as show
    from finetune101.data.images import find_data

    root = find_data(arguments.data)
    sheet = show.contact_sheet(root, Path(arguments.out), arguments.augment, arguments.per_class)
    print(f"Picture: {sheet}")
    return 0


def demo(argv: Sequence[str]) -> int:
    """``finetune101 demo``."""
    arguments = parse(DemoArguments, argv, prog="finetune101 demo")
    from finetune101.demo.job import run_demo

    run_demo(Path(arguments.out), arguments.epochs)
    return 0


Verb = Callable[[Sequence[str]], int]


def _later(name: str) -> Verb:
    """The function ``name`` of ``verbs``, which is imported when the verb is called."""

    def verb(argv: Sequence[str]) -> int:
        from finetune101.cli import verbs

        return int(getattr(verbs, name)(argv))

    return verb


DATA_VERBS: dict[str, Verb] = {"download": data_download, "verify": data_verify, "show": data_show}
VERBS: dict[str, Verb] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "ensemble": _later("ensemble"),
    "compare": _later("compare"),
    "report": _later("report"),
    "study": _later("study"),
    "search": search,
    "lr-find": _later("lr_find"),
    "recipes": _later("recipes"),
    "benchmark": _later("benchmark"),
    "cache": _later("cache"),
    "demo": demo,
}
ABOUT = """usage: finetune101 VERB ...  (finetune101 VERB --help for its flags)

  data download|verify|show   get Caltech-101, check every image, draw a contact sheet
  train      fine-tune a pretrained network, or train from random initialisation (--no-pretrain)
  evaluate   score a run on its test images
  predict    label images with a run
  ensemble   score the mean probabilities of several runs
  compare    tested runs or groups of runs: paired difference with interval, tests, cost, curves
  report     one page about a run, a comparison or a study
  study      seeds x splits x arms x networks x training sizes, trained, tested and summed up
  search     hyper-parameters: grid, random or TPE, with pruning; search report DIR explains it
  lr-find    a learning-rate range test: the loss at growing rates, and a suggestion
  recipes    the named recipes of train
  benchmark  how fast this machine trains
  cache      list or clear the folder of decoded images and features
  demo       all of it on a small drawn data set"""


def dispatch(argv: Sequence[str]) -> int:
    """Runs the verb that ``argv`` starts with. Raises Refused for an unknown one."""
    verbs, words, name = VERBS, expanded(argv), "verb"
    if words[:1] == ["data"]:
        verbs, words, name = DATA_VERBS, words[1:], "data verb"
    if not words or words[0] in ("-h", "--help"):
        print(ABOUT)
        return 0
    if words[0] not in verbs:
        near = difflib.get_close_matches(words[0], verbs, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(verbs)}"
        raise Refused(f"unknown {name} {words[0]!r}; {hint}")
    if place().size > 1 and words[0] != "train":
        raise Refused(f"only train runs in several processes; start {words[0]} without torchrun")
    return verbs[words[0]](words[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``finetune101`` and ``python -m finetune101``; returns the exit code."""
    if argv is None:  # before torch is loaded, which takes the cores of the machine
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    return guarded(lambda: dispatch(sys.argv[1:] if argv is None else argv))
