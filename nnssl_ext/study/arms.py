"""The sides of a study's comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.errors import UserError
from nnssl_ext.methods import TRAINERS
from nnssl_ext.study.protocol import SCRATCH, TITLES, TOTAL


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        name: As on the command line.
        method: Its pretraining method, '' for none.
        init: A file of pretrained weights from elsewhere, '' for none.
    """

    name: str
    method: str = ""
    init: str = ""

    @property
    def title(self) -> str:
        """The exact name of an arm for the report."""
        return TITLES.get(self.name, self.name)


def arms_of(methods: list[str], inits: list[str], total_baseline: int) -> list[Arm]:
    """The arms that the command line names; scratch is always the first.

    Raises:
        UserError: For an unknown method or a file that does not exist.
    """
    known = {trainer.removeprefix("nnsslTrainer_"): name for name, trainer in TRAINERS.items()}
    arms = [Arm(SCRATCH)]
    for name in methods:
        if name == SCRATCH:
            continue
        if name not in known:
            raise UserError(f"--methods: unknown method '{name}'; known: scratch, {', '.join(known)}")
        arms.append(Arm(name, method=known[name]))
    for word in inits:
        name, _, file = word.partition("=")
        if not file or not Path(file).is_file():
            raise UserError(f"--init {word}: expected NAME=FILE with a file that exists")
        if not name.replace("_", "").replace("-", "").isalnum() or name in (SCRATCH, TOTAL, *known):
            raise UserError(
                f"--init {word}: the name may have letters, digits, - and _, and is neither {SCRATCH} nor a method's"
            )
        arms.append(Arm(name, init=str(Path(file).resolve())))
    if len({arm.name for arm in arms}) != len(arms):
        raise UserError("two arms have the same name; give each --methods and --init once")
    if total_baseline and any(arm.method for arm in arms):
        arms.append(Arm(TOTAL))
    return arms
