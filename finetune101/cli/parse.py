"""What each verb takes, and how its command line is read; bodies import lazily, so that --help does not load torch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
from tyro._errors import BadValue, InstantiationFailure, InvalidChoice, MissingArgs, UnrecognizedArgs, on_parse_error

from finetune101.config import (
    SHEET_AUGMENT,
    SHEET_PER_CLASS,
    AugmentConfig,
    Flat,
    StudyConfig,
    TrainConfig,
    check_name,
    read_recipe,
)
from finetune101.errors import Refused, shortened

Settings = Annotated[
    str | None, tyro.conf.arg(name="config", help="Start from a recipe file such as a search's winner.yaml.")
]


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Train a network and keep everything about it in RUNS/EXP."""

    config: Annotated[TrainConfig, Flat]
    settings: Settings = None
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Continue an interrupted run."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace an existing run of this name."""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Score a run's best epoch on its test images; writes test.json and predictions.csv."""

    run: tyro.conf.Positional[str]
    """Folder or name of a run."""
    subset: Literal["test", "val", "train"] = "test"
    """Which images."""
    mirror: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """See each image and its mirror image, and take the mean."""
    data: str | None = None
    """Where the images are, if not where the run found them."""
    as_test: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Score all images of --data, another folder of labelled images; writes test_NAME.json and predictions_NAME.csv."""
    batch_size: int = 64
    """Images per step."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """Label images with a run's best epoch, or with a network that comes with this package."""

    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Images, folders or globs; before them a run (folder or name), a best.safetensors, or released_finetune,
    released_random or released_probe. Without: released_finetune."""
    top_k: int = 5
    """Classes to show for each image."""
    csv: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print CSV."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""
    batch_size: int = 64
    """Images per step."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class SearchArguments:
    """Search hyper-parameters; stopped, the same command goes on. `search report DIR` explains what it saw."""

    config: Annotated[TrainConfig, Flat]
    settings: Settings = None
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME=VALUE,VALUE,... to try, or a range NAME=LOW..HIGH or NAME=LOW..HIGH:log for random and tpe. Repeat it."""
    space: str | None = None
    """YAML or TOML file: a list or a range for each name. Default without --grid: the original's 72 combinations."""
    stage: Literal["all", "probe"] = "all"
    """probe: search for the output layer alone, on frozen features computed once; a trial takes seconds."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    """Which points: all combinations, random ones, or what the scores so far suggest."""
    pruner: Literal["none", "median", "asha"] = "none"
    """Stop bad trials early: below the median, or outside of the best third at epochs 1, 3, 9, ..."""
    trials: int | None = None
    """How many points. Default: the whole grid."""
    timeout: str | None = None
    """Stop after this time, such as 30m or 2h."""
    jobs: int = 1
    """Worker processes."""
    storage: str | None = None
    """Database URL; the same command on several machines (with one --runs folder) shares the work. The password is
    read from PGPASSWORD or ~/.pgpass: what stands in a command can be read by others."""
    finalists: int = 0
    """Train this many of the best again with several seeds; the best mean wins."""
    seeds: int = 3
    """Seeds of each finalist."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say how many trials there are and about how long they take, then stop."""


@dataclass(frozen=True, kw_only=True)
class SearchReportArguments:
    """Explain a search: one HTML page and pictures in DIR/report."""

    folder: tyro.conf.Positional[str]
    """Folder of the search: RUNS/EXP."""
    pair: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NAME,NAME: a heat map of these two. Repeat it. Default: learning rate and batch size."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Compare tested runs, or groups of runs that differ in seed and split, on the same test images."""

    groups: tyro.conf.Positional[tuple[str, ...]]
    """Two or more: runs (folder or name), folders that hold runs, quoted globs; or one study."""
    out: str = "comparison"
    """Folder for comparison.json and comparison.png."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Make one self-contained page about a tested run, a comparison, a study or a search."""

    target: tyro.conf.Positional[str]
    """A run (folder or name), or the folder that compare, study or search wrote."""
    out: str = "report"
    """Folder for report.html, report.md and the pictures."""
    lang: Literal["en", "zh"] = "en"
    """Language of the page."""
    gallery: bool = True
    """Show example images; --no-gallery leaves them out, so that the images need not be there."""
    data: str | None = None
    """Where the images are, if not where the run found them."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class StudyArguments:
    """What was pretraining worth? Trains and tests every arm, network, size, split and seed that is not done yet."""

    study: Annotated[StudyConfig, Flat]
    jobs: int = 1
    """Runs at a time. The same command on other machines that share the folder takes runs as well."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only say how many runs there are to do, and how long they take."""


