"""The documentation as a site: built without a warning, no request to elsewhere, no dead link or anchor."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import docs_site
import pytest

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "audio": "src", "video": "src"}
FETCHED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload"}


class Parsed(HTMLParser):
    """What a page loads, what it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])
        if tag == "link" and FETCHED & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("material", "mkdocs_static_i18n"):
        pytest.importorskip(package, reason="needs the extra docs: pip install 'finetune101[docs]'")
    build = tmp_path_factory.mktemp("docs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MkDocs' own packages; what MkDocs says of our pages is no Python warning
        assert docs_site.main(build) == 0
    return build / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Parsed]:
    made = (page for page in site.rglob("*.html") if "report" not in page.parts)
    return {page: Parsed(page.read_text(encoding="utf-8")) for page in made}


def test_both_languages_have_every_page(site: Path, pages: dict[Path, Parsed]) -> None:
    english = {page.relative_to(site) for page in pages if page.relative_to(site).parts[0] not in ("zh", "404.html")}
    assert len(english) > 25 and all((site / "zh" / page).is_file() for page in english)
    assert 'lang="zh"' in (site / "zh" / "index.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Parsed]) -> None:
    away = re.compile(r"^(https?:)?//")
    assert [one for page in pages.values() for one in page.loaded if away.match(one)] == []
    assert all(page.loaded for page in pages.values())
    for page in pages:
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8")  # the theme would fetch a script for it
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", text), sheet


def dead(site: Path, pages: dict[Path, Parsed]) -> Iterator[str]:
    for page, parsed in pages.items():
        for link in parsed.links:
            path, anchor = urldefrag(link)
            if re.match(r"^[a-z]+:", path) or page.name == "404.html":
                continue
            target = (page.parent / unquote(path)).resolve() if path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                yield f"{page.relative_to(site)}: {link}"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{page.relative_to(site)}: {link} has no such heading"


def test_no_link_or_anchor_is_dead(site: Path, pages: dict[Path, Parsed]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert list(dead(site, pages)) == []


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_anchors_of_the_readme(readme: str, site: Path, pages: dict[Path, Parsed]) -> None:
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = re.findall(r"\]\((docs/[^)\s#]+)\.md(?:#([^)\s]+))?\)", text)
    assert links
    for path, anchor in links:
        page = site / f"{path.removeprefix('docs/')}.html"
        if page.is_file() and anchor:
            assert anchor in pages[page].anchors, f"{readme}: {path}.md#{anchor}"


def test_words_for_the_tests_are_not_shown(site: Path) -> None:
    for page in site.glob("*.html"):
        assert not re.search(r"sh (runnable|small|server)|python (runnable|small|signature)", page.read_text("utf-8"))
