"""What the verbs that take image files say of them and of the network that sees them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from finetune101.errors import escaped

if TYPE_CHECKING:
    from finetune101.deploy.choose import Chosen
    from finetune101.deploy.inputs import Inputs


def say_which(chosen: Chosen) -> None:
    """Names on standard error the network that answers where none was named."""
    if not chosen.named:
        print(f"No run was named: {chosen.name} answers (Caltech-101's classes)", file=sys.stderr)


def end_of_images(images: Inputs) -> int:
    """Says on standard error what was left out and what cannot be read; the exit code: 1 where an image failed."""
    from finetune101.deploy.inputs import left_out_text

    for line in [left_out_text(images), *(escaped(f"failed: {path}: {reason}") for path, reason in images.failed)]:
        if line:
            print(line, file=sys.stderr)
    return 1 if images.failed else 0
