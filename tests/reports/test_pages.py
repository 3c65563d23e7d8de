"""Report pages of really trained runs: what stands on them, what they never load, and how a browser sees them."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, browser
from written_runs import write_run

from finetune101.cli.main import main
from finetune101.errors import Refused
from finetune101.evaluation.tested import Answer, confused_pairs
from finetune101.reports import groups, mistakes
from finetune101.reports.page import TEMPLATES, Name, Page, read_words, words
from finetune101.reports.run_sections import add_details
from finetune101.run import Run

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


def make(target: Path, out: Path, *words: str, name: str = "report") -> str:
    """The page about ``target``."""
    assert main(["report", str(target), "--out", str(out), *words]) == 0
    return (out / f"{name}.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    """Notes every tag, its attributes, and what is open at the end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br", "source"):
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
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in read.tags if tag == "th")
    assert {"col", "row"} <= {attrs.get("scope") for _, attrs in read.tags}
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
    for expected in (
        f"{test['top1']:.2f}%",
        test["manifest_hash"],
        f"{test['loss']:.3f}",
        env["versions"]["torch"],
        "finetune101 evaluate",
    ):
        assert expected in page
    assert f"{test['calibration_scaled']['ece']:.3f}" in page
    assert "36 images of 3 classes" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert len(pictures) == 3 and all((tmp_path / name).is_file() for name in pictures)
    assert f"{test['top1']:.2f}%" in text and "| class | accuracy, % (95%) | images |" in text
    optim = Run(runs / "r0").config().optim
    assert optim.nesterov and optim.schedule == "cosine"
    rows = dict(re.findall(r"^\| (\w[^|]*) \| ([^|]*) \|", text, re.MULTILINE))
    assert rows["optimizer"] == f"SGD, Nesterov momentum {optim.momentum:g}"
    assert rows["learning rate, output layer"] == f"{optim.lr:g}"
    assert rows["learning rate, other layers"] == f"{optim.lr:g} (1 ×)"  # from scratch all layers learn alike
    assert (rows["batch size"], rows["epochs"]) == ("8", "1")
    assert rows["test loss (cross-entropy)"] == f"{test['loss']:.3f}"


def test_without_gallery_the_images_need_not_be_there(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "data:image/jpeg" not in make(runs / "r0", tmp_path, "--no-gallery")
    capsys.readouterr()
    assert main(["report", str(runs / "r0"), "--out", str(tmp_path), "--data", str(tmp_path / "none")]) == 2
    assert "--no-gallery" in capsys.readouterr().err
    assert main(["report", "nope", "--runs", str(runs)]) == 2
    assert "no run named nope; there are: r0, r1" in capsys.readouterr().err


def test_mistakes_show_where_the_network_looked_and_what_is_near(runs: Path, tmp_path: Path) -> None:
    read = Reader(make(runs / "r0", tmp_path))
    alts = [attrs["alt"] for tag, attrs in read.tags if tag == "img"]
    looked, near = sum("where it looked" in alt for alt in alts), alts.count("nearest training image")
    assert looked > 0 and near == 3 * looked
    assert "where it looked" not in make(runs / "r0", tmp_path, "--no-explain")


def test_a_page_whose_network_cannot_be_read_says_so(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "r0", tmp_path / "r0")
    (tmp_path / "r0/best.safetensors").write_text("damaged")
    page = make(tmp_path / "r0", tmp_path / "out")
    assert "Where the network looked is left out: " in page and "is damaged" in page


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "![x](http:evil)",
    "](javascript:alert(1))",
    "a|b",
    "a`b",
    "new\nline",
    "\x1b[31mred",
    "*bold*",
    "not UTF-8 \udcff",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stand_as_they_are_in_markdown_and_html(tmp_path: Path, name: str) -> None:
    page = Page(tmp_path, "en")
    page.title, page.headline = name, f"headline {name}"
    page.table("classes", [Name(name), "images"], [[words(name), words("1")]], name)
    page.add("gallery", "mistakes", examples=[{"path": name, **answer(name)._asdict(), "image": None}])
    page.add(
        "pairs", "pairs", pairs=[{"label": name, "prediction": name, "count": 1, "images": [None, None]}], unread=""
    )
    page.add("facts", "failed", facts=[(name, name)])
    page.add("code", "commands", lines=[f"train {name}", "```", "# after"])
    page.write()
    html, text = ((tmp_path / file).read_text(encoding="utf-8") for file in ("report.html", "report.md"))
    assert not {"script", "img"} & {tag for tag, attrs in Reader(html).tags if tag == "img" or attrs.get("src")}
    assert "<script>alert" not in html and "\x1b" not in text + html
    before, fence, code = text.partition("````sh\n")
    assert fence and code.splitlines()[1:4] == ["```", "# after", "````"]
    assert not re.search(r"<(script|img)|(?<!\\)\]\(|(?<!\\)`", before)
    headings = [line for line in before.splitlines() if line.startswith("#")]
    assert len(headings) == 6  # the title and one of each section: a name begins no line
    table = [line for line in before.splitlines() if line.startswith("|")]
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in table] == [3, 3, 3]


