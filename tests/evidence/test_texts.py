"""evidence/texts.py: numbers of the claims in README and docs/, by marks that a reader does not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import texts

ROOT = Path(__file__).parents[2]
CLAIMS: dict[str, dict[str, Any]] = {
    one["id"]: one
    for one in (
        {"id": "a.top1", "value": 97.4, "n": 3, "spread": 0.09},
        {"id": "gain.top1", "value": 13.67, "n": 2, "spread": [12.15, 15.2]},
        {"id": "speed.run", "value": 14024.0, "n": 1, "spread": None},
    )
}


def mark(name: str, text: str = "?") -> str:
    return f"a <!--claim:{name}-->{text}<!--/--> b"


def test_the_projects_own_texts_are_as_claimed() -> None:
    assert texts.differences(ROOT, texts.read_claims(ROOT)) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.top1", "97.40"),
        ("a.top1@n", "3"),
        ("a.top1@spread", "0.09"),
        ("a.top1:.0f", "97"),
        ("gain.top1@low:+.1f", "+12.2"),
        ("gain.top1@high:.2f", "15.20"),
        ("speed.run:,.0f", "14,024"),
        ("speed.run", "14,024.0"),
    ],
)
def test_a_number_is_put_in_its_mark(name: str, text: str) -> None:
    assert texts.filled(mark(name), CLAIMS) == (mark(name, text), [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (mark("b.top1"), "no claim b.top1"),
        (mark("a.top1@low"), "a.top1 has no low"),
        (mark("a.top1@middle"), "a.top1 has no middle"),
        (mark("gain.top1@spread"), "gain.top1 has no spread"),
        (mark("a.top1:q"), "line 1"),
        ("\na <!--claim:a.top1-->97.40", "line 2: a mark is not closed"),
        ("a <!--claim:a.top1-->97.40\n<!--/-->", "line 1: a mark is not closed"),
        ("a <!--claim:a.top1--><b>97.40</b><!--/-->", "holds more than a number"),
        ("text\n<!--claim:a.top1-->97.40<!--/--> b", "line 2: a mark begins the line"),
        ("- <!--fact-->96.33<!--/-->", "line 1: a mark begins the line"),
    ],
)
def test_what_is_wrong_with_a_mark(text: str, problem: str) -> None:
    assert any(problem in told for told in texts.filled(text, CLAIMS)[1])


def test_code_is_left_alone() -> None:
    code = f"`{mark('a.top1')}`\n\n```md\n{mark('b.top1')}\n```\n"
    assert texts.filled(code, CLAIMS) == (code, [])


@pytest.mark.parametrize(
    "text",
    ["97.4", "97 %", "97%", "0.5", "2 seconds", "3 分钟", "35 个百分点", "4 times", "−0.5", "1,024 MB", "| 1.5 |"],
)
def test_a_number_without_a_mark(text: str) -> None:
    assert len(texts.unmarked(f"first line\n{text}")) == 1
    assert texts.unmarked(f"first line\n{text}")[0].startswith("line 2")


@pytest.mark.parametrize(
    "text",
    [
        "1,770 photos of 101 classes", "Caltech-101", "Apache-2.0", "`--lr 0.01`", "```sh\nx --lr 0.01  # 2 s\n```",
        "[page](docs/v1.5.md)", "an <!--fact-->95%<!--/--> interval", mark("a.top1", "97.40"), '<img alt="1.5 s">',
    ],
)  # fmt: skip
def test_what_needs_no_mark(text: str) -> None:
    assert texts.unmarked(text) == []


@pytest.mark.parametrize(
    "text", ["with 96.68%", "by 1.40\npoints", "相差 1.4 个百分点", "| AUROC | 0.98 | x |", "AUROC 0.984"]
)
def test_what_needs_a_mark_in_the_documentation(text: str, project: Path) -> None:
    page = project / "docs" / "results.md"
    texts.main([], project)
    page.write_text(f"first line\n{text}\n")
    assert [line.split(":")[0] for line in texts.differences(project, CLAIMS)] == ["docs/results.md, line 2"]
    for written in (
        f"<!-- generated: python evidence/references.py -->\n{text}\n<!-- end of generated -->",
        f"```text\n{text}\n```",
        "at most 0.5, Python 3.11, 95% interval",
    ):
        page.write_text(written)
        assert texts.differences(project, CLAIMS) == []


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.json").write_text(json.dumps(list(CLAIMS.values())))
    (tmp_path / "docs" / "zh").mkdir(parents=True)
    for name in ("README.md", "README.zh-CN.md", "docs/results.md", "docs/zh/results.md"):
        (tmp_path / name).write_text(mark("a.top1", "97.39"))
    return tmp_path


def test_the_script_checks_and_writes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert texts.main(["--check"], project) == 1
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [
        "README.md", "README.zh-CN.md", "docs/results.md", "docs/zh/results.md"
    ]  # fmt: skip
    assert (project / "README.md").read_text() == mark("a.top1", "97.39")
    assert texts.main([], project) == 0
    assert {file.read_text() for file in project.rglob("*.md")} == {mark("a.top1", "97.40")}
    assert texts.main(["--check"], project) == 0


def test_lines_go_between_their_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- b -->\nafter\n")
    texts.write_between(page, ("<!-- a -->", "<!-- b -->"), "new\nrow")
    assert page.read_text() == "before\n<!-- a -->\nnew\nrow\n<!-- b -->\nafter\n"
    texts.write_between(page, ("<!-- c -->", "<!-- b -->"), "new")
    assert "after" in page.read_text() and "page.md" in capsys.readouterr().err
