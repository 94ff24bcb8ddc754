"""Draw a run's progress without slowing or ending it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

#: Seconds between two pictures at least, and the share of a run's time that they may take.
DRAW_SECONDS, DRAW_SHARE = 15.0, 0.02


class ProgressPicture:
    """Draw progress.png now and then, and at the end.

    Args:
        draw: Writes the picture.
        log: Takes a line when that fails.
    """

    def __init__(self, draw: Callable[[], None], log: Callable[[str], None]) -> None:
        self.draw, self.log, self._drawn, self._took = draw, log, time.monotonic(), 0.0

    def update(self, last: bool) -> None:
        """Draw the picture if it is due. It always is after the last epoch."""
        start = time.monotonic()
        if not last and start - self._drawn <= max(DRAW_SECONDS, self._took / DRAW_SHARE):
            return
        try:
            self.draw()
        except OSError as error:
            self.log(f"WARNING: progress.png could not be written: {error.strerror or error}")
        # a closed figure is garbage in cycles, 60 MiB in nnU-Net's size, which Python finds many epochs later
        gc.collect()
        self._drawn = time.monotonic()
        self._took = self._drawn - start
