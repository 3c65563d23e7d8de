"""The generated parts of docs/ are as the code is; what people write about the code names what is there."""

from __future__ import annotations

import re
from pathlib import Path

import chinese_tables
import field_meanings
import pytest
import references

from finetune101 import schemas
from finetune101.cli.main import DATA_VERBS, VERBS
from finetune101.run import WRITTEN

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_pages_are_as_the_code() -> None:
    assert references.main(["--check"]) == 0, "give: python evidence/references.py"


def test_a_page_that_differs_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "networks.md"
    page.write_text(f"# N\n\n{references.MARKS[0]}\nold\n{references.MARKS[1]}\n\nrest\n", encoding="utf-8")
    assert references.main(["--check"], tmp_path) == 1 and "networks.md" in capsys.readouterr().err
    assert references.main([], tmp_path) == 0
    text = page.read_text(encoding="utf-8")
    assert "`resnet18`" in text and "\nold\n" not in text and text.endswith("rest\n")
    assert references.main(["--check"], tmp_path) == 0


def test_every_verb_and_flag_is_listed() -> None:
    text = references.commands()
    for verb in (*VERBS, *(f"data {name}" for name in DATA_VERBS)):
        assert f"## finetune101 {verb}\n" in text
    for flag in ("--exp TEXT", "--backbone-lr-ratio X", "--grid", "--neighbours N", "--overwrite"):
        assert flag in text


def test_every_field_has_a_meaning_and_no_other() -> None:
    for name, meanings in field_meanings.MEANINGS.items():
        fields = set(getattr(schemas, name).__annotations__)
        assert set(meanings) - {""} <= fields | set(getattr(schemas, name).__mro__[0].__annotations__), name
    text = references.run_folder()
    for name in ("world.precision", "val_top1", "calibration.bins[].n", "cells[].arm", "results[].state"):
        assert f"`{name}`" in text


def test_every_file_of_a_run_is_named() -> None:
    text = (DOCS / "run-folder.md").read_text(encoding="utf-8").replace("NAME", "*")
    assert [name for name in WRITTEN if f"`{name}`" not in text] == []


def test_messages_are_those_of_the_code() -> None:
    text = references.messages()
    assert text.count("\n| ") > 200
    assert "| … exists | add --resume to continue it or --overwrite to start anew |" in text


def test_the_common_messages_of_the_faq_are_said_by_the_code() -> None:
    text = (DOCS / "faq.md").read_text(encoding="utf-8")
    headings = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(headings) >= 20
    wrong = re.findall(r"^\| (.+?) \|", references.messages(), re.M)
    assert [one for one in headings if not any(message.startswith(one) for message in wrong)] == []


def test_every_claim_is_listed() -> None:
    assert references.claims().count("\n| `") > 100


def test_chinese_pages_have_chinese_headings() -> None:
    head, row, code = "| argument | what it is |", "| `X` | on | off |", "```text\n| yes | on |\n```"
    text = chinese_tables.in_chinese(f"## finetune101 train\n\n{head}\n|---|---|\n{row}\n\n{code}")
    assert "训练一个实验。" in text and "| 位置参数 | 含义 |" in text and "| `X` | 开 | 关 |" in text and code in text
    assert set(chinese_tables.VERBS) == {*VERBS, *(f"data {name}" for name in DATA_VERBS), "search report"}
    for page in references.PARTS:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        generated = text.partition(references.MARKS[0])[2].partition(references.MARKS[1])[0]
        assert set(re.findall(r"^(\| .*)\n\|---", generated, re.M)) <= set(chinese_tables.ROWS), page