def answer(name: str) -> Answer:
    """A mistake between two classes of this name."""
    return Answer(name, name + "!", 0.9)


def test_headings_are_words_or_names(tmp_path: Path) -> None:
    page = Page(tmp_path, "en")
    page.table("cells", ["size", Name("size")], [])
    assert page.sections[0]["heads"] == ["images per class", "size"]
    with pytest.raises(KeyError):
        page.table("cells", ["no such word"], [])


@pytest.mark.parametrize("stem", ["/../../../escaped", "..", "a" * 300, "x/y", ".hidden", "\0"])
def test_pictures_stay_in_the_folder(tmp_path: Path, stem: str) -> None:
    page = Page(tmp_path / "page" / "in", "en")

    def draw(file: Path, narrow: bool = False) -> Path:
        file.write_bytes(b"picture")
        return file

    page.picture("search_heat", draw, "alt", stem=stem, upto="")
    page.write()
    assert sorted(path.suffix for path in page.folder.iterdir()) == [".html", ".md", ".png"]
    assert list(tmp_path.iterdir()) == [tmp_path / "page"] and list((tmp_path / "page").iterdir()) == [page.folder]


@pytest.mark.parametrize("path", ["../secret/bee/1.jpg", "/etc/bee/1.jpg", "C:\\bee\\1.jpg", "a/../../bee/1.jpg"])
def test_no_picture_from_outside_of_the_data(tmp_path: Path, path: str) -> None:
    with pytest.raises(Refused, match="not inside"):
        mistakes.picture(tmp_path, path)
    run = write_run(tmp_path / "run", {1})
    split = run.read_json("split.json")
    split["subsets"]["train"][0] = path if "bee" in path.split("/")[-2:-1] else f"ant/{path}"
    run.write_json("split.json", split)
    with pytest.raises(Refused):
        groups.read_tested(run)


def test_a_page_without_the_picture_that_cannot_be_read(tiny_data: Path, runs: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for file in data.rglob("*.*"):
        file.write_bytes(b"no picture at all")
    page = make(runs / "r0", tmp_path / "out", "--data", str(data))
    assert "data:image/jpeg" not in page and "could not be read" in page


@pytest.mark.parametrize(("after", "sentence"), [(0.3, "not help"), (0.1, "after temp"), (0.2, "no temperature")])
def test_a_temperature_that_does_not_help_is_no_improvement(tmp_path: Path, after: float, sentence: str) -> None:
    run = write_run(tmp_path / "run", {1, 2})
    bins = [{"n": 5, "confidence": 80.0, "top1": 60.0}]
    scaled = {"ece": after, "bins": bins, "temperature": 1.0 if after == 0.2 else 36.0}
    run.write_json("test.json", {**run.read_json("test.json"), "calibration": {"ece": 0.2, "bins": bins},
                                 "calibration_scaled": scaled})  # fmt: skip
    page = Page(tmp_path / "page", "en")
    add_details(page, groups.read_tested(run), "", None)
    assert sentence in page.sections[-1]["note"]


def test_a_study_with_failed_runs_tells_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("finetune", "scratch"):
        write_run(tmp_path / "study" / "net" / name / "all" / "split42_seed0", {1, 2}, scores=[50, 60])
    cell = {"model": "efficientnet_lite0", "size": None, "n": 1, "planned": 2, "seconds": 60.0}
    cell |= {"top1": 99.0, "top1_sd": None, "mean_per_class": 99.0, "mean_per_class_sd": None}
    cells = [
        {**cell, "arm": name, "folder": f"net/{name}/all", "errors": ["out of memory (seed 1)"] * (name == "scratch")}
        for name in ("finetune", "scratch")
    ]
    Run(tmp_path / "study").write_json("study.json", {"settings": {}, "cells": cells})
    page = make(tmp_path / "study", tmp_path / "out", "--no-gallery")
    assert "Failed runs: 1." in page and "out of memory (seed 1)" in page
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "study"), "--out", str(tmp_path / "compared")]) == 0
    assert "failed in net/scratch/all: out of memory" in capsys.readouterr().out
    cells = [{**one, "n": 0} for one in cells]
    Run(tmp_path / "study").write_json("study.json", {"settings": {}, "cells": cells})
    assert main(["compare", str(tmp_path / "study")]) == 2
    assert "out of memory" in capsys.readouterr().err


