"""End long work between two steps when asked to."""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

#: Ctrl-C, Ctrl-Break on Windows, a closed terminal, a stop by a scheduler, and SLURM's warnings before a time limit:
#: USR2 is submitit's.
NAMES = ("SIGINT", "SIGBREAK", "SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2")
#: A shell ignores these for ``nohup`` and for background jobs; then they stay ignored.
_MAY_BE_IGNORED = ("SIGINT", "SIGHUP")


class EndSignals:
    """Note signals to end, instead of dying from them.

    Work looks at ``received`` between two steps, saves what there is and says how to go on. A second Ctrl-C raises
    KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, nothing is noted.

    Args:
        at_once: Raise KeyboardInterrupt at the first signal, for work without steps. Later signals are ignored.

    Example:
        with EndSignals() as signals:
            for item in items:
                work_on(item)
                if signals.received:
                    raise SystemExit(f"Stopped by {signals.received}; nothing is lost. Go on with: ...")

    Attributes:
        received: Name of the signal that came; '' if none did.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.at_once, self.received = at_once, ""
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> EndSignals:
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)  # Windows has fewer
                if number is None or (name in _MAY_BE_IGNORED and signal.getsignal(number) is signal.SIG_IGN):
                    continue
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            with suppress(TypeError):  # None: a handler that was not set from Python
                signal.signal(number, handler)
        self._earlier.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        name, before = signal.Signals(number).name, self.received
        if self.at_once and before:
            return
        self.received = name
        if self.at_once or name == before == "SIGINT":
            raise KeyboardInterrupt


def ignore_in_worker() -> None:
    """Leave the terminal's signals to the main process."""
    for name in _MAY_BE_IGNORED:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
