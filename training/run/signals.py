"""Stopping a run by Ctrl-C, a terminal that goes, a supervisor or a scheduler of jobs."""

from __future__ import annotations

import signal
from types import FrameType

NOW = ("SIGINT", "SIGTERM")  # a second one ends the process at once
STOP = ("SIGHUP", "SIGUSR2", "SIGXCPU")  # the system repeats these, or sends them after the others
SAVE = "SIGUSR1"


class StopSignals:
    """Within it signals ask for a stop after the present step, or for a checkpoint (SIGUSR1).

    A second SIGINT or SIGTERM ends the process at once, unless it is `patient`: `torchrun` repeats what its terminal
    got, and kills its processes itself when they take more than 30 seconds. What is ignored, as SIGHUP is under
    `nohup`, stays ignored.
    """

    def __init__(self, patient: bool = False) -> None:
        self.stop = self.save = False
        self._patient = patient

    def __enter__(self) -> StopSignals:
        self._handlers = {}
        for name in (*NOW, *STOP, SAVE):
            number = getattr(signal, name, None)  # Windows lacks most
            if number is not None and (name in NOW or signal.getsignal(number) is not signal.SIG_IGN):
                self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == SAVE:
            self.save = True
            return
        self.stop = True
        if name in NOW and not self._patient:
            for each in NOW:
                signal.signal(getattr(signal, each), self._handlers[getattr(signal, each)])
