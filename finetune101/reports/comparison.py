"""A comparison of two arms: its numbers, its lines for a terminal, and the sentences that these share with the page.

The page's tables have up to twelve columns, which no terminal has room for: here each arm is a paragraph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune101.errors import escaped
from finetune101.evaluation import metrics
from finetune101.reports.figures import draw_comparison
from finetune101.reports.page import p_text, read_words


@dataclass(frozen=True, kw_only=True)
class Score:
    """One run of an arm; accuracies in percent."""

    path: str
    seed: int
    split_seed: int
    manifest_hash: str
    epoch: int
    correct: int
    top1: float
    mean_per_class: float
    init_hash: str
    start: str
    command: str
    seconds: float
    features_cached: bool
    frozen: bool
    steps: int
    images: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: means over its runs; standard deviations are None with one run. Accuracies are in percent.

    ``seconds`` is the time of one training, mean over the runs that computed their own features; None where every run
    read its features from a cache. ``steps_to_other`` and ``seconds_to_other`` are None where the arm never reaches the
    other arm's final validation accuracy.
    """

    name: str
    network: str
    recipe: str | None
    pretrain: bool
    device: str
    seconds: float | None
    init_source: str
    init_hash: str
    epoch: int
    correct: float
    top1: float
    top1_sd: float | None
    top1_interval: tuple[float, float]
    mean_per_class: float
    mean_per_class_sd: float | None
    validation: float | None
    steps_to_other: float | None
    seconds_to_other: float | None
    runs: tuple[Score, ...]
    random_layers: tuple[str, ...] = ()
    """Layers beside the output layer that started at random in a pretrained network."""
    epochs: int | None = None
    whole_epochs: int | None = None
    """Epochs of the recipe, where it was cut to ``epochs``."""

    @property
    def better_recipes(self) -> tuple[tuple[str, str], ...]:
        """Recipes that are known to reach more than this arm's, each with its time: "half", "same", "twice", "gpu"."""
        if self.pretrain:
            return (("finetune", "half"),) if self.recipe == "original" else ()
        if self.device == "cuda":
            return (("scratch_long", "gpu"),) if self.recipe in ("original", "scratch_fast", "scratch") else ()
        quick = (("scratch_fast", "same"),) if self.recipe == "original" else ()
        return (*quick, ("scratch", "twice")) if self.recipe in ("original", "scratch_fast") else ()

    @property
    def frozen(self) -> int:
        """Runs whose tested weights have the backbone as it came: only an output layer was trained."""
        return sum(run.frozen for run in self.runs)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """McNemar's exact test of two runs on one split."""

    a: str
    b: str
    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True, kw_only=True)
