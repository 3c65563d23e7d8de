"""The pages in a real browser, with the network behind a server and in the browser itself."""

from __future__ import annotations

import contextlib
import csv
import functools
import http.server
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from browser import CHROMIUM, Tab, browser
from commands import refused
from exported import CLASSES, save, small_model
from PIL import Image

from finetune101.cli.main import main
from finetune101.deploy.network import load
from finetune101.deploy.onnx_network import OnnxNetwork
from finetune101.deploy.tables import write_csv
from finetune101.errors import Refused
from finetune101.serve.app import application
from finetune101.serve.listen import http_server, listening
from finetune101.serve.uploads import Limits
from finetune101.serve.web import RUNTIME_FILES, write_web

RUNTIME = Path(os.environ.get("FINETUNE101_ONNXRUNTIME_WEB", "node_modules/onnxruntime-web/dist")).absolute()
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
needs_runtime = pytest.mark.skipif(
    not (RUNTIME / RUNTIME_FILES[0]).is_file(),
    reason="needs onnxruntime-web: npm install it, and set FINETUNE101_ONNXRUNTIME_WEB to its folder dist",
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(small_model(), tmp_path_factory.mktemp("exported") / "small.onnx")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A JPEG that has to be turned, a PNG with a transparent half, a grey JPEG, and one whose name is a formula."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    blocks = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)).resize(
        (300, 200), Image.Resampling.BICUBIC
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    blocks.save(folder / "turned.jpg", quality=95, exif=exif)
    clear = blocks.convert("RGBA")
    clear.paste((0, 0, 0, 60), (0, 0, 150, 200))
    clear.save(folder / "clear.png")
    blocks.convert("L").save(folder / "grey.jpg", quality=95)
    blocks.rotate(180).save(folder / "=sum.png")
    return sorted(folder.iterdir())


@contextlib.contextmanager
def web(folder: Path) -> Iterator[str]:
    """``folder`` behind a plain web host."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *values: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def served(network: OnnxNetwork) -> Iterator[str]:
    """The server's page."""
    with listening("127.0.0.1", 0) as server:
        runner = http_server(application(network), Limits())
        thread = threading.Thread(target=lambda: runner.run(sockets=[server]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            runner.should_exit = True
            thread.join()


@contextlib.contextmanager
def page(kind: str, file: Path, folder: Path) -> Iterator[str]:
    """The address of the page of ``file``, by a server or with the network in the browser."""
    if kind == "serve":
        with served(OnnxNetwork(file)) as address:
            yield address
    else:
        write_web(file, folder / "web", RUNTIME)
        with web(folder / "web") as address:
            yield address


KINDS = [pytest.param("serve"), pytest.param("web", marks=needs_runtime)]
BARS = "Array.from(document.querySelectorAll('#bars li'), li => Array.from(li.children, one => one.innerText))"


def answer(tab: Tab, photo: Path) -> list[list[str]]:
    """What the page says of ``photo``: (class, percent) of each bar."""
    tab.choose("#files", photo)
    tab.wait(f"document.querySelector('#status').innerText.includes({json.dumps(photo.name)} + ':')")
    return [row[:2] for row in tab.evaluate(BARS)]


@needs_browser
@pytest.mark.parametrize("kind", KINDS)
def test_both_pages_answer_as_predict(kind: str, exported: Path, photos: list[Path], tmp_path: Path) -> None:
    network = OnnxNetwork(exported)
    with page(kind, exported, tmp_path) as address, browser(tmp_path) as tab:
        tab.open(address)
        tab.wait("document.documentElement.dataset.ready")
        for photo in photos:
            rows = answer(tab, photo)
            expected = network.predict(photo)
            assert rows[0][0] == expected.label and len(rows) == 5
            assert float(rows[0][1].split()[0]) / 100 == pytest.approx(expected.probability, abs=0.01)
        assert tab.problems == []
        names = tab.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
        assert [name for name in names if not name.startswith((address, "blob:", "data:"))] == []  # works offline
        tab.choose("#files", *photos)
        tab.wait(
            f"document.querySelectorAll('td.share').length === {len(photos)} && document.querySelector('#stop').hidden"
        )
        tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        tab.evaluate("document.querySelector('#download').click()")
        tab.wait("true")
        table = read_table(tab, tmp_path / "predictions.csv")
        text = io.StringIO()
        write_csv(network.predict(photos), text, 5)
        expected_table = list(csv.DictReader(io.StringIO(text.getvalue())))
        assert table[0]["path"] == "'=sum.png" and table[0].keys() == expected_table[0].keys()
        for row, expected_row in zip(table, expected_table, strict=True):
            assert row["class_1"] == expected_row["class_1"] and row["unlike"] == expected_row["unlike"]
            assert float(row["probability_1"]) == pytest.approx(float(expected_row["probability_1"]), abs=0.01)
        assert tab.problems == []


def read_table(tab: Tab, file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, once the browser has written it."""
    for _ in range(200):
        if file.is_file() and file.read_bytes().endswith(b"\n"):
            break
        tab.evaluate("new Promise(done => setTimeout(done, 25))")
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@needs_browser
def test_the_page_works_by_keyboard_on_a_phone_and_in_chinese(
    exported: Path, photos: list[Path], tmp_path: Path
) -> None:
    with page("serve", exported, tmp_path) as address, browser(tmp_path) as tab:
        tab.call("Emulation.setLocaleOverride", locale="zh-CN")
        tab.call("Page.addScriptToEvaluateOnNewDocument", source=CHINESE)
        tab.screen(390, 844, phone=True)
        tab.open(address)
        tab.wait("document.documentElement.dataset.ready")
        assert tab.evaluate("document.documentElement.lang") == "zh-CN"
        assert "图片" in tab.evaluate("document.querySelector('h1').innerText")
        focused = []
        for _ in range(4):
            for kind in ("keyDown", "keyUp"):
                tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
            focused.append(tab.evaluate("document.activeElement.id"))
            outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline == "solid"
        assert focused == ["language", "choose", "photograph", "folder"]
        tab.choose("#files", *photos)
        tab.wait(FINISHED)
        tab.evaluate("document.querySelector('#rows button').click()")
        assert tab.evaluate("document.activeElement.id") == "label"
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.evaluate("document.querySelector('#status').getAttribute('aria-live')") == "polite"
        nameless = "document.querySelectorAll('button:empty, img:not([alt]), input:not([hidden])').length"
        assert tab.evaluate(nameless) == 0
        tab.evaluate("document.querySelector('#language').click()")
        assert tab.evaluate("document.querySelector('#summary').innerText") == "4 pictures"
        assert tab.problems == []


@needs_browser
def test_pictures_come_by_drop_paste_and_folder(exported: Path, photos: list[Path], tmp_path: Path) -> None:
    with page("serve", exported, tmp_path) as address, browser(tmp_path) as tab:
        tab.screen(1280, 800)
        tab.open(address)
        tab.wait("document.documentElement.dataset.ready")
        tab.evaluate(PASTE)
        tab.wait("document.querySelector('#status').innerText.includes('pasted.png:')")
        data = {"items": [], "files": [str(photos[0]), str(photos[0].parent)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            tab.call("Input.dispatchDragEvent", type=kind, x=600, y=200, data=data)
        tab.wait("document.querySelector('#status').innerText.startsWith('5 pictures')")
        names = tab.evaluate("Array.from(document.querySelectorAll('#rows button'), one => one.innerText)")
        assert sorted(names) == sorted(["=sum.png", *(f"{photo.parent.name}/{photo.name}" for photo in photos)])
        tab.choose("#tree", photos[0].parent)
        tab.wait(FINISHED)
        assert tab.problems == []


PASTE = """
new Promise(done => {
  const canvas = document.createElement("canvas");
  canvas.toBlob(blob => {
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([blob], "pasted.png", {type: "image/png"}));
    document.dispatchEvent(new ClipboardEvent("paste", {clipboardData}));
    done(1);
  });
})
"""
FINISHED = "document.querySelector('#status').innerText.match(/^4 |4 张/) && document.querySelector('#stop').hidden"
CHINESE = "Object.defineProperty(navigator, 'languages', {get: () => ['zh-CN', 'en']})"


@pytest.fixture(scope="module")
def real(caltech101: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A released network as an exported file, and real photos."""
    folder = tmp_path_factory.mktemp("real")
    photos = [folder / "few" / f"{name}.jpg" for name in ("accordion", "lotus", "panda")]
    (folder / "few").mkdir()
    for photo in photos:
        shutil.copyfile(caltech101 / photo.stem / "image_0003.jpg", photo)
    words = ["export", "released_finetune", "--out", str(folder / "net.onnx"), "--parity", str(folder / "few")]
    assert main(words) == 0
    return folder / "net.onnx", photos


@needs_browser
@pytest.mark.slow
@pytest.mark.caltech101
@pytest.mark.parametrize("kind", KINDS)
def test_a_real_photo(kind: str, real: tuple[Path, list[Path]], tmp_path: Path) -> None:
    file, photos = real
    network = load("released_finetune")
    with page(kind, file, tmp_path) as address, browser(tmp_path) as tab:
        tab.open(address)
        tab.wait("document.documentElement.dataset.ready")
        for photo in photos:
            best, percent = answer(tab, photo)[0]
            expected = network.predict(photo)
            assert best == expected.label
            assert float(percent.split()[0]) / 100 == pytest.approx(expected.probability, abs=0.01)
        assert tab.problems == []


# the folder


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    folder = tmp_path / "dist"
    folder.mkdir()
    for name in (*RUNTIME_FILES, "ort.all.js"):
        (folder / name).write_text(name)
    return folder


def test_the_folder_holds_the_page_the_network_and_what_runs_it(exported: Path, runtime: Path, tmp_path: Path) -> None:
    index = write_web(exported, tmp_path / "web", runtime)
    assert index == tmp_path / "web" / "index.html" and "Content-Security-Policy" in index.read_text()
    assert (index.parent / "network.onnx").read_bytes() == exported.read_bytes()
    assert json.loads((index.parent / "network.json").read_text(encoding="utf-8"))["classes"] == list(CLASSES)
    assert {*RUNTIME_FILES} < {file.name for file in index.parent.iterdir()}
    assert not (index.parent / "ort.all.js").exists()
    assert write_web(exported, tmp_path / "web", runtime) == index  # again


def test_what_cannot_be_a_page_is_refused(exported: Path, runtime: Path, tmp_path: Path) -> None:
    resized = onnx.load(exported)
    resized.graph.input[0].name = resized.graph.node[0].input[0] = "resized"
    save(resized, tmp_path / "resized.onnx", "resized")
    with pytest.raises(Refused, match="resized pictures"):
        write_web(tmp_path / "resized.onnx", tmp_path / "web", runtime)
    (runtime / RUNTIME_FILES[2]).unlink()
    with pytest.raises(Refused, match="npm install onnxruntime-web"):
        write_web(exported, tmp_path / "web", runtime)
    with pytest.raises(Refused):
        write_web(runtime / "ort.all.js", tmp_path / "web", runtime)
    assert not (tmp_path / "web").exists()


@pytest.mark.slow
def test_a_run_becomes_a_page(
    runs: Path, tiny_data: Path, runtime: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["export", str(runs / "a"), "--format", "web", "--out", "page", "--parity", str(tiny_data / "ball")]
    assert main([*command, "--runtime", str(runtime)]) == 0
    assert "http.server --directory page" in capsys.readouterr().out
    assert OnnxNetwork(here / "page" / "network.onnx").classes == sorted(path.name for path in tiny_data.iterdir())
    assert "exists" in refused(capsys, *command, "--runtime", str(runtime))
    assert "npm install" in refused(capsys, *command, "--overwrite")
    assert main([*command, "--runtime", str(runtime), "--overwrite"]) == 0


@needs_browser
@needs_runtime
def test_the_example_in_javascript(exported: Path, photos: list[Path], tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    code = text.partition("```js\n")[2].partition("```")[0]
    write_web(exported, tmp_path / "web", RUNTIME)
    (tmp_path / "web" / "example.js").write_text(code)
    (tmp_path / "web" / "example.html").write_text("<body><script type=module src=example.js></script></body>")
    shutil.copyfile(photos[-1], tmp_path / "web" / "photo.jpg")
    with web(tmp_path / "web") as address, browser(tmp_path) as tab:
        tab.open(f"{address}example.html")
        tab.wait("document.body.textContent")
        label, _, probability = tab.evaluate("document.body.textContent").rpartition(" ")
    expected = OnnxNetwork(exported).predict(photos[-1])
    assert not isinstance(expected, list)
    assert label == expected.label
    assert float(probability) == pytest.approx(expected.probability, abs=0.01)
