"""A comparison as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from finetune101.errors import escaped
from finetune101.report.compare import Arm, ClassGain, Comparison

TIMES = {"half": "in half the time", "same": "in the same time", "twice": "in twice the time", "gpu": "made for a GPU"}


def text(c: Comparison) -> str:
    """The comparison as lines for a terminal."""
    width = max(len(c.a.name), len(c.b.name), len("difference"))
    where = f"the same {c.n} images" if c.splits == 1 else f"{c.splits} splits (the first has {c.n} images)"
    lines = [f"Tested on {where} (95 % intervals)", "", f"{'':{width}}  {'right answers':26}  mean per class"]
    lines += [_row(arm, width, c.n) for arm in (c.a, c.b)]
    lines.append(f"{'difference':{width}}  {_points(c.difference)} points ({_span(c.interval)}; over {c.over})")
    if c.crossed and c.difference_interval:
        lines.append(f"{'':{width}}  of these very runs, over images only: {_span(c.difference_interval)}")
        lines.append(
            f"{'':{width}}  t test over images and runs: p = {c.crossed.p:.2g} ({c.crossed.df:.1f} degrees of freedom)"
        )
    lines.append("")
    for pair in c.mcnemar:
        lines.append(f"Only {pair.a} is right: {_images(pair.only_a)}. Only {pair.b} is right: {_images(pair.only_b)}.")
        lines.append(f"  McNemar's exact test that both are equally good: p = {pair.p:.2g}.")
    lines.append(_verdict(c))
    single = [arm.name for arm in (c.a, c.b) if len(arm.runs) == 1]
    if single:
        lines.append(f"One training run of {' and of '.join(single)}: another seed or split would give other numbers.")
    best, worst = c.classes[:3], c.classes[:-4:-1]
    lines += ["", f"By class, the difference is greatest in {_classes(best)}; least in {_classes(worst)}."]
    lines += [line for arm, other in ((c.a, c.b), (c.b, c.a)) for line in _arm_lines(arm, other)]
    if c.a.network != c.b.network:
        lines += ["", "The networks differ, so the difference does not come from the start of training alone."]
    return "\n".join(map(escaped, lines))


def _arm_lines(arm: Arm, other: Arm) -> list[str]:
    """Start, cost and speed of one arm."""
    first, n = arm.runs[0], len(arm.runs)
    lines = [
        "",
        f"{arm.name}: {arm.network}, weights of epoch {arm.epoch}" + (f" (first of {n} runs)" if n > 1 else ""),
    ]
    if arm.frozen:
        which = "" if arm.frozen == n == 1 else f" in {arm.frozen} of {n} runs"
        lines.append(f"  frozen backbone{which}: nothing but the output layer was trained in what was tested")
    lines += [f"  started from: {arm.init_source}", f"  initial state: {arm.init_hash[:19]}"]
    lines += [f"  {start}" for start in dict.fromkeys(run.start for run in arm.runs) if start != "pretrained"]
    if first.steps or first.seconds:
        lines.append(_cost(arm))
    if arm.better_recipes:
        better = " and ".join(f"{recipe} ({TIMES[time]})" for recipe, time in arm.better_recipes)
        lines.append(f"  its recipe, {arm.recipe}, is not the best known: more is reached by {better}")
    if arm.validation is not None and other.validation is not None:
        goal = f"{other.name}'s final validation accuracy ({other.validation:.1f} %)"
        when = "never"
        if arm.steps_to_other is not None:
            time = "" if arm.seconds_to_other is None else f", {_minutes(arm.seconds_to_other)}"
            when = f"after {arm.steps_to_other:g} steps{time}"
        lines.append(f"  reaches {goal}: {when}")
    return lines


def _cost(arm: Arm) -> str:
    """Time, steps and images of one training."""
    first, n = arm.runs[0], len(arm.runs)
    cached = sum(run.features_cached for run in arm.runs)
    words = [f"{first.steps} steps", f"{first.images} images gone through" + (", each of its runs" if n > 1 else "")]
    if arm.seconds is None:
        return f"  {', '.join(words)}; no time, as its features were read from the cache of an earlier run"
    left_out = f"; {cached} of {n} runs read their features from a cache and are not in the time" if cached else ""
    return f"  trained for {_minutes(arm.seconds)}: {', '.join(words)}{left_out}"


def _row(arm: Arm, width: int, n: int) -> str:
    if arm.top1_sd is None or arm.mean_per_class_sd is None:
        top1, right = f"{arm.top1:6.2f} % ({_span(arm.top1_interval, '.2f')})", f"{arm.correct:g} of {n}"
        return f"{arm.name:{width}}  {top1:26}  {arm.mean_per_class:6.2f} %    {right}"
    top1, per_class = (
        f"{arm.top1:6.2f} ± {arm.top1_sd:.2f} %",
        f"{arm.mean_per_class:6.2f} ± {arm.mean_per_class_sd:.2f} %",
    )
    return f"{arm.name:{width}}  {top1:26}  {per_class}    n = {len(arm.runs)} runs"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _points(value: float) -> str:
    return f"{value:+.2f}"


def _span(interval: tuple[float, float], form: str = "+.2f") -> str:
    return f"{interval[0]:{form}} to {interval[1]:{form}}"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _classes(rows: Sequence[ClassGain]) -> str:
    return ", ".join(f"{row.name} ({row.gain:+.0f})" for row in rows)


def _verdict(c: Comparison) -> str:
    what = "choice of test images" if c.over == "images" else f"choice of {c.over}"
    single = len(c.a.runs) == len(c.b.runs) == 1
    sure = c.mcnemar[0].p < 0.05 if single else not c.interval[0] <= 0 <= c.interval[1]
    if not any(pair.only_a or pair.only_b for pair in c.mcnemar):
        return "Both are right on the same images."
    if not sure:
        return "So these images do not tell the two apart." if c.over == "images" else "So the two are not told apart."
    return f"So {c.a.name if c.difference > 0 else c.b.name} is better, by more than the {what} explains."
