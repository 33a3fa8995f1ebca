"""python -m app: serves a checkpoint until SIGTERM or SIGINT, then drains."""

from __future__ import annotations

import logging
import math
import signal
import sys
from types import FrameType

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from app import logs
from app.engine.runner import Runner
from app.main import create_app
from app.routes.common import Service
from app.settings import PREFIX, Settings, service_links, unknown_variables

log = logging.getLogger("ddpm.start")

GRACE_S = 5  # beyond the drain, for answers to reach their clients


class Server(uvicorn.Server):
    """Stops taking work the moment a signal comes, while uvicorn waits for the open connections."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The engine begins to drain when the signal comes, not when uvicorn has closed its sockets."""
        self._service.engine.drain(self._service.settings.drain_s)
        super().handle_exit(sig, frame)


def read_settings(argv: list[str]) -> Settings:
    """Settings from flags and environment. Exits with a message where one is wrong."""
    source = CliSettingsSource[Settings](
        Settings,
        cli_prog_name="python -m app",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )
    if complaints := unknown_variables():
        sys.exit("python -m app: " + "; ".join(complaints))
    try:
        return CliApp.run(Settings, cli_args=argv, cli_settings_source=source)
    except (ValidationError, SettingsError) as error:
        if not isinstance(error, ValidationError):
            sys.exit(f"python -m app: {error}")
        lines = []
        for problem in error.errors():
            name = "_".join(map(str, problem["loc"]))
            flag = "--" + name.replace("_", "-")
            lines.append(f"{flag} ({PREFIX}{name.upper()}): {problem['msg']}, not {problem['input']!r}")
        sys.exit("python -m app: " + "; ".join(lines))


def serve(settings: Settings, runner: Runner | None = None) -> None:
    """Serves until a signal comes and the admitted work is done. `runner` is for tests."""
    logs.configure(settings.log_level)
    if links := service_links():
        log.warning("these variables are an orchestrator's service links, and ignored: %s", ", ".join(links))
    try:
        app = create_app(settings, runner)
    except ValueError as error:
        sys.exit(f"python -m app: {error}")
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_s) + GRACE_S,
    )
    server = Server(config, app.state.service)
    # uvicorn puts its own handlers in place when it runs, and raises the signal again when it has shut down; a
    # drained server has nothing to die of.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)
    server.run()


if __name__ == "__main__":
    serve(read_settings(sys.argv[1:]))
