"""Serves checkpoints over HTTP, batching requests at every denoising step."""

import signal

if not hasattr(signal, "SIGHUP"):  # before anything else is imported that is not there
    raise SystemExit("the server needs Linux or macOS: on Windows run it under WSL or in Docker (see README.md)")
