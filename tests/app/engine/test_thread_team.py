from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine import thread_team
from app.engine.runner import ModelRunner
from app.engine.thread_team import LONGEST_REST, MOST_THREADS, PROBE_AFTER, SHORTEST_REST, TRIES, ThreadTeam
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(thread_team, "time", clock)
    return clock


@pytest.fixture
def team(clock: Clock) -> ThreadTeam:
    """One that has been faster so far."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 3)
    assert clock.agree(team)
    assert clock.ran(team, 5) == ["team"] * 5
    assert team.patience == SHORTEST_REST
    return team


@pytest.mark.parametrize(("cores", "threads"), [(2, 2), (64, MOST_THREADS)])
def test_a_call_has_the_teams_threads_and_the_next_has_one(clock: Clock, cores: int, threads: int) -> None:
    team = ThreadTeam(clock.network("team"), clock.network("alone"), cores)
    assert clock.agree(team)
    team(*ROW)
    team.rest_s = 1.0
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


def test_where_the_team_is_slower_calls_have_one_thread_for_longer_and_longer(clock: Clock, team: ThreadTeam) -> None:
    assert clock.ran(team, 3) == ["team"] * 3
    clock.seconds["team"] = 0.058
    assert clock.ran(team, 3) == ["team", "team", "alone"]
    assert team.rest_s == pytest.approx(SHORTEST_REST * 0.05 - 0.008)
    clock.now += 1000
    assert clock.ran(team) == ["alone"], "an idle machine has not changed"
    tries = [i for i, name in enumerate(clock.ran(team, 5000)) if name == "team"]
    rests = [0.008 * (later - earlier - 1) / 0.05 for earlier, later in itertools.pairwise(tries)]
    assert rests[:2] == pytest.approx([2 * SHORTEST_REST, 4 * SHORTEST_REST], rel=0.1)
    assert rests[2:] == pytest.approx([LONGEST_REST] * len(rests[2:]), rel=0.1)


def test_a_new_team_that_is_slower_rests_for_long(clock: Clock) -> None:
    """As on a machine that is always busy."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 2)
    assert clock.agree(team)
    clock.seconds["team"] = 0.1
    assert clock.ran(team, 3) == ["team", "team", "alone"]
    assert team.rest_s == pytest.approx(LONGEST_REST * 0.092 - 0.008)


def test_a_team_that_is_faster_again_is_trusted_little_by_little(clock: Clock, team: ThreadTeam) -> None:
    clock.seconds["team"] = 0.058
    clock.ran(team, 1000)
    clock.seconds["team"], team.rest_s = 0.006, 0.0
    assert team.patience == LONGEST_REST
    assert clock.ran(team, 2) == ["team"] * 2
    assert team.patience == LONGEST_REST // 4
    assert clock.ran(team, 20) == ["team"] * 20
    assert team.patience == SHORTEST_REST


def test_a_hiccup_ends_nothing_and_two_calls_that_are_a_little_slower_do(clock: Clock, team: ThreadTeam) -> None:
    clock.seconds["team"] = 60.0
    assert clock.ran(team) == ["team"]
    clock.seconds["team"] = 0.006
    assert clock.ran(team, 2) == ["team", "team"]
    clock.seconds["team"] = 0.013
    assert clock.ran(team, 3) == ["team", "team", "alone"]
    assert team.rest_s == pytest.approx(SHORTEST_REST * 0.005 - 0.008)
    team.rest_s = 0.0
    assert clock.ran(team) == ["team"], "and it is as slow as before"
    assert team.rest_s == pytest.approx(2 * SHORTEST_REST * 0.005)


def test_a_call_that_was_held_up_for_long_counts_as_a_slow_one(clock: Clock, team: ThreadTeam) -> None:
    """As by SIGSTOP, with one thread or several."""
    clock.seconds["team"] = 60.0
    assert clock.ran(team) == ["team"]
    clock.seconds["team"] = 0.012
    assert clock.ran(team) == ["team"]
    assert team.rest_s == pytest.approx(SHORTEST_REST * 0.004)
    clock.seconds["team"], team.rest_s = 60.0, 0.0
    assert clock.ran(team) == ["team"]
    assert team.rest_s == pytest.approx(2 * SHORTEST_REST * 0.004)
    clock.seconds["alone"] = 60.0
    assert clock.ran(team) == ["alone"]
    assert team.alone_s < 0.009


def test_a_warm_up_beside_others_is_forgotten(clock: Clock) -> None:
    """What one thread takes was measured on a busy machine: the team seems faster, and is not."""
    team = ThreadTeam(clock.network("team"), clock.network("alone"), 2)
    clock.seconds.update(team=0.036, alone=0.024)
    assert clock.agree(team)
    clock.seconds.update(team=0.012, alone=0.008)
    assert clock.ran(team, PROBE_AFTER + 1) == ["team"] * PROBE_AFTER + ["alone"]
    assert clock.ran(team, 4) == ["team", "team", "alone", "alone"]


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
