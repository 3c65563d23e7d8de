"""What all pictures share: colours, style, fonts for Chinese, and how a figure becomes a file."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from PIL import Image

from finetune101.errors import escaped
from finetune101.files import atomic
from finetune101.reports.page import read_words

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
ARMS = (BLUE, VERMILION, GREEN, "#A0448A", "#7A5C00")  # one for each arm
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
PHONE = 4.4  # width in inches of a picture for a phone
# A style context rather than rcParams, so that a caller's own plots keep theirs; names may hold any character.
STYLE: Any = {
    "font.size": 10.5,
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11.5,
    "axes.titlepad": 10,
    "grid.color": "#E3E3E3",
    "lines.linewidth": 2,
    "legend.frameon": False,
}
# Of a collection of fonts (.ttc) matplotlib reads the first one: of Noto Sans CJK that is the Japanese one, which has
# the Chinese characters as well.
CHINESE = (
    "Noto Sans CJK SC", "Noto Sans SC", "Noto Sans CJK JP", "Source Han Sans SC", "Source Han Sans CN", "PingFang SC",
    "Hiragino Sans GB", "Heiti SC", "Heiti TC", "STHeiti", "Microsoft YaHei", "DengXian", "SimHei", "SimSun",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Serif CJK SC", "Noto Serif CJK JP", "Droid Sans Fallback",
    "Arial Unicode MS",
)  # fmt: skip


@functools.cache
def chinese_font() -> str | None:
    """The name of a font of this machine that has Chinese characters; None without one.

    Matplotlib keeps a list of fonts for ever, so fonts that were installed since are added to it.
    """
    manager = font_manager.fontManager
    if name := _chinese_of([font.name for font in manager.ttflist]):
        return name
    listed = {font.fname for font in manager.ttflist}
    before = len(manager.ttflist)
    for file in sorted(set(font_manager.findSystemFonts()) - listed):
        with contextlib.suppress(OSError, RuntimeError, ValueError):
            manager.addfont(file)
    if name := _chinese_of([font.name for font in manager.ttflist[before:]]):
        return name
    for font in manager.ttflist:
        if font.name.startswith("Last Resort"):  # comes with matplotlib: one box for every character there is
            continue
        with contextlib.suppress(OSError, RuntimeError):
            if FT2Font(font.fname).get_char_index(ord("图")):
                return str(font.name)
    return None


def _chinese_of(names: Sequence[str]) -> str | None:
    return next((name for name in CHINESE if name in names), None)


def picture_words(lang: str) -> Mapping[str, str]:
    """The words of pictures in the language ``lang``; English ones where no font here could draw them."""
    return read_words(lang if lang == "en" or chinese_font() else "en")


def font_remark(lang: str) -> str:
    """What a page in the language ``lang`` says where its pictures had to be in English; else ""."""
    return "" if lang == "en" or chinese_font() else read_words(lang)["no_font"]


def plot_style() -> Any:
    """The style, with a font for Chinese behind matplotlib's own, which draws digits and the minus sign."""
    fonts = ["DejaVu Sans", *filter(None, [chinese_font()])]
    return matplotlib.rc_context({**STYLE, "font.family": fonts})


@functools.cache
def _say_missing(characters: str) -> None:
    """Says once that no font here can draw ``characters``."""
    print(
        f"No font on this machine can draw {characters}: the pictures have boxes there. Install one for this script "
        "(for Chinese: fonts-noto-cjk on Debian and Ubuntu, google-noto-sans-cjk-fonts on Fedora) and draw them again",
        file=sys.stderr,
    )


def save_figure(figure: Figure, out: Path, whole: bool = False, narrow: bool = False) -> Path:
    """Writes the picture completely or not at all; no library version in it, so that equal runs give equal files.

    ``whole`` makes the picture as large as all that is drawn, ``narrow`` is one for a phone, with finer pixels. 256
    colours make the file a third as large and no picture here different to the eye. Raises Refused where ``out``
    cannot be written.
    """
    png = BytesIO()
    with warnings.catch_warnings(record=True) as complaints, _any_weight(), atomic(out) as part:
        warnings.filterwarnings("always", message="Glyph .* missing from")
        box: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.1} if whole else {}
        FigureCanvasAgg(figure).print_figure(png, format="png", dpi=140 if narrow else 100, **box)
        with Image.open(png) as image:
            small = image.convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)  # kmeans keeps rare colours
        small.save(part, format="PNG", optimize=True)
    _pass_on(complaints)
    return out


@contextlib.contextmanager
def _any_weight() -> Iterator[None]:
    """A font without bold characters is drawn as it is, which is no news for a user."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _pass_on(complaints: Sequence[warnings.WarningMessage]) -> None:
    """Characters that no font here has are told in one sentence; other warnings stay warnings."""
    missing = set()
    for one in complaints:
        text = str(one.message)
        if text.startswith("Glyph ") and " missing from" in text:
            missing.add(chr(int(text.split()[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if printable := "".join(sorted(character for character in missing if character.isprintable()))[:20]:
        _say_missing(printable)


def short(text: str, length: int) -> str:
    """At most ``length`` characters; the middle is left out, as names of runs often differ at the end."""
    half, text = length // 2, escaped(text)
    return text if len(text) <= length else f"{text[: half - 1]}…{text[-half:]}"


def draw_band(axes: Axes, x: Sequence[float], mean: Sequence[float], sd: Sequence[float], colour: str) -> None:
    """One standard deviation around a line."""
    if any(sd):
        low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
