"""Going on from a finished run with other crops: the high-resolution stage."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.training.pretraining.state import start_from
from nnssl_ext.transfer.names import canonical_weights
from nnssl_ext.transfer.read import read_source
from tests.conftest import Environment
from tests.support.runs import STOCK, Killed, kill_at, pretrain, same_run, trainer_for
from tests.transfer.files import nnssl_file

Data = Callable[[str], Environment]
TRAINER = "nnsslTrainer_3DINO"
SMALL = {"local_crops": 1, "hidden_dim": 16, "bottleneck_dim": 8, "prototypes": 64, "token_stride": 4}


def finished(environment: Environment) -> Path:
    environment.write_plans("vit", "low", {"epochs": 1, "dino": SMALL})
    return pretrain(environment, "vit", "low", trainer=TRAINER) / "checkpoint_final.pth"


def test_everything_that_was_learned_is_taken_over_at_a_larger_crop(with_data: Data) -> None:
    environment = with_data("vit")
    file = finished(environment)
    crop = [2 * edge for edge in environment.plans("vit")["configurations"]["3d_fullres"]["patch_size"]]
    # the folder of a run is one of its sources
    settings = {"epochs": 1, "learning_rate": 0.0, "start_from": str(file.parent), "crop_size": crop, "dino": SMALL}
    environment.write_plans("vit", "high", settings)
    high = checkpoint.load(pretrain(environment, "vit", "high", trainer=TRAINER) / "checkpoint_final.pth")
    low = checkpoint.load(file)
    assert high["nnssl_ext"]["counters"]["step"] > 0
    for name in low["nnssl_ext"]["state"]:
        if name.startswith("student."):  # student and teacher start from the teacher, and nothing learns at rate 0
            expected = low["nnssl_ext"]["state"][name.replace("student.", "teacher.", 1)]
            assert torch.allclose(high["nnssl_ext"]["state"][name], expected, atol=1e-6), name


def test_a_continued_run_keeps_its_own_state(with_data: Data) -> None:
    environment = with_data("vit")
    environment.write_plans("vit", "high", {"epochs": 2, "start_from": str(finished(environment)), "dino": SMALL})
    final = pretrain(environment, "vit", "high", trainer=TRAINER) / "checkpoint_final.pth"
    before = checkpoint.load(final)
    pretrain(environment, "vit", "high", trainer=TRAINER, c=True)
    assert checkpoint.digest(before["nnssl_ext"]["state"]) == checkpoint.digest(
        checkpoint.load(final)["nnssl_ext"]["state"]
    )


@pytest.mark.parametrize(("grid", "says"), [((4, 4, 4), True), ((2, 4, 8), True), ((4, 4, 4), False)])
def test_positions_of_another_grid_are_resized(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int, int], says: bool
) -> None:
    """Also when the file does not say its grid, as those of earlier versions, and it is cubic."""
    environment = with_data("vit")
    file = finished(environment)
    content = checkpoint.load(file)
    before = content["nnssl_ext"]["position_grid"]
    assert before == [3, 3, 3]
    if not says:
        del content["nnssl_ext"]["position_grid"]
    monkeypatch.setattr(checkpoint, "load", lambda path: content)
    name = "teacher.reader.network.backbone.pos_embed"
    old = content["nnssl_ext"]["state"][name]
    method, encoder = with_grid(old.shape[2], grid)
    start_from(method, str(file))
    assert torch.equal(encoder.pos_embed[:, 0], old[:, 0])
    resized = torch.nn.functional.interpolate(
        old[:, 1:].transpose(1, 2).unflatten(2, before), size=grid, mode="trilinear"
    )
    assert torch.allclose(encoder.pos_embed[:, 1:], resized.flatten(2).transpose(1, 2), atol=1e-6)


def with_grid(width: int, grid: tuple[int, int, int]) -> tuple[Any, Any]:
    """A new method whose transformers have another grid of positions, and the student's encoder."""
    trainer = trainer_for("vit", "low", TRAINER)
    trainer.initialize()
    method: Any = trainer.method
    encoder = method.student.reader.network.backbone
    for network in (encoder, method.teacher.reader.network.backbone):
        network.position_grid = grid
        network.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + math.prod(grid), width))
    return method, encoder


