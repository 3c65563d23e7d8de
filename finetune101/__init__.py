"""Fine-tune ImageNet networks on Caltech-101 or your own folder of images, and compare with training from scratch.

import finetune101 as ft

run = ft.train("photos", exp="mine")
ft.evaluate(run).top1
ft.load(run).predict("photo.jpg")
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported
__all__ = ["RECIPES", "Refused", "__version__", "auto", "compare", "evaluate", "load", "predict", "report", "train"]

_HOMES = {"RECIPES": "recipes", "Refused": "errors"}  # of all other names: api


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that ``import finetune101`` loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"finetune101.{_HOMES.get(name, 'api')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
