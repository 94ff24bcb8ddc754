"""List what cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nnssl_ext.data.cases import shorten
from nnssl_ext.errors import UserError


class Unreadable:
    """List unreadable cases or images, which are replaced.

    Of ``total`` ``kind`` (a plural noun) at most the fraction ``limit`` may be unreadable. Each is logged in a line.
    """

    def __init__(self, kind: str, total: int, limit: float, log: Callable[[str], None]) -> None:
        self.kind, self.total, self.limit, self.log = kind, total, limit, log
        self.names: list[str] = []

    def note(self, names: Iterable[str]) -> None:
        """Log each name once, and end the run at too many. The text after ': ' in a name is the reason."""
        known = {name.partition(": ")[0] for name in self.names}
        new = list({name.partition(": ")[0]: name for name in names if name.partition(": ")[0] not in known}.values())
        for name in new:
            self.names.append(name)
            self.log(f"cannot be read and is skipped ({len(self.names)} so far): {name}")
        if new and len(self.names) > self.limit * self.total:
            raise UserError(
                f"{len(self.names)} of {self.total} {self.kind} cannot be read, more than max_unreadable_fraction="
                f"{self.limit} allows: {shorten(self.names, 20)}. Repair them or raise it, then go on with --c"
            )
