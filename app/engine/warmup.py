"""Models whose networks have not run yet. They warm up on the engine's thread, one after another, between its steps."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future

from app.engine.instance import ModelInstance
from app.engine.memory import is_out_of_memory
from app.errors import LoadFailed, NotReady, OutOfMemory, ServiceError

log = logging.getLogger("ddpm.engine")


class WarmupQueue:
    """Each model in it gets one answer: it is warm, or the ServiceError that says why it never will be."""

    def __init__(self, lock: threading.Condition) -> None:
        self._queue: deque[tuple[ModelInstance, Future[None]]] = deque()
        self._lock = lock  # the engine's: two threads may end the queue at once

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, model: ModelInstance) -> Future[None]:
        """On any thread. The future is done when the model is warm."""
        answer: Future[None] = Future()
        answer.set_running_or_notify_cancel()  # it cannot be cancelled from here on
        self._queue.append((model, answer))
        return answer

    def run_one(self, log_level: int) -> ModelInstance | None:
        """Runs the next piece of warm-up, about as long as a step; returns the model if it is warm now.

        It then waits for `complete`. Raises LoadFailed or OutOfMemory where a model cannot run: it has been answered
        so, and logged at `log_level`.
        """
        model = self._queue[0][0]
        device = model.runner.device
        try:
            next(model.warmup_steps)
            return None
        except StopIteration:
            rate = round(model.throughput.nfe_per_second, 1)
            extra = {"model": model.name, "sha256": model.sha256, "precision": model.runner.precision}
            log.info("model ready", extra=extra | {"nfe_per_second": rate})
            return model
        except Exception as error:
            extra = {"model": model.name, "sha256": model.sha256}
            log.log(log_level, "the checkpoint cannot be run on %s", device, exc_info=error, extra=extra)
            no_memory = is_out_of_memory(error)
        # From here on the traceback, and whatever memory it held, is gone.
        model.runner.close()
        answer: ServiceError = LoadFailed(f"the checkpoint cannot be run on {device}")
        if no_memory:
            answer = OutOfMemory("the device has not enough memory for this checkpoint beside the others")
        self.complete(answer)
        raise answer

    def complete(self, error: ServiceError | None = None) -> None:
        """Answers the first one, which leaves."""
        with self._lock:
            if not self._queue:
                return
            _, answer = self._queue.popleft()
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def reject_all(self) -> None:
        """The engine ends."""
        while self._queue:
            self.complete(NotReady("the server is shutting down", retry_after=5))
