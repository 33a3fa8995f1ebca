"""The file of a checkpoint that is served: replaced, corrupted and deleted under the server."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

from tests.app.processes import metric
from tests.stress.http_client import PATIENCE, ask, message
from tests.stress.load_generator import LoadGenerator

PICKLE = b"\x80\x04cos\nsystem\n(S'exit'\ntR."


class ServedFile:
    """`path` is what the server is told to serve, a copy of one of `versions`; all have its name."""

    def __init__(self, folder: Path, checkpoints: list[Path]) -> None:
        self.path = folder / "served" / checkpoints[0].name
        self.versions = [folder / str(i) / checkpoints[0].name for i in range(len(checkpoints))]
        for version, checkpoint in zip(self.versions, checkpoints, strict=True):
            version.parent.mkdir()
            shutil.copyfile(checkpoint, version)
        self.hashes = {version: hashlib.sha256(version.read_bytes()).hexdigest() for version in self.versions}
        self.path.parent.mkdir()
        self._put(self.versions[0].read_bytes())
        self._one_at_a_time = asyncio.Lock()

    def _put(self, content: bytes) -> None:
        part = self.path.with_suffix(".part")
        part.write_bytes(content)
        os.replace(part, self.path)

    async def change(self, load: LoadGenerator, pid: int) -> None:
        """Another file, or none, and SIGHUP. What can be served is served within some time; what cannot is refused,
        and what was served is served on."""
        async with self._one_at_a_time:
            before = await _loads(load.port)
            good = load.rng.random() < 0.6
            if good:
                version = load.rng.choice(self.versions)
                self._put(version.read_bytes())
            elif load.rng.random() < 0.3:
                self.path.unlink(missing_ok=True)
            else:
                self._put(corrupt(self.versions[0].read_bytes(), load.rng))
            os.kill(pid, signal.SIGHUP)
            until = time.monotonic() + PATIENCE
            while sum(after := await _loads(load.port)) == sum(before) and time.monotonic() < until:  # noqa: ASYNC110
                await asyncio.sleep(0.2)
            outcome = "loaded" if after[0] > before[0] else "unchanged" if after[1] > before[1] else "refused"
            load.outcomes["new weights" if good else "corrupt weights", outcome] += 1
            if good != (outcome != "refused") or sum(after) == sum(before):
                load.wrong.append(f"{'good' if good else 'corrupt'} weights: {before} became {after}")
            await load.check_canary("after other weights")


async def _loads(port: int) -> list[float]:
    """Attempts until now: loaded, unchanged, refused."""
    while (answer := await ask(port, message("GET", "/metrics"))).status != 200:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    text = answer.body.decode()
    total = metric(text, "ddpm_model_loads_total")
    loaded, unchanged = (metric(text, "ddpm_model_loads_total", outcome=name) for name in ("loaded", "unchanged"))
    return [loaded, unchanged, total - loaded - unchanged]


def corrupt(content: bytes, rng: random.Random) -> bytes:
    """Certainly no checkpoint any more."""
    return rng.choice([content[: rng.randrange(len(content))], rng.randbytes(1000), b"", PICKLE, PICKLE + content])
