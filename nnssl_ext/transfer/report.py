"""Report what became of every tensor of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

COPIED, ADAPTED, LEFT = "copied", "adapted", "left"


@dataclass(frozen=True)
class Row:
    """One tensor of the target.

    Attributes:
        name: Its canonical name.
        shape: Its shape.
        action: ``COPIED``, ``ADAPTED`` or ``LEFT`` at its initial value.
        note: How it was adapted, or why it was left.
        source: The tensor's name in the source's file; '' if there is none.
        parameters: Number of trained values; 0 for a buffer.
        filled: Number of them that come from the source.
        encoder: Whether it belongs to the encoder.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    note: str
    source: str
    parameters: int
    filled: int
    encoder: bool = False


@dataclass
class Report:
    """Collect rows, unused tensors, factors and remarks."""

    rows: list[Row]
    unused: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    lengths: dict[str, float] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Count the trained values of the target."""
        return sum(row.parameters for row in self.rows)

    @property
    def filled(self) -> int:
        """Count the target's trained values from the source."""
        return sum(row.filled for row in self.rows)

    @property
    def encoder_share(self) -> float:
        """Return the encoder's share from the source, 0 to 1."""
        encoder = [row for row in self.rows if row.encoder]
        return sum(row.filled for row in encoder) / max(sum(row.parameters for row in encoder), 1)

    def filled_by(self, action: str) -> int:
        """Count the values from the source by action."""
        return sum(row.filled for row in self.rows if row.action == action)

    def as_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return {
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "unused": self.unused,
            "remarks": self.remarks,
            "lengths": self.lengths,
            "parameters": self.parameters,
            "filled": self.filled,
        }

    def __str__(self) -> str:
        table = [self._cells(row) for row in self.rows]
        widths = [max((len(cell) for cell in column), default=0) for column in zip(*table, strict=True)]
        lines = [_line(cells, widths) for cells in table]
        left = self.parameters - self.filled
        lines += [
            "",
            f"copied   {self.filled_by(COPIED):>13,} parameters",
            f"adapted  {self.filled_by(ADAPTED):>13,} parameters",
            f"left     {left:>13,} parameters at their initial values",
            f"total    {self.parameters:>13,} parameters, {self.filled / self.parameters:.1%} from the source",
            f"encoder  {self.encoder_share:>13.1%} from the source",
        ]
        if self.unused:
            names = ", ".join(list(self.unused)[:3]) + (", ..." if len(self.unused) > 3 else "")
            lines.append(f"not used: {len(self.unused)} tensors of the source, {sum(self.unused.values()):,} ({names})")
        if self.lengths:
            factors = self.lengths.values()
            lines.append(
                f"scaled to initial length: {len(self.lengths)} convolutions, factors {min(factors):.3g} to "
                f"{max(factors):.3g}, median {median(factors):.3g}"
            )
        return "\n".join([*lines, *self.remarks])

    def _cells(self, row: Row) -> list[str]:
        notes = [row.note] if row.note else []
        if row.name in self.lengths:
            notes.append(f"x {self.lengths[row.name]:.3g} to its initial length")
        if row.source and row.source != row.name and row.action != LEFT:
            notes.append(f"from {row.source}")
        return [row.action, row.name, "x".join(map(str, row.shape)) or "1", "; ".join(notes)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
