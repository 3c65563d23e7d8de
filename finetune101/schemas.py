"""What each file of a run, a study, a search or a comparison holds; ``files.read_json`` checks what it reads by these.

Keys without ``NotRequired`` are always written. Further keys are allowed: a reader takes those that it knows.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

Whole = Annotated[int, Meta(ge=0, le=10**15)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
Seconds = Annotated[float, Meta(ge=0, le=1e12)]
Percent = Annotated[float, Meta(ge=0, le=100.0001)]


class Machine(TypedDict):
    """The key "world" of env.json: where a run was trained."""

    device: str
    precision: str
    channels_last: bool
    processes: NotRequired[Annotated[int, Meta(ge=1, le=10**15)]]


class Start(TypedDict):
    """The key "model" of env.json: where the weights came from."""

    init_source: str
    init_hash: str


class Environment(TypedDict):
    """env.json."""

    world: Machine
    model: Start
    teachers: NotRequired[list[str]]
    """"sha256:..." of the checkpoint of each teacher, in the order of ``optim.teacher``."""
    command: NotRequired[str]
    versions: NotRequired[dict[str, str]]
    machine: NotRequired[dict[str, str | bool | int | float | None]]


class Subsets(TypedDict):
    """Paths of images relative to the data folder, of each subset."""

    train: list[str]
    val: list[str]
    test: list[str]


class Split(TypedDict):
    """split.json, a manifest."""

    protocol: str
    seed: Whole
    options: dict[str, Any]
    classes: list[str]
    content_hash: str
    subsets: Subsets
    hash: NotRequired[str]


class Record(TypedDict):
    """A line of metrics.jsonl: one epoch."""

    epoch: Whole
    step: Whole
    train_loss: Finite
    train_top1: Finite
    lr_head: Finite
    lr_backbone: Finite
    seconds: Seconds
    images_per_s: Finite
    val_loss: Finite | None
    val_top1: Percent | None
    val_seconds: NotRequired[Seconds]
    best: bool


class Bin(TypedDict):
    """One bin of a reliability diagram; shares from 0 to 1, None where the bin is empty."""

    n: Whole
    confidence: Finite | None
    top1: Finite | None


class Calibration(TypedDict):
    """Expected calibration error (a share) and the bins behind it."""

    ece: Finite
    bins: list[Bin]
    temperature: NotRequired[Annotated[float, Meta(gt=0, le=1e6)]]


class WithoutDuplicates(TypedDict):
    """Top-1 on the test images that have no near-duplicate in training."""

    n: Whole
    top1: Percent | None


class Test(TypedDict):
    """test.json."""

    n: Annotated[int, Meta(ge=1, le=10**15)]
    correct: Whole
    loss: Finite
    top1: Percent
    top1_interval: Annotated[list[Finite], Meta(min_length=2, max_length=2)]
    top5: Percent
    mean_per_class: Percent
    manifest_hash: str
    protocol: NotRequired[str]
    epoch: NotRequired[Whole]
    times_scored: NotRequired[Whole]
    mirror: NotRequired[bool]
    frozen_backbone: NotRequired[bool]
    random_layers: NotRequired[list[str]]
    """Layers that started at random in a network that began from ImageNet weights."""
    frozen_members: NotRequired[list[str]]
    temperature: NotRequired[Annotated[float, Meta(gt=0, le=1e6)]]
    temperature_reason: NotRequired[str]
    world: NotRequired[Machine]
    runs: NotRequired[list[str]]
    calibration: NotRequired[Calibration]
    calibration_scaled: NotRequired[Calibration]
    without_duplicates: NotRequired[WithoutDuplicates]


class Cell(TypedDict):
    """One row of study.json."""

    model: str
    arm: str
    size: Whole | None
    folder: str
    n: Whole
    planned: Whole
    seconds: Seconds | None
    top1: Percent | None
    top1_sd: Finite | None
    mean_per_class: Percent | None
    mean_per_class_sd: Finite | None
    errors: list[str]
    frozen: NotRequired[Whole]


class Study(TypedDict):
    """study.json."""

    settings: dict[str, Any]
    cells: list[Cell]


Point = dict[str, str | bool | int | float | None]  # name of a setting -> its value


class Result(TypedDict):
    """One point of search.json."""

    point: Point
    state: str
    run: str | None
    best_val_top1: NotRequired[Percent | None]
    best_epoch: NotRequired[Whole | None]
    epochs: NotRequired[Whole | None]
    steps: NotRequired[Whole | None]
    seconds: NotRequired[Seconds | None]
    error: NotRequired[str | None]
    rungs: NotRequired[dict[str, Any]]
    trial: NotRequired[Whole]


class Winner(TypedDict):
    """The key "winner" of search.json."""

    point: Point
    run: str | None


class Search(TypedDict):
    """search.json."""

    results: list[Result]
    space: dict[str, Any]
    winner: NotRequired[Winner | None]
    finalists: NotRequired[list[dict[str, Any]]]
    base: NotRequired[dict[str, Any]]
    probe: NotRequired[Result]


class ComparedRun(TypedDict):
    """A run of an arm of comparison.json."""

    path: str


class ComparedArm(TypedDict):
    """An arm of comparison.json."""

    name: str
    runs: Annotated[list[ComparedRun], Meta(min_length=1)]


class ComparedPair(TypedDict):
    """Two arms of comparison.json."""

    a: ComparedArm
    b: ComparedArm


class Comparison(ComparedPair):
    """comparison.json."""

    others: list[ComparedPair]


MOST_BYTES = 32 * 2**20  # of any of these files but a split

REMEDIES = {
    "test.json": "test the run again: finetune101 evaluate",
    "study.json": "start the study again: it keeps the runs that are done",
    "search.json": "start the search again: it keeps the runs that are done",
    "comparison.json": "compare the runs again",
}
"""What to do about a damaged file; of a file that is not listed: train the run again."""

SCHEMAS: dict[str, Any] = {
    "config.json": dict[str, Any],  # config.from_dict reads it: its settings have bounds of their own
    "env.json": Environment,
    "split.json": Split,
    "test.json": Test,
    "study.json": Study,
    "search.json": Search,
    "comparison.json": Comparison,
}