def test_grids_of_as_many_tokens_are_not_taken_for_each_other(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("vit")
    content = checkpoint.load(finished(environment))
    own, name = content["nnssl_ext"], "student.reader.network.backbone.pos_embed"
    width, file = own["state"][name].shape[2], environment.root / "other.pth"
    monkeypatch.setattr(checkpoint, "load", lambda path: content)
    file.touch()
    for table in [key for key in own["state"] if key.endswith(".pos_embed")]:
        own["state"][table] = torch.randn(1, 65, width)
    own["position_grid"] = [2, 4, 8]
    method, encoder = with_grid(width, (4, 4, 4))
    start_from(method, str(file))
    assert not torch.allclose(encoder.pos_embed[:, 1:], own["state"][name][:, 1:])
    own["position_grid"] = [3, 4, 8]
    with pytest.raises(UserError, match="has 64 positions of tokens, and does not say of which grid"):
        start_from(method, str(file))


@pytest.mark.usefixtures("two_blocks")
def test_positions_of_primus_are_resized(with_data: Data) -> None:
    environment = with_data("plain")
    settings = {"epochs": 1, "target_trainer": STOCK, "dino": {**SMALL, "local_crops": 0}}
    environment.write_plans("plain", "primus", settings)
    file = pretrain(environment, "plain", "primus", trainer=TRAINER) / "checkpoint_final.pth"
    plans = environment.plans("plain")
    patch = plans["configurations"]["3d_fullres"]["patch_size"]
    larger = [patch[0], 2 * patch[1], patch[2]]

    def enlarge(plans: dict) -> None:
        plans["configurations"]["3d_fullres"]["patch_size"] = larger

    environment.write_plans("plain", "larger", settings, enlarge)
    trainer = trainer_for("plain", "larger", TRAINER)
    trainer.initialize()
    start_from(trainer.method, str(file))
    content = checkpoint.load(file)["nnssl_ext"]
    (name,) = (n for n in content["state"] if n.startswith("student.") and n.endswith("eva.pos_embed"))
    # the student starts from the teacher
    resized, old = trainer.method.state_dict()[name], content["state"][name.replace("student.", "teacher.", 1)]
    assert resized.shape[1] == 2 * old.shape[1]
    learned = trainer.method.backbone.learned_positions()
    assert learned is not None
    grid = (learned.grid[0], learned.grid[1] // 2, learned.grid[2])
    torch.testing.assert_close(resized, resize_positions(old, grid, learned.grid, learned.prefix))


def test_another_network_or_no_file_is_one_line(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("vit")
    file = finished(environment)
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


@pytest.mark.parametrize("trainer", ["nnsslTrainer_VolumeFusion", TRAINER])
def test_foreign_weights_fill_the_network_as_transfer_does(
    with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str], trainer: str
) -> None:
    """A file of nnssl's layout, fitted to the plan before the first step; the table is in the log; --c is exact."""
    environment = with_data("residual")
    nnssl_file(tmp_path / "nnssl.pth", "residual")
    words = ["-d", "812", "-c", "3d_fullres", "-o", str(tmp_path / "init.pth")]
    assert main(["transfer", str(tmp_path / "nnssl.pth"), *words]) == 0
    fitted = read_source(str(tmp_path / "init.pth")).weights
    settings = {"epochs": 2, "start_from": str(tmp_path / "nnssl.pth"), "dino": {**SMALL, "local_crops": 0}}
    environment.write_plans("residual", "foreign", settings)
    begun = trainer_for("residual", "foreign", trainer)
    begun.initialize()
    begun.on_train_start()
    for network in (begun.method.network, begun.method.exported):
        state = canonical_weights(network.state_dict())
        encoder = [name for name in state if name.startswith("encoder.")]
        assert encoder
        assert all(torch.equal(state[name].cpu(), fitted[name]) for name in encoder)
    log = next(Path(begun.output_folder).glob("training_log_*.txt")).read_text()
    assert "encoder         100.0% from the source" in log
    assert f"Starting from {tmp_path / 'nnssl.pth'}" in log

    final = pretrain(environment, "residual", "foreign", trainer=trainer) / "checkpoint_final.pth"
    before = checkpoint.load(final)
    pretrain(environment, "residual", "foreign", trainer=trainer, c=True)
    assert checkpoint.digest(before["network_weights"]) == checkpoint.digest(checkpoint.load(final)["network_weights"])


def test_a_run_of_another_method_is_a_source(with_data: Data) -> None:
    environment = with_data("vit")
    file = finished(environment)
    environment.write_plans("vit", "other", {"start_from": str(file)})
    begun = trainer_for("vit", "other", "nnsslTrainer_VolumeFusion")
    begun.initialize()
    begun.on_train_start()
    theirs, mine = read_source(str(file)).weights, begun.method.network.state_dict()
    name = "backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(mine[name].cpu(), theirs[name])


def test_stocks_pretrained_weights_fill_the_teacher_too(with_data: Data) -> None:
    environment = with_data("vit")
    file = finished(environment)
    environment.write_plans("vit", "low2", {"epochs": 1, "dino": SMALL})
    begun = trainer_for("vit", "low2", TRAINER)
    maybe_load_checkpoint(begun, False, False, str(file))
    begun.on_train_start()
    student, teacher = begun.method.network.state_dict(), begun.method.exported.state_dict()
    theirs = read_source(str(file)).weights
    name = "backbone.blocks.1.attn.qkv.weight"
    assert torch.equal(student[name].cpu(), theirs[name])
    assert torch.equal(teacher[name], student[name])


def test_a_decoder_of_the_first_stage_counts_as_trained(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder-only objective leaves it as it was, and transfer takes it."""
    environment = with_data("plain")
    environment.write_plans("plain", "first", {"epochs": 1})
    first = pretrain(environment, "plain", "first", trainer="nnsslTrainer_VolumeFusion") / "checkpoint_final.pth"
    environment.write_plans("plain", "second", {"epochs": 1, "start_from": str(first)})
    environment.write_plans("plain", "alone", {"epochs": 1})
    kept = "decoder.stages.0.convs.0.conv.weight"
    trainer = "nnsslTrainer_Rotation"
    second = pretrain(environment, "plain", "second", trainer=trainer) / "checkpoint_final.pth"
    for _ in range(2):
        assert kept not in read_source(str(second)).untrained
        pretrain(environment, "plain", "second", trainer=trainer, c=True)
    alone = pretrain(environment, "plain", "alone", trainer=trainer) / "checkpoint_final.pth"
    assert kept in read_source(str(alone)).untrained
    # stock's argument, whose file stock loads itself
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(first)])
    begun = trainer_for("plain", "alone", trainer, fold=1)
    maybe_load_checkpoint(begun, False, False, str(first))
    begun.on_train_start()
    assert kept in begun.filled


def test_killed_in_its_first_epoch_it_goes_on_from_stocks_pretrained_weights(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "first", {"epochs": 1})
    first = pretrain(environment, "plain", "first") / "checkpoint_final.pth"
    for name in ("whole", "broken"):
        environment.write_plans("plain", name, {"epochs": 1})
    folds = {}
    for name in ("whole", "broken"):
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(first)])
            begun = trainer_for("plain", name)
            maybe_load_checkpoint(begun, False, False, str(first))
            if name == "broken":
                kill_at(1, patch)
                with pytest.raises(Killed):
                    begun.run_training()
            else:
                begun.run_training()
        folds[name] = environment.fold("plain", name, type(begun).__name__)
    pretrain(environment, "plain", "broken", c=True)
    same_run(folds["whole"], folds["broken"])


@pytest.mark.parametrize("argument", [True, False])
def test_a_run_does_not_start_from_what_it_replaces(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, argument: bool
) -> None:
    """Its checkpoints are set aside before the weights are read."""
    environment = with_data("plain")
    environment.write_plans("plain", "run", {"epochs": 1})
    file = pretrain(environment, "plain", "run") / "checkpoint_final.pth"
    before = file.read_bytes()
    if argument:
        monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    else:
        environment.write_plans("plain", "run", {"epochs": 1, "start_from": str(file.parent)})
    with pytest.raises(UserError, match="expected weights of another run to start from, got .* Continue it with --c"):
        pretrain(environment, "plain", "run")
    assert file.read_bytes() == before
    if not argument:  # a continued run does not read it
        environment.write_plans("plain", "run", {"epochs": 1})
    pretrain(environment, "plain", "run", c=True)
