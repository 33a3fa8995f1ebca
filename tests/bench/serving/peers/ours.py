"""Our own server, its network's calls as long as the settings say (see `tests.bench.serving.fixed_latency`)."""

from __future__ import annotations

import sys
from typing import Any

from app.__main__ import read_settings, serve
from app.engine import runner
from tests.bench.serving.fixed_latency import held
from tests.bench.serving.settings import settings


def hold() -> None:
    """From now on, where the settings ask for it."""
    compiled = runner.compile_for_inference

    def compile_for_inference(*args: Any) -> Any:
        return held(compiled(*args), settings())

    runner.compile_for_inference = compile_for_inference


if __name__ == "__main__":
    hold()
    serve(read_settings(sys.argv[1:]))
