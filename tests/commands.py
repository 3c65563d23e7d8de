"""What tests of several verbs share: the flags of a small training, and the sentence of a refusal."""

from __future__ import annotations

import pytest

from finetune101.cli.main import main

SMALL = ["--model", "squeezenet1_1", "--size", "32", "--batch-size", "8", "--threads", "1", "--epochs", "1"]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The sentence with which ``words`` are refused; checks that it is one, on standard error, with exit code 2."""
    capsys.readouterr()
    assert main(words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in lines[0] and len(lines[0]) < 700
    return lines[0]
