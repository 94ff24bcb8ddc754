"""The command that continues a run."""

from __future__ import annotations

import os
import shlex

from nnssl_ext.commands import RunName
from nnssl_ext.environment import launched
from nnssl_ext.training.distributed.ranks import world


def continuation(run: RunName, device: str) -> str:
    """Return the command that continues a run on as many processes as there are now."""
    started_by_torchrun = world() > 1 and launched()
    words = [*_launcher(), *run.arguments()] if started_by_torchrun else run.words()
    if device != "cuda":
        words += ["-device", device]
    if world() > 1 and not started_by_torchrun:
        words += ["-num_gpus", str(world())]
    return shlex.join([*words, "--c"])


def _launcher() -> list[str]:
    """Return the words by which torchrun starts as many processes again."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    several = ["--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"] if here < world() else ["--standalone"]
    sizes = [f"--nnodes={world() // here}", f"--nproc-per-node={here}"]
    return ["torchrun", *several, *sizes, "-m", "nnssl_ext.train"]
