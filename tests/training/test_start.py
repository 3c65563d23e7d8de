"""What a training has loaded by the end of its first step: loading takes longer than the step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune101.machine import without_compiler

LATER = ("torch._dynamo", "sympy", "scipy", "matplotlib", "tensorboard", "onnx", "onnxruntime", "optuna", "jinja2")
DRIVER = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from finetune101.cli.main import main

def end(*_):
    print("loaded:", *sorted(sys.modules), flush=True)
    os._exit(0)

register_optimizer_step_post_hook(end)
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("model", "not_needed"), [("squeezenet1_1", {"timm"}), ("efficientnet_lite0", set())])
def test_the_first_step_loads_what_it_uses(model: str, not_needed: set[str], tiny_data: Path, tmp_path: Path) -> None:
    words = f"train --no-pretrain --recipe original --model {model} --size 32 --epochs 1 --batch-size 8 --threads 1"
    augmented = "--crop-scale 0.5 --ema 0.9"
    command = [sys.executable, "-c", DRIVER, *words.split(), *augmented.split(), "--exp", "a"]
    done = subprocess.run(
        [*command, "--data", str(tiny_data), "--runs", str(tmp_path)], capture_output=True, text=True, check=True
    )
    loaded = next(line for line in done.stdout.splitlines() if line.startswith("loaded:")).split()
    assert "torch" in loaded and not {*LATER, *not_needed} & {*loaded}


def test_whoever_asks_for_the_compiler_gets_it() -> None:
    code = """
import sys, torch
from finetune101.machine import without_compiler
with without_compiler():
    import torch._dynamo
    marked = torch._dynamo.disable(lambda x: x + 1)
    from torch._dynamo.utils import is_compile_supported
assert "torch._dynamo" not in sys.modules
assert marked(1) == 2 and is_compile_supported("cpu") in (True, False)
assert callable(torch._dynamo.optimize)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_compiler_is_there_again_afterwards() -> None:
    before = {name: sys.modules.get(name) for name in ("torch._dynamo", "torch._dynamo.utils")}
    with pytest.raises(ValueError, match="stop"), without_compiler():
        raise ValueError("stop")
    assert {name: sys.modules.get(name) for name in before} == before
