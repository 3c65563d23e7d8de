"""How the Chinese pages are written: Chinese punctuation, brackets of one kind, a space between Chinese and Latin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.zh-CN.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
LEFT_OUT = re.compile(
    r"<!-- (?:generated|speed|accuracy).*?<!-- end of .*?-->|^```.*?^```$|<!--.*?-->|<[^<>\n]*>", re.S | re.M
)
HAN, WIDE = "[\u4e00-\u9fff]", "[，。；：！？、（）]"
WRONG = {
    "punctuation": rf"{HAN}[,;:!?]|[,;:!?]{HAN}",
    "brackets": rf"{HAN}\(|\){HAN}|\([^()（）]*）|（[^()（）]*\)",
    "no space": rf"{HAN}[A-Za-z0-9`]|[A-Za-z0-9`%]{HAN}",
    "space": rf"[^|\n]{WIDE} [^|·]|[^|·] {WIDE}",
}


def mistakes(text: str) -> Iterator[str]:
    """What is wrong in the prose of ``text``, with the place."""
    prose = LEFT_OUT.sub("", text)
    prose = re.sub(r"`[^`\n]*`", "`x`", re.sub(r"\]\([^)]*\)", "]", prose))
    prose = re.sub(r"!\[|[\[\]*]", "", prose)  # links and bold text are read through
    for name, pattern in WRONG.items():
        for match in re.finditer(pattern, prose):
            yield f"{name}: {prose[max(0, match.start() - 12) : match.end() + 12]!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_chinese_page_is_punctuated(page: Path) -> None:
    assert list(mistakes(page.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    ["训练,测试。", "网络(大)。", "网络（大)。", "用GPU训练。", "用`train`命令。", "约 3%的图片。", "图片， 网络。"],
)
def test_a_mistake_is_found(text: str) -> None:
    assert list(mistakes(text))
    assert not list(mistakes("用 `train` 训练网络（很大）：约 3% 的图片，[见这里](a.md)。\n"))
