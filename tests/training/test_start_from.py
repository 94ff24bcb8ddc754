"""Going on from a finished run with other crops: the high-resolution stage."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.training.state import start_from
from tests.conftest import Environment
from tests.training.test_trainer import pretrain, trainer_for

Data = Callable[[str], Environment]
TRAINER = "nnsslTrainer_3DINO"
SMALL = {"local_crops": 1, "hidden": 16, "bottleneck": 8, "prototypes": 64, "cell_stride": 4}


def finished(environment: Environment) -> Path:
    environment.write_plans("vit", "low", {"epochs": 1, "dino": SMALL})
    return pretrain(environment, "vit", "low", trainer=TRAINER) / "checkpoint_final.pth"


def test_everything_that_was_learned_is_taken_over_at_a_larger_crop(with_data: Data) -> None:
    environment = with_data("vit")
    file = finished(environment)
    crop = [2 * edge for edge in environment.plans("vit")["configurations"]["3d_fullres"]["patch_size"]]
    settings = {"epochs": 1, "learning_rate": 0.0, "start_from": str(file), "crop_size": crop, "dino": SMALL}
    environment.write_plans("vit", "high", settings)
    high = checkpoint.load(pretrain(environment, "vit", "high", trainer=TRAINER) / "checkpoint_final.pth")
    low = checkpoint.load(file)
    assert high["nnssl_ext"]["counters"]["step"] > 0
    for name, tensor in low["nnssl_ext"]["state"].items():
        if name.startswith("student."):  # nothing learns at rate 0, but centres and the teacher move
            assert torch.allclose(high["nnssl_ext"]["state"][name], tensor, atol=1e-6), name


def test_a_continued_run_keeps_its_own_state(with_data: Data) -> None:
    environment = with_data("vit")
    environment.write_plans("vit", "high", {"epochs": 2, "start_from": str(finished(environment)), "dino": SMALL})
    final = pretrain(environment, "vit", "high", trainer=TRAINER) / "checkpoint_final.pth"
    before = checkpoint.load(final)
    pretrain(environment, "vit", "high", trainer=TRAINER, c=True)
    assert checkpoint.digest(before["nnssl_ext"]["state"]) == checkpoint.digest(
        checkpoint.load(final)["nnssl_ext"]["state"]
    )


def test_positions_of_another_grid_are_resized(with_data: Data) -> None:
    environment = with_data("vit")
    file = finished(environment)
    trainer = trainer_for("vit", "low", TRAINER)
    trainer.initialize()
    name = "student.reader.network.backbone.pos_embed"
    old = checkpoint.load(file)["nnssl_ext"]["state"][name]
    method: Any = trainer.method
    encoder = method.student.reader.network.backbone
    for network in (encoder, method.teacher.reader.network.backbone):
        network.position_grid = (4, 4, 4)
        network.pos_embed = torch.nn.Parameter(torch.zeros(1, 65, old.shape[2]))
    start_from(method, file)
    assert torch.equal(encoder.pos_embed[:, 0], old[:, 0])
    assert torch.allclose(encoder.pos_embed[:, 1:].mean(1), old[:, 1:].mean(1), atol=0.02)
    assert encoder.pos_embed.std() > 0


def test_another_method_or_network_is_one_line(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("vit")
    file = finished(environment)
    environment.write_plans("vit", "other", {"start_from": str(file)})
    with pytest.raises(SystemExit, match=r"start_from=.* is a run of dino, this is volume_fusion"):
        pretrain(environment, "vit", "other", trainer="nnsslTrainer_VolumeFusion")
    environment.write_plans("vit", "heads", {"start_from": str(file), "dino": {**SMALL, "prototypes": 32}})
    with pytest.raises(SystemExit, match=r"belongs to another network or other heads: '.*' differs"):
        pretrain(environment, "vit", "heads", trainer=TRAINER)
    environment.write_plans("vit", "absent", {"start_from": str(tmp_path / "absent.pth"), "dino": SMALL})
    with pytest.raises((SystemExit, UserError), match=r"absent\.pth"):
        pretrain(environment, "vit", "absent", trainer=TRAINER)


def test_the_recipes_of_the_published_system_fit_together(with_data: Data) -> None:
    environment = with_data("plain")
    for name, recipes in (("low", ["3dino"]), ("high", ["3dino", "3dino_high_resolution"])):
        assert main(["plan", "-d", "811", "-c", "3d_fullres", "-o", name, *recipes, "dino.prototypes=64"]) == 0
    low, high = (environment.plans("plain", name) for name in ("low", "high"))
    assert low["configurations"]["3d_fullres"]["architecture"] == high["configurations"]["3d_fullres"]["architecture"]
    assert low["nnssl_ext"]["crop_size"] == [96] * 3
    assert high["nnssl_ext"]["crop_size"] == [112] * 3
    assert high["nnssl_ext"]["dino"]["local_size"] == [64] * 3
    assert high["nnssl_ext"]["dino"]["layer_decay"] == low["nnssl_ext"]["dino"]["layer_decay"] == 0.9
