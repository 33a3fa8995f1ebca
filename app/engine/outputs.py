"""What leaves the engine: images and frames are read from the device, and every request gets exactly one answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from app.engine.admission import AdmissionController
from app.engine.instance import ModelInstance
from app.engine.memory import is_out_of_memory
from app.engine.request import Frame, OutputStream, Request, RequestOutput, Sample, View, dispatch
from app.errors import ServiceError, StepFailed
from app.metrics import EngineMetrics
from model.images import Image

log = logging.getLogger("ddpm.engine")


class OutputDispatcher:
    """Collects frames and answers, and wakes each event loop that has some once. Used by all threads."""

    def __init__(self, lock: threading.Condition, admission: AdmissionController, metrics: EngineMetrics) -> None:
        self._lock, self._admission, self._metrics = lock, admission, metrics  # the engine's
        self._outbox: list[tuple[OutputStream, Frame | RequestOutput]] = []

    def emit_frame(self, request: Request, frame: Frame) -> None:
        """A frame, to be published."""
        with self._lock:
            self._outbox.append((request.output, frame))

    def finish(self, request: Request, output: RequestOutput) -> None:
        """An answer, to be published. The first counts."""
        with self._lock:
            if request.status.is_final:
                return
            request.finish(output)
            self._admission.release(request)
            self._outbox.append((request.output, output))
        if isinstance(output, ServiceError):
            self._metrics.wasted_steps.labels(request.model, output.code).inc(request.image_steps)
        else:
            self._metrics.images.labels(request.model).inc(request.n)

    def abort_all(self, error: ServiceError) -> int:
        """The same answer for every request; returns how many there were."""
        with self._lock:
            requests = list(self._admission)
        for request in requests:
            self.finish(request, error)
        return len(requests)

    def publish(self) -> None:
        """Wakes each event loop that has news, once."""
        with self._lock:
            outbox, self._outbox = self._outbox, []
        if outbox:
            dispatch(outbox)


class OutputProcessor:
    """Used on the engine's thread. If `process` raises it can be called again: it goes on from where it was."""

    def __init__(self, dispatcher: OutputDispatcher, finish: Callable[[Request, RequestOutput], None]) -> None:
        """`finish` lets a request leave the engine with its answer."""
        self._dispatcher, self._finish = dispatcher, finish
        self._unprocessed: list[tuple[ModelInstance, list[Sample]]] = []  # they took a step, and were not looked at yet
        self.failures = 0  # of the engine outside of steps, since an image was read

    def enqueue(self, model: ModelInstance, samples: list[Sample]) -> None:
        """They took a step, or got their noise."""
        self._unprocessed.append((model, samples))

    def process(self) -> None:
        """Reads the images and frames that are due, together, and publishes them.

        After two failures it reads one by one, so that only the request at fault fails.
        """
        while self._unprocessed:
            model, waiting = self._unprocessed[0]
            samples = waiting[: 1 if self.failures > 1 else None]
            try:
                self._read_due(model, [sample for sample in samples if not sample.request.status.is_final])
            except Exception as error:
                if self.failures < 2 or (is_out_of_memory(error) and model.batch_limits.max > 1):
                    raise
                log.error("decoding failed", exc_info=error)
                self._finish(samples[0].request, StepFailed("the image could not be decoded"))
            left = waiting[len(samples) :]
            self._unprocessed[:1] = [(model, left)] if left else []
        self._dispatcher.publish()

    def _read_due(self, model: ModelInstance, samples: list[Sample]) -> None:
        """Everything is read before the first is given away, so if it raises it can be done again."""
        frames = []
        if shown := [sample for sample in samples if sample.step in sample.request.frame_steps]:
            for view in ("xt", "x0"):
                frames += _read(model, [sample for sample in shown if sample.request.view == view], view)
        finished = _read(model, [sample for sample in samples if sample.finished], "xt")
        for sample, image in frames:
            frame = sample.request.add_frame_image(sample.step, sample.i, image)
            if frame is not None:
                self._dispatcher.emit_frame(sample.request, frame)
        for sample, image in finished:
            images = sample.request.add_image(sample.i, image)
            if images is not None:
                self._finish(sample.request, images)
        if frames or finished:
            self.failures = 0


def _read(model: ModelInstance, samples: list[Sample], view: View) -> list[tuple[Sample, Image]]:
    return list(zip(samples, model.runner.to_images(samples, view), strict=True)) if samples else []
