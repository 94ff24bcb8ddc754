"""Fine-tuning runs, their faults, and their comparison."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nnssl_ext import checkpoint
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
from nnssl_ext.training.run.folder import HOLDER, LATEST, LOCK, PREVIOUS
from tests.conftest import Environment
from tests.support import runs

NAME = "nnsslTrainer_Finetune"
RUN = {"steps": 8, "steps_per_epoch": 3, "validation_iterations": 1, "save_every": 1, "snapshots": [4, 8]}
#: The same with other snapshots.
BROKEN = {**RUN, "snapshots": [2, 4]}

kill_at = partial(runs.kill_at, error=KeyboardInterrupt, trainer=nnsslTrainer_Finetune)
signal_at = partial(runs.signal_at, trainer=nnsslTrainer_Finetune)


def tune(environment: Environment, kind: str, plans: str, pretrained: Path | None = None, c: bool = False) -> Path:
    return runs.pretrain(environment, kind, plans, trainer=NAME, weights=pretrained, c=c)


def final(fold: Path) -> dict:
    return checkpoint.load(fold / "checkpoint_final.pth")


WORDS = ["nnUNetv2_train", "817", "3d_fullres", "0", "-tr", NAME, "-p", "broken", "-device", "cpu"]


def plans(environment: Environment, *names: str, common: dict | None = None, **settings: Any) -> None:
    for name in names:
        environment.write_plans("labelled", name, {**(common or {}), "finetune": {**BROKEN, **settings}})


def fold(environment: Environment, name: str = "broken") -> Path:
    return environment.fold("labelled", name, NAME)


def same_run(first: Path, second: Path) -> None:
    """Weights, optimiser and log are equal bit for bit, in the end, at the best and in the snapshots."""
    for name in ("final", "best", "step_000002", "step_000004"):
        one, other = (checkpoint.load(folder / f"checkpoint_{name}.pth") for folder in (first, second))
        assert one["nnssl_ext"]["weights_sha256"] == other["nnssl_ext"]["weights_sha256"], name
        digests = []
        for content in (one, other):
            log = {k: v for k, v in content.get("logging", {}).items() if not k.endswith("timestamps")}
            own = {k: content["nnssl_ext"].get(k) for k in ("step", "trained_weights", "losses")}
            kept = {k: content.get(k) for k in ("optimizer_state", "_best_ema", "current_epoch")}
            digests.append(checkpoint.content_digest({**kept, "logging": log, "nnssl_ext": own}))
        assert digests[0] == digests[1], name
    assert not [path for path in second.iterdir() if path.name in (LATEST, PREVIOUS, LOCK, HOLDER)]


def asked_to_end(environment: Environment, c: bool = False) -> None:
    with pytest.raises(SystemExit) as ended:
        tune(environment, "labelled", "broken", c=c)
    assert ended.value.code == 0
