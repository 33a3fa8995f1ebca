"""Two processes under torchrun are one, but for the order of the sums."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from training.loop import distributed
from training.loop.distributed import DistributedContext, init_distributed
from training.run.config import TrainConfig
from training.train import train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]
ROOT = Path(__file__).parents[3]
SAME = """
import atexit
import sys
from functools import partial

import torch
from training import train
from training.data.batches import Batches
from training.loop import validation

validation.VALIDATION_IMAGES = 64
train.git_revision = lambda: "0123"
torch.compile = partial(torch.compile, backend="aot_eager")  # inductor takes a minute
clean = Batches.__getitem__


def spoiled(self, iteration):
    batch = clean(self, iteration)
    if iteration == 2 and self._ranks.rank == self._ranks.size - 1:
        batch.x0[-1] = float("nan")  # the last image of the global batch, which only the last process has
    return batch


if sys.argv.pop(1) == "poisoned":
    Batches.__getitem__ = spoiled
atexit.register(print, "finalized")
sys.exit(train.main())
"""


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts two processes of training.train, with the validation images and revision of the other tests."""
    (tmp_path / "same.py").write_text(SAME)
    with ExitStack() as stack:

        def run(*words: str, poisoned: bool = False) -> subprocess.Popen[str]:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            process = subprocess.Popen(
                [sys.executable, *torchrun, str(tmp_path / "same.py"), "poisoned" if poisoned else "clean", *words],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "FutureWarning" not in err
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "more", "close"),
    [
        ("adam", {}, 2e-5),
        ("adam", {"compile": True}, 2e-5),
        ("muon", {}, 1e-3),  # directions of hardly any gradient are as large as others in Muon's steps
    ],
    ids=str,
)
def test_two_processes_train_as_one_does(
    optimizer: str,
    more: Options,
    close: float,
    torchrun: Callable[..., subprocess.Popen[str]],
    tiny_options: Options,
    command_line: list[str],
) -> None:
    more = more | {
        "dropout": 0.0,
        "flip": True,
        "label_dropout": 0.3,
        "grad_clip": 0.1,
        "accumulate": 2,
        "schedule": "cosine",
    }
    more |= {"num_timesteps": 4, "timestep_sampler": "loss_second_moment", "iterations": 12, "checkpoint_rate": 6}
    more |= {"optimizer": optimizer, "ema_power": (0.1,)}
    words = [w for k, v in more.items() for w in (f"--{k}", str(v))]
    process = torchrun(*command_line, *words, "--run_name", "two", poisoned=True)
    sys_argv = [sys.executable, str(Path(tiny_options["log_dir"]).parent / "same.py"), "poisoned"]
    one = subprocess.run([*sys_argv, *command_line, *words], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert one.returncode == 0
    out = finished(process)
    assert out.count("29 images to train on, 1 to validate") == out.count("Done: ") == 1  # the first process speaks
    runs = [Path(tiny_options["log_dir"]) / name for name in ("run", "two")]
    assert sorted(p.name for p in runs[0].iterdir()) == sorted(p.name for p in runs[1].iterdir())
    a, b = (torch.load(run / "state-0000012.pt", weights_only=True) for run in runs)
    assert (a["importance"]["counts"][:-1] >= 10).all()  # or importance would not have counted yet
    assert torch.equal(a["importance"]["counts"], b["importance"]["counts"])
    torch.testing.assert_close(a["importance"]["losses"], b["importance"]["losses"], rtol=1e-4, atol=1e-6)
    kinds = [(a["optimizer"], b["optimizer"])]
    if optimizer == "muon":
        kinds = [(a["optimizer"][kind], b["optimizer"][kind]) for kind in ("adamw", "muon")]
    for x, y in kinds:
        assert x["state"]
        for i, moments in x["state"].items():
            torch.testing.assert_close(moments, y["state"][i], rtol=50 * close, atol=close / 20)
    torch.testing.assert_close(a["network"], b["network"], rtol=1e-3, atol=close)
    torch.testing.assert_close(a["ema"], b["ema"], rtol=1e-3, atol=close)
    assert a["tally"][2] == b["tally"][2] == 1  # the poisoned step, skipped by both
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs]
    for x, y in zip(*logs, strict=True):
        for key in ("train_loss", "validation_loss"):
            assert (key in x) == (key in y)
            assert x.get(key, 0.0) == pytest.approx(y.get(key, 0.0), rel=1e-4)
    # and goes on, from two processes to one
    more |= {"run_name": "two", "iterations": 13, "compile": False}
    assert train(TrainConfig(**tiny_options | more), resume=True) == runs[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_with_a_checkpoint(
    torchrun: Callable[..., subprocess.Popen[str]], tiny_options: Options, command_line: list[str]
) -> None:
    run = TrainConfig(**tiny_options).run_dir
    process = torchrun(*command_line, "--iterations", "1000000", "--checkpoint_rate", "1000000")
    deadline = time.monotonic() + 300
    while not (run / "log.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False)
    children = [int(pid) for pid in found.stdout.split()]
    assert len(children) == 2
    os.kill(max(children), signal.SIGTERM)  # the one started last
    out = finished(process)
    assert "Stopped at iteration" in out
    assert "finalized" not in out  # where gloo's threads may abort it
    (state,) = run.glob("state-*.pt")
    iteration = torch.load(state, weights_only=True)["iteration"]
    assert iteration > 0
    again = torchrun("--resume", str(run), "--iterations", str(iteration + 3), "--checkpoint_rate", "100")
    assert "Done: " in finished(again)  # the second process has the state as well, though only the first one reads it
    assert (run / f"state-{iteration + 3:07d}.pt").exists()


@pytest.mark.parametrize(("name", "why"), [("cuda:1", "each process has its own"), ("cuda", "than the 0 GPUs")])
def test_each_process_has_a_gpu_of_its_own(name: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(distributed, "torch_device", torch.device)  # as if there were GPUs
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=why), init_distributed(name):
        pass


def test_alone_there_is_nobody_to_wait_for() -> None:
    with init_distributed("cpu") as (ranks, device):
        assert (ranks, device) == (DistributedContext(0, 1), torch.device("cpu"))
        x = torch.arange(4.0)
        assert torch.equal(ranks.shard(x), x)
        assert torch.equal(ranks.mean(x), x)
        assert ranks.broadcast("a") == "a"
        assert (ranks.any(True), ranks.any(False)) == (True, False)
        network = torch.nn.Linear(1, 1)
        assert ranks.wrap_ddp(network) is network


def test_every_image_has_one_process() -> None:
    parts = [DistributedContext(rank, 3).shard(torch.arange(12)).tolist() for rank in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
