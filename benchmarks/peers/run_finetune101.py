"""finetune101 as ``python -m finetune101`` runs it; beside it a thread that writes down when the first step ended.

``python run_finetune101.py FILE STARTED train ...`` writes the seconds since the Unix time STARTED into FILE.
"""

from __future__ import annotations

import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any


def watch(file: Path, started: float) -> None:
    """Waits until PyTorch is loaded, then for the end of the first step of an optimizer."""
    while not hasattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook"):
        time.sleep(0.02)
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def stepped(*args: Any) -> None:
        file.write_text(str(round(time.time() - started, 3)), encoding="utf-8")
        handle.remove()

    handle = register_optimizer_step_post_hook(stepped)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(Path(sys.argv[1]), float(sys.argv[2])), daemon=True).start()
    sys.argv[0:3] = ["finetune101"]
    runpy.run_module("finetune101", run_name="__main__", alter_sys=True)
