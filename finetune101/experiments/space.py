"""The space of a search: name of a setting -> the values to try, or a range to draw from; imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from finetune101.config import SETTINGS, Setting, TrainConfig, change, typed, validate
from finetune101.errors import Refused, bare, escaped, shortened, shown
from finetune101.experiments.settings import SearchOptions
from finetune101.files import read_settings

Point = dict[str, Any]

ORIGINAL: dict[str, list[Any]] = {  # the original project's 72 combinations
    "batch_size": [256, 128, 64],
    "lr": [0.01, 0.001],
    "step_size": [10, 30],
    "gamma": [0.5, 0.1],
    "weight_decay": [1e-4, 1e-5, 0.0],
}


@dataclass(frozen=True)
class Range:
    """All numbers from ``low`` to ``high``, whole ones for whole settings; ``log``: evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __str__(self) -> str:
        return f"{self.low:g}..{self.high:g}{':log' if self.log else ''}"


Space = dict[str, "list[Any] | Range"]


def _searched() -> dict[str, Setting]:
    """Every setting that can be searched, by the name of its flag."""
    # a tuple would need a list of lists; threads change no number, and trials are compared at every epoch
    left_out = {"threads", "val_every"} | {
        name for name, kind in SETTINGS.items() if get_origin(bare(kind.type)) is tuple
    }
    return {name: one for name, one in SETTINGS.items() if one.part not in ("", "data") and name not in left_out}


SEARCHED = _searched()
DATA = {one.field for one in SETTINGS.values() if one.part == "data"} - {"root", "cache", "download"}  # not searched


def make_space(lists: Mapping[str, Any]) -> Space:
    """``lists`` (name -> list of values, or a range such as "1e-4..1e-1:log") with every value in its setting's type.

    Raises Refused for an unknown name, an empty list, and a value that its setting cannot have.
    """
    if not lists:
        raise Refused("the space of the search is empty; give at least one --grid NAME=VALUE,VALUE")
    space: Space = {}
    for flag, values in lists.items():
        name = flag.replace("-", "_")
        if name in DATA:
            raise Refused(f"{name} changes the validation images, by which trials are compared; it is not searched")
        if name not in SEARCHED:
            known = ", ".join(sorted(SEARCHED))
            raise Refused(f"{escaped(shortened(flag, 60))} is not a setting to search; choose from {known}")
        if isinstance(values, Range) or (isinstance(values, str) and ".." in values):
            space[name] = _range(name, str(values))
            continue
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise Refused(f"{name} is {shown(values)}; give a list of values, or a range such as 1e-4..1e-1:log")
        if not values:
            raise Refused(f"{name} has no values to search; give at least one")
        typed = [_typed(name, value) for value in values]
        space[name] = [value for i, value in enumerate(typed) if value not in typed[:i]]
    return space


def parse_space(words: Iterable[str], file: str | None = None) -> Space:
    """The space in ``--space FILE`` (YAML or TOML: name -> list or range) with the ``--grid NAME=...`` of ``words``.

    Without either it is the original's. Raises Refused as ``make_space`` does, and for a file that cannot be read.
    """
    lists: dict[str, Any] = read_settings(Path(file)) if file else {}
    named: set[str] = set()
    for word in words:
        name, equals, values = word.partition("=")
        if not equals or not name:
            raise Refused(f"--grid {word} names no values; write it as --grid lr=0.01,0.001 or lr=1e-4..1e-1:log")
        if ".." in values or (name in named and ".." in lists[name]):
            if name in named:
                raise Refused(f"--grid {name} is given twice; write one range, or one list of values")
            lists[name] = values
        else:
            more = [value for value in values.split(",") if value.strip()]
            lists[name] = [*(lists[name] if name in named else []), *more]
        named.add(name)
    return make_space(lists or ORIGINAL)


def _range(name: str, text: str) -> Range:
    bounds, _, scale = text.partition(":")
    low, _, high = bounds.partition("..")
    try:
        span = Range(_typed(name, low), _typed(name, high), scale == "log")
        numbers = all(isinstance(end, int | float) and math.isfinite(end) for end in (span.low, span.high))
        fine = numbers and scale in ("", "log") and span.low < span.high and (not span.log or span.low > 0)
    except (Refused, TypeError, OverflowError):
        fine = False
    if not fine:
        raise Refused(
            f"{name}={shortened(escaped(text))} is no range; write LOW..HIGH, or LOW..HIGH:log with LOW above 0"
        )
    return span


