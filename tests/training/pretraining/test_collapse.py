"""A run that learns nothing any more ends by itself, at the same epoch however often it was interrupted."""

from collections.abc import Callable

import pytest
import torch

from nnssl_ext import checkpoint
from tests.conftest import Environment
from tests.support.runs import Killed, kill_at, pretrain

Data = Callable[[str], Environment]
TRAINER = "nnsslTrainer_3DINO"
SMALL = {
    "local_crops": 1,
    "hidden_dim": 32,
    "bottleneck_dim": 64,
    "prototypes": 64,
    "token_stride": 4,
    "mask_probability": 1.0,
    "teacher_momentum": 0.996,
}
#: Targets that are neither centred nor sharpened.
BROKEN = {
    **SMALL,
    "teacher_temperature": [1.0, 1.0],
    "center_momentum": 1.0,
    "patience": 2,
    "teacher_momentum": 0.992,
    "koleo_weight": 0.1,
}


def test_a_collapsed_run_stops_and_a_healthy_one_does_not(
    with_data: Data, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("plain")
    common = {
        "epochs": 4,
        "validation_iterations": 4,
        "save_every": 1,
        "seed": 1,
        "learning_rate": 5e-4,
        "batch_size": 2,
    }
    environment.write_plans("plain", "healthy", {**common, "dino": {**SMALL, "patience": 2}})
    assert (pretrain(environment, "plain", "healthy", trainer=TRAINER) / "checkpoint_final.pth").is_file()

    environment.write_plans("plain", "broken", {**common, "dino": BROKEN})
    with pytest.raises(SystemExit, match=r"collapsed \(2 epochs in a row\): the teacher's targets are uniform"):
        pretrain(environment, "plain", "broken", trainer=TRAINER)
    assert "dino.teacher_temperature" in capsys.readouterr().out
    fold = environment.fold("plain", "broken", TRAINER)
    assert not (fold / "checkpoint_final.pth").exists()
    assert checkpoint.load(fold / "checkpoint_latest.pth")["current_epoch"] == 1

    # the count is in the log: one sign before the interruption and one after it are two in a row
    environment.write_plans("plain", "killed", {**common, "dino": BROKEN})
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            pretrain(environment, "plain", "killed", trainer=TRAINER)
    torch.manual_seed(1)
    with pytest.raises(SystemExit, match="2 epochs in a row"):
        pretrain(environment, "plain", "killed", trainer=TRAINER, c=True)
    assert checkpoint.load(environment.fold("plain", "killed", TRAINER) / "checkpoint_latest.pth")["current_epoch"] == 1
