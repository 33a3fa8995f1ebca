"""Checkpoints that are to be served and whose networks have not run yet."""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future

from app.engine.memory import is_out_of_memory
from app.engine.served import Served
from app.errors import LoadFailed, NotReady, OutOfMemory, ServiceError

log = logging.getLogger("ddpm.engine")


class Newcomers:
    """They warm up on the engine's thread, one after another, in portions of about a step. Each gets one answer."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Served, Future[None]]] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, served: Served) -> Future[None]:
        """On any thread. The future is done when it is warm, or has the ServiceError that says why it never will be."""
        answer: Future[None] = Future()
        answer.set_running_or_notify_cancel()  # nobody cancels it from here on
        self._queue.append((served, answer))
        return answer

    def portion(self, level: int) -> Served | None:
        """Runs the next portion. The one that is warm now, if it was its last: it may be answered. Raises LoadFailed or
        OutOfMemory where one is not fit to serve; it was answered so, and it is logged at `level`."""
        served = self._queue[0][0]
        device = served.runner.device
        try:
            next(served.portions)
            return None
        except StopIteration:
            rate = round(served.rate.rows_per_second, 1)
            log.info("ready", extra={"model": served.name, "sha256": served.sha256, "rows_per_second": rate})
            return served
        except Exception as error:
            extra = {"model": served.name, "sha256": served.sha256}
            log.log(level, "the checkpoint cannot be run on %s", device, exc_info=error, extra=extra)
            no_memory = is_out_of_memory(error)
        # From here on the traceback, and whatever memory it held, is gone.
        served.runner.close()
        answer: ServiceError = LoadFailed(f"the checkpoint cannot be run on {device}")
        if no_memory:
            answer = OutOfMemory("the device has not enough memory for this checkpoint beside what is there")
        self.answer(answer)
        raise answer

    def answer(self, error: ServiceError | None = None) -> None:
        """The first one leaves."""
        with self._lock:
            if not self._queue:
                return
            _, answer = self._queue.popleft()
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def refuse(self) -> None:
        """No more of them, because the engine ends."""
        while self._queue:
            self.answer(NotReady("the server is shutting down", retry_after=5))
