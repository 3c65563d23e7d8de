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


def built(build: Path, root: Path = ROOT) -> int:
    """What the script returns for the project at ``root``."""
    for package in ("material", "mkdocs_static_i18n"):
        pytest.importorskip(package, reason="needs the extra docs: pip install 'finetune101[docs]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MkDocs' own packages; what MkDocs says of our pages is no Python warning
        return docs_site.main(build, root)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("docs")
    assert built(build) == 0
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


def test_every_block_of_code_is_one(site: Path) -> None:
    """The words behind its language, which are for the tests, would make it text."""
    for page in set(site.rglob("*.html")) - set(site.rglob("CONTRIBUTING.html")):  # which tells of these words
        assert "```" not in page.read_text(encoding="utf-8"), page


@pytest.mark.parametrize(
    ("name", "text", "page"),
    [
        (
            "docs/a.md",
            "[b](b.md#c) [x](../results/x.png) [w](https://w.org)",
            "[b](b.md#c) [x](results/x.png) [w](https://w.org)",
        ),
        ("docs/zh/a.md", "[b](b.md) ![x](../../results/x.png)", "[b](b.md) ![x](results/x.png)"),
        ("results/t.md", "[a](../docs/a.md)", "[a](../a.md)"),
        ("docs/a.md", "`a[0](../b)`\n```python small\nc[0](../d)\n```\n", "`a[0](../b)`\n```python\nc[0](../d)\n```\n"),
    ],
)
def test_links_lead_to_where_the_site_has_their_files(name: str, text: str, page: str) -> None:
    assert docs_site.as_page(text, name) == page


def test_an_english_page_among_chinese_ones_names_no_headings_of_them() -> None:
    text = "[b](b.md#c) [d](#e)"
    assert docs_site.as_page(text, "docs/a.md", is_fallback=True) == "[b](b.md) [d](#e)"


@pytest.mark.parametrize(
    ("link", "code"),
    [("b.md", 0), ("b.md#here", 0), ("../notes/n.txt", 0), ("c.md", 1), ("b.md#nowhere", 1), ("../notes/gone.txt", 1)],
)
def test_a_dead_link_fails_the_build(link: str, code: int, tmp_path: Path) -> None:
    for name, text in {
        "docs/index.md": f"# A\n\n[link]({link})\n",
        "docs/b.md": "# B\n\n## Here\n",
        "notes/n.txt": "note\n",
        "mkdocs.yml": "site_name: s\nvalidation: {links: {anchors: warn}}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert built(tmp_path / "build", tmp_path) == code
