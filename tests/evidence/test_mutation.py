"""The last mutation testing: enough mutants were killed, and each survivor is explained."""

from __future__ import annotations

import json
import re

import mutation


def test_what_became_of_a_mutant() -> None:
    names = {0: "survived", 1: "killed", 3: "killed", 24: "out of time", 33: "survived", None: "not tried"}
    assert {code: mutation.status_of(code) for code in names} == names


def test_enough_mutants_were_killed_and_each_survivor_is_explained() -> None:
    result = json.loads(mutation.RESULT.read_text(encoding="utf-8"))
    assert {name.removeprefix("finetune101/").removesuffix(".py") for name in result["modules"]} == {*mutation.MODULES}
    for row in result["modules"].values():
        assert row["killed"] + row["out_of_time"] + row["survived"] == row["tried"] <= row["mutants"]
        assert row["tried"] >= 30 and row["percent"] >= mutation.LEAST
        assert re.fullmatch("[0-9a-f]{64}", row["sha256"])  # of the file then: it may have been edited since
        assert row["percent"] == round(100 * (1 - row["survived"] / row["tried"]), 1)
    assert sum(row["survived"] for row in result["modules"].values()) == len(result["survivors"])
    assert result["percent"] == round(100 * (1 - len(result["survivors"]) / result["tried"]), 1)
    assert result["selection"] and result["mutmut"]
    assert [name for name, one in result["survivors"].items() if not (one["note"] and one["change"])] == []


def test_notes_stand_by_the_change() -> None:
    result = json.loads(mutation.RESULT.read_text(encoding="utf-8"))
    notes = json.loads(mutation.NOTES.read_text(encoding="utf-8"))
    for name, one in result["survivors"].items():
        assert notes[mutation.key_of(name, one["change"])] == one["note"]


def test_survivors_are_counted_with_their_note_whatever_their_number() -> None:
    codes: dict[str, dict[str, int | None]] = {module: {} for module in mutation.MODULES}
    codes["data/splits"] = {f"finetune101.data.splits.x_f__mutmut_{n}": code for n, code in ((3, 0), (8, 1), (9, None))}
    notes = {"data.splits.x_f\n- a\n+ b": "the same"}
    result = mutation.counted(codes, notes, lambda mutant: ["- a", "+ b"])
    assert (result["mutants"], result["tried"], result["killed"], result["percent"]) == (3, 2, 1, 50.0)
    assert result["selection"] == "the mutants whose number ends in 3 or 8"
    assert result["survivors"]["data.splits.x_f__mutmut_3"] == {"change": ["- a", "+ b"], "note": "the same"}
    assert result["modules"]["finetune101/data/splits.py"]["sha256"] == mutation.sha256_of("data/splits")
