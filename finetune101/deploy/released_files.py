"""The files of the released networks that this package holds; knows no torch."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent.parent / "weights"
RELEASED = {
    "released_finetune": "caltech101_finetune_efficientnet_lite0",
    "released_random": "caltech101_scratch_efficientnet_lite0",
    "released_probe": "caltech101_probe_efficientnet_lite0",
}
"""Name to use -> file in ``weights/``, and the card of the same name beside it; the first that is there predicts."""


def available() -> list[str]:
    """The names of the released networks that this package holds, the one to predict with first."""
    return [name for name, file in RELEASED.items() if (FOLDER / f"{file}.safetensors").is_file()]
