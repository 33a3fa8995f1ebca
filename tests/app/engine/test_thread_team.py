from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import thread_team
from app.engine.runner import ModelRunner
from app.engine.thread_team import MOST_CREDIT, MOST_LOST, MOST_THREADS, PATIENCE, PROBE_AFTER, TRIES, ThreadTeam
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from tests.app.engine.conftest import equal

CPU = torch.device("cpu")
PRETRAINED = Path(__file__).parents[3] / "model" / "pretrained"
ROW = torch.ones(1, 1, 2, 2), torch.zeros(1), None


class Clock:
    """Of a machine on which a call takes as long as it says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.seconds = {"team": 0.006, "alone": 0.008}
        self.calls: list[tuple[str, int]] = []  # and the threads that it had

    def monotonic(self) -> float:
        return self.now

    def network(self, name: str, bias: float = 0.0) -> thread_team.Network:
        def run(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
            self.calls.append((name, torch.get_num_threads()))
            self.now += self.seconds[name]
            return x + bias

        return run

    def agree(self, team: ThreadTeam) -> bool:
        """What `agrees` returns, after four calls with a pause behind each."""
        steps = team.agrees(*ROW)
        for calls in range(1, 2 * TRIES + 1):
            next(steps)
            assert len(self.calls) == calls
        with pytest.raises(StopIteration) as end:
            next(steps)
        self.calls.clear()
        return bool(end.value.value)

    def ran(self, team: ThreadTeam, calls: int = 1) -> list[str]:
        self.calls.clear()
        for _ in range(calls):
            team(*ROW)
        return [name for name, _ in self.calls]

    def mean(self, team: ThreadTeam, seconds: Iterable[float]) -> float:
        """Milliseconds of a call, where the team's calls would take so long, one after another."""
        began, calls = self.now, 0
        for self.seconds["team"] in seconds:
            team(*ROW)
            calls += 1
        return 1e3 * (self.now - began) / calls


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(thread_team, "time", clock)
    return clock


@pytest.fixture
def team(clock: Clock) -> ThreadTeam:
    """One that has been faster for long."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 3)
    assert clock.agree(team)
    assert clock.ran(team, 50) == ["team"] * 50
    assert team.credit_s == pytest.approx(MOST_CREDIT * 0.008)
    return team


@pytest.mark.parametrize(("cores", "threads"), [(2, 2), (64, MOST_THREADS)])
def test_a_call_has_the_teams_threads_and_the_next_has_one(clock: Clock, cores: int, threads: int) -> None:
    team = ThreadTeam(clock.network("team"), clock.network("alone"), cores)
    assert clock.agree(team)
    team(*ROW)
    team.credit_s = -1.0
    team(*ROW)
    assert clock.calls == [("team", threads), ("alone", 1)]
    assert torch.get_num_threads() == 1


def test_a_call_that_raises_leaves_the_thread_alone(clock: Clock, team: ThreadTeam) -> None:
    clock.seconds.clear()
    with pytest.raises(KeyError):
        team(*ROW)
    assert torch.get_num_threads() == 1


def test_other_bits_are_no_team(clock: Clock) -> None:
    assert not clock.agree(ThreadTeam(clock.network("team", 1e-7), clock.network("alone"), 2))


def test_where_the_team_is_much_slower_calls_have_one_thread(clock: Clock, team: ThreadTeam) -> None:
    clock.seconds["team"] = 0.098
    assert clock.ran(team, 3) == ["team", "alone", "alone"]
    assert team.credit_s == pytest.approx(MOST_CREDIT * 0.008 - 0.09 + 2 * 0.008 / PATIENCE)
    clock.now += 1000
    assert clock.ran(team) == ["alone"], "an idle machine has not changed"
    assert clock.mean(team, [0.098] * 5000) == pytest.approx(8 * (1 + 1 / PATIENCE), rel=0.01), "what tries cost"
    clock.seconds["team"], team.credit_s = 0.006, 0.0
    assert clock.ran(team, 20) == ["team"] * 20


def test_a_hiccup_ends_nothing(clock: Clock, team: ThreadTeam) -> None:
    assert clock.mean(team, [0.045, *[0.006] * 30] * 20) < 7.4
    clock.seconds["team"] = 0.045
    assert clock.ran(team, 3) == ["team", "team", "alone"], "two are none"


def test_a_new_team_has_no_credit(clock: Clock) -> None:
    """As on a machine that is always busy."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 2)
    assert clock.agree(team)
    clock.seconds["team"] = 0.009
    assert clock.ran(team, 2) == ["team", "alone"]


