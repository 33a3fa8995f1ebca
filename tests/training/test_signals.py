import os
import signal
from collections.abc import Iterator

import pytest

from training.run.signals import StopSignals

ALL = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)


@pytest.fixture(autouse=True)
def ended_by() -> Iterator[list[int]]:
    """What reaches the handlers that were there before; nothing is ended by it."""
    reached: list[int] = []
    before = {number: signal.signal(number, lambda got, _: reached.append(got)) for number in ALL}
    yield reached
    for number, handler in before.items():
        signal.signal(number, handler)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [number for number in ALL if number != signal.SIGUSR1])
def test_a_signal_asks_for_a_stop(number: int, ended_by: list[int]) -> None:
    with StopSignals() as signals:
        send(number)
        assert (signals.stop, signals.save) == (True, False)
    send(number)
    assert ended_by == [number]


def test_usr1_asks_for_a_checkpoint(ended_by: list[int]) -> None:
    with StopSignals() as signals:
        send(signal.SIGUSR1)
        assert (signals.stop, signals.save) == (False, True)
    assert ended_by == []


def test_a_second_ctrl_c_or_term_ends_at_once(ended_by: list[int]) -> None:
    with StopSignals():
        send(signal.SIGINT, signal.SIGTERM)
        assert ended_by == [signal.SIGTERM]


def test_what_systems_repeat_does_not_end_at_once(ended_by: list[int]) -> None:
    """A shell passes on the SIGHUP that the terminal sent; systemd adds one to SIGTERM; SIGXCPU comes every second."""
    with StopSignals():
        send(signal.SIGHUP, signal.SIGHUP, signal.SIGXCPU, signal.SIGXCPU, signal.SIGTERM, signal.SIGHUP)
        assert ended_by == []


def test_patience_outlasts_a_second_ctrl_c(ended_by: list[int]) -> None:
    with StopSignals(patient=True):
        send(signal.SIGINT, signal.SIGINT)
    assert ended_by == []


def test_what_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        send(signal.SIGHUP)
        assert not signals.stop
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_signals_that_a_system_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
        monkeypatch.delattr(signal, name)
    with StopSignals() as signals:
        send(signal.SIGTERM)
        assert signals.stop
