"""Records of epochs -> TensorBoard events in the folder of the run."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from finetune101.run import Run

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STOPS = (signal.SIGINT, signal.SIGTERM)
TAGS = {
    "train_loss": "loss/train",
    "val_loss": "loss/val",
    "train_top1": "accuracy/train",
    "val_top1": "accuracy/val",
    "lr_head": "learning_rate/head",
    "lr_backbone": "learning_rate/backbone",
    "images_per_s": "speed/images_per_s",
}


def log_records(run: Run, records: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Passes ``records`` on, each written to the run's TensorBoard events, by epoch.

    Where events cannot be written, one line says so and the training goes on: metrics.jsonl holds the same numbers.
    """
    writer: SummaryWriter | None = None
    left = iter(records)
    with _told_once():
        try:
            for record in left:
                try:
                    writer = writer or _opened(run)
                    _write(writer, record)
                except OSError as error:
                    reason = error.strerror or error
                    print(f"TensorBoard events of {run.path} cannot be written ({reason})", file=sys.stderr)
                    yield record
                    break
                yield record
            yield from left
        finally:
            if isinstance(records, Generator):
                records.close()  # its progress bar goes before a sentence about an interruption
            if writer:
                with contextlib.suppress(OSError):
                    writer.close()


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """In the block TensorBoard's thread prints no traceback of a full disk: its error is raised here as well."""
    usual = threading.excepthook

    def tell(fault: threading.ExceptHookArgs) -> None:
        if not (isinstance(fault.exc_value, OSError) and type(fault.thread).__module__.startswith("tensorboard.")):
            usual(fault)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = usual


def _opened(run: Run) -> SummaryWriter:
    with _later_interrupted():
        from torch.utils.tensorboard import SummaryWriter  # here: loading it takes half a second before the first step

    return SummaryWriter(str(run.path))


@contextlib.contextmanager
def _later_interrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block: packages that are half loaded make other errors of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    before = {one: signal.signal(one, lambda number, _: arrived.append(number)) for one in STOPS}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    for number in arrived[:1]:
        signal.raise_signal(number)


def _write(writer: SummaryWriter, record: dict[str, Any]) -> None:
    for key, tag in TAGS.items():
        if record[key] is not None:
            writer.add_scalar(tag, record[key], record["epoch"])
    writer.flush()
