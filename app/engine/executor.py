"""Takes a batch one step further. Where that fails, the request at fault fails and no other."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from app.engine.instance import ModelInstance
from app.engine.memory import is_out_of_memory
from app.engine.outputs import OutputProcessor
from app.engine.request import Request, RequestStatus, Sample
from app.engine.scheduler import Batch
from app.engine.watchdog import StepWatchdog
from app.errors import OutOfMemory, ServiceError, StepFailed
from app.metrics import EngineMetrics

log = logging.getLogger("ddpm.engine")


class DeviceLost(Exception):
    """Not even zeros can be run any more."""


@dataclass
class StepResult:
    """What became of a batch: the calls that succeeded, as (samples, network rows, when each began and ended, in
    seconds of `time.monotonic`), and the requests that failed."""

    calls: list[tuple[list[Sample], int, float, float]] = field(default_factory=list)
    failures: dict[Request, ServiceError] = field(default_factory=dict)


class StepExecutor:
    """Used on the engine's thread. If a method raises it can be called again: all samples are as they were."""

    def __init__(self, metrics: EngineMetrics, watchdog: StepWatchdog, outputs: OutputProcessor) -> None:
        self._metrics, self._watchdog, self._outputs = metrics, watchdog, outputs

    def init_latents(self, batch: Batch) -> list[Request]:
        """Draws x_T of the samples that have none. Returns the requests that begin with it."""
        new = [sample for sample in batch.samples if not sample.has_noise]
        if not new:
            return []
        batch.model.runner.init_latents(new)
        self._outputs.enqueue(batch.model, new)
        started = {s.request: None for s in new if s.request.status is RequestStatus.WAITING}
        now = time.monotonic()
        for request in started:
            request.status, request.first_step_time = RequestStatus.RUNNING, now
        return list(started)

    def execute(self, batch: Batch) -> StepResult:
        """One step. Raises DeviceLost where no step will ever succeed."""
        result = StepResult()
        self._run(batch.model, batch.samples, result)
        return result

    def _run(self, model: ModelInstance, samples: list[Sample], result: StepResult) -> None:
        costs = [sample.nfe for sample in samples]
        self._watchdog.start(model.throughput.step_seconds)
        started = time.monotonic()
        try:
            not_finite = model.runner.step(samples)
        except Exception as error:
            log.error("a step failed", exc_info=error, extra={"samples": len(samples)})
            no_memory, not_finite = is_out_of_memory(error, len(samples)), None
        if not_finite is None:  # and the traceback is gone, with the memory that it held
            self._metrics.failed_steps.labels(model.name).inc()
            if no_memory:
                self._handle_oom(model, samples, sum(costs), result)
            else:
                self._isolate(model, samples, result)
            return
        self._outputs.enqueue(model, samples)
        for sample, nfe in zip(samples, costs, strict=True):
            sample.request.remaining_nfe -= nfe
            sample.request.image_steps += 1
        for sample in not_finite:
            result.failures[sample.request] = StepFailed("the network returned numbers that are not finite")
        result.calls.append((samples, sum(costs), started, time.monotonic()))

    def _isolate(self, model: ModelInstance, samples: list[Sample], result: StepResult) -> None:
        """A failed step changed nothing, so each sample is tried again alone: only the request at fault fails."""
        if len(samples) > 1:
            for sample in samples:
                if sample.request not in result.failures and not sample.request.status.is_final:
                    self._run(model, [sample], result)
            return
        try:
            model.runner.warm_up(1)
        except Exception as error:
            if not is_out_of_memory(error):
                log.critical("device lost: test step failed", exc_info=error)
                raise DeviceLost from error
        result.failures[samples[0].request] = StepFailed("a denoising step failed")

    def _handle_oom(self, model: ModelInstance, samples: list[Sample], batch_size: int, result: StepResult) -> None:
        """The samples are as they were, and the next batches smaller. One that does not fit alone never will."""
        if len(samples) > 1:
            model.shrink_after_oom(batch_size)
        else:
            model.runner.free_memory()
            message = "the device has not enough memory for this image"
            result.failures[samples[0].request] = OutOfMemory(message)
