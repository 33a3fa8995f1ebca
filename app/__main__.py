"""python -m app: serves a checkpoint until SIGTERM or SIGINT, then drains."""

from __future__ import annotations

from app.interruption import end_in_one_line

if __name__ == "__main__":
    end_in_one_line("python -m app")  # importing the rest takes seconds

import asyncio
import functools
import gc
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from app import logs
from app.auth import APIKeyStore
from app.engine.memory import is_out_of_memory
from app.engine.runner import ModelRunner
from app.http_protocol import ConnectionLimits, HardenedHttpProtocol
from app.listening import bind, complaint, url
from app.main import MakeRunner, create_app, create_operations_app
from app.routes.state import AppState
from app.settings import Settings, complaints_about, misread, service_links, unknown_variables
from app.tracing import Tracer

log = logging.getLogger("ddpm.start")

DUPLICATE_SIGNAL_S = 0.5  # signals this close are one: a terminal and what runs under it may both pass on a Ctrl-C
SHUTDOWN_GRACE_S = 5  # beyond the drain, for answers to reach their clients


class Server(uvicorn.Server):
    """Stops taking work the moment a signal comes, while uvicorn waits for the open connections.

    `operations` listens beside it, until after the last request.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: AppState,
        keys: APIKeyStore,
        tracer: Tracer | None,
        operations: uvicorn.Server | None = None,
        operations_sockets: Sequence[socket.socket] = (),
    ) -> None:
        super().__init__(config)
        self._operations_sockets = list(operations_sockets)
        self._service, self._keys, self._operations, self._tracer = service, keys, operations, tracer
        self._signalled: float | None = None
        self._done = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to listen, on both ports. Raises SystemExit where another process was faster."""
        if hasattr(signal, "SIGHUP"):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self.request_reload)
        settings = self._service.settings
        host, port, prefix = settings.host, settings.port, ""
        try:
            await super().startup(sockets)
            for listener in sockets or []:
                log.info("ddpm-serve running on %s (Ctrl-C ends it)", url(listener))
            if self._operations:
                host, port, prefix = settings.metrics_host, settings.metrics_port, "metrics-"
                self._operations.config.load()
                self._operations.lifespan = self._operations.config.lifespan_class(self._operations.config)
                await self._operations.startup(self._operations_sockets)
                log.info("metrics running on %s", url(self._operations_sockets[0]))
        except OSError as error:
            log.critical("%s", complaint(error, host, port, prefix))
            await self.lifespan.shutdown()
            sys.exit(1)

    def request_reload(self) -> None:
        """SIGHUP: the files of keys and checkpoints are read again."""
        self._keys.request_reload()
        self._service.models.request_reload()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends when all connections have, or their time is up."""
        await super().shutdown(sockets)
        if self._operations:
            await self._operations.shutdown()
        self._done = True

    async def on_tick(self, counter: int) -> bool:
        """Whether to shut down, asked ten times a second: also where the engine has failed for good."""
        if self._service.engine.failure is None:
            return await super().on_tick(counter)
        self.config.timeout_graceful_shutdown = SHUTDOWN_GRACE_S  # everyone is answered; there is no work to wait for
        return True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The engine begins to drain when the signal comes, not when uvicorn has closed its sockets. A second signal
        ends the process at once."""
        if self._done:  # uvicorn raises the signal again
            return
        if self._signalled is not None and time.monotonic() - self._signalled > DUPLICATE_SIGNAL_S:
            exit_now(self._tracer, 128 + sig)
        self._signalled = self._signalled or time.monotonic()
        self._service.engine.drain(self._service.settings.drain_s)
        super().handle_exit(sig, frame)


def exit_now(tracer: Tracer | None, code: int) -> NoReturn:
    """Ends the process whatever hangs in it, at once but for the spans that have to be sent."""
    if tracer:
        tracer.flush()
    os._exit(code)


def _config(app: FastAPI, settings: Settings, host: str, port: int) -> uvicorn.Config:
    limits = ConnectionLimits(
        settings.max_connections, settings.max_header_bytes, settings.read_timeout_s, settings.write_timeout_s
    )
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=functools.partial(HardenedHttpProtocol, limits),  # type: ignore[arg-type]
        ws="none",
        workers=1,
        proxy_headers=bool(settings.trusted_proxies),  # uvicorn's own default believes whatever comes from localhost
        forwarded_allow_ips=settings.trusted_proxies,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # it goes to `call_later`
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + SHUTDOWN_GRACE_S,
    )


def read_settings(argv: list[str], kind: type[Settings] = Settings, command: str = "python -m app") -> Settings:
    """Settings from flags and environment. Exits with a message where one is wrong."""
    source = CliSettingsSource[Settings](
        kind,
        cli_prog_name=command,
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )
    if complaints := unknown_variables(kind):
        sys.exit(f"{command}: " + "; ".join(complaints))
    try:
        return CliApp.run(kind, cli_args=argv, cli_settings_source=source)
    except SettingsError as error:
        print(f"{command}: {misread(str(error), kind)}", file=sys.stderr)
        sys.exit(2)
    except ValidationError as error:
        sys.exit(f"{command}: " + "; ".join(complaints_about(error, kind)))


def serve(settings: Settings, make_runner: MakeRunner = ModelRunner) -> None:
    """Serves until a signal comes and the admitted work is done, or the engine fails for good (exit code 1).

    `make_runner` is for tests.
    """
    logs.configure(settings.log_level, settings.log_format)
    # What no line says is not looked up: where a record was made, and in which thread and process.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    if links := service_links():
        log.warning("ignoring environment variables that are an orchestrator's service links: %s", ", ".join(links))
    operations, operations_sockets = None, []
    try:
        sockets = bind(settings.host, settings.port)
        if settings.metrics_port >= 0:
            operations_sockets = bind(settings.metrics_host, settings.metrics_port, "metrics-")
        begun = time.monotonic()
        app = create_app(settings, make_runner)
        log.info("loaded %s in %.1f s", settings.checkpoint, time.monotonic() - begun)
    except ValueError as error:
        sys.exit(f"python -m app: {error}")
    except (RuntimeError, MemoryError) as error:  # what torch raises for its devices
        log.debug("not loaded", exc_info=error)
        device = "this machine" if settings.device == "auto" else settings.device
        why = "does not have the memory for" if is_out_of_memory(error) else "does not run"
        sys.exit(f"python -m app: {device} {why} {settings.checkpoint}; --log-level debug says more")
    gc.freeze()  # what was imported stays: a full collection took 0.2 s to look through it, in which nobody is served
    keys: APIKeyStore = app.state.keys
    if keys.required:
        log.info("API keys are required", extra={"keys": keys.names})
    if operations_sockets:
        operations = uvicorn.Server(
            _config(create_operations_app(app.state.service), settings, settings.metrics_host, settings.metrics_port)
        )
    config = _config(app, settings, settings.host, settings.port)
    server = Server(config, app.state.service, keys, app.state.tracer, operations, operations_sockets)

    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: server.request_reload())  # until `Server.startup`, which has a loop
    # uvicorn puts its own handlers in place when it runs, and raises the signal again when it has shut down; a
    # drained server has nothing to die of.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    server.run(sockets)
    if failure := app.state.service.engine.failure:
        log.critical("fatal error, exiting for restart: %s", failure)
        logging.shutdown()
        exit_now(
            app.state.tracer, 1
        )  # in good order it would wait for the engine's thread, which may hang in the driver


if __name__ == "__main__":
    serve(read_settings(sys.argv[1:]))
