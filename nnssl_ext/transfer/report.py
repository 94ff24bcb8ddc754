"""What became of every tensor of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

COPIED, ADAPTED, LEFT = "copied", "adapted", "left"


@dataclass(frozen=True)
class Row:
    """One tensor of the target.

    Attributes:
        name: Its canonical name.
        shape: Its shape.
        action: ``COPIED``, ``ADAPTED`` or ``LEFT`` at its initial value.
        note: How it was adapted or why it was left.
        source: The source's tensor; '' if there is none.
        parameters: How many trained numbers it holds; 0 for a buffer.
        filled: How many of them come from the source.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    note: str
    source: str
    parameters: int
    filled: int


@dataclass
class Report:
    """Every tensor of the target, what the source has over, and remarks."""

    rows: list[Row]
    unused: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Trained numbers of the target."""
        return sum(row.parameters for row in self.rows)

    @property
    def filled(self) -> int:
        """Trained numbers of the target that come from the source."""
        return sum(row.filled for row in self.rows)

    def filled_by(self, action: str) -> int:
        """Trained numbers that come from the source, of the tensors with this action."""
        return sum(row.filled for row in self.rows if row.action == action)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, for the file that is written."""
        return {
            "rows": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "unused": self.unused,
            "remarks": self.remarks,
            "parameters": self.parameters,
            "filled": self.filled,
        }

    def __str__(self) -> str:
        widths = [
            max((len(cell) for cell in column), default=0) for column in zip(*map(_cells, self.rows), strict=True)
        ]
        lines = [_line(_cells(row), widths) for row in self.rows]
        left = self.parameters - self.filled
        lines += [
            "",
            f"copied   {self.filled_by(COPIED):>13,} parameters",
            f"adapted  {self.filled_by(ADAPTED):>13,} parameters",
            f"left     {left:>13,} parameters at their initial values",
            f"total    {self.parameters:>13,} parameters, {self.filled / self.parameters:.1%} from the source",
        ]
        if self.unused:
            names = ", ".join(list(self.unused)[:3]) + (", ..." if len(self.unused) > 3 else "")
            lines.append(f"not used: {len(self.unused)} tensors of the source, {sum(self.unused.values()):,} ({names})")
        return "\n".join([*lines, *self.remarks])


def _cells(row: Row) -> list[str]:
    note = row.note
    if row.source and row.source != row.name and row.action != LEFT:
        note = f"{note}; from {row.source}" if note else f"from {row.source}"
    return [row.action, row.name, "x".join(map(str, row.shape)) or "1", note]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
