"""The pictures on top of the READMEs: ``python evidence/front_picture.py`` (Chromium draws them; about a minute).

Left a terminal: the label of a photo as README.md shows it, and what ``compare`` prints of the best pair of arms in
results/. Right the page that ``report`` writes about the same pair. docs/pictures/front.png and front-dark.png for
README.md, front-zh.png and front-zh-dark.png for README.zh-CN.md: 1600 x 900 pixels, 256 colours. Each file keeps the
difference that it shows as the text "claim", so that a test sees when the claim has changed since.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from texts import number, read_claims

from finetune101.cli.main import main as finetune101

ROOT = Path(__file__).parents[1]
PAIR = "compare.gain.efficientnet_lite0.top1"
WIDTH, HEIGHT = 1600, 900
LINES = 6  # of the comparison: its table
COLOURS = {
    "light": {"back": "#dde6f0", "window": "#ffffff", "bar": "#e8eaed"},
    "dark": {"back": "#05070a", "window": "#17181b", "bar": "#2a2e36"},
}
PAGE = """<!doctype html><meta charset="utf-8"><style>
* {{ box-sizing: border-box; margin: 0 }}
body {{ width: {width}px; height: {height}px; background: {back}; position: relative; overflow: hidden;
  color-scheme: {theme} }}
.window {{ position: absolute; border-radius: 12px; overflow: hidden; box-shadow: 0 18px 50px rgba(0, 0, 0, .35) }}
.bar {{ height: 34px; display: flex; gap: 9px; align-items: center; padding: 0 14px }}
.bar i {{ width: 13px; height: 13px; border-radius: 50% }}
.terminal {{ left: 30px; top: 180px; width: 780px; height: 530px; background: #12161c; z-index: 2 }}
.terminal .bar {{ background: #262c36 }}
pre {{ color: #d5dbe3; font: 17.2px/1.55 "DejaVu Sans Mono", monospace; padding: 24px; white-space: pre-wrap }}
pre b {{ color: #7fd1a8; font-weight: normal }}
.page {{ left: 650px; top: 30px; width: 920px; height: 840px; background: {window} }}
.page .bar {{ background: {bar} }}
iframe {{ border: 0; width: {inner}px; height: 1200px; transform: scale({scale}); transform-origin: 0 0;
  margin-left: 160px; color-scheme: {theme} }}
</style>
<div class="window page"><div class="bar">{dots}</div><iframe src="{report}"></iframe></div>
<div class="window terminal"><div class="bar">{dots}</div><pre>{terminal}</pre></div>
"""
DOTS = "".join(f'<i style="background: {colour}"></i>' for colour in ("#8b929c",) * 3)


def copy_pair(folder: Path) -> None:
    """Puts the runs of the best pair of arms into ``folder``/runs/finetune and runs/scratch."""
    results = ROOT / "results"
    evidence = results / read_claims(ROOT)[PAIR]["evidence"]
    pair = json.loads((evidence / "comparison.json").read_text(encoding="utf-8"))
    shutil.copytree(results / "splits", folder / "splits")
    for arm, name in (("a", "finetune"), ("b", "scratch")):
        for run in pair[arm]["runs"]:
            source = (evidence / run["path"]).resolve()
            shutil.copytree(source, folder / "runs" / name / source.name)


def output(*words: str) -> str:
    """What the command prints on standard output. Raises RuntimeError where it fails."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        if finetune101(words) != 0:
            raise RuntimeError(f"finetune101 {' '.join(words)} failed")
    return text.getvalue()


def prompt(command: str) -> str:
    """A command as a line of the terminal."""
    return f"<b>$ {html.escape(command)}</b>\n"


def terminal(folder: Path) -> str:
    """The text of the terminal, as HTML; the comparison is written into ``folder``/comparison."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    label = re.search(r"^(finetune101 predict.*?)\n```\n\n```text\n.*?\n(.*?)```", readme, re.DOTALL | re.MULTILINE)
    if not label:
        raise RuntimeError("README.md shows no prediction")
    compared = output("compare", "finetune", "scratch").splitlines()
    parts = [prompt(label[1]), html.escape(label[2]), "\n", prompt("finetune101 compare finetune scratch")]
    parts += [html.escape("\n".join(compared[:LINES])), "\n\n", prompt("finetune101 report comparison")]
    return "".join(parts)


def draw(page: Path, picture: Path) -> None:
    """Chromium draws ``page`` into the PNG ``picture``, with as few colours as a small file needs."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise SystemExit("front_picture.py needs Chromium")
    dark = "dark" in picture.stem
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-color-profile=srgb"]
    flags += [f"--window-size={WIDTH},{HEIGHT + 200}", f"--blink-settings=preferredColorScheme={int(not dark)}"]
    raw = page.with_suffix(".png")
    command = [browser, *flags, f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=4000"]
    subprocess.run([*command, f"--screenshot={raw}", page.as_uri()], check=True, capture_output=True)
    with Image.open(raw) as image:
        whole = image.convert("RGB").crop((0, 0, WIDTH, HEIGHT))
        small = whole.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    note = PngInfo()
    note.add_text("claim", number(read_claims(ROOT)[PAIR]))
    small.save(picture, optimize=True, pnginfo=note)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} KB")


def main() -> int:
    """Draws all four pictures."""
    pictures = ROOT / "docs" / "pictures"
    pictures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_pair(folder)
        os.chdir(folder)
        text = terminal(folder)
        for language in ("en", "zh"):
            out = f"report_{language}"
            told = output("report", "comparison", "--no-gallery", "--no-explain", "--lang", language, "--out", out)
            lines = text + html.escape(told.replace(out, "report"))
            if language == "zh":
                lines = lines.replace("report comparison<", "report comparison --lang zh<")
            for theme, colours in COLOURS.items():
                page = folder / f"{language}_{theme}.html"
                values = {"theme": theme, "width": WIDTH, "height": HEIGHT, "inner": 835, "scale": 0.91, **colours}
                page.write_text(
                    PAGE.format(dots=DOTS, report=f"{out}/report.html", terminal=lines, **values), encoding="utf-8"
                )
                stem = "front" + ("-zh" if language == "zh" else "") + ("-dark" if theme == "dark" else "")
                draw(page, pictures / f"{stem}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
