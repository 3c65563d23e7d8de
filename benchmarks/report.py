"""How large the report page of a run is, and how long a browser takes to open it without network.

python benchmarks/report.py RUN          writes results/report/report.json; needs chromium on the PATH

The time is that of a headless Chromium that opens the page, less that of the same with an empty page.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from finetune101.files import write_json
from finetune101.reports.pages import write_report

OUT = Path(__file__).parents[1] / "results" / "report" / "report.json"
REPEATS = 5


def opened(browser: str, address: str, profile: str) -> tuple[float, str]:
    """Seconds that ``browser`` takes from its start to the loaded page, and what it said."""
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    started = time.perf_counter()
    words = [*command, f"--user-data-dir={profile}", address]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return time.perf_counter() - started, done.stderr


def main(run: str) -> None:
    """Measures, prints and writes."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with tempfile.TemporaryDirectory() as folder:
        page = write_report(run, Path(folder) / "page")
        empty = Path(folder) / "empty.html"
        empty.write_text("<!doctype html><title>empty</title>")
        differences, messages = [], ""
        for _ in range(REPEATS + 1):  # the first makes the browser's profile
            seconds, errors = opened(browser, page.as_uri(), f"{folder}/profile")
            differences.append(seconds - opened(browser, empty.as_uri(), f"{folder}/profile")[0])
            messages += errors
        result = {
            "size_mb": round(page.stat().st_size / 1e6, 2),
            "open_s": round(statistics.median(differences[1:]), 2),
            "open_s_max": round(max(differences[1:]), 2),
            "console_messages": messages.count("CONSOLE"),
            "repeats": REPEATS,
        }
    write_json(OUT, result)
    print(result)


if __name__ == "__main__":
    main(sys.argv[1])
