"""A small draw of every part of ``make stress``, and its judges: each must see the fault that it is there for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults import hostile
from faults.bench import Answer
from faults.mutations import changed_bytes, changed_json, changed_text
from faults.process import Ended
from faults.sandbox import names_a_failure
from stress import DRAW, PARTS, enough, merged

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the faults are made by Linux only")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a small draw of all parts."""
    out = tmp_path_factory.mktemp("stress") / "stress.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "stress.py"), "--draw", "--out", str(out)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert out.is_file(), done.stdout[-2000:] + done.stderr[-2000:]
    results: dict[str, Any] = json.loads(out.read_text())
    assert done.returncode == (results["failures"] > 0), done.stderr[-2000:]
    return results


@pytest.mark.slow
@pytest.mark.parametrize("part", DRAW)
def test_nothing_is_lost(part: str, drawn: dict[str, Any]) -> None:
    result = drawn["parts"][part]
    assert result["failures"] == 0, "\n".join(result["failed"])
    assert result["count"] > DRAW[part] // 2  # of hostile files, kinds that are rare are left out


def test_the_draw_has_every_part_but_the_searches() -> None:
    assert set(PARTS) - set(DRAW) == {"searches"}  # tests/experiments/test_stress.py kills those


def test_results_of_one_part_replace_its_own_and_are_summed(tmp_path: Path) -> None:
    file = tmp_path / "stress.json"
    first = {
        "kills": {"count": 3, "failures": 1, "seconds": 5, "version": "1 a"},
        "old": {"count": 1, "failures": 0, "seconds": 1, "version": "1 a"},
    }
    file.write_text(json.dumps(merged(file, first)))
    assert "several_versions" not in json.loads(file.read_text())
    both = merged(file, {"kills": {"count": 10, "failures": 0, "seconds": 9, "version": "1 b"}})
    assert (both["faults"], both["failures"], both["seconds"], list(both["parts"])) == (11, 0, 10, ["kills", "old"])
    assert both["versions"] == ["1 a", "1 b"] and "2 versions" in both["several_versions"]


def test_a_published_part_is_replaced_by_as_many_cases_only(tmp_path: Path) -> None:
    file = tmp_path / "stress.json"
    assert enough("kills", file) == 1
    for count, least in ((30, 30), (500, PARTS["kills"][0])):
        one = {"kills": {"count": count, "failures": 0, "seconds": 5, "version": "1 a"}}
        file.write_text(json.dumps(merged(file, one)))
        assert enough("kills", file) == least


def test_kinds_of_hostile_files_take_turns() -> None:
    batches = hostile.in_turns({"a": 25, "b": 0, "c": 3}, 10)
    assert sorted(batches) == [("a", 5), ("a", 10), ("a", 10), ("c", 3)]
    assert {name for name, _ in batches[:2]} == {"a", "c"}


def test_exit_code_1_needs_the_image_and_the_reason() -> None:
    assert names_a_failure("failed: d/a.jpg: cannot be read\n", "")
    assert names_a_failure("", "unreadable 1\n  a.jpg: cut short\n")
    assert not names_a_failure("", "unreadable 0\n") and not names_a_failure("Killed\n", "")


@pytest.mark.parametrize(
    ("code", "err", "hung", "fault"),
    [
        (0, "", False, ""),
        (2, "error: give less\n", False, ""),
        (2, "nothing\n", False, "0 sentences"),
        (2, "error: a\nerror: b\n", False, "2 sentences"),
        (-11, "", False, "exit code -11"),
        (1, "Traceback (most recent call last):\n", False, "traceback"),
        (0, "", True, "did not end"),
    ],
)
def test_a_bad_end_is_told(code: int, err: str, hung: bool, fault: str) -> None:
    told = Ended(code, "", err, 0.0, 0, hung).fault()
    assert told.startswith(fault) and bool(told) == bool(fault)


def test_every_difference_of_two_trainings_is_told() -> None:
    answer = Answer([[1, 0.5]], "ab", [("a.jpg", "a", "b", "0.900")])
    assert answer.difference(Answer([[1, 0.5]], "ab", [("a.jpg", "a", "b", "0.900")], seconds=9)) == ""
    for other in (
        Answer([[1, 0.6]], "ab", answer.predictions),
        Answer([], "ab", answer.predictions),
        Answer(answer.metrics, "ac", answer.predictions),
        Answer(answer.metrics, "ab", [("a.jpg", "a", "a", "0.900")]),
    ):
        assert "differ" in answer.difference(other)


SANDBOX = """
import os, sys, time
from pathlib import Path
from faults import sandbox
from faults.sandbox import Call, run_calls

folder, outside = Path(sys.argv[1]), Path(sys.argv[2])
sandbox.CPU, sandbox.WALL, sandbox.MEMORY = 0.5, 3.0, 2**26

def endless(place):
    while True: pass

def sleeping(place):
    time.sleep(60)

def large(place):
    bytearray(2**27)
    return ""

def writes(place):
    (outside / "x").write_text("x")
    return ""

def runs(place):
    os.system("true")
    return ""

def marked(place):
    (place / "MARKER").touch()
    return ""

def dies(place):
    os.abort()

calls = [endless, sleeping, large, writes, runs, marked, dies, lambda place: 1 / 0, lambda place: ""]
os.environ["FINETUNE101_CACHE"] = str(folder)
for one, fault in run_calls([Call(str(call), 1, call) for call in calls], folder, folder / "cache"):
    print(repr(fault))
"""
TOLD = ("CPU time", "hang", "GB", "wrote", "os.system", "code was run", "ended with -6", "ZeroDivisionError", "''")


def test_what_hostile_files_do_is_told(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run(
        [sys.executable, "-c", SANDBOX, str(inside), str(outside)], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == len(TOLD) and all(words in line for words, line in zip(TOLD, lines, strict=True)), lines


def test_mutations_change_what_they_are_given() -> None:
    import random

    rng = random.Random(0)
    value = {"a": [1, 2, {"b": "text"}], "c": 1.5}
    for _ in range(500):
        assert changed_bytes(rng, b"0123456789" * 9) != b"0123456789" * 9
        assert json.loads(changed_json(rng, value)) != value
        assert changed_text(rng, "a: 1\nb: 2\n").rstrip(b"\n") != b"a: 1\nb: 2"
    assert value == {"a": [1, 2, {"b": "text"}], "c": 1.5}


def test_three_thousand_files_are_three_thousand() -> None:
    assert sum(files for files, _, _ in hostile.TARGETS.values()) == PARTS["hostile"][0] == 3000
