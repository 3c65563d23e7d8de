"""MkDocs reads this file as a hook: pages of docs/ may link to files beside docs/, as on a code host.

Each file that a page names by ``](../PATH)`` becomes a part of the site: a Markdown file as a page, another one as it
is. The words behind the language of a block of code (``sh runnable``) are for the tests and left out.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
FENCE = re.compile(r"^(\s*```\w+) .*$", re.MULTILINE)
OUTSIDE = re.compile(r"^[a-z]+:|^#")
BESIDE = ("CONTRIBUTING.md", "finetune101/fast/README.md", "results/ablations.md", "results/peers.md", "results/tried.md")
"""Pages of the navigation that do not stand in docs/."""


def targets(text: str, folder: str) -> list[str]:
    """The files that the Markdown ``text`` of a file in ``folder`` of the project links to, from the project's root."""
    links = (match[2] for match in LINK.finditer(text) if not OUTSIDE.match(match[2]))
    return [posixpath.normpath(posixpath.join(folder, link)) for link in links]


def address(target: str) -> str:
    """Where a file of the project stands in the site: that of docs/ at its top, another one under its own path."""
    return target.removeprefix("docs/")


@event_priority(100)  # before the languages are told apart
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files beside docs/ that pages link to."""
    waiting = [*BESIDE]
    for file in files.documentation_pages():
        waiting += targets(file.content_string, "docs")
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in done or name.startswith("docs/") or not (ROOT / name).is_file():
            continue
        done.add(name)
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
        if name.endswith(".md"):
            waiting += targets((ROOT / name).read_text(encoding="utf-8"), posixpath.dirname(name))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes links lead where the site has their files, and leaves the tests' words out."""
    inside = (Path(config.docs_dir) / page.file.src_uri).is_file()
    folder = posixpath.join("docs" if inside else "", posixpath.dirname(page.file.src_uri))
    here = posixpath.dirname(page.file.src_uri)

    def led(match: re.Match[str]) -> str:
        if OUTSIDE.match(match[2]):
            return match[0]
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        return match[1] + posixpath.relpath(address(target), here or ".") + match[3]

    return FENCE.sub(r"\1", LINK.sub(led, markdown))
