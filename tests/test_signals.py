"""Signals that ask a process to end."""

import os
import signal

import pytest

from nnssl_ext.signals import NAMES, EndSignals


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(signal, name)])
def test_a_signal_leaves_a_note_and_handlers_are_as_before(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with EndSignals() as signals:
        assert signals.received == ""
        os.kill(os.getpid(), number)
        assert signals.received == name
    assert signal.getsignal(number) is before


def test_a_second_interrupt_ends_at_once() -> None:
    with EndSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_stays_in_force() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with EndSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received == ""
    finally:
        signal.signal(signal.SIGHUP, before)


def test_work_without_steps_ends_at_once_and_only_once() -> None:
    with EndSignals(at_once=True) as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # what is being kept must not be interrupted
    assert signals.received == "SIGTERM"
