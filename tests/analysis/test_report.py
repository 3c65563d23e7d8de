"""Report pages of really trained runs: what stands on them, what they never load, and how a browser sees them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from finetune101.analysis import mistakes
from finetune101.analysis.groups import Answer
from finetune101.analysis.page import TEMPLATES
from finetune101.cli import main

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tested runs, and their comparison."""
    folder = tmp_path_factory.mktemp("report") / "runs"
    small = ["--model", "squeezenet1_1", "--size", "32", "--batch-size", "8", "--threads", "1", "--epochs", "1"]
    for seed in ("0", "1"):
        words = ["--exp", f"r{seed}", "--runs", str(folder), "--data", str(tiny_data), "--no-pretrain", *small]
        assert main(["train", *words, "--seed", seed]) == 0
        assert main(["evaluate", f"r{seed}", "--runs", str(folder)]) == 0
    assert main(["compare", "r0", "r1", "--runs", str(folder), "--out", str(folder.parent / "comparison")]) == 0
    return folder


def make(target: Path, out: Path, *words: str) -> str:
    """The page about ``target``."""
    assert main(["report", str(target), "--out", str(out), *words]) == 0
    return (out / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Notes every tag, its attributes, and what is open at the end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("target", ["runs/r0", "comparison"])
def test_the_page_is_whole_and_loads_nothing(runs: Path, tmp_path: Path, target: str, lang: str) -> None:
    page = make(runs.parent / target, tmp_path, "--lang", lang)
    read = Reader(page)
    assert not read.open and f'<html lang="{lang}">' in page
    pictures = [attrs for tag, attrs in read.tags if tag == "img"]
    assert len(pictures) > 10 and all(image["src"].startswith("data:image/") for image in pictures)
    assert all(image["alt"] for image in pictures)
    assert not [tag for tag, attrs in read.tags if tag == "link" or attrs.get("href") or "url(" in str(attrs)]
    assert "http" not in re.sub(r"data:image/[^\"]*|http-equiv", "", page)
    assert len(page) < 1_500_000
    words = json.loads((TEMPLATES / f"{lang}.json").read_text(encoding="utf-8"))
    for key in ("confusion", "mistakes", "hits", "reliability", "protocol_title", "commands"):
        assert words[key] in page


def test_a_run_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    page = make(runs / "r0", tmp_path)
    test = json.loads((runs / "r0" / "test.json").read_text())
    env = json.loads((runs / "r0" / "env.json").read_text())
    for expected in (f"{test['top1']:.2f} %", test["manifest_hash"], env["versions"]["torch"], "finetune101 evaluate"):
        assert expected in page
    assert f"{test['calibration_scaled']['ece']:.3f} after temperature scaling" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 3 and all((tmp_path / name).is_file() for name in pictures)
    assert f"{test['top1']:.2f} %" in text and "| class | images |" in text


def test_without_gallery_the_images_need_not_be_there(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data:image/jpeg" not in make(runs / "r0", tmp_path, "--no-gallery")
    capsys.readouterr()
    assert main(["report", str(runs / "r0"), "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
    assert "--no-gallery" in capsys.readouterr().err
    assert main(["report", "nope", "--runs", str(runs)]) == 2
    assert "no run named nope; there are: r0, r1" in capsys.readouterr().err


def test_class_names_cannot_inject(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "r0", run)
    file = run / "predictions.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    for row in rows[1:4]:
        row[2] = "<script>alert(1)</script>"
    file.write_text("\n".join(map(",".join, rows)) + "\n")
    test = json.loads((run / "test.json").read_text())
    test["correct"] = sum(row[1] == row[2] for row in rows)
    (run / "test.json").write_text(json.dumps(test))
    assert "<script>alert" not in make(run, tmp_path / "out", "--no-gallery")


def test_confused_classes_stand_together() -> None:
    names = [f"class {k:02d}" for k in range(40)]
    answers = {f"{name}/{i}": Answer(name, name, 0.9) for name in names for i in range(5)}
    for a, b in ((0, 20), (5, 33)):  # taken for each other
        answers[f"{names[a]}/0"] = Answer(names[a], names[b], 0.8)
        answers[f"{names[b]}/0"] = Answer(names[b], names[a], 0.7)
    found = mistakes.confusion(answers)
    assert found.hidden == 36 and found.blocks == [2, 2]
    assert {frozenset(found.names[:2]), frozenset(found.names[2:])} == {
        frozenset({names[0], names[20]}),
        frozenset({names[5], names[33]}),
    }
    assert np.array_equal(np.diag(found.counts), [4] * 4) and found.counts.sum() == 20
    assert mistakes.pairs(answers)[0] == (names[0], names[20], 1)
    assert [e["confidence"] for e in mistakes.examples(answers, False, None)] == [0.8, 0.8, 0.7, 0.7]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("target", ["runs/r0", "comparison"])
def test_a_browser_opens_it_and_its_tables_sort(runs: Path, tmp_path: Path, target: str) -> None:
    make(runs.parent / target, tmp_path)
    assert BROWSER
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri() + "#selftest"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert 'data-selftest="ok"' in done.stdout, re.findall('data-selftest="[^"]*"', done.stdout)
    assert "CONSOLE" not in done.stderr
