"""The sections on one run: its classes, confusions, example images and confidence; split, machine and commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finetune101.evaluation import metrics
from finetune101.evaluation.tested import confused_pairs, evaluate_command
from finetune101.redaction import redacted
from finetune101.reports import figures, mistakes
from finetune101.reports.drawing import picture_words
from finetune101.reports.groups import Tested
from finetune101.reports.page import Cell, Page, number, percent, words


def add_classes(page: Page, run: Tested) -> None:
    """Adds the accuracy in every class, and what its images are taken for."""
    rows: list[list[Cell]] = []
    for name, share in run.by_class().items():
        predictions = Counter(answer.prediction for answer in run.answers.values() if answer.label == name)
        n, right = predictions.total(), predictions.pop(name, 0)
        often = min(predictions, key=lambda other: (-predictions[other], other), default="")
        taken = f"{often} ({predictions[often]})" if often else ""
        interval = metrics.wilson(right, n)
        rows.append([words(name), percent(share, interval), number(n, "d"), number(right, "d"), words(taken)])
    rows.sort(key=lambda row: row[1][1])
    page.table("classes", ("class", "share", "images", "right", "mistaken"), rows)


def add_details(page: Page, run: Tested, name: str, root: Path | None) -> None:
    """Confusions, examples and calibration of one run; with ``root`` also the images."""
    matrix = mistakes.confusion_of(run.answers)
    pairs = confused_pairs(run.answers)
    alt = page.words["confusion_alt_none"]
    if pairs:
        alt = page.say("confusion_alt", pairs=page.words["stop"].join(f"{a} → {b} ({n})" for a, b, n in pairs[:3]))
    total = len(matrix.names) + matrix.hidden
    hidden = page.say("confusion_hidden", shown=len(matrix.names), total=total) if matrix.hidden else ""
    draw = partial(figures.draw_confusion, matrix.names, matrix.counts, matrix.blocks, lang=page.lang)
    page.picture("confusion", draw, alt, name, whole=True, hidden=hidden)
    if not pairs:
        page.add("words", "no_mistakes", name)
    elif root:
        examples = mistakes.pair_examples(run, root)
        unread = sum(image is None for pair in examples for image in pair["images"])
        page.add("pairs", "pairs", name, pairs=examples, unread=page.say("unread", n=unread) if unread else "")
    else:
        rows = [[words(label), words(prediction), number(count, "d")] for label, prediction, count in pairs]
        page.table("pairs_table", ("class", "prediction", "images"), rows, name)
    for key, right in (("mistakes", False), ("hits", True)):
        chosen = mistakes.examples(run.answers, right, root)
        if not chosen:
            continue
        unread = sum(one["image"] is None for one in chosen) if root else 0
        notes = [page.say("unread", n=unread)] if unread else []
        if root and page.explains and not right:
            notes.append(mistakes.add_reasons(run.run, root, chosen, page.words))
        page.add("gallery", key, name, examples=chosen)
        page.sections[-1]["note"] += page.join(notes)
    if "calibration" in run.test:
        _calibration(page, run, name)


def _calibration(page: Page, run: Tested, name: str) -> None:
    """Whether the confidence is right, and whether the temperature made it better."""
    before, after = run.test["calibration"], run.test.get("calibration_scaled") or {}
    t, ece = after.get("temperature"), after.get("ece")
    labels = picture_words(page.lang)
    lines = {labels["fig_as_trained"].format(ece=before["ece"]): before["bins"]}
    if t is None or t == 1:
        scaled = page.words["unscaled" if t is None else "unhelpful"]
    else:
        lines[labels["fig_scaled"].format(t=t, ece=ece)] = after["bins"]
        scaled = page.say("scaled" if ece < before["ece"] else "scaled_worse", t=t, ece=ece)
    values = {"ece": before["ece"], "scaled": scaled}
    alt = page.say("reliability_text", name=name, **values)
    page.picture("reliability", partial(figures.draw_reliability, lines, lang=page.lang), alt, name, **values)


def _machine(facts: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Device, precision and machine of a run in a line."""
    names = {"True": words["yes"], "False": words["no"], "in part": words["in_part"]}
    parts = [f"{words.get(f'env_{key}', key)} {names.get(str(value), value)}" for key, value in facts.items()]
    return words["comma"].join(parts)


def add_facts(page: Page, runs: Sequence[Tested]) -> None:
    """Split, environment and the commands that make it all again."""
    first = runs[0]
    sizes = " / ".join(f"{len(first.manifest.subsets[name]):,}" for name in ("train", "val", "test"))
    splits = dict.fromkeys((run.split, run.manifest.seed) for run in runs)
    facts = [("protocol", first.manifest.protocol), ("sizes", sizes)]
    facts += [("manifest", page.say("manifest_seed", split=split, seed=seed)) for split, seed in splits]
    versions = dict.fromkeys(", ".join(f"{k} {v}" for k, v in run.env.get("versions", {}).items()) for run in runs)
    facts += [("versions", line) for line in versions if line]
    machines = [{**run.env.get("world", {}), **run.env.get("machine", {})} for run in runs]
    lines = dict.fromkeys(_machine(machine, page.words) for machine in machines)
    facts += [("machine", line) for line in lines]
    facts.append(("times_scored", ", ".join(str(run.test.get("times_scored", 1)) for run in runs)))
    page.add("facts", "protocol_title", facts=[(page.words[key], value) for key, value in facts])
    commands = [redacted(run.env["command"]) for run in runs if run.env.get("command")]  # old ones have secrets
    commands += [evaluate_command(run.run) for run in runs if run.run.best.is_file()]
    page.add("code", "commands", lines=list(dict.fromkeys(commands)))
