"""The runner on a GPU: whole steps with and without CUDA graphs, beside the bare network, and one image to its bytes.

    python -m tests.bench.gpu [--nets cifar10,mnist] [--rows 1,8,64,256,512,1024] [--precision bf16]
        [--micro_batch_size N]

Steps are the engine's, with the host's part: deterministic ones (ddim), and noisy ones (ddpm), whose noise is drawn in
the graph. It needs torch, numpy and safetensors, and nothing else. The weights of cifar10 are random. Candidates take
turns, medians of the rounds; the device is waited for. Not a test; `--device cpu --nets tiny --rows 1,2,8` shows that
it runs.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from app.engine.batch_invariance import default_micro_batch_size
from app.engine.instance import ModelInstance
from app.engine.memory import device_memory
from app.engine.request import OutputStream, Request, Sample
from app.engine.runner import ModelRunner
from model import checkpoint
from model.backends.compile import best_precision
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import make_schedule
from tests.bench.gpu_questions import memory_of_a_spoiled_recording, norms, padding, same_bits, warm_up_memory
from tests.bench.timing import matrix_peak, processor, seconds

CONFIGS = {
    "cifar10": UNetConfig(),  # of Ho et al. 2020: 35.7 million weights
    "tiny": UNetConfig(
        image_channels=1, image_size=(8, 8), base_channels=16, channel_mults=(1, 2), num_res_blocks=1, time_emb_dim=16
    ),
}
STEPS = 20  # of the single image
TURN_S = 0.1  # that one candidate runs for, within a round


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


def medians(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a call. Before each turn there is one that does not count: it brings back what others pushed out."""
    repeat = {}
    for name, run in runs.items():
        run()
        repeat[name] = max(1, min(200, round(TURN_S / max(seconds(run, device, 2), 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            times[name].append(seconds(run, device, repeat[name]))
    return {name: statistics.median(values) for name, values in times.items()}


class Bench:
    """One checkpoint, warmed up as the server does it."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.device, self.rounds = torch.device(args.device), args.rounds
        self.loop = asyncio.new_event_loop()
        loaded = load(name)
        self.config, self.diffusion, self.flops = loaded.config.unet, loaded.diffusion, flops(loaded.network)
        self.network, self.args = copy.deepcopy(loaded.network), args
        precision = best_precision(self.device) if args.precision == "auto" else args.precision
        self.micro_batch_size = args.micro_batch_size or default_micro_batch_size(loaded.network, self.device)
        self.runner = ModelRunner(loaded, self.device, self.micro_batch_size, 0, "torch", precision)
        self.served = ModelInstance(loaded, self.runner, 0)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        started = time.perf_counter()
        for _ in self.served.warmup_steps:
            pass
        self.ready = time.perf_counter() - started

    def request(self, n: int, steps: int, sampler: str = "ddim") -> Request:
        schedule = make_schedule(self.diffusion, sampler, steps)
        classes = None if self.config.num_classes is None else (1,) * n
        return Request(schedule, 0, 0, n, classes, math.inf, OutputStream(self.loop), self.served.name)

    @contextmanager
    def graphs(self, wanted: bool) -> Iterator[None]:
        """Without them where they are not wanted; samples have to be started so, too."""
        graphs = self.runner._graphs
        self.runner._graphs = graphs if wanted else None
        try:
            yield
        finally:
            self.runner._graphs = graphs

    def stepping(self, rows: int, sampler: str, graphs: bool) -> Callable[[], object]:
        """A step of so many samples, over and over."""
        samples = self.request(rows, 1000, sampler).samples
        with self.graphs(graphs):
            self.runner.init_latents(samples)

        def step() -> None:
            if samples[0].finished:
                for sample in samples:
                    sample.step = 0
            with self.graphs(graphs):
                self.runner.step(samples)

        return step

    def eagerly(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network with as many rows at a time as the runner takes, but no padding."""
        network, parts = self.runner._network, []
        for start in range(0, len(x), self.runner.micro_batch_size):
            rows = slice(start, start + self.runner.micro_batch_size)
            parts.append(network(x[rows], t[rows], None if y is None else y[rows]))
        return torch.cat(parts)

    def same_bits(self, rows: int) -> bool:
        """Whether samples of both samplers come out alike with and without graphs, all their steps in one batch."""
        images = []
        for graphs in (True, False):
            requests = [self.request(max(1, rows // 2), 10, sampler) for sampler in ("ddim", "ddpm")]
            samples: list[Sample] = [sample for request in requests for sample in request.samples][: max(2, rows)]
            with self.graphs(graphs):
                self.runner.init_latents(samples)
                while not samples[0].finished:
                    self.runner.step(samples)
                states = [self.runner._graphs.slots.x_of(s) if self.runner._graphs else s.x for s in samples]
                images.append(torch.stack(states))  # type: ignore[arg-type]
        return torch.equal(*images)

    @torch.inference_mode()
    def row(self, rows: int, peak: float) -> str:
        """A line of the table."""
        given = inputs(self.config, rows, self.device)
        runs: dict[str, Callable[[], object]] = {"network": lambda: self.eagerly(*given)}
        for sampler in ("ddim", "ddpm"):
            for graphs in (False, True):
                runs[f"{sampler} {graphs}"] = self.stepping(rows, sampler, graphs)
        took = medians(runs, self.device, self.rounds)
        cells = [f"{1e3 * s:.3f} ({rows * self.flops / s / peak:.1%})" for s in took.values()]
        per_second = rows / took["ddim True"]
        return f"| {rows} | {' | '.join(cells)} | {per_second:.4g} | {'yes' if self.same_bits(rows) else 'no'} |"

    @torch.inference_mode()
    def one_image(self, graphs: bool) -> tuple[float, float]:
        """Median and longest seconds of one image of 20 steps, from the noise to its bytes on the host."""
        times = []
        with self.graphs(graphs):
            for _ in range(3 + 4 * self.rounds):
                samples = self.request(1, STEPS).samples
                started = time.perf_counter()
                self.runner.init_latents(samples)
                while not samples[0].finished:
                    self.runner.step(samples)
                self.runner.to_images(samples, "xt")
                times.append(time.perf_counter() - started)
        return statistics.median(times[3:]), max(times[3:])

    def report(self, rows: list[int], peak: float) -> None:
        used, total = (n / 2**30 for n in device_memory(self.device))
        runner = self.runner
        print(f"{self.flops / 1e9:.4g} GFLOP a row, {runner.precision}; ready after {self.ready:.1f} s; ", end="")
        print(f"{used:.1f} of {total:.0f} GiB in use")
        print(
            f"same bits: {same_bits(runner._network, self.config, self.micro_batch_size, self.device, inputs)}; ",
            end="",
        )
        print(f"run: {' '.join(map(str, runner.sizes))}; ", end="")
        graphs = runner._graphs
        print(f"graphs: {f'all of them, {graphs.slots.count} slots' if graphs else 'none'}; ", end="")
        print(f"rows in a step at most: {self.served.batch_limits.max}")
        print(padding(runner.sizes, self.micro_batch_size))
        if self.device.type == "cuda":
            print(warm_up_memory(self.device, graphs is not None))
        print()
        print(
            "Milliseconds (of the peak): the network alone; steps of ddim and of ddpm, without graphs and as served.\n"
        )
        print(
            "| rows | network | ddim, no graphs | **ddim** | ddpm, no graphs | **ddpm** | image-steps/s | same bits |"
        )
        print("|---:|---:|---:|---:|---:|---:|---:|---|")
        for n in rows:
            print(self.row(n, peak), flush=True)
        for graphs_too in (False, True):
            middle, longest = self.one_image(graphs_too)
            how = "as served" if graphs_too else "no graphs"
            print(f"\none image, {STEPS} steps of ddim, {how}: {1e3 * middle:.2f} ms (longest {1e3 * longest:.2f})")
        print()
        for line in norms(self.network, self.args, runner.precision, self.micro_batch_size, inputs, medians):
            print(line, flush=True)
        print()
        self.loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nets", default="cifar10,mnist", help=f"{', '.join(CONFIGS)}, or bundled")
    parser.add_argument("--rows", default="1,8,64,256,512,1024")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--micro_batch_size", type=int, default=0, help="as --micro-batch-size of the server")
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
    if gpu:
        print(memory_of_a_spoiled_recording(device))


if __name__ == "__main__":
    main()