@dataclass(frozen=True, kw_only=True)
class LrFindArguments:
    """Learning-rate range test: trains a few steps at growing rates, draws the loss, suggests --lr."""

    config: Annotated[TrainConfig, Flat]
    settings: Settings = None
    low: float = 1e-5
    """First learning rate of the output layer."""
    high: float = 10.0
    """Last learning rate of the output layer."""
    steps: int = 100
    """Steps from --low to --high."""
    out: str = "lr_find.png"
    """Picture to write."""


@dataclass(frozen=True, kw_only=True)
class EnsembleArguments:
    """Score the mean probabilities of several runs of one split."""

    members: tyro.conf.Positional[tuple[str, ...]]
    """Two or more runs (folder or name)."""
    subset: Literal["test", "val", "train"] = "val"
    """Which images: val chooses the members, test is for the end."""
    out: str = "ensemble"
    """Folder for test.json and predictions.csv."""
    mirror: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """See each image and its mirror image, and take the mean."""
    data: str | None = None
    """Where the images are, if not where the runs found them."""
    batch_size: int = 64
    """Images per step."""
    runs: str = "runs"
    """Folder of all runs."""


@dataclass(frozen=True, kw_only=True)
class DownloadArguments:
    """Download, verify and unpack Caltech-101."""

    target: str = "data"
    """Folder that will hold 101_ObjectCategories."""


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Read every image and report what is wrong, duplicated or unusual; changes nothing."""

    data: str | None = None
    """Folder with one folder per class (or its parent)."""


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """Draw a contact sheet: a few images per class, and what augmentation makes of some."""

    data: str | None = None
    """Folder with one folder per class (or its parent)."""
    out: str = "contact_sheet.jpg"
    """Picture to write."""
    per_class: int = SHEET_PER_CLASS
    """Images of each class."""
    augment: Annotated[AugmentConfig, Flat] = field(default=SHEET_AUGMENT)


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """The whole job on a drawn data set in a few minutes: verify, train both arms, test, compare, predict."""

    out: str = "demo"
    """Folder for everything that the demo writes."""
    epochs: Annotated[int, tyro.conf.Suppress] = field(default=8)


@dataclass(frozen=True, kw_only=True)
class RecipesArguments:
    """The named recipes: their commands and what to expect of them."""


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    """List or empty the folder of caches: decoded images, features of networks, thumbnails, compiled kernels."""

    action: tyro.conf.Positional[Literal["list", "clear"]] = "list"
    """list: each file with its size, age and content. clear: remove them; what is needed again is made anew."""
    older_than: float = 0.0
    """Clear only what was not used for so many days."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments:
    """Images/s of the bare training step, of the data alone and of both, on this machine."""

    models: tuple[str, ...] = ("resnet18", "efficientnet_lite0")
    """Networks to measure."""
    data: str | None = None
    """Folder with one folder per class (or its parent). Without any, images are drawn."""
    size: int | None = None
    """Height and width of the input in pixels. Default: the network's own."""
    batch_size: int = 64
    """Images per step."""
    steps: int = 10
    """Steps of one measurement."""
    repeats: int = 5
    """Measurements; the median counts."""
    every: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Measure fp32 and bf16, contiguous and channels_last, not only what the machine would choose."""
    out: str = "benchmark.json"
    """File for the numbers."""


class _Unparsed(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise Refused(message)


def parse(kind: Any, argv: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """``argv`` as a ``kind``; raises Refused naming the nearest flag for one that does not exist."""
    extra = {"default": default} if default is not None else {}
    flags = [name.replace("_", "-") for name in [*_flags(kind), "--help"]]
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            near = difflib.get_close_matches(flag, flags, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
            raise Refused(f"unknown argument {word}; {hint}")

    def refuse(event: Any) -> None:
        raise Refused(f"{_sentence(event)}; see {prog} --help")

    said = io.StringIO()  # neither a terminal nor UTF-8: tyro draws no colours, and frames that every console has
    try:
        with contextlib.redirect_stdout(said), on_parse_error(refuse):
            value, unknown = tyro.cli(kind, args=list(argv), prog=prog, return_unknown_args=True, **extra)
    finally:
        print(said.getvalue(), end="")
    if unknown:
        raise Refused(f"unknown argument {unknown[0]}; see {prog} --help")
    return value


def _sentence(event: Any) -> str:
    """What is wrong with a command line, of which tyro's parser made ``event``."""
    if isinstance(event, MissingArgs):
        return f"missing: {', '.join(_flag(one.arg) for one in event.missing_arguments)}"
    if isinstance(event, InvalidChoice):
        return f"{_flag(event.argument)} cannot be {shortened(repr(event.value))}; give {' or '.join(event.choices)}"
    if isinstance(event, BadValue):
        got = "" if event.offending_value is None else f", not {shortened(repr(event.offending_value))}"
        return f"{_flag(event.argument)} needs {'no' if got else 'a'} value{got}"
    if isinstance(event, InstantiationFailure):
        if words := re.fullmatch(r"Could not find valid parse for arguments: \[(.*)\]\.?", event.message.strip()):
            return f"{_flag(event.argument)} cannot be {shortened(words[1])}"
        told = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", event.message)
        told = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", told).strip().rstrip(".")
        return f"{_flag(event.argument)}: {shortened(told)}" if event.argument else shortened(told)
    if isinstance(event, UnrecognizedArgs):
        return f"unknown argument {event.tokens[0]}"
    return "the command line cannot be read"