@pytest.mark.parametrize("slow", [0.025, 0.06, 0.25])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.6, 1.0])
def test_whatever_share_of_calls_is_slow_the_better_is_hardly_missed(
    clock: Clock, team: ThreadTeam, slow: float, share: float
) -> None:
    """As in a container with so many microseconds of the processor in each period."""
    dice = random.Random(0)
    seconds = [slow if dice.random() < share else 0.006 for _ in range(5000)]
    better = min(8.0, 1e3 * sum(seconds) / len(seconds))
    assert clock.mean(team, seconds) < 1.1 * better
    assert clock.mean(team, sorted(seconds)) < 1.1 * better


def test_a_call_that_was_held_up_for_long_ends_no_team(clock: Clock, team: ThreadTeam) -> None:
    """As by SIGSTOP, with one thread or several, even twice."""
    clock.seconds.update(team=60.0, alone=60.0)
    assert clock.ran(team, 2) == ["team", "alone"]
    assert team.alone_s < 0.009
    assert team.credit_s > -MOST_LOST * 0.009
    clock.seconds.update(team=0.006, alone=0.008)
    assert clock.ran(team, MOST_LOST * PATIENCE)[-1] == "team"


def test_a_warm_up_beside_others_is_forgotten(clock: Clock) -> None:
    """What one thread takes was measured on a busy machine: the team seems faster, and is not."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 2)
    clock.seconds.update(team=0.036, alone=0.024)
    assert clock.agree(team)
    clock.seconds.update(team=0.012, alone=0.008)
    assert clock.ran(team, PROBE_AFTER + 1) == ["team"] * PROBE_AFTER + ["alone"]
    assert clock.ran(team, 100).count("team") < 30


def test_what_a_call_on_one_thread_takes_is_known_from_the_newest_ones(clock: Clock, team: ThreadTeam) -> None:
    """The whole machine has slowed down: the team is as much faster as before."""
    clock.seconds.update(team=0.06, alone=0.08)
    assert clock.ran(team, 200).count("alone") < 40
    assert 0.06 < team.alone_s < 0.08
    assert clock.ran(team, 20) == ["team"] * 20


def test_only_a_lone_row_has_a_team(checkpoint: Checkpoint) -> None:
    runner, ran = ModelRunner(checkpoint, CPU, 4, threads=2), list[int]()
    x, t = torch.zeros(4, *checkpoint.config.unet.image_shape), torch.zeros(4, dtype=torch.int64)
    runner.warm_up(1)
    assert runner.sizes[0] == 1
    expected = runner.forward(x, t, t)
    runner._team = lambda x, t, y: (ran.append(len(x)), torch.zeros_like(x))[1]  # type: ignore[assignment]
    assert all(equal(runner.forward(x[:n], t[:n], t[:n]), expected[:n]) for n in (2, 3, 4))
    assert not runner.forward(x[:1], t[:1], t[:1]).any()
    assert ran == [1]
    runner.close()
    assert runner._team is None, "it has weights"
    assert not ModelRunner(checkpoint, CPU, 4, threads=1)._team


def test_without_the_memory_for_a_team_a_model_is_served(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_room(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ThreadTeam, "_on_all", no_room)
    runner = ModelRunner(checkpoint, CPU, 4, threads=2)
    runner.warm_up(1)
    assert runner._team is None
    assert "no team of threads" in caplog.text
    x, t = torch.zeros(1, *checkpoint.config.unet.image_shape), torch.zeros(1, dtype=torch.int64)
    assert runner.forward(x, t, t).shape == x.shape
    runner.close()


def test_before_the_warm_up_no_row_has_a_team(checkpoint: Checkpoint) -> None:
    """Nobody knows then whether it gives the same bits."""
    runner = ModelRunner(checkpoint, CPU, 4, threads=2)
    assert runner._team is not None
    runner._team = lambda x, t, y: pytest.fail("it was asked")  # type: ignore[assignment]
    x, t = torch.zeros(1, *checkpoint.config.unet.image_shape), torch.zeros(1, dtype=torch.int64)
    assert runner.forward(x, t, t).shape == x.shape
    runner.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "mnist-fast", "cifar10"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bundled_network_gives_the_same_bits_on_a_team(name: str, precision: str) -> None:
    loaded = checkpoints.load(PRETRAINED / f"{name}.safetensors")
    shape, noise = loaded.config.unet.image_shape, torch.Generator().manual_seed(0)
    rows = torch.randn(9, *shape, generator=noise), torch.linspace(0, 999, 9).floor(), torch.arange(9)
    outs = []
    for threads in (1, 2):
        runner = ModelRunner(loaded, CPU, 2, threads, "torch", precision)
        runner.warm_up(1)
        if threads > 1 and runner._team is None:
            pytest.skip("on this processor a team gives other bits, and is not used")
        with torch.inference_mode():
            outs.append([runner.forward(*(part[i : i + 1] for part in rows)) for i in range(9)])
        runner.close()
    assert equal(*outs)
