"""The runner on a GPU: its network calls with and without CUDA graphs, whole steps, and one image from noise to bytes.

    python -m tests.bench.gpu [--nets cifar10,mnist] [--rows 1,8,64,256,512,1024] [--precision bf16] [--chunk N]

It needs torch, numpy and safetensors, and nothing else. `--device cpu --nets tiny --rows 1,2,8` shows that it runs.
The weights of cifar10 are random. Contenders take turns, medians of the rounds; the device is waited for. Not a test.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from app.engine.memory import device_memory
from app.engine.request import Mailbox, Request
from app.engine.runner import Runner, best_chunk, last
from app.engine.served import Served
from app.engine.sizes import candidates
from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointConfig
from model.cuda import Graphs
from model.diffusion import DiffusionConfig
from model.inference import best_precision
from model.plan import make_plan
from model.rng import normals
from model.unet import UNet, UNetConfig
from tests.bench.timing import matrix_peak, processor, seconds

CONFIGS = {
    "cifar10": UNetConfig(),  # of Ho et al. 2020: 35.7 million weights
    "tiny": UNetConfig(
        image_channels=1, image_size=(8, 8), base_channels=16, channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=16
    ),
}
STEPS = 20  # of the single image
TURN_S = 0.1  # that one contender runs for, within a round


def load(name: str) -> Checkpoint:
    """The bundled one of that name, or a random network with no zeros in it: fresh ones have zero convolutions."""
    if name not in CONFIGS:
        return checkpoint.load(name)
    torch.manual_seed(0)
    config = CONFIGS[name]
    network = UNet(config).eval()
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return Checkpoint(name, "0" * 64, CheckpointConfig(config, DiffusionConfig()), network)


def inputs(config: UNetConfig, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    x = normals([1] * rows, range(rows), [0] * rows, config.image_shape, device)
    t = torch.arange(rows, device=device) * 997 % 1000
    return x, t, None if config.num_classes is None else torch.arange(rows, device=device) % config.num_classes


@torch.inference_mode()
def flops(network: UNet) -> float:
    """Of one row: convolutions and matrix products only."""
    with FlopCounterMode(display=False) as counter:
        network(*inputs(network.config, 1, torch.device("cpu")))
    return float(counter.get_total_flops())


@torch.inference_mode()
def groups(eager: Callable[..., Tensor], config: UNetConfig, chunk: int, device: torch.device) -> str:
    """Numbers of rows that give the same bits, group by group."""
    whole = inputs(config, chunk, device)
    found: list[tuple[Tensor, list[int]]] = []
    for size in candidates(chunk, device.type):
        out = eager(*last(size, *whole))
        for first, sizes in found:
            if torch.equal(out, first[-size:]):
                sizes.append(size)
                break
        else:
            found.append((out, [size]))
    return "; ".join(" ".join(map(str, sizes)) for _, sizes in found)


def medians(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a call."""
    repeat = {}
    for name, run in runs.items():
        run()
        repeat[name] = max(1, min(200, round(TURN_S / max(seconds(run, device, 2), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device, repeat[name]))
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """One checkpoint, warmed up as the server does it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device, self.rounds = torch.device(args.device), args.rounds
        self.loop = asyncio.new_event_loop()
        loaded = load(name)
        self.config, self.diffusion, self.flops = loaded.config.unet, loaded.diffusion, flops(loaded.network)
        precision = best_precision(self.device) if args.precision == "auto" else args.precision
        self.chunk = args.chunk or best_chunk(loaded.network, self.device)
        self.runner = Runner(loaded, self.device, self.chunk, 0, "torch", precision)
        self.served = Served(loaded, self.runner, 0)
        started = time.perf_counter()
        for _ in self.served.portions:
            pass
        self.ready = time.perf_counter() - started
        network = self.runner._network
        self.graphs = network.rows if isinstance(network, Graphs) else []
        self.eager = network.eager if isinstance(network, Graphs) else network

    def request(self, n: int, steps: int) -> Request:
        plan = make_plan(self.diffusion, "ddim", steps)
        classes = None if self.config.num_classes is None else (1,) * n
        return Request(plan, 0, 0, n, classes, math.inf, Mailbox(self.loop), self.served)

    def eagerly(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """As many rows at a time as the runner takes, but no padding and no graphs."""
        parts = [range(len(x))[i : i + self.runner.chunk] for i in range(0, len(x), self.runner.chunk)]
        cut = [slice(part.start, part.stop) for part in parts]
        return torch.cat([self.eager(x[rows], t[rows], None if y is None else y[rows]) for rows in cut])

    @torch.inference_mode()
    def row(self, rows: int, peak: float) -> str:
        """A line of the table."""
        given = inputs(self.config, rows, self.device)
        samples = self.request(rows, 1000).samples
        self.runner.start(samples)

        def step() -> None:
            if samples[0].finished:
                for sample in samples:
                    sample.step = 0
            self.runner.step(samples)

        runs = {"eager": lambda: self.eagerly(*given), "served": lambda: self.runner.forward(*given), "step": step}
        took = medians(runs, self.device, self.rounds)
        per_second, share = rows / took["step"], {name: rows * self.flops / s / peak for name, s in took.items()}
        same = torch.equal(self.eagerly(*given), self.runner.forward(*given))
        cells = [f"{1e3 * s:.3f} ({share[name]:.1%})" for name, s in took.items()]
        return f"| {rows} | {' | '.join(cells)} | {per_second:.4g} | {'yes' if same else 'no'} |"

    @torch.inference_mode()
    def one_image(self) -> tuple[float, float]:
        """Median and longest seconds of one image of 20 steps, from the noise to its bytes on the host."""
        times = []
        for _ in range(3 + 4 * self.rounds):
            samples = self.request(1, STEPS).samples
            started = time.perf_counter()
            self.runner.start(samples)
            while not samples[0].finished:
                self.runner.step(samples)
            self.runner.read(samples, "xt")
            times.append(time.perf_counter() - started)
        return statistics.median(times[3:]), max(times[3:])

    def report(self, rows: list[int], peak: float) -> None:
        used, total = (n / 2**30 for n in device_memory(self.device))
        runner = self.runner
        print(f"{self.flops / 1e9:.4g} GFLOP a row, {runner.precision}; ready after {self.ready:.1f} s; ", end="")
        print(f"{used:.1f} of {total:.0f} GiB in use")
        print(f"same bits: {groups(self.eager, self.config, self.chunk, self.device)}; ", end="")
        print(f"run: {' '.join(map(str, runner.sizes))}; graphs: {' '.join(map(str, self.graphs)) or 'none'}; ", end="")
        print(f"rows in a step at most: {self.served.scheduler.max_rows}\n")
        print("| rows | network, eager: ms (of the peak) | as served | a whole step | image-steps/s | same bits |")
        print("|---:|---:|---:|---:|---:|---|")
        for n in rows:
            print(self.row(n, peak), flush=True)
        middle, longest = self.one_image()
        print(f"\none image, {STEPS} steps of ddim: {1e3 * middle:.2f} ms (longest {1e3 * longest:.2f})\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nets", default="cifar10,mnist", help=f"{', '.join(CONFIGS)}, or bundled")
    parser.add_argument("--rows", default="1,8,64,256,512,1024")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--chunk", type=int, default=0, help="as --chunk-rows of the server")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)  # why there are no graphs
    device = torch.device(args.device)
    peak = matrix_peak(device, time.perf_counter)
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads of {processor()}, no GPU"
    cudnn = f", cuDNN {torch.backends.cudnn.version()}" if gpu else ""
    print(f"{where}; torch {torch.__version__}{cudnn}; {date.today().isoformat()}")
    print(f"bf16 matrix peak {peak / 1e12:.4g} TFLOP/s; medians of {args.rounds} rounds\n")
    for name in args.nets.split(","):
        print(f"**{name}**\n")
        Bench(name, args).report([int(n) for n in args.rows.split(",")], peak)


if __name__ == "__main__":
    main()
