"""The commands that continue a run or use its weights."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from nnssl_ext.commands import train_words
from nnssl_ext.environment import launched
from nnssl_ext.training.distributed.ranks import world


@dataclass(frozen=True)
class RunName:
    """Name of a run on stock's command line.

    Attributes:
        dataset: Name of the data set, with its number.
        configuration: Configuration of the plans.
        fold: Number of the fold, or ``all``.
        plans: Name of the plans.
        trainer: Name of the trainer.
    """

    dataset: str
    configuration: str
    fold: str
    plans: str
    trainer: str

    def words(self) -> list[str]:
        """Return the words of ``nnUNetv2_train`` for this run."""
        return train_words(self.dataset, self.configuration, self.fold, plans=self.plans, trainer=self.trainer)

    def fine_tuning(self, checkpoint: Path) -> str:
        """Return the command that trains this run from pretrained weights."""
        return shlex.join([*self.words(), "-pretrained_weights", str(checkpoint)])

    def continuation(self, device: str) -> str:
        """Return the command that continues this run on as many processes as there are now."""
        words = self.words()
        if device != "cuda":
            words += ["-device", device]
        if world() > 1 and launched():
            words[:1] = _launcher()
        elif world() > 1:
            words += ["-num_gpus", str(world())]
        return shlex.join([*words, "--c"])


def _launcher() -> list[str]:
    """Return the words by which torchrun starts as many processes again."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    several = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"] if here < world() else ["--standalone"]
    sizes = [f"--nnodes={world() // here}", f"--nproc-per-node={here}"]
    return ["torchrun", *several, *sizes, "-m", "nnssl_ext.train"]