def _typed(name: str, value: Any) -> Any:
    """``value`` in the type of the setting ``name``; text is read as on the command line."""
    word = value.strip() if isinstance(value, str) else value
    hint = SEARCHED[name].type
    nothing = word in ("none", "None") and type(None) in get_args(bare(hint))  # else a word, as in policy=none
    return typed(hint, None if nothing else word, f"{name} is")


def points(space: Space) -> list[Point]:
    """Every combination of a space of lists. Raises Refused when it holds a range."""
    for name, values in space.items():
        if isinstance(values, Range):
            raise Refused(f"{name}={values} is a range, a grid needs a list; or add --sampler random --trials 20")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]  # type: ignore[arg-type]


def check_space(base: TrainConfig, space: Space) -> None:
    """Raises Refused for a value that cannot work, each tried alone; what two of them do together shows later."""
    for name, values in space.items():
        if base.model.cached_features and SEARCHED[name].part == "augment":
            raise Refused(f"{name} changes nothing on cached features; search it without --stage probe")
        for value in [values.low, values.high] if isinstance(values, Range) else values:
            config = change(base, {name: value})
            if name != "warmup_epochs" and "warmup_epochs" in space:  # bounded by epochs, which may be searched too
                config = change(config, {"warmup_epochs": 0.0})
            validate(config)


AROUND: dict[str, str | list[float]] = {
    "lr": "0.003..0.03:log",
    "backbone_lr_ratio": "0.05..1:log",
    "weight_decay": "1e-5..1e-2:log",
    "crop_scale": "0.2..0.9",
    "label_smoothing": [0.0, 0.05, 0.1, 0.2],
}
"""What is searched around a recipe where nobody names a space: what moves the accuracy of fine-tuning most."""


def planned_search(
    config: TrainConfig, options: SearchOptions, usual: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, Space]:
    """The settings of every trial, and the space; ``usual`` is the space without --grid and --space.

    Raises Refused for settings and values that cannot work.
    """
    if options.stage == "probe":
        config = change(config, {"head": "random", "freeze": True, "cached_features": True})
    if options.is_automatic and not usual:
        config = change(config, {"val_every": 1})  # a recipe may validate less often
        space = around(config)
    else:
        named = options.grid or options.space or not usual
        space = parse_space(options.grid, options.space) if named else make_space(usual or {})
    validate(config)
    check_space(config, space)
    return config, space


def around(config: TrainConfig) -> Space:
    """``AROUND``, its ranges widened to hold the settings of ``config``."""
    space = make_space(AROUND)
    for name, value in _own_values(config, space).items():
        values = space[name]
        if isinstance(values, Range):
            space[name] = Range(min(values.low, value or values.low), max(values.high, value), values.log)
        elif value not in values:
            values.append(value)
    return space


def own_point(config: TrainConfig, space: Space) -> Point:
    """The values that ``config`` has of the settings of ``space``, or the nearest in their ranges."""
    point = _own_values(config, space)
    ranges = {name: values for name, values in space.items() if isinstance(values, Range)}
    return point | {name: min(max(point[name], values.low), values.high) for name, values in ranges.items()}


def _own_values(config: TrainConfig, space: Space) -> Point:
    values = {name: getattr(getattr(config, SEARCHED[name].part), SEARCHED[name].field) for name in space}
    ratio = {"backbone_lr_ratio": config.backbone_lr_ratio()}  # None is another value for random weights
    return values | {name: value for name, value in ratio.items() if name in space}


def point_label(point: Point) -> str:
    """A point as text: ``lr=0.01,gamma=0.5``."""
    return ",".join(f"{name}={value_text(value)}" for name, value in point.items())


def value_text(value: Any) -> str:
    """A value as people write it, and as any page and picture can show it."""
    return f"{value:g}" if isinstance(value, float) else escaped(str(value))


def described(space: Space) -> dict[str, Any]:
    """The space as JSON types, as ``make_space`` reads it."""
    return {name: str(values) if isinstance(values, Range) else values for name, values in space.items()}
