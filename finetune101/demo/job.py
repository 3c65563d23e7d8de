"""The whole job on a drawn data set: verify, split, train both arms, test, compare, predict."""

from __future__ import annotations

import time
from pathlib import Path

from finetune101 import api
from finetune101.config import change
from finetune101.data.verify import verify
from finetune101.demo.dataset import draw
from finetune101.recipes import original
from finetune101.run import Run

SIZE = 128  # px: half the network's own, so that two trainings fit in the time of a coffee
NEXT = """
What to type for Caltech-101:
  finetune101 data download                                fetch it (137 MB)
  finetune101 train --exp finetune                         fine-tune EfficientNet-Lite0
  finetune101 train --exp random --no-pretrain             the same network from random initialisation
  finetune101 evaluate finetune; finetune101 evaluate random
  finetune101 compare finetune random
  finetune101 report comparison
For your own images, one folder per class: add --data FOLDER to train."""


def run_demo(out: Path, epochs: int) -> None:
    """Runs the demo in ``out``, replacing an earlier one there; prints what it does and where the pictures are."""
    started = time.perf_counter()
    print("Seven steps; a laptop's processor takes two to four minutes.")
    _title("1. Draw a data set: 12 classes of object pictures")
    data = draw(out / "data")
    _title("2. Verify every image")
    print(verify(data).text())
    _title("3. Fine-tune EfficientNet-Lite0 from its ImageNet weights")
    before = time.perf_counter()
    finetune = _arm(out, data, "finetune", epochs, pretrain=True)
    left = 2 * (time.perf_counter() - before)  # step 4 has twice the epochs
    print(f"About {max(10, round(left, -1)):.0f} s left.")
    _title("4. Train the same network from random initialisation, for twice as many epochs")
    random = _arm(out, data, "random", 2 * epochs, pretrain=False)
    _title("5. Compare them on the same test images")
    comparison = api.compare(finetune, random, out=out / "comparison")
    _title("6. Label one test image")
    image = finetune.read_json("split.json")["subsets"]["test"][0]
    print(api.predict(finetune, data / image, top_k=3))
    _title("7. Make the report page")
    page = api.report(out / "comparison", out / "report")
    gain, seconds = comparison.difference, time.perf_counter() - started
    print(f"\nDone in {seconds:.0f} s: pretraining was worth {gain:.1f} points of test accuracy here.")
    print(f"Open {page} in a browser; tensorboard --logdir {out}/runs")
    print(NEXT)


def _title(text: str) -> None:
    print(f"\n== {text} ==", flush=True)


def _arm(out: Path, data: Path, name: str, epochs: int, *, pretrain: bool) -> Run:
    """One arm, trained by the original recipe on small images, and tested."""
    recipe = original(name, pretrain=pretrain)
    settings = {"runs": out / "runs", "data": data, "size": SIZE, "epochs": epochs, "batch_size": 32}
    run = api.run_training(change(recipe, settings), overwrite=True)
    print(api.evaluate(run))
    return run
