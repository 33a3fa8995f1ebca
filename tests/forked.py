"""`python -m module` without the seconds that importing torch takes: forked from a process that has imported it.

Python's own fork server (multiprocessing) forks; what runs is the module's `__main__`, with arguments, environment and
outputs of its own. How a module starts from nothing is for tests that start Python.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TextIO
from unittest import mock

ROOT = Path(__file__).parents[1]
IMPORTED = ["torch", "app.main", "app.http_protocol", "app.tracing", "uvicorn.lifespan.on", "uvicorn.loops.auto"]
IMPORTED += ["training.train", "matplotlib.pyplot", "torch._dynamo"]  # but no `__main__`: that is what runs
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # read when the libraries are loaded


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, ONE_THREAD):
        forkserver.ensure_running()
    return context


class Forked:
    """A process like subprocess.Popen's, with text in `stdout` and `stderr`."""

    def __init__(self, module: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        context = _server()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        words = (module, list(argv), dict(environment), *(sending for _, sending in pipes))
        self._process = context.Process(target=_run, args=words, daemon=True)
        self._process.start()
        self.stdout, self.stderr = (_text(receiving) for receiving, _ in pipes)
        for _, sending in pipes:
            sending.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of its outputs, once it has ended. Raises subprocess.TimeoutExpired, and kills it then."""
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(pipe.read) for pipe in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return texts[0].result(), texts[1].result()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        self.stdout.close()
        self.stderr.close()


def _text(pipe: Connection) -> TextIO:
    with pipe:
        return os.fdopen(os.dup(pipe.fileno()), encoding="utf-8", errors="replace")


def _run(module: str, argv: list[str], environment: dict[str, str], out: Connection, err: Connection) -> None:
    """In the new process."""
    for number, pipe in ((1, out), (2, err)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    # Python's own streams remember what these were before.
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = [module, *argv]
    sys.modules.pop(module, None)  # as for -m: it is `__main__`
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
