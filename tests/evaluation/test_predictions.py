"""predictions.csv holds any name that a folder can have, and no formula."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune101.evaluation.predictions import name_in_cell, read_rows, write_pair
from finetune101.standalone import csv_cell

NAMES = [
    "=cmd|' /C calc'!A1",
    "+1",
    "-1",
    "@x",
    "'=1",
    "''=1",
    "'s",
    "\x1b[2J",
    "a\nb",
    "caf\udce9",
    "\\u001b",
    "\t=1",
    "猫",
]


@given(st.text(st.characters(exclude_categories=[])) | st.sampled_from(NAMES))
def test_every_name_comes_back(name: str) -> None:
    text = csv_cell(name)
    assert name_in_cell(text) == name
    assert text[:1] not in ("=", "+", "-", "@") or not text
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)
    text.encode("utf-8")


def test_files_of_before_are_read_as_they_are() -> None:
    for name in ("BACKGROUND/image_0001.jpg", "-x/1.jpg", "'s/1.jpg", "a b/ü.jpg"):
        assert name_in_cell(name) == name


def test_a_table_comes_back(tmp_path: Path) -> None:
    rows = [(f"{name}/1.jpg", name, "other", 0.5) for name in NAMES]
    write_pair(tmp_path, "", {"n": 1}, rows)
    back = [
        (row["path"], row["label"], row["prediction"], float(row["confidence"]))
        for row in read_rows(tmp_path / "predictions.csv")
    ]
    assert back == rows


def test_a_number_that_json_lacks_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_pair(tmp_path, "", {"loss": float("nan")}, [("a", "b", "c", 0.5)])
    assert list(tmp_path.iterdir()) == []
