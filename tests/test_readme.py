"""Both READMEs: short, of equal standing, each command tested or marked, no dead link, an output as it really is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import texts
from PIL import Image

from finetune101.cli.main import main

ROOT = Path(__file__).parents[1]
READMES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
BLOCK = re.compile(r"(<!--[^>]*-->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the blocks of code and the commands in the text, without comments."""
    parts = re.findall(r"```\w+\n(.*?)```|`(finetune101 [^`\n]+)`", text, re.DOTALL)
    return [re.sub(r"(^|\s+)#.*", "", line) for block, inline in parts for line in (block or inline).splitlines()]


def test_both_give_the_same_commands() -> None:
    english, chinese = READMES.values()
    assert commands(english) == commands(chinese) != []


def test_both_show_the_same_numbers() -> None:
    english, chinese = (re.findall(r"<!--(claim:[^>]+|fact)-->", text) for text in READMES.values())
    assert sorted(english) == sorted(chinese) != []


@pytest.mark.parametrize("readme", READMES)
def test_it_is_read_in_two_minutes(readme: str) -> None:
    assert len(READMES[readme].splitlines()) <= 150


@pytest.mark.parametrize("readme", READMES)
def test_each_command_is_tested_or_says_why_not(readme: str) -> None:
    """tests/test_examples.py runs ``finetune101``, test_original.py the original's commands, test_api.py the Python."""
    for comment, language, block in BLOCK.findall(READMES[readme]):
        tested = all(line.startswith(("finetune101 ", "python ", "tensorboard ")) for line in block.splitlines())
        assert language in ("text", "python") or (language == "sh" and (tested or "not run: " in comment)), block


@pytest.mark.parametrize("readme", READMES)
def test_no_link_is_dead(readme: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", READMES[readme])
    paths = [(a or b).partition("#")[0] for a, b in links]
    assert len(paths) > 20
    assert [path for path in paths if ":" not in path and not (ROOT / path).exists()] == []


@pytest.mark.parametrize("picture", ["front", "front-dark", "front-zh", "front-zh-dark"])
def test_the_pictures_show_the_claim(picture: str) -> None:
    """Where it fails: ``python evidence/front_picture.py`` draws them anew."""
    claim = texts.read_claims(ROOT)["compare.gain.efficientnet_lite0.top1"]
    file = ROOT / "docs" / "pictures" / f"{picture}.png"
    with Image.open(file) as image:
        assert image.size == (1600, 900) and image.info["claim"] == texts.number(claim)
    assert file.stat().st_size < 300_000


@pytest.mark.caltech101
def test_the_label_of_a_photo_is_as_shown(caltech101: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = READMES["README.md"]
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    (name,) = re.findall(r"`(\w+/image_\d+\.jpg)`", text)
    (here / "photo.jpg").write_bytes((caltech101 / name).read_bytes())
    (command,) = re.findall(r"^finetune101 (predict photo\.jpg.*)$", text, re.MULTILINE)
    assert main(command.split()) == 0
    streams = capsys.readouterr()
    printed = streams.err.splitlines() + streams.out.splitlines()
    label = re.compile(r"^ +([\d.]+) %  (\w+)$")
    wanted = shown.splitlines()
    assert [label.sub(r"\2", line) for line in printed] == [label.sub(r"\2", line) for line in wanted]
    numbers = [[float(match[1]) for match in map(label.match, lines) if match] for lines in (printed, wanted)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.2)  # another processor rounds otherwise
