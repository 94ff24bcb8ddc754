"""Draw a run's progress without slowing or ending it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

#: Seconds between two pictures: one costs about a second of a core.
DRAW_SECONDS = 15.0


class ProgressPicture:
    """Draw progress.png now and then, and at the end. ``log`` is called with a line when that fails."""

    def __init__(self, draw: Callable[[], None], log: Callable[[str], None]) -> None:
        self.draw, self.log, self._drawn = draw, log, time.monotonic()

    def update(self, last: bool) -> None:
        """Draw the picture if it is due. It always is after the last epoch."""
        if not last and time.monotonic() - self._drawn <= DRAW_SECONDS:
            return
        try:
            self.draw()
        except OSError as error:
            self.log(f"WARNING: progress.png could not be written: {error.strerror or error}")
        # a closed figure is garbage in cycles, 60 MiB in nnU-Net's size, which Python finds many epochs later
        gc.collect()
        self._drawn = time.monotonic()
