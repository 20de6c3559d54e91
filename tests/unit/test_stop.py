"""Which signals ask a run to stop, which belong together, and which stop it at once."""

import signal
import subprocess
import sys

import pytest

from qlora_neft.run_folder import stop
from qlora_neft.run_folder.stop import StopNow, StopRequest, answered

INT, TERM, HUP, USR1, XCPU = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU


def told(request, arrivals, monkeypatch):
    """What each signal (seconds, number) does: nothing, a line, or an exception."""
    effects = []
    request.on_request = effects.append
    for seconds, number in arrivals:
        monkeypatch.setattr(stop.time, "monotonic", lambda seconds=seconds: 100.0 + seconds)
        try:
            request.request(number)
        except KeyboardInterrupt as error:
            effects.append(type(error).__name__)
    return effects


@pytest.mark.parametrize(
    ("arrivals", "effects"),
    [
        ([(0, INT)], ["SIGINT"]),
        ([(0, INT), (0.05, INT), (1.9, INT)], ["SIGINT"]),
        ([(0, INT), (0.05, TERM)], ["SIGINT"]),
        ([(0, INT), (3, INT)], ["SIGINT", "KeyboardInterrupt"]),
        ([(0, TERM), (3, INT)], ["SIGTERM", "KeyboardInterrupt"]),
        ([(0, HUP), (3, TERM)], ["SIGHUP"]),  # a terminal that is closed, then a machine that is shut down
        ([(0, USR1), (60, TERM), (63, INT)], ["SIGUSR1", "KeyboardInterrupt"]),
        ([(seconds, XCPU) for seconds in range(9)], ["SIGXCPU"]),
    ],
)
def test_what_a_series_of_signals_asks_for(arrivals, effects, monkeypatch):
    request = StopRequest(grace_seconds=30)
    assert told(request, arrivals, monkeypatch) == effects
    assert request.signal == arrivals[0][1]


def test_before_there_is_anything_to_save_a_signal_interrupts(monkeypatch):
    arrivals = [(0, TERM), (0.5, TERM), (1, INT), (3, INT)]  # the second and third would interrupt the cleaning up
    assert told(StopRequest(30, interrupts=True), arrivals, monkeypatch) == ["StopNow", "StopNow"]
    swallowed = StopRequest(30, interrupts=True)
    with pytest.raises(StopNow):
        swallowed.request(HUP)
    with pytest.raises(StopNow, match="SIGHUP"):
        swallowed.hold()


def test_a_signal_of_another_rank_is_none_of_this_process(monkeypatch):
    request = StopRequest(grace_seconds=30)
    request.agree(TERM)
    assert told(request, [(0, INT)], monkeypatch) == ["SIGINT"] and request.signal == TERM


def test_nohup_is_respected_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    code = (
        "import signal; from qlora_neft.run_folder.stop import *\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with answered(StopRequest(0)) as stop: signal.raise_signal(signal.SIGHUP)\n"
        "print(stop.signal, 'torch' in __import__('sys').modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None False\n"
    with answered(StopRequest(0)) as request:
        signal.raise_signal(HUP)
    assert request.signal == HUP
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before
