"""Files of runs, comparisons and studies with any value of any kind: read right or refused, never a traceback."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

from finetune101.errors import Refused
from finetune101.reports import compare, pages
from finetune101.reports.comparison import comparison_text
from finetune101.run import Run

GONE = object()
WRONG = (None, [], {}, "x", "\ud800\0", "../../x", -1, 1e308, 10**30, [[1]], GONE)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value; of lists the first item."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def mutations(value: Any) -> Iterator[Any]:
    """``value`` with each of its places wrong in each way."""
    for path in places(value):
        for wrong in WRONG:
            if not path:
                if wrong is not GONE:
                    yield wrong
                continue
            made = copy.deepcopy(value)
            at = made
            for key in path[:-1]:
                at = at[key]
            if wrong is GONE:
                del at[path[-1]]
            else:
                at[path[-1]] = wrong
            yield made


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of two arms, and their comparison in its folder."""
    folder = tmp_path_factory.mktemp("damaged") / "study"
    for arm in ("finetune", "scratch"):
        first = 3.0 if arm == "finetune" else None
        write_run(folder / arm / "s0", {1, 2}, test=8, scores=[50, 60], first=first)
    cell = {"model": "net", "size": None, "n": 1, "planned": 1, "seconds": 60.0, "top1": 99.0, "top1_sd": None}
    cell |= {"mean_per_class": 99.0, "mean_per_class_sd": None, "errors": ["why"]}
    cells = [{**cell, "arm": arm, "folder": arm} for arm in ("finetune", "scratch")]
    Run(folder).write_json("study.json", {"settings": {}, "cells": cells})
    pairs = [{"name": arm, "runs": [{"path": f"{arm}/s0"}]} for arm in ("finetune", "scratch")]
    Run(folder).write_json("comparison.json", {"a": pairs[0], "b": pairs[1], "others": []})
    return folder


def use(folder: Path) -> None:
    """Everything that is read of a study, but drawn nothing."""
    pages.lines_of(pages.finished_cells(folder))
    arms = pages.study_groups(folder)
    again = compare.read_groups(folder)
    for pair in compare.all_pairs(arms):
        comparison_text(pair)
        compare.comparison_json([pair], folder)
    assert [len(group.runs) for group in again] and pages.progress_of(folder) and pages.failures_of(folder)


@pytest.mark.parametrize(
    "name", ["study.json", "comparison.json", *(f"finetune/s0/{n}.json" for n in ("env", "test", "split"))]
)
def test_a_damaged_json_file_is_read_or_refused(study: Path, name: str) -> None:
    use(study)
    file = study / name
    whole = file.read_text()
    try:
        for value in mutations(json.loads(whole)):
            file.write_text(json.dumps(value))
            with contextlib.suppress(Refused):
                use(study)
    finally:
        file.write_text(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.csv"])
def test_a_damaged_table_is_read_or_refused(study: Path, name: str) -> None:
    file = study / "finetune" / "s0" / name
    whole = file.read_text()
    try:
        for wrong in ("null", "[]", '{"epoch": 1}', "[" * 10_000, "\0", "a,b", '"', "1,2,3,nan", "é" * 9):
            for text_ in (wrong, f"{wrong}\n{whole}", f"{whole}{wrong}", whole.replace("0.9", wrong, 1), whole[:-9]):
                file.write_text(text_)
                with contextlib.suppress(Refused):
                    use(study)
        file.write_bytes(whole.encode() + b"\xff")
        with contextlib.suppress(Refused):
            use(study)
    finally:
        file.write_text(whole)
