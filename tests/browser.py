"""Headless Chromium for tests, driven by its DevTools protocol through a pipe: no package, no port, no internet."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), "")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
# the browser reads commands from file 3 and writes to file 4
START = """
import os, sys
for source, target in ((int(sys.argv[1]), 100), (int(sys.argv[2]), 101), (100, 3), (101, 4)):
    os.dup2(source, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """One page: ``evaluate`` runs JavaScript in it, ``problems`` are errors that its console shows."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._buffer, self._count, self._session = to, back, b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._back, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        values = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(values["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning"):
            self.problems.append(json.dumps(values["entry"]))
        elif message.get("method") == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(values["args"]))
        return message

    def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression, awaited where it is a promise."""
        result = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{code}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, code: str, seconds: float = 60) -> Any:
        """Waits until the expression is true, and gives its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(code)):
            if time.monotonic() > end:
                page = self.evaluate("document.body.innerText")
                raise TimeoutError(f"{code} never came true: {page!r} {self.problems}")
            time.sleep(0.05)
        return value

    def open(self, address: str) -> None:
        """Loads a page."""
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def choose(self, selector: str, *files: Path) -> None:
        """Puts files into an input, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file.resolve()) for file in files])

    def screen(self, width: int, height: int, *, phone: bool = False, dark: bool = False) -> None:
        """The size of the screen, and whether it is dark."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, file: Path) -> Path:
        """The whole page as a PNG."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(picture))
        return file


@contextlib.contextmanager
def browser(folder: Path, language: str = "en") -> Iterator[Tab]:
    """Chromium with its profile in ``folder``."""
    to_read, to_write = os.pipe()
    back_read, back_write = os.pipe()
    environment = {**os.environ, "HOME": str(folder), "LANGUAGE": language, "LANG": f"{language}.UTF-8"}
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--lang={language}"]
    with open(folder / "chromium.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(to_read), str(back_write), *command],
            pass_fds=(to_read, back_write),
            stdout=log,
            stderr=log,
            env=environment,
        )
    os.close(to_read)
    os.close(back_write)
    try:
        tab = Tab(to_write, back_read)
        yield tab
        with contextlib.suppress(RuntimeError, OSError):
            tab._session = ""
            tab.call("Browser.close")
    finally:
        os.close(to_write)
        os.close(back_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
