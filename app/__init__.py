"""Serves checkpoints over HTTP, batching requests at every denoising step."""

import os
import signal

if not hasattr(signal, "SIGHUP"):  # before anything else is imported that is not there
    raise SystemExit("the server needs Linux or macOS: on Windows run it under WSL or in Docker (see README.md)")

# Where the threads of a team (see `app.engine.thread_team`) meet, an early one spins for less than a millisecond and
# then sleeps: beside a busy neighbour the late one may need its core. It is read when torch is loaded.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "20000"