class ClassGain:
    """One class: test images (of the first split), and the percent of them that each arm gets right, mean over runs."""

    name: str
    n: int
    a: float
    b: float
    gain: float
    a_interval: tuple[float, float]
    b_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms and their paired difference (a minus b, percentage points) on the same ``n`` test images.

    ``difference_interval`` is over images and about the given runs; ``crossed`` over images and runs, with two runs or
    more on each side; ``over_splits`` is there instead of both with several splits.
    """

    a: Arm
    b: Arm
    n: int
    manifest_hash: str
    splits: int
    difference: float
    difference_interval: tuple[float, float] | None
    crossed: metrics.Crossed | None
    over_splits: tuple[float, float] | None
    mcnemar: tuple[Pair, ...]
    classes: tuple[ClassGain, ...]

    def __repr__(self) -> str:
        return comparison_text(self)

    def _repr_png_(self) -> bytes:
        """Test accuracy of both arms with intervals, for notebooks."""
        arms = [
            {"name": arm.name, "curve": [], "top1": arm.top1, "interval": arm.top1_interval,
             "runs": [run.top1 for run in arm.runs]}
            for arm in (self.a, self.b)
        ]  # fmt: skip
        with TemporaryDirectory() as folder:
            return draw_comparison(arms, Path(folder) / "test.png", self.over).read_bytes()

    @property
    def interval(self) -> tuple[float, float]:
        """The widest interval that the runs allow."""
        interval = self.over_splits or (self.crossed and self.crossed.interval) or self.difference_interval
        assert interval is not None
        return interval

    @property
    def over(self) -> str:
        """What ``interval`` is over: splits, images and runs, or images."""
        return "splits" if self.over_splits else "images and runs" if self.crossed else "images"


def comparison_text(c: Comparison) -> str:
    """The comparison as lines for a terminal: accuracies, difference, tests, classes, and a paragraph for each arm."""
    width = max(len(c.a.name), len(c.b.name), len("difference"))
    where = f"the same {c.n} images" if c.splits == 1 else f"{c.splits} splits (the first has {c.n} images)"
    lines = [f"Tested on {where} (95 % intervals)", "", f"{'':{width}}  {'right answers':26}  mean per class"]
    lines += [_row(arm, width, c.n) for arm in (c.a, c.b)]
    lines.append(f"{'difference':{width}}  {c.difference:+.2f} points ({_span(c.interval)}; over {c.over})")
    if c.crossed and c.difference_interval:
        lines.append(f"{'':{width}}  of these very runs, over images only: {_span(c.difference_interval)}")
        chance, freedom = p_text(c.crossed.p), f"{c.crossed.df:.1f} degrees of freedom"
        lines.append(f"{'':{width}}  t test over images and runs: p {chance} ({freedom})")
    lines.append("")
    for pair in c.mcnemar:
        lines.append(f"Only {pair.a} is right: {_images(pair.only_a)}. Only {pair.b} is right: {_images(pair.only_b)}.")
        lines.append(f"  McNemar's exact test that both are equally good: p {p_text(pair.p)}.")
    lines.append(_verdict(c))
    if single := [arm.name for arm in (c.a, c.b) if len(arm.runs) == 1]:
        lines.append(f"One training run of {' and of '.join(single)}: another seed or split would give other numbers.")
    best, worst = c.classes[:3], c.classes[3:][:-4:-1]
    least = f"; least in {_classes(worst)}" if worst else ""
    lines += ["", f"By class, the difference is greatest in {_classes(best)}{least}."]
    lines += [line for arm, other in ((c.a, c.b), (c.b, c.a)) for line in _arm_lines(arm, other)]
    if c.a.network != c.b.network:
        lines += ["", "The networks differ, so the difference does not come from the start of training alone."]
    return "\n".join(map(escaped, lines))


def cut_note(arm: Arm, words: Mapping[str, str]) -> str:
    """That ``arm`` was trained for fewer epochs than its recipe has."""
    return words["cut_arm"].format(arm=arm.name, epochs=arm.epochs, whole=arm.whole_epochs, recipe=arm.recipe)


def arm_notes(arm: Arm, words: Mapping[str, str]) -> list[str]:
    """What the accuracies and costs of ``arm`` do not show: layers at random, frozen ones, lost times, a weak recipe.

    ``words`` are those of a page, so that page and terminal say the same.
    """
    notes = []
    if arm.random_layers:
        notes.append(words["random_layers_arm"].format(arm=arm.name, layers=", ".join(arm.random_layers)))
    if arm.frozen:
        notes.append(words["frozen_arm"].format(arm=arm.name, frozen=arm.frozen, n=len(arm.runs)))
    if cached := [f"{arm.name}/{Path(run.path).name}" for run in arm.runs if run.features_cached]:
        notes.append(words["cached"].format(runs=", ".join(cached)))
    if arm.whole_epochs:
        notes.append(cut_note(arm, words))
    if arm.better_recipes:
        better = ", ".join(f"{recipe} ({words[time]})" for recipe, time in arm.better_recipes)
        notes.append(words["better"].format(arm=arm.name, recipe=arm.recipe, better=better))
    return notes


def _arm_lines(arm: Arm, other: Arm) -> list[str]:
    """Start, cost and speed of one arm."""
    first, n = arm.runs[0], len(arm.runs)
    which = f" (first of {n} runs)" if n > 1 else ""
    lines = ["", f"{arm.name}: {arm.network}, weights of epoch {arm.epoch}{which}"]
    lines += [f"  started from: {arm.init_source}", f"  initial state: {arm.init_hash[:19]}"]
    lines += [f"  {start}" for start in dict.fromkeys(run.start for run in arm.runs) if start != "pretrained"]
    if first.steps or first.seconds:
        time = f"trained for {_minutes(arm.seconds)}" if arm.seconds is not None else "no time is known"
        each = ", each of its runs" if n > 1 else ""
        lines.append(f"  {time}: {first.steps} steps, {first.images} images gone through{each}")
    lines += [f"  {note}" for note in arm_notes(arm, read_words("en"))]
    if arm.validation is not None and other.validation is not None:
        when = "never"
        if arm.steps_to_other is not None:
            time = "" if arm.seconds_to_other is None else f", {_minutes(arm.seconds_to_other)}"
            when = f"after {arm.steps_to_other:g} steps{time}"
        lines.append(f"  reaches {other.name}'s final validation accuracy ({other.validation:.1f} %): {when}")
    return lines


def _row(arm: Arm, width: int, n: int) -> str:
    if arm.top1_sd is None or arm.mean_per_class_sd is None:
        top1, right = f"{arm.top1:6.2f} % ({_span(arm.top1_interval, '.2f')})", f"{arm.correct:g} of {n}"
        return f"{arm.name:{width}}  {top1:26}  {arm.mean_per_class:6.2f} %    {right}"
    top1 = f"{arm.top1:6.2f} ± {arm.top1_sd:.2f} %"
    per_class = f"{arm.mean_per_class:6.2f} ± {arm.mean_per_class_sd:.2f} %"
    return f"{arm.name:{width}}  {top1:26}  {per_class}    n = {len(arm.runs)} runs"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _span(interval: tuple[float, float], form: str = "+.2f") -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _classes(rows: Sequence[ClassGain]) -> str:
    return ", ".join(f"{row.name} ({row.gain:+.0f})" for row in rows)


def _verdict(c: Comparison) -> str:
    """Which arm is better, if the choice of images (or of runs, or of splits) does not explain the difference."""
    if not any(pair.only_a or pair.only_b for pair in c.mcnemar):
        return "Both are right on the same images."
    single = len(c.a.runs) == len(c.b.runs) == 1
    sure = c.mcnemar[0].p < 0.05 if single else not c.interval[0] <= 0 <= c.interval[1]
    if not sure:
        return "So these images do not tell the two apart." if c.over == "images" else "So the two are not told apart."
    what = "choice of test images" if c.over == "images" else f"choice of {c.over}"
    return f"So {c.a.name if c.difference > 0 else c.b.name} is better, by more than the {what} explains."
