"""The one thread that runs the network of a server: a bounded queue of pictures, several requests in one pass."""

from __future__ import annotations

import base64
import io
import queue
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image as Pillow

from finetune101.config import Preprocessing
from finetune101.data.decode import Unreadable, opened
from finetune101.redaction import traceback_of
from finetune101.serve.answers import Answered, Answers, ClassShare, Neighbour, Unread
from finetune101.standalone import MOST_PIXELS

SMALL = 224  # px, the longer side of a training image
PASS = 16  # pictures of one forward pass: ``evaluation.forward`` fills passes up to this number
PIXELS_OF_A_REQUEST = 100_000_000  # a small file can hold them, and decoding them keeps everybody waiting
TOO_MANY_PIXELS = f"the pictures before it have over {PIXELS_OF_A_REQUEST / 1e6:.0f} megapixels together; send fewer"


class Classifier(Protocol):
    """What a server needs of a network: ``deploy.network.Network``, or an ONNX file.

    ``explain``, where the network has it, adds where the network looked.
    """

    @property
    def name(self) -> str:
        """Its file, folder or name."""
        ...

    @property
    def preprocessing(self) -> Preprocessing:
        """What turns an image into its input."""
        ...

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        ...

    def predict(self, images: Sequence[Pillow.Image], top_k: int = 5) -> Any:
        """A ``Prediction`` for each image."""
        ...


class Explained(Protocol):
    """Where a network looked in a picture, and what is near to it: ``deploy.explain.Explanation``."""

    @property
    def neighbours(self) -> Sequence[Any]:
        """Training images: ``file``, ``label``, ``distance`` and ``thumbnail(side)``."""
        ...

    def overlay(self) -> Pillow.Image:
        """The picture under the map of its most probable class."""
        ...


class Busy(Exception):
    """The queue is full."""


@dataclass
class Job:
    """The pictures of one request, (name, bytes) each, and where the answer will be."""

    pictures: list[tuple[str, bytes]]
    top_k: int = 5
    explain: bool = False
    answer: Future[Answers] = field(default_factory=Future)


class Worker:
    """Answers jobs one pass at a time, in a thread of its own; ``most_waiting`` jobs may wait."""

    def __init__(self, network: Classifier, most_waiting: int = 128) -> None:
        self.network = network
        self._queue: queue.Queue[Job | None] = queue.Queue(most_waiting)
        self._thread = threading.Thread(target=self._work, name="network", daemon=True)
        self._side = network.preprocessing.cache_size

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the pass that it is at; jobs that still wait are cancelled."""
        while True:
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.answer.cancel()
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> Future[Answers]:
        """Puts ``job`` into the queue; cancelling the future frees its pictures. Raises Busy when the queue is full."""
        job.answer.add_done_callback(lambda answer: job.pictures.clear() if answer.cancelled() else None)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job.answer

    def _work(self) -> None:
        while True:
            jobs = self._waiting()
            alive = [job for job in jobs if job is not None and job.answer.set_running_or_notify_cancel()]
            self._finish(alive)
            if None in jobs:
                return

    def _finish(self, jobs: Sequence[Job]) -> None:
        """Answers ``jobs`` in one pass. Where that fails, each is tried alone: the fault may be that of one."""
        try:
            self._answer(jobs)
        except Exception as error:  # the next request must find a worker
            waiting = [job for job in jobs if not job.answer.done()]
            if len(jobs) > 1:
                for job in waiting:
                    self._finish([job])
                return
            print(traceback_of(error), end="", file=sys.stderr)
            for job in waiting:
                job.answer.set_exception(error)

    def _waiting(self) -> list[Job | None]:
        """The next job, and those behind it that fit into the same pass; None is the end."""
        jobs = [self._queue.get()]
        while jobs[-1] is not None and sum(len(job.pictures) for job in jobs if job) < PASS:
            try:
                jobs.append(self._queue.get_nowait())
            except queue.Empty:
                break
        return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Decodes the pictures of ``jobs``, classifies them, and gives each job its answer."""
        answers = {id(job): Answers([], []) for job in jobs}
        batch: list[tuple[Job, str, Pillow.Image]] = []
        for job in jobs:
            pixels = 0
            for name, content in job.pictures:
                if pixels > PIXELS_OF_A_REQUEST:
                    answers[id(job)].failed.append(Unread(name, TOO_MANY_PIXELS))
                    continue
                try:
                    with opened(Path("picture"), self._side, content) as picture:
                        batch.append((job, name, picture.image))
                        pixels += picture.image.width * picture.image.height
                except Unreadable as error:
                    answers[id(job)].failed.append(Unread(name, error.reason))
                if len(batch) >= PASS or sum(image.width * image.height for *_, image in batch) > MOST_PIXELS:
                    self._classify(batch, answers)
                    batch.clear()
        self._classify(batch, answers)
        for job in jobs:
            job.answer.set_result(answers[id(job)])

    def _classify(self, batch: Sequence[tuple[Job, str, Pillow.Image]], answers: dict[int, Answers]) -> None:
        """One pass: the classes of the images in ``batch`` go to the answers of their jobs."""
        if not batch:
            return
        top_k = max(job.top_k for job, *_ in batch)
        predictions = self.network.predict([image for *_, image in batch], top_k=top_k)
        for (job, name, image), prediction in zip(batch, predictions, strict=True):
            classes = [ClassShare(label, probability) for label, probability in prediction.classes[: job.top_k]]
            answered = Answered(name, classes)
            if prediction.unlike is not None:
                answered.unlike, answered.unlike_score = prediction.unlike, prediction.unlike_score or 0.0
            if job.explain and hasattr(self.network, "explain"):
                add_explanation(answered, self.network.explain(image))
            answers[id(job)].predictions.append(answered)


def add_explanation(answered: Answered, explanation: Explained) -> None:
    """Puts the overlay and the nearest training images into ``answered``."""
    answered.overlay = data_url(explanation.overlay())
    answered.nearest = [
        Neighbour(one.file.name, one.label, one.distance, data_url(small) if (small := one.thumbnail(SMALL)) else "")
        for one in explanation.neighbours
    ]


def data_url(image: Pillow.Image) -> str:
    """``image`` as a JPEG in a URL."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
