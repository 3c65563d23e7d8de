"""Pages in two languages: nothing of the other language on a page or in its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from written_runs import write_run

from finetune101.cli.main import main
from finetune101.reports import drawing, figures
from finetune101.reports.page import LANGUAGES, read_words, sentence

CHINESE = re.compile("[\u4e00-\u9fff]")
SAME = {"p", "v_trivial", "env_gpu"}  # the same in every language


def test_both_languages_have_every_word_with_the_same_values() -> None:
    english, chinese = (read_words(lang) for lang in LANGUAGES)
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        fields = [{name.split(":")[0] for name in re.findall(r"{(\w+)", one)} for one in (text, chinese[key])]
        allowed = {"n", "millions", "tens_of_thousands"}  # one of two units; a plural may leave the number out
        assert fields[0] ^ fields[1] <= allowed, key
        if re.search("[a-z]{3}", re.sub("{[^}]*}", "", text)) and key not in SAME:
            assert CHINESE.search(chinese[key]), key
            assert text != chinese[key], key


def test_one_is_told_in_the_singular() -> None:
    words = {"runs": "{n} runs", "runs_one": "one run", "other": "{n} others"}
    assert [sentence(words, "runs", n=n) for n in (1, 2)] == ["one run", "2 runs"]
    assert sentence(words, "other", n=1) == "1 others"


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All words in the pictures that are saved."""
    kept: list[str] = []
    save_figure = figures.save_figure

    def keep(figure: Figure, *rest: Any, **options: Any) -> Path:
        out = save_figure(figure, *rest, **options)
        kept.extend(one.get_text() for one in figure.findobj(Text) if isinstance(one, Text))
        return out

    monkeypatch.setattr(figures, "save_figure", keep)
    return kept


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Two arms of two runs each, compared."""
    for arm, wrong in (("tuned", 20), ("scratch", 60)):
        for seed in (0, 1):
            mistakes = {seed + 3 * i for i in range(wrong)}
            write_run(tmp_path / arm / f"s{seed}", mistakes, scores=[50, 60, 70], run_seed=seed)
    out = tmp_path / "comparison"
    assert main(["compare", str(tmp_path / "tuned"), str(tmp_path / "scratch"), "--out", str(out)]) == 0
    return out


def sentences(lang: str) -> Iterator[str]:
    """What the templates say in this language, cut at values; only what is long enough to be told from a name."""
    for text in read_words(lang).values():
        yield from (
            part.strip() for part in re.split(r"{[^}]*}", text) if len(part.strip()) > (11 if lang == "en" else 3)
        )


@pytest.mark.skipif(drawing.chinese_font() is None, reason="needs a font with Chinese characters")
@pytest.mark.parametrize("style", ["full", "assignment"])
def test_a_page_has_the_words_of_its_language_only(
    comparison: Path, tmp_path: Path, texts: list[str], style: str
) -> None:
    name = "report" if style == "full" else style
    for lang, other in (("zh", "en"), ("en", "zh")):
        texts.clear()
        words = ["--lang", lang, "--style", style, "--no-gallery", "--out", str(tmp_path / lang)]
        assert main(["report", str(comparison), *words]) == 0
        page = re.sub(r"data:image/[^\"]*", "", (tmp_path / lang / f"{name}.html").read_text(encoding="utf-8"))
        page = page[page.index("<body>") : page.index("<script>")]
        told = page + "\n".join(texts)
        own = set(sentences(lang))
        assert [part for part in sentences(other) if part in told and part not in own] == []
        assert len(texts) > 50 and bool(CHINESE.search("".join(texts))) == (lang == "zh")
        assert bool(CHINESE.search(page)) == (lang == "zh")


def test_pictures_are_in_english_where_no_font_has_chinese(
    comparison: Path, tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "chinese_font", lambda: None)
    assert main(["report", str(comparison), "--lang", "zh", "--no-gallery", "--out", str(tmp_path / "out")]) == 0
    assert texts and not CHINESE.search("".join(texts))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert read_words("zh")["no_font"] in page and "fonts-noto-cjk" in page


@pytest.mark.skipif(drawing.chinese_font() is None, reason="needs a font with Chinese characters")
def test_a_font_that_was_installed_after_matplotlib_made_its_list_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, name = font_manager.fontManager, drawing.chinese_font()
    files = {font.fname for font in manager.ttflist if font.name in (name, *drawing.CHINESE)}
    old = [font for font in manager.ttflist if font.fname not in files]
    monkeypatch.setattr(manager, "ttflist", old)
    assert drawing.chinese_font.__wrapped__() in (name, *drawing.CHINESE)


def test_a_font_of_boxes_is_not_one_for_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = font_manager.fontManager
    western = [font for font in manager.ttflist if font.name.startswith(("DejaVu Sans", "Last Resort"))]
    monkeypatch.setattr(manager, "ttflist", western)
    monkeypatch.setattr(font_manager, "findSystemFonts", list)
    assert drawing.chinese_font.__wrapped__() is None


def test_a_character_that_no_font_has_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"epoch": 1, "train_loss": 1.0, "train_top1": 50.0, "val_loss": None, "val_top1": None, "best": True}
    for name in ("one.png", "two.png"):
        figures.draw_curves([record], tmp_path / name, "\U00012000")  # cuneiform
    told = capsys.readouterr().err
    assert told.count("No font on this machine can draw \U00012000") == 1 and "Install one" in told
