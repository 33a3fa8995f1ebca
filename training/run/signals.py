"""Stopping a run by Ctrl-C or by a supervisor."""

from __future__ import annotations

import signal


class StopSignals:
    """Within it SIGINT and SIGTERM ask for a stop after the present step.

    A second one ends the process at once, unless it is `patient`: `torchrun` repeats what its terminal got, and kills
    its processes itself when they take more than 30 seconds.
    """

    def __init__(self, patient: bool = False) -> None:
        self.requested, self._patient = False, patient

    def __enter__(self) -> StopSignals:
        self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True
        if not self._patient:
            self.__exit__()