def _flag(argument: Any) -> str:
    """How the user writes an argument."""
    return str(argument.field.intern_name) if argument.is_positional() else str(argument.lowered.name_or_flags[-1])


def _flags(kind: Any) -> list[str]:
    """Every flag of a dataclass, nested ones included, as the user types it."""
    from typing import get_type_hints

    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = hint.__origin__ if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(inner):
            names += _flags(inner)
        else:
            renamed = [m.name for m in getattr(hint, "__metadata__", ()) if getattr(m, "name", None)]
            name = renamed[0] if renamed else name
            names += [f"--{name}", *([f"--no-{name}"] if inner is bool else [])]
    return names


def parse_train(argv: Sequence[str], *, prog: str, model: str | None = None, kind: Any = TrainArguments) -> Any:
    """Arguments of ``train`` and ``search``; defaults: --recipe, --config, or with --resume the run itself."""
    from finetune101.recipes import named, usual_finetune, usual_scratch
    from finetune101.run import open_run

    first = _Unparsed(add_help=False, allow_abbrev=False)
    for name in ("--recipe", "--config", "--model", "--device"):
        first.add_argument(name, default=None)
    first.add_argument("--no-pretrain", "--no_pretrain", action="store_true")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--exp", default="")
    first.add_argument("--runs", default="runs")
    told, _ = first.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    if told.resume and told.exp:
        check_name(told.exp)
        recorded = open_run(told.exp, told.runs, anywhere=False).config()
        config = dataclasses.replace(recorded, runs=told.runs)  # it may have moved
    elif told.config:
        if told.recipe:
            raise Refused("--recipe and --config both say where to start; give one of them")
        config = read_recipe(told.config, tyro.MISSING)
    else:
        usual = "original"  # of its scripts, and of a search, whose usual space is the original's
        if not model and kind is not SearchArguments:
            name = told.model or ""
            usual = usual_scratch(name, told.device or "auto") if told.no_pretrain else usual_finetune(name)
        config = named(told.recipe or usual)(tyro.MISSING, pretrain=not told.no_pretrain)
        if model and told.recipe in (None, "original"):
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=model))
    return _fitting(parse(kind, argv, prog=prog, default=kind(config=config)), argv)


def _fitting(arguments: Any, argv: Sequence[str]) -> Any:
    """``arguments`` with what a recipe sets for its own length and size made to fit the --epochs and --size given."""
    given = {word.split("=")[0].replace("_", "-") for word in argv}
    config: TrainConfig = arguments.config
    optim, augment = config.optim, config.augment
    if "--epochs" in given and "--warmup-epochs" not in given and optim.warmup_epochs >= optim.epochs:
        optim = dataclasses.replace(optim, warmup_epochs=max(optim.epochs - 1, 0))
    if "--size" in given and "--train-sizes" not in given and config.model.size:
        sizes = tuple(min(size, config.model.size) for size in augment.train_sizes)
        augment = dataclasses.replace(augment, train_sizes=sizes)
    return dataclasses.replace(arguments, config=dataclasses.replace(config, optim=optim, augment=augment))
