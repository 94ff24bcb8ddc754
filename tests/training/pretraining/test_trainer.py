"""The bridge in process: everything but the command line is stock nnU-Net's own code path."""

import json
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.methods import METHODS, TRAINERS
from nnssl_ext.training.pretraining import classes
from nnssl_ext.training.pretraining.trainer import PretrainingTrainer
from tests.conftest import REPOSITORY, Environment
from tests.support.runs import TRAINER, Data, pretrain, signal_at, trainer_for


@pytest.mark.parametrize("method", METHODS)
def test_stock_finds_one_picklable_class(environment: Environment, method: str) -> None:
    name = TRAINERS[method]
    first, second = (recursive_find_trainer_class_by_name(name) for _ in range(2))
    assert first is second is getattr(classes, name)
    assert first.__name__ == name
    assert pickle.loads(pickle.dumps(first)) is first
    assert (REPOSITORY / "trainers" / f"{name}.py").is_file()


def test_unknown_classes_are_not_invented() -> None:
    with pytest.raises(AttributeError):
        _ = classes.nnsslTrainer_Absent


def test_stock_trainers_are_still_found(environment: Environment) -> None:
    for name in ("nnUNetTrainer", "nnUNetTrainer_5epochs"):
        assert recursive_find_trainer_class_by_name(name).__module__.startswith("nnunetv2.")


def test_writes_what_nnunet_writes_where_it_writes_it(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"pretext_picture_every": 1})
    before = sorted(p.name for p in (environment.dataset("plain") / "nnUNetPlans_3d_fullres").iterdir())
    fold = pretrain(environment, "plain", "quick")
    assert {p.name for p in fold.iterdir() if not p.name.startswith("training_log_")} == {
        "checkpoint_best.pth",
        "checkpoint_final.pth",
        "debug.json",
        "progress.png",
        "pretext.png",
        "pretraining_summary.json",
    }
    assert len(list(fold.glob("training_log_*.txt"))) == 1
    assert {p.name for p in fold.parent.iterdir()} == {
        "fold_0",
        "plans.json",
        "dataset.json",
        "dataset_fingerprint.json",
    }
    assert json.loads((fold.parent / "plans.json").read_text())["nnssl_ext"]["epochs"] == 2
    assert sorted(p.name for p in (environment.dataset("plain") / "nnUNetPlans_3d_fullres").iterdir()) == before
    summary = json.loads((fold / "pretraining_summary.json").read_text())
    assert summary["steps"] == 6
    assert summary["next_command"].endswith(f"-p quick -pretrained_weights {fold / 'checkpoint_final.pth'}")
    log = next(fold.glob("training_log_*.txt")).read_text()
    for line in ("Epoch 1", "train_loss", "val_loss", "Dice of the fusion levels", "Pretraining summary"):
        assert line in log
    assert "Traceback" not in log


def test_checkpoint_is_complete_and_plain(with_data: Data) -> None:
    environment = with_data("two_channel")
    environment.write_plans("two_channel", "quick", {})
    fold = pretrain(environment, "two_channel", "quick")
    content = torch.load(fold / "checkpoint_final.pth", weights_only=True)
    stock = trainer_for("two_channel", "quick", "nnUNetTrainer")
    stock.initialize()
    own = stock.network.state_dict()
    assert {k: v.shape for k, v in content["network_weights"].items()} == {k: v.shape for k, v in own.items()}
    assert {
        "optimizer_state",
        "grad_scaler_state",
        "logging",
        "_best_ema",
        "current_epoch",
        "init_args",
        "trainer_name",
        "inference_allowed_mirroring_axes",
        "nnssl_adaptation_plan",
        "citations",
        "nnssl_ext",
    } <= set(content)
    assert content["current_epoch"] == 2
    section = content["nnssl_ext"]
    assert section["method"] == "volume_fusion"
    assert section["counters"] == {"step": 6, "samples": 12, "nonfinite": 0}
    assert section["settings"]["volume_fusion"]["levels"] == 4
    assert section["weights_sha256"] == checkpoint.digest(content["network_weights"])
    assert set(section["trained"]) == {name for name, _ in stock.network.named_parameters()}
    plan = content["nnssl_adaptation_plan"]
    assert plan["architecture_plans"]["arch_class_name"] == "PlainConvUNet"
    assert plan["pretrain_num_input_channels"] == 2
    assert plan["recommended_downstream_patchsize"] == [16, 16, 16]
    assert plan["pretrain_plan"]["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]
    for key in plan["keys_to_in_proj"]:
        assert f"{key}.weight" in content["network_weights"]
    # aliases share memory, so the file is not several times its size
    tensors = sum(p.numel() * 4 for p in stock.network.parameters())
    assert (fold / "checkpoint_final.pth").stat().st_size < 4 * tensors + 400_000


@pytest.mark.parametrize(("configuration", "fold"), [("3d_lowres", "0"), ("3d_fullres", "all"), ("3d_fullres", "4")])
def test_configurations_and_folds(with_data: Data, configuration: str, fold: str) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 1})
    folder = pretrain(environment, "plain", "quick", fold, configuration)
    assert (folder / "checkpoint_final.pth").is_file()


