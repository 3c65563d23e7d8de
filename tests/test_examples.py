"""The README's own commands, in its order, in one folder with small images; only sizes and lengths are cut.

They are the lines of its ```sh blocks and what stands in `finetune101 ...` signs; the original's commands are run by
test_original.py.

Of the pages in docs/ the blocks that begin with ```sh runnable or ```python runnable are run as they stand, those with
"small" as the README's: only sizes and lengths are cut. Every other block has a comment <!-- not run: why --> before
it. Each page has a folder of its own with photo.jpg, photos/ (12 images), path/to/photos and data/101_ObjectCategories
(a folder per class) and runs/mine, a tested run, unless the page trains it. A line ``PRODUCER | finetune101 ...`` gives
what PRODUCER prints to the command. The Chinese pages give the same commands and are not run.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune101.cli.main import ABOUT, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = [
    line.split(" #")[0].strip()
    for block, inline in re.findall(r"```sh\n(.*?)```|`(finetune101 [^`\n]+)`", README, flags=re.S)
    for line in (block or inline).splitlines()
    if line.startswith("finetune101 ")
]
SMALL = ["--size", "64", "--batch-size", "8", "--epochs", "1"]
CUTS = {
    "train": [*SMALL, "--train-per-class", "6"],
    "search": [*SMALL, "--model", "squeezenet1_1", "--no-pretrain", "--seeds", "1"],
    "study": [*SMALL[:4], "--epochs", "2", "--seeds", "1", "--splits", "1"],  # scratch_fast has an epoch of warm-up
    "benchmark": ["--models", "squeezenet1_1", "--size", "64", "--batch-size", "8", "--steps", "1", "--repeats", "1"],
    "lr-find": ["--size", "64", "--batch-size", "8", "--steps", "20", "--low", "0.001", "--head", "random"],
    "demo": ["--epochs", "1"],
}
RUN = r"^```(sh|python) (runnable|small)\n(.*?)^```"
PAGES = {
    page.stem: blocks
    for page in sorted((ROOT / "docs").glob("*.md"))
    if (blocks := re.findall(RUN, page.read_text(encoding="utf-8"), re.S | re.M))
}
ELSEWHERE = ("data download", "demo", "serve")  # needs the network; the others have tests of their own


def shortened(line: str) -> list[str]:
    """The words of a command behind ``finetune101``, with small sizes; [] for one that is tested elsewhere."""
    words = shlex.split(line)[1:]
    if words[0] == "auto":  # which is tested elsewhere: a training leaves such a run
        words = ["train", "--exp", words[words.index("--exp") + 1], "--data", words[1]]
    elif " ".join(words[:2]).startswith(ELSEWHERE):
        return []
    cut = [] if words[1:2] == ["report"] else list(CUTS.get(words[0], []))
    if "--stage" in words:  # needs a network that ends in a linear layer
        cut = SMALL
    cut += ["--train-per-class", "2"] if words[0] == "study" and "--train-per-class" in words else []
    if "--trials" in words:
        words[words.index("--trials") + 1] = "8"
    if words[0] == "search" and "--budget" in words:  # test_outcome.py lets one end within its budget
        cut = [*cut, "--dry-run"]
    if "probe" in words and words[0] == "train":  # the recipe has no epochs
        cut = SMALL[:4]
    if "winner.yaml" in line or "--inference" in words or "--resume" in words:
        cut = []
    return [*words, *cut]


def test_every_verb_has_an_example() -> None:
    verbs = re.findall(r"^  ([\w-]+)", ABOUT, flags=re.M)
    assert len(verbs) >= 10
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    named = set(re.findall(r"finetune101 ([a-z][\w-]*)", f"{pages}\n{README}"))
    assert set(verbs) - {"demo"} <= named, "give each of these an example in docs/"


@pytest.mark.slow
def test_the_examples_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FINETUNE101_DATA", raising=False)
    for folder in ("data/101_ObjectCategories", "path/to/photos", "photos"):
        source = tiny_data / "ball" if folder == "photos" else tiny_data
        shutil.copytree(source, tmp_path / folder)
    shutil.copyfile(tiny_data / "box/image_0001.jpg", tmp_path / "photo.jpg")
    ran = []
    for line in EXAMPLES:
        if words := shortened(line):
            assert main(words) == 0, f"{line}: {capsys.readouterr().err}"
            ran.append(words[0])
    assert len(ran) >= 12 and (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(
    page: str, tiny_data: Path, runs: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if not any("train --exp mine --data" in block for *_, block in PAGES[page]):  # which makes the run
        shutil.copytree(runs / "a", here / "runs" / "mine")
    for folder in ("path/to/photos", "data/101_ObjectCategories"):
        shutil.copytree(tiny_data, here / folder)
    shutil.copytree(tiny_data / "ball", here / "photos")
    shutil.copyfile(tiny_data / "box/image_0001.jpg", here / "photo.jpg")
    names: dict[str, Any] = {}
    for language, kind, block in PAGES[page]:
        if language == "python":
            code = re.sub(r'exp="(\w+)"(.*?)(, epochs=\d+)?\)', r'exp="\1"\2, epochs=2, size=64, batch_size=8)', block)
            exec(compile(code if kind == "small" else block, f"docs/{page}.md", "exec"), names)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split(" #")[0].strip()
            if command.startswith("python "):
                subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True, cwd=here)
                continue
            producer, pipe, consumer = command.rpartition(" | finetune101 ")
            if pipe:
                printed = subprocess.run(producer, shell=True, check=True, capture_output=True, cwd=here).stdout
                monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(printed)))
            words = shlex.split(consumer if pipe else command.removeprefix("finetune101 "))
            assert command == "" or pipe or command.startswith("finetune101 "), f"{page}.md: no command of ours: {line}"
            words = shortened(command) if command and kind == "small" else words
            assert not words or main(words) == 0, f"{page}.md: {line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    fences = re.findall(
        r"^(<!-- not run: .+ -->\n)?```(\w+) ?(.*)\n(?:.*\n)*?```$", page.read_text(encoding="utf-8"), re.M
    )
    for why, language, kind in fences:
        assert language not in ("sh", "python") or why or kind in ("runnable", "small", "server", "signature"), (
            page.name
        )


def blocks(page: Path) -> list[tuple[str, str]]:
    """The first line of each block of code, and its code without comments and without the language of its output."""
    fences = re.findall(r"^```(\w.*)\n((?:.*\n)*?)```$", page.read_text(encoding="utf-8"), re.M)
    return [(head, re.sub(r" *(#|//) .*$| --lang zh", "", lines, flags=re.M)) for head, lines in fences]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "zh").glob("*.md")), ids=lambda page: page.stem)
def test_a_chinese_page_has_the_code_and_the_numbers_of_the_english_one(page: Path) -> None:
    english = ROOT / "docs" / page.name
    assert blocks(page) == blocks(english)
    marks = [re.findall(r"<!--claim:([^>]+)-->", one.read_text(encoding="utf-8")) for one in (page, english)]
    assert sorted(marks[0]) == sorted(marks[1])
