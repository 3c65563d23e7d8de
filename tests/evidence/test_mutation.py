"""The last mutation testing: enough mutants were killed, and each survivor is explained."""

from __future__ import annotations

import json

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
    assert sum(row["survived"] for row in result["modules"].values()) == len(result["survivors"])
    assert [name for name, one in result["survivors"].items() if not (one["note"] and one["change"])] == []