def test_regions_and_ignore_labels(with_data: Data) -> None:
    environment = with_data("regions")
    environment.write_plans("regions", "quick", {"epochs": 1})
    fold = pretrain(environment, "regions", "quick")
    weights = checkpoint.load(fold / "checkpoint_final.pth")["network_weights"]
    assert weights["decoder.seg_layers.1.weight"].shape[0] == 2


def test_labels_are_never_read(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 1})
    for path in (environment.dataset("plain") / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"):
        path.write_bytes(b"not a label")
    for path in (environment.dataset("plain") / "nnUNetPlans_3d_fullres").glob("*.pkl"):
        path.unlink()
    assert (pretrain(environment, "plain", "quick") / "checkpoint_final.pth").is_file()


def test_a_fold_trains_on_its_training_cases_only(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    trainer = trainer_for("plain", "quick")
    trainer.on_train_start()
    splits = json.loads((environment.dataset("plain") / "splits_final.json").read_text())
    seen = {case for batch in trainer.dataloader_train for case in batch.cases}
    assert seen == set(splits[0]["train"])
    validated = {case for batch in trainer.dataloader_val for case in batch.cases}
    assert set() != validated <= set(splits[0]["val"])


def test_validation_sees_the_same_crops_each_epoch(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"learning_rate": 0.0, "epochs": 3})
    fold = pretrain(environment, "plain", "quick")
    losses = checkpoint.load(fold / "checkpoint_final.pth")["logging"]["val_losses"]
    assert len(set(losses)) == 1
    training = checkpoint.load(fold / "checkpoint_final.pth")["logging"]["train_losses"]
    assert len(set(training)) == 3


def test_seed_decides_everything(with_data: Data) -> None:
    environment = with_data("plain")
    digests: list[str] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        environment.write_plans("plain", name, {"seed": seed})
        torch.manual_seed(len(digests))  # what happened before does not matter
        weights = checkpoint.load(pretrain(environment, "plain", name) / "checkpoint_final.pth")["network_weights"]
        digests.append(checkpoint.digest(weights))
    assert digests[0] == digests[1] != digests[2]


def test_validation_only_prints_the_summary(with_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    fold = pretrain(environment, "plain", "quick")
    before = (fold / "checkpoint_final.pth").read_bytes()
    capsys.readouterr()
    pretrain(environment, "plain", "quick", val=True)
    printed = capsys.readouterr().out
    assert "Pretraining summary" in printed
    assert "2 epochs, 6 steps of 2" in printed
    pretrain(environment, "plain", "quick", val=True, val_best=True)
    assert (fold / "checkpoint_final.pth").read_bytes() == before


def test_the_best_checkpoint_is_written_first(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill behind the latest one would leave an old best one, which a continued run takes for its own."""
    environment, written = with_data("plain"), []
    environment.write_plans("plain", "run", {"save_every": 1})
    save = PretrainingTrainer.save_checkpoint

    def noted(self: PretrainingTrainer, *paths: str) -> None:
        written.append([Path(path).name for path in paths])
        save(self, *paths)

    monkeypatch.setattr(PretrainingTrainer, "save_checkpoint", noted)
    pretrain(environment, "plain", "run")
    assert written[0] == ["checkpoint_best.pth", "checkpoint_latest.pth"]


def test_checkpointing_can_be_disabled(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    fold = pretrain(environment, "plain", "quick", disable_checkpointing=True)
    assert not list(fold.glob("*.pth"))
    # an earlier run's, which stock would remove
    for name in ("checkpoint_latest.pth", "checkpoint_previous.pth"):
        (fold / name).write_bytes(b"an interrupted run's")
    pretrain(environment, "plain", "quick", disable_checkpointing=True)
    assert sorted(path.name for path in fold.glob("*.pth")) == ["checkpoint_latest.pth", "checkpoint_previous.pth"]


def test_a_non_finite_objective_stops_the_run(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    trainer = trainer_for("plain", "quick")
    trainer.initialize()
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))
    with pytest.raises(SystemExit, match="the objective became nan in epoch 0"):
        trainer.run_training()
    assert not list(environment.fold("plain", "quick", TRAINER).glob("*.pth"))


def test_pretraining_can_start_from_weights(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    file = pretrain(environment, "plain", "quick") / "checkpoint_final.pth"
    trainer = trainer_for("plain", "quick")
    maybe_load_checkpoint(trainer, False, False, str(file))
    stored = checkpoint.load(file)["network_weights"]
    for name, value in trainer.network.state_dict().items():
        if ".seg_layers." not in name:
            assert torch.equal(value, stored[name])


def test_a_terminal_gets_a_progress_bar_and_a_file_does_not(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("plain")
    for terminal in (True, False):
        environment.write_plans("plain", "quick", {"epochs": 1})
        monkeypatch.setattr("sys.stderr.isatty", lambda answer=terminal: answer)
        capsys.readouterr()
        pretrain(environment, "plain", "quick")
        assert ("Epoch 0, training" in capsys.readouterr().err) == terminal


@pytest.mark.draws
def test_progress_picture_is_drawn(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    picture = pretrain(environment, "plain", "quick") / "progress.png"
    image = __import__("matplotlib.image").image.imread(picture)
    assert np.ptp(image) > 0.5
    assert min(image.shape[:2]) > 500


def test_without_checkpoints_no_weights_of_an_earlier_run_are_recommended(with_data: Data) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 1})
    pretrain(environment, "plain", "quick")
    fold = pretrain(environment, "plain", "quick", disable_checkpointing=True)
    summary = json.loads((fold / "pretraining_summary.json").read_text())
    assert (summary["checkpoint"], summary["next_command"]) == (None, None)


def test_the_summarys_commands_for_a_short_fine_tuning(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "quick", {"epochs": 1, "learning_rate": 0.1})
    fold = pretrain(environment, "labelled", "quick")
    commands = json.loads((fold / "pretraining_summary.json").read_text())["recipe_commands"]
    assert [line.split()[1] for line in commands[:-1]] == ["plan", "transfer"]
    small = "finetune.steps=2 finetune.steps_per_epoch=2 finetune.validation_iterations=1"
    for line in commands[:-1]:
        main(shlex.split(line.replace("finetune.steps=6000", small))[1:])
    environment.run(*shlex.split(commands[-1]), "-device", "cpu")
    tuned = environment.fold("labelled", "quick_finetune_adamw", "nnsslTrainer_Finetune")
    content = checkpoint.load(tuned / "checkpoint_final.pth")["nnssl_ext"]
    assert (content["finetune"]["optimizer"], content["finetune"]["weight_average_decay"]) == ("adamw", 0.998)
    assert (content["step"], (tuned / "validation" / "summary.json").is_file()) == (2, True)


def test_the_summary_of_the_best_checkpoint_names_it(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 2})
    best = iter((True, False))
    monkeypatch.setattr(PretrainingTrainer, "is_best", lambda _: next(best))
    fold = pretrain(environment, "plain", "quick")
    for val_best, name, epochs in ((False, "checkpoint_final.pth", 2), (True, "checkpoint_best.pth", 1)):
        pretrain(environment, "plain", "quick", val=True, val_best=val_best)
        summary = json.loads((fold / "pretraining_summary.json").read_text())
        assert (summary["checkpoint"], summary["epochs"]) == (str(fold / name), epochs)
        assert summary["next_command"].endswith(name)


def stop_amid_an_epoch(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.write_plans("plain", "quick", {"epochs": 2})
    with monkeypatch.context() as patch:
        signal_at(4, patch, 15)
        with pytest.raises(SystemExit):
            pretrain(environment, "plain", "quick")


def test_a_run_stopped_amid_an_epoch_ends_with_fewer_epochs(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    stop_amid_an_epoch(environment, monkeypatch)
    environment.write_plans("plain", "quick", {"epochs": 1})
    fold = pretrain(environment, "plain", "quick", c=True)
    summary = json.loads((fold / "pretraining_summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (1, 5)
    assert 0 < summary["hours"] < 0.1


def test_tensors_of_another_version_are_one_line(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    stop_amid_an_epoch(environment, monkeypatch)

    def other_tensors(*_: object) -> None:
        raise RuntimeError("Error(s) in loading state_dict for VolumeFusion: size mismatch for a, b, c ...")

    monkeypatch.setattr(METHODS["volume_fusion"], "load_state_dict", other_tensors)
    with pytest.raises(SystemExit, match=r"holds other tensors than this version .* began it \(\d.*without --c$"):
        pretrain(environment, "plain", "quick", c=True)
