"""The bundled checkpoints through HTTP: images a second and a lone image's latency, beside an older tree's defaults.

    git worktree add build/baseline b3b5c34
    python -m tests.bench.end_to_end --baseline build/baseline [--models mnist,mnist-fast,cifar10] [--rounds 3]
        [--seconds 4] [--diffusers PYTHON [--diffusers_steps 10,5]]

Two server processes with their defaults: the baseline, which makes each data set's images by its default, and this
tree, which makes them by each of the plans that GET /models lists. In a round all take turns: one client that always
waits asks for single images, then eight ask for 16 images each. Images a second are the denoising steps that the server
counted in the window, over the steps of an image; latency is from the request to the last byte. Medians of the rounds.

With --diffusers that Python (with torch and diffusers) takes turns, too, without HTTP: batches of 16 of the baseline's
`mnist` in two exported networks, guided, DPM-Solver++(2M). Not a test: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.convert.exporter import export
from tests.bench.timing import circumstances
from tests.bench.tree_server import TreeServer, post

ROOT = Path(__file__).parents[2]
N, CLIENTS = 16, 8
LEAD_S = 1.0  # from the first request of a load to its window


class Contender:
    """Makes images of a data set, `rows` network rows each. `times` are images a second and seconds of a lone image."""

    def __init__(self, name: str, data: str, rows: int) -> None:
        self.name, self.data, self.rows = name, data, rows
        self.times: list[tuple[float, float]] = []

    def turn(self, seconds: float) -> None:
        """Measures both once, for about so long."""
        raise NotImplementedError

    @property
    def medians(self) -> tuple[float, float]:
        """Of the rounds."""
        rate, lone = (statistics.median(column) for column in zip(*self.times, strict=True))
        return rate, lone


class Served(Contender):
    """Through HTTP, by a server's default or by a plan of it."""

    def __init__(self, server: TreeServer, name: str, data: str, body: dict[str, Any]) -> None:
        self.server, self.body = server, body
        answer = server.client.post("/generate", json=body)
        if answer.status_code != 200:
            raise SystemExit(f"{name}: {answer.text}")
        told = answer.headers
        self.steps = int(told["X-DDPM-Steps"])
        guided = float(told["X-DDPM-Guidance-Scale"]) != 1
        super().__init__(name, data, int(told.get("X-DDPM-NFE", self.steps * (1 + guided))))

    def turn(self, seconds: float) -> None:
        lone = self.server.load(1, seconds / 2, post("/generate", self.body), fewest=3)
        load = self.server.load(CLIENTS, seconds, post("/generate", self.body | {"n": N}), LEAD_S, fewest=0)
        steps = load.rate("ddpm_image_steps_total", model=self.body["model"])
        self.times.append((steps / self.steps, statistics.median(lone.latencies)))


class Loop:
    """`tests.bench.guided_diffusers` of a checkpoint, in a process of its own."""

    def __init__(self, python: str, source: Checkpoint, folder: Path) -> None:
        folders = [folder / name for name in ("class", "none")]
        for path, label in zip(folders, (7, source.config.unet.num_classes), strict=True):
            export(source, path, label)
        command = [python, ROOT / "tests" / "bench" / "guided_diffusers.py", *folders]
        command.append(str(source.config.sampling.guidance_scale))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.form = self._read()

    def _read(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("diffusers' loop ended")
        return line.strip()

    def seconds(self, steps: int, count: int) -> float:
        """Of so many images."""
        print(steps, count, file=self.process.stdin, flush=True)
        return float(self._read())


class Diffusers(Contender):
    """Without HTTP."""

    def __init__(self, loop: Loop, steps: int) -> None:
        self.loop, self.steps = loop, steps
        super().__init__(f"diffusers, dpmpp_2m {steps} ({loop.form})", "mnist", 2 * steps)

    def turn(self, seconds: float) -> None:
        lone = statistics.median(self.loop.seconds(self.steps, 1) for _ in range(3))
        batches = [self.loop.seconds(self.steps, N)]
        while sum(batches) < seconds:
            batches.append(self.loop.seconds(self.steps, N))
        self.times.append((N * len(batches) / sum(batches), lone))


def served(server: TreeServer) -> Iterator[Served]:
    """Each model by its default, and by the others of its plans."""
    for model in server.client.get("/models").json()["models"]:
        name, default = model["name"], model["defaults"]
        told = [default, *(model.get("plans") or {}).values()]
        scales = {(plan["sampler"], plan["steps"]): plan["guidance_scale"] for plan in told}
        for sampler, steps in scales:
            is_default = (sampler, steps) == (default["sampler"], default["steps"])
            title = f"{name}, {sampler} {steps}{' (default)' * is_default}"
            body = {"model": name, "sampler": sampler, "steps": steps, "guidance_scale": scales[sampler, steps]}
            yield Served(server, title, name.partition("-")[0], body)


def table(contenders: list[Contender]) -> str:
    """Markdown. Ratios are over the first contender of the data set, and over each of diffusers'."""
    theirs = [c for c in contenders if isinstance(c, Diffusers)]
    heads = ["rows an image", "images/s", "times", "lone image, ms", "times", *(f"over {c.name}" for c in theirs)]
    lines = [f"| | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    for c in contenders:
        (rate, lone), first = c.medians, next(other.medians for other in contenders if other.data == c.data)
        numbers = [rate, rate / first[0], 1e3 * lone, lone / first[1]]
        numbers += [rate / other.medians[0] if other.data == c.data else math.nan for other in theirs]
        cells = [str(c.rows), *("" if math.isnan(number) else f"{number:.3g}" for number in numbers)]
        lines.append(f"| {' | '.join([c.name, *cells])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--baseline", type=Path, required=True, help="another tree of this repository")
    add("--models", default="mnist,mnist-fast,cifar10", help="of this tree; the baseline has those that it knows")
    add("--rounds", type=int, default=3)
    add("--seconds", type=float, default=4, help="of a window of images a second")
    add("--diffusers", default="", metavar="PYTHON", help="a Python that has torch and diffusers")
    add("--diffusers_steps", default="10,5")
    args = parser.parse_args()
    baseline, names = args.baseline.resolve(), args.models.split(",")
    known = [name for name in names if (baseline / "model" / "pretrained" / f"{name}.safetensors").exists()]
    contenders: list[Contender] = []
    with ExitStack() as stack:
        for tree, models in ((baseline, known), (ROOT, names)):
            server = TreeServer(tree, "-m", "app", "--checkpoint", ",".join(models))
            stack.callback(server.close)
            if tree == baseline:
                contenders += [Served(server, f"baseline, {name}", name, {"model": name}) for name in models]
            else:
                contenders += served(server)
        if args.diffusers:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            source = checkpoint.load(str(baseline / "model" / "pretrained" / "mnist.safetensors"))
            loop = Loop(args.diffusers, source, folder)
            stack.callback(loop.process.kill)
            contenders += [Diffusers(loop, int(steps)) for steps in args.diffusers_steps.split(",")]
        else:
            print("without diffusers: --diffusers PYTHON is not given")
        for _ in range(args.rounds):
            for contender in contenders:
                contender.turn(args.seconds)
    print(f"{circumstances(torch.device('cpu'))}; medians of {args.rounds} rounds\n\n{table(contenders)}")


if __name__ == "__main__":
    main()