def test_confused_classes_stand_together() -> None:
    names = [f"class {k:02d}" for k in range(40)]
    answers = {f"{name}/{i}": Answer(name, name, 0.9) for name in names for i in range(5)}
    for a, b in ((0, 20), (5, 33)):  # taken for each other
        answers[f"{names[a]}/0"] = Answer(names[a], names[b], 0.8)
        answers[f"{names[b]}/0"] = Answer(names[b], names[a], 0.7)
    matrix = mistakes.confusion_of(answers)
    assert matrix.hidden == 36 and matrix.blocks == [2, 2]
    assert {frozenset(matrix.names[:2]), frozenset(matrix.names[2:])} == {
        frozenset({names[0], names[20]}),
        frozenset({names[5], names[33]}),
    }
    assert np.array_equal(np.diag(matrix.counts), [4] * 4) and matrix.counts.sum() == 20
    assert confused_pairs(answers)[0] == (names[0], names[20], 1)
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


@pytest.mark.parametrize("lang", ["en", "zh"])
@pytest.mark.parametrize("target", ["runs/r0", "comparison"])
def test_the_assignment_says_what_a_lab_report_has_to_say(runs: Path, tmp_path: Path, target: str, lang: str) -> None:
    make(runs.parent / target, tmp_path, "--style", "assignment", "--lang", lang, name="assignment")
    text = (tmp_path / "assignment.md").read_text(encoding="utf-8")
    told = read_words(lang)
    data = (
        "lab_data",
        "lab_method",
        "lab_training",
        "lab_results",
        "lab_classes",
        "lab_conclusion",
        "steps",
        "test_loss",
    )
    settings = ("lr", "backbone", "batch", "decay", "optimizer", "loss", "schedule")
    for key in (*data, *(f"set_{name}" for name in settings)):
        assert told[key] in text, key
    test = json.loads((runs / "r0" / "test.json").read_text())
    for value in (f"{test['top1']:.2f}", f"{test['loss']:.3f}", "(1 ×)"):
        assert value in text
    assert [line[3] for line in text.splitlines() if line.startswith("## ")] == list("123456789")


def test_a_search_has_no_assignment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "search.json").write_text("{}")
    assert main(["report", str(tmp_path), "--style", "assignment"]) == 2
    assert f"give the run or comparison as target, and --search {tmp_path}" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--search", str(tmp_path)]) == 2
    assert "add --style assignment" in capsys.readouterr().err


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize("style", ["full", "assignment"])
def test_nothing_is_cut_on_a_phone_and_on_paper(runs: Path, tmp_path: Path, style: str) -> None:
    name = "report" if style == "full" else style
    make(runs.parent / "comparison", tmp_path, "--style", style, "--lang", "zh", name=name)
    (tmp_path / "profile").mkdir()
    with browser(tmp_path / "profile") as tab:
        for width, phone in ((390, True), (1280, False)):
            tab.screen(width, 800, phone=phone)
            tab.open((tmp_path / f"{name}.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") == width
            assert tab.evaluate(f"{CUT}.map(one => one.outerHTML.slice(0, 200))") == []
            assert tab.evaluate(STACKED) is phone
            # a confusion matrix is scrolled on a phone only
            assert phone or tab.evaluate(f"{WHOLE}.every(one => one.scrollWidth <= one.clientWidth)")
        page = tab.call("Page.printToPDF", preferCSSPageSize=True)["data"]
        box = re.search(rb"/MediaBox *\[ *0 0 ([0-9.]+) ([0-9.]+)", base64.b64decode(page))
        assert box and [round(float(side)) for side in box.groups()] == [595, 842]  # A4 in points
        assert not tab.problems


# what reaches beyond the screen; what scrolls in a box of its own is not cut
CUT = """[...document.querySelectorAll("body *")].filter(one => {
  const box = one.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !one.closest(".scroll");
})"""
WHOLE = "[...document.querySelectorAll('.picture.whole')]"
STACKED = """[...document.images].filter(one => one.closest(".picture:not(.whole)")).every(
  one => one.naturalWidth < 700)"""
