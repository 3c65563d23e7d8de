"""A number of README or docs/ stands as ``<!--claim:ID-->96.69<!--/-->``; behind ID may come ``@low``, ``@high``,
``@spread`` or ``@n``, then a format as ``:.1f``. ``python evidence/texts.py`` puts it there from results/claims.json.

With ``--check`` nothing is written, and the exit code is 1 where a text differs from the claims. In the READMEs every
number with decimals or with a unit needs such a mark, or ``<!--fact-->96.33<!--/-->`` where nobody measured it here: a
definition, a size of the data, another's result. In docs/ every number with decimals does that has a unit, three
decimals or a table's cell of its own. Code and the parts that a script writes are left alone. No mark may begin a line:
there Markdown takes the rest of the line for HTML.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

READMES = ("README.md", "README.zh-CN.md")
CODE = r"^```.*?^```[^\n]*$|`[^`\n]+`"
MARK = re.compile(
    CODE + r"|(?P<head><!--claim:(?P<id>[^@:\s>]+)(?:@(?P<field>\w+))?(?::(?P<format>[^>\s]+?))?-->)"
    r"(?P<text>[^<>\n]*)<!--/-->",
    re.DOTALL | re.MULTILINE,
)
BESIDE = re.compile(CODE + r"|<!--.*?-->|<[^<>\n]*>|\]\([^)\n]*\)", re.DOTALL | re.MULTILINE)  # never shown as text
MARKED = re.compile(r"<!--(?:claim:[^>\s]+|fact)-->[^<>\n]*<!--/-->")
UNIT = r"%|points?\b|times\b|s\b|ms\b|seconds?\b|minutes?\b|hours?\b|[MG]B\b|个百分点|分钟|小时|秒|毫秒|倍|张/秒"
NUMBER = re.compile(rf"(?<![\w.])(?<![A-Za-z]-)(?:\d[\d,]*\.\d+|\d[\d,]*(?=\s?(?:{UNIT})))")
MEASURED = re.compile(rf"(?<![\w.])(?<![A-Za-z]-)\d[\d,]*\.(?:\d+(?=\s?(?:{UNIT})|[ *]*\|)|\d{{3,}}\b)")
WRITTEN = re.compile(r"^<!-- [a-z]+: python .*?^<!-- end of ", re.DOTALL | re.MULTILINE)
TWO_DECIMALS = (".top1", ".mean_per_class")


def pages(root: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every README and page below docs/ of the project at ``root``."""
    files = [root / name for name in READMES] + sorted((root / "docs").rglob("*.md"))
    for file in files:
        if file.is_file():
            yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")


def number(claim: Mapping[str, Any], field: str = "", form: str = "") -> str:
    """The value of ``claim``, or its ``field`` (low, high, spread, n), as a text shows it.

    Raises ValueError where the claim has no such number or the format does not fit.
    """
    value, spread = claim["value"], claim["spread"]
    if field in ("low", "high"):
        value = spread[field == "high"] if isinstance(spread, list) else None
    elif field == "spread":
        value = None if isinstance(spread, list) else spread
    elif field:
        value = claim["n"] if field == "n" else None
    if value is None:
        raise ValueError(f"{claim['id']} has no {field}")
    if form:
        return f"{value:{form}}"
    if field != "n" and claim["id"].endswith(TWO_DECIMALS):
        return f"{value:.2f}"
    return f"{value:,}"


def filled(text: str, claims: Mapping[str, Mapping[str, Any]]) -> tuple[str, list[str]]:
    """``text`` with the numbers of ``claims`` in its marks, and what is wrong with the marks, each with its line."""
    problems = []

    def fill(match: re.Match[str]) -> str:
        if not match["head"]:
            return match[0]
        line = f"line {text.count(chr(10), 0, match.start()) + 1}"
        if match["id"] not in claims:
            problems.append(f"{line}: there is no claim {match['id']}")
            return match[0]
        try:
            value = number(claims[match["id"]], match["field"] or "", match["format"] or "")
        except ValueError as error:
            problems.append(f"{line}: {error}")
            return match[0]
        return f"{match['head']}{value}<!--/-->"

    result = MARK.sub(fill, text)
    rest = MARKED.sub("", re.sub(CODE, lambda code: "\n" * code[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE))
    for count, line in enumerate(rest.splitlines(), start=1):
        if re.search(r"<!--(claim|fact)|<!--/-->", line):
            problems.append(f"line {count}: a mark is not closed, or holds more than a number")
    for match in re.finditer(r"^[\s>*+-]*<!--(claim|fact)", text, re.MULTILINE):
        problems.append(f"line {text.count(chr(10), 0, match.end()) + 1}: a mark begins the line; put a word before it")
    return result, problems


def unmarked(text: str, numbers: re.Pattern[str] = NUMBER) -> list[str]:
    """The ``numbers`` (with decimals or a unit) that stand in ``text`` without a mark, each with its line."""
    blank = text
    for left_alone in (WRITTEN, MARKED, BESIDE):
        blank = left_alone.sub(lambda part: "\n" * part[0].count("\n"), blank)
    places = ((match[0], blank.count("\n", 0, match.start()) + 1) for match in numbers.finditer(blank))
    return [f"line {line}: {digits} has no mark" for digits, line in places]


def differences(root: Path, claims: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What differs between the texts of the project at ``root`` and ``claims``, one line each."""
    wrong = []
    for name, text in pages(root):
        new, problems = filled(text, claims)
        wrong += [f"{name}, {problem}" for problem in problems]
        lines = zip(text.splitlines(), new.splitlines(), strict=True)
        wrong += [f"{name}, line {i}: not as claimed: {a}" for i, (a, b) in enumerate(lines, start=1) if a != b]
        numbers = NUMBER if name in READMES else MEASURED
        wrong += [f"{name}, {problem}" for problem in unmarked(text, numbers)]
    return wrong


def write_between(page: Path, marks: tuple[str, str], lines: str) -> None:
    """Puts ``lines`` between the lines ``marks`` of ``page``; says so where the page lacks them."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, first, rest = text.partition(marks[0])
    _, last, after = rest.partition(marks[1])
    if not (first and last):
        print(f"{page} has no place for it: {marks[0]} ... {marks[1]}", file=sys.stderr)
        return
    page.write_text(f"{before}{first}\n{lines}\n{last}{after}", encoding="utf-8")


def read_claims(root: Path) -> dict[str, dict[str, Any]]:
    """results/claims.json by id."""
    listed = json.loads((root / "results" / "claims.json").read_text(encoding="utf-8"))
    return {claim["id"]: claim for claim in listed}


def main(argv: list[str] | None = None, root: Path = Path(__file__).parents[1]) -> int:
    """Writes the numbers into the texts and says where; with --check says what differs, and returns 1 where it does."""
    parser = argparse.ArgumentParser(description="numbers of results/claims.json into README and docs/")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a text differs")
    arguments = parser.parse_args(argv)
    claims = read_claims(root)
    if not arguments.check:
        for name, text in pages(root):
            new, _ = filled(text, claims)
            if new != text:
                (root / name).write_text(new, encoding="utf-8")
                print(f"{name}: written")
    wrong = differences(root, claims)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
