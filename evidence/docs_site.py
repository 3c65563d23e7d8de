"""The documentation as a site: ``python evidence/docs_site.py`` (``make docs``) builds build/site; warnings are errors.

MkDocs reads build/docs, which this script puts together: docs/ with docs/zh/PAGE.md as PAGE.zh.md, the name that the
plugin i18n knows (a page that is not translated stands there in English), and every file beside docs/ that a page links
to by ``](../PATH)``: a Markdown file as a page, another one as it is. The words behind the language of a block of code
(``sh runnable``) are for the tests and left out.
"""

from __future__ import annotations

import logging
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FENCE = re.compile(r"^(\s*```\w+) .*$", re.MULTILINE)
OUTSIDE = re.compile(r"^[a-z]+:|^#")
ZH = "docs/zh/"
BESIDE = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "finetune101/fast/README.md",
    "results/ablations.md",
    "results/peers.md",
    "results/tried.md",
)
"""Pages of the navigation that do not stand in docs/."""


def in_prose(text: str, change: Callable[[str], str]) -> str:
    """``text`` with ``change`` made to everything but code."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def links(text: str, folder: str) -> Iterator[str]:
    """The files that the Markdown ``text`` of a file in ``folder`` of the project links to, from the project's root."""
    for match in LINK.finditer(CODE.sub("", text)):
        if not OUTSIDE.match(match[2]):
            yield posixpath.normpath(posixpath.join(folder, match[2]))


def address(name: str) -> str:
    """Where MkDocs finds a file of the project: what docs/ holds at its top, the rest under its own path."""
    if name.startswith(ZH):
        stem, dot, ending = name.removeprefix(ZH).rpartition(".")
        return f"{stem}.zh{dot}{ending}"
    return name.removeprefix("docs/")


def as_page(text: str, name: str, is_fallback: bool = False) -> str:
    """The Markdown ``text`` of the file ``name`` as MkDocs reads it.

    ``is_fallback``: it stands among Chinese pages, which have other headings, so links to headings of other pages lead
    to these pages.
    """
    folder, here = posixpath.dirname(name), posixpath.dirname(address(name))

    def led(match: re.Match[str]) -> str:
        if OUTSIDE.match(match[2]):
            return match[0]
        target = address(posixpath.normpath(posixpath.join(folder, match[2])))
        target = re.sub(r"\.zh\.(\w+)$", r".\1", target)  # i18n finds the page in the reader's language
        rest = re.sub(r"^#[^)\s]*", "", match[3]) if is_fallback else match[3]
        return match[1] + posixpath.relpath(target, here or ".") + rest

    return in_prose(FENCE.sub(r"\1", text), lambda prose: LINK.sub(led, prose))


def gather(out: Path, root: Path = ROOT) -> list[str]:
    """Puts what MkDocs reads into ``out``, and returns the names of the files, relative to the project at ``root``."""
    shutil.rmtree(out, ignore_errors=True)
    pages = (file.relative_to(root).as_posix() for file in sorted((root / "docs").rglob("*")) if file.is_file())
    waiting, done = [*BESIDE, *pages], dict[str, None]()
    while waiting:
        name = waiting.pop()
        if name in done or not (root / name).is_file():
            continue  # MkDocs names a link that leads nowhere
        done[name] = None
        target = out / address(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".md"):
            text = (root / name).read_text(encoding="utf-8")
            target.write_text(as_page(text, name), encoding="utf-8")
            chinese = root / ZH / name.removeprefix("docs/")
            if name.startswith("docs/") and (root / ZH).is_dir() and ZH not in name and not chinese.is_file():
                target.with_suffix(".zh.md").write_text(as_page(text, name, is_fallback=True), encoding="utf-8")
            waiting += links(text, posixpath.dirname(name))
        else:
            shutil.copyfile(root / name, target)
    return sorted(done)


def main(build: Path = BUILD, root: Path = ROOT) -> int:
    """Builds the site of the project at ``root`` into ``build``/site; returns 1 where MkDocs warns."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort, ConfigurationError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    gather(build / "docs", root)
    site = build / "site"
    try:
        build_site(load_config(str(root / "mkdocs.yml"), docs_dir=str(build / "docs"), site_dir=str(site), strict=True))
    except (Abort, ConfigurationError) as error:
        print(error, file=sys.stderr)
        return 1
    if (site / "zh").is_dir():
        shutil.copyfile(site / "sitemap.xml", site / "zh" / "sitemap.xml")  # the theme asks for it
    print(site / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
