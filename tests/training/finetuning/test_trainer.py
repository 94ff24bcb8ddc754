"""The fine-tuner and its from-scratch twin, through nnU-Net's own entry point."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.settings import FinetuneSettings
from nnssl_ext.study.metrics import fold_metrics
from nnssl_ext.training.finetuning import trainer as finetune
from nnssl_ext.training.finetuning.components import finetune_settings, moving_average, rate_at
from nnssl_ext.training.finetuning.evaluation import Evaluation
from nnssl_ext.training.finetuning.state import refuse_other_run
from nnssl_ext.training.finetuning.trainer import nnsslTrainer_Finetune
from tests.conftest import Environment
from tests.datasets import dataset_name
from tests.support.finetunings import NAME, RUN, final, tune
from tests.support.runs import trainer_for

Data = Callable[[str], Environment]
without_validation = pytest.mark.usefixtures("training_only")


def test_what_it_writes_predicts_with_stock_alone(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": RUN})
    fold = tune(environment, "labelled", "run")
    content = final(fold)
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["nnssl_ext"]["step"] == 8

    images = environment.root / "to_predict"
    images.mkdir()
    image = environment.dataset("labelled") / "imagesTr" / "case_00_0000.nii.gz"
    (images / image.name).write_bytes(image.read_bytes())
    where = ["-i", "to_predict", "-o", "out", "-d", "817", "-c", "3d_fullres", "-p", "run", "-tr", NAME]
    # no variable names our trainers: prediction must not need them
    how = ["-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1"]
    environment.run("nnUNetv2_predict", *where, *how, variables={"nnUNet_extTrainer": ""})
    assert list((environment.root / "out").glob("*.nii.gz"))

    predictor = nnUNetPredictor(device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(fold.parent), (0,), "checkpoint_step_000004.pth")
    kept = checkpoint.load(fold / "checkpoint_step_000004.pth")["network_weights"]
    assert all(torch.equal(kept[k], v) for k, v in predictor.list_of_parameters[0].items())


def test_snapshots_are_validated_with_their_own_weights(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "learning_rate": 0.1}})
    fold = tune(environment, "labelled", "run")
    early = json.loads((fold / "validation_step_000004" / "summary.json").read_text())
    late = json.loads((fold / "validation" / "summary.json").read_text())
    assert not (fold / "validation_step_000008").exists()
    assert len(early["metric_per_case"]) == len(late["metric_per_case"]) > 0
    assert early["metric_per_case"] != late["metric_per_case"]

    environment.run(
        "nnUNetv2_evaluate_folder",
        str(environment.dataset("labelled") / "gt_segmentations"),
        str(fold / "validation"),
        "-djfile",
        str(environment.dataset("labelled") / "dataset.json"),
        "-pfile",
        str(environment.dataset("labelled") / "run.json"),
        "-o",
        str(environment.root / "evaluated.json"),
        "--chill",
    )
    stock = json.loads((environment.root / "evaluated.json").read_text())
    assert stock["foreground_mean"]["Dice"] == pytest.approx(late["foreground_mean"]["Dice"], abs=1e-6)
    assert stock["mean"] == late["mean"]
    # and what the study keeps, case by case, whether a class is there or not
    frame = fold_metrics(
        fold / "validation",
        environment.dataset("labelled") / "gt_segmentations",
        json.loads((environment.dataset("labelled") / "dataset.json").read_text()),
        1.0,
        SimpleITKIO(),
    )
    by_case = {Path(entry["prediction_file"]).name: entry["metrics"] for entry in stock["metric_per_case"]}
    names = json.loads((environment.dataset("labelled") / "dataset.json").read_text())["labels"]
    assert len(frame) == sum(map(len, by_case.values()))
    for row in frame.itertuples():
        expected = by_case[row.case][str(names[row.organ])]["Dice"]
        assert row.dice == pytest.approx(expected, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("mirroring", [True, False])
def test_a_snapshot_is_validated_as_stock_predicts_with_its_file(with_data: Data, mirroring: bool) -> None:
    environment = with_data("labelled")
    # so low a rate that noise is predicted, which every change of the weights shows in
    settings = {**RUN, "learning_rate": 0.003, "weight_average_decay": 0.5, "mirroring": mirroring}
    environment.write_plans("labelled", "run", {"finetune": settings})
    fold, reader = tune(environment, "labelled", "run"), SimpleITKIO()
    folders = {"step_000004": "validation_step_000004", "final": "validation"}
    for folder in folders.values():
        file = next((fold / folder).glob("*.nii.gz"))
        image = environment.dataset("labelled") / "imagesTr" / file.name.replace(".nii.gz", "_0000.nii.gz")
        expected = reader.read_seg(str(file))[0][0]
        for name, its_own in folders.items():
            for mirrored in (True, False):
                predictor = nnUNetPredictor(
                    use_mirroring=mirrored, perform_everything_on_device=False, device=torch.device("cpu")
                )
                predictor.initialize_from_trained_model_folder(str(fold.parent), (0,), f"checkpoint_{name}.pth")
                found = predictor.predict_single_npy_array(*reader.read_images([str(image)]), None, None, False)
                same = mirrored == mirroring and its_own == folder
                assert np.array_equal(found, expected) == same, (name, folder, mirrored, np.mean(found != expected))


def test_without_snapshots_stock_validates(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": [], "steps": 3}})
    fold = tune(environment, "labelled", "run")
    assert (fold / "validation" / "summary.json").is_file()
    assert not list(fold.glob("checkpoint_step*"))


@without_validation
def test_twins_start_alike_but_for_what_was_pretrained(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "scratch", {"finetune": {**RUN, "learning_rate": 0.0, "snapshots": []}})
    environment.write_plans("labelled", "pretrained", {"finetune": {**RUN, "learning_rate": 0.0, "snapshots": []}})
    source = {k: v + 1 for k, v in final(tune(environment, "labelled", "scratch"))["network_weights"].items()}
    torch.save({"network_weights": source}, environment.root / "source.pth")

    seen: dict[str, list] = {"scratch": [], "pretrained": []}
    original = nnsslTrainer_Finetune.train_step

    def train_step(self: nnsslTrainer_Finetune, batch: dict) -> dict:
        seen[self.plans_manager.plans_name].append((batch["keys"], batch["data"].sum().item()))
        return original(self, batch)

    monkeypatch.setattr(nnsslTrainer_Finetune, "train_step", train_step)
    scratch = final(tune(environment, "labelled", "scratch"))["network_weights"]
    pretrained = final(tune(environment, "labelled", "pretrained", environment.root / "source.pth"))["network_weights"]
    heads = [k for k in scratch if ".seg_layers." in k]
    assert heads
    assert all(torch.equal(scratch[k], pretrained[k]) for k in heads)
    assert all(torch.equal(pretrained[k], source[k]) for k in source if k not in heads)
    assert [str(x) for x in seen["scratch"]] == [str(x) for x in seen["pretrained"]]


@without_validation
def test_seeds_and_folds_differ(with_data: Data) -> None:
    environment = with_data("labelled")
    digests = set()
    for seed in (0, 1):
        environment.write_plans("labelled", f"seed{seed}", {"finetune": {**RUN, "snapshots": [], "seed": seed}})
        digests.add(final(tune(environment, "labelled", f"seed{seed}"))["nnssl_ext"]["weights_sha256"])
    assert len(digests) == 2
    assert len({finetune.run_seed(0, fold) for fold in (0, 1, 2, "all")}) == 4


def test_the_default_schedule_is_stocks() -> None:
    _, settings = finetune_settings({"plans_name": "x"})
    assert (settings.steps, settings.steps_per_epoch, settings.optimizer) == (250_000, 250, "sgd")
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.01)
    stock = PolyLRScheduler(optimiser, 0.01, 1000)
    for epoch in (0, 1, 500, 999):
        stock.step(epoch)
        assert rate_at(settings, 0.01, epoch * 250) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)


def test_the_average_is_what_is_written_and_validating_does_not_change_it(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch norm in training mode would change its running statistics."""
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "weight_average_decay": 0.9}})
    trainer: Any = trainer_for("labelled", "run", NAME)
    trainer.averaged = moving_average(torch.nn.BatchNorm3d(1), 0.9)
    trainer.averaged.module.train()
    monkeypatch.setattr(nnUNetTrainer, "validation_step", lambda self, batch: self.network(batch["data"]))
    before = {name: tensor.clone() for name, tensor in trainer.exported_weights().items()}
    trainer.validation_step({"data": torch.randn(2, 1, 4, 4, 4) * 5 + 3})
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.exported_weights().items())
    with torch.no_grad():
        trainer.averaged.module.weight.fill_(7.0)
    assert trainer.exported_weights()["weight"].item() == 7


def test_out_of_memory_is_one_line(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": RUN})

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(nnsslTrainer_Finetune, "autocast", fail)
    with pytest.raises(SystemExit) as stopped:
        tune(environment, "labelled", "run")
    line = str(stopped.value.code)
    assert line.startswith("nnssl_ext: error: out of memory (MemoryError after step 0): a batch of 2 crops of ")
    assert "Use a smaller configuration.batch_size (now 2)" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": [9]}, r"snapshots has \[9\], beyond finetune.steps=8"),
        ({"warmup": 8}, "warmup=8 leaves none of 8 steps"),
        ({"head_only_steps": 10}, "head_only_steps=10 leaves none"),
        ({"optimzer": "sgd"}, "did you mean 'finetune.optimizer'"),
        ({"optimiser": "sgd"}, "setting 'finetune.optimiser' is called 'finetune.optimizer'"),
        ({"precision": "float16"}, "precision float16 needs a GPU"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(with_data: Data, settings: dict, message: str) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, **settings}})
    with pytest.raises(UserError, match=message):
        tune(environment, "labelled", "run")
    assert not list(environment.results.rglob("*"))


@without_validation
def test_another_runs_checkpoint_is_refused(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": []}})
    fold = tune(environment, "labelled", "run")
    before = (fold / "checkpoint_final.pth").read_bytes()
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": [], "seed": 3}})
    with pytest.raises(UserError, match=r"other finetune settings \(seed\)"):
        tune(environment, "labelled", "run", c=True)
    assert (fold / "checkpoint_final.pth").read_bytes() == before
    # neither changes a step
    environment.write_plans(
        "labelled", "run", {"finetune": {**RUN, "snapshots": [], "mirroring": False, "save_every": 2}}
    )
    tune(environment, "labelled", "run", c=True)


def test_settings_that_a_later_version_adds_have_their_defaults() -> None:
    settings = vars(FinetuneSettings())
    older = {name: value for name, value in settings.items() if name != "plain_norms"}
    content = {"nnssl_ext": {"finetune": older, "fold": 0}, "optimizer_state": {}}
    refuse_other_run(content, settings, 0, "file")
    with pytest.raises(UserError, match=r"other finetune settings \(plain_norms\) and another fold"):
        refuse_other_run(content, {**settings, "plain_norms": True}, 1, "file")


@without_validation
def test_weights_that_a_last_gradient_spoilt_are_not_kept(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the loss was finite."""
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": []}})

    steps = iter(range(8))

    def overflow(parameters: list[torch.nn.Parameter], _: float) -> None:
        if next(steps) == 7:
            parameters[0].grad = torch.full_like(parameters[0], torch.nan)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(UserError, match="the gradient became nan in epoch 2. The checkpoints of earlier epochs"):
        tune(environment, "labelled", "run")
    fold = environment.fold("labelled", "run", NAME)
    assert not (fold / "checkpoint_final.pth").exists()
    weights = checkpoint.load(fold / "checkpoint_latest.pth")["network_weights"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@without_validation
def test_no_run_goes_on_from_a_snapshot(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": RUN})
    fold = tune(environment, "labelled", "run")
    with pytest.raises(UserError, match="is a snapshot: it holds weights only"):
        trainer_for("labelled", "run", NAME).load_checkpoint(str(fold / "checkpoint_step_000004.pth"))


def test_probabilities_are_written_beside_snapshots(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": [4, 8]}})
    words = (dataset_name("labelled"), "3d_fullres", 0, NAME, "run")
    run_training(*words, export_validation_probabilities=True, device=torch.device("cpu"))
    fold = environment.fold("labelled", "run", NAME)
    cases = {file.name.partition(".")[0] for file in (fold / "validation").glob("*.nii.gz")}
    assert cases
    assert {file.stem for file in (fold / "validation").glob("*.npz")} == cases
    assert (fold / "validation_step_000004" / "summary.json").is_file()
    assert "Mean Validation Dice" in next(fold.glob("training_log*")).read_text()


@pytest.mark.parametrize("options", [{"export_validation_probabilities": True}, {}])
def test_stock_validates_before_the_snapshots_which_one_process_validates(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    """Stock's processes wait for each other. They would wait for the snapshots until NCCL gives up."""
    environment, validated = with_data("labelled"), list[str]()
    environment.write_plans("labelled", "run", {"finetune": RUN})
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: validated.append("stock"))
    monkeypatch.setattr(Evaluation, "run", lambda _, folder: validated.append(folder.name))
    run_training(dataset_name("labelled"), "3d_fullres", 0, NAME, "run", device=torch.device("cpu"), **options)
    assert validated == (["stock", "validation_step_000004"] if options else ["validation_step_000004", "validation"])


def test_without_checkpoints_the_snapshots_of_an_earlier_run_are_not_validated(
    with_data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, validated = with_data("labelled"), list[str]()
    environment.write_plans("labelled", "run", {"finetune": RUN})
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: validated.append("stock"))
    monkeypatch.setattr(Evaluation, "run", lambda _, folder: validated.append(folder.name))
    tune(environment, "labelled", "run")
    del validated[:]
    words = (dataset_name("labelled"), "3d_fullres", 0, NAME, "run")
    run_training(*words, disable_checkpointing=True, device=torch.device("cpu"))
    assert validated == ["stock"]


@without_validation
def test_another_split_is_refused(with_data: Data) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "run", {"finetune": {**RUN, "snapshots": []}})
    fold = tune(environment, "labelled", "run")
    file = environment.dataset("labelled") / "splits_final.json"
    split = json.loads(file.read_text())
    file.write_text(json.dumps([split[1], split[0], *split[2:]]))
    tune(environment, "labelled", "run", c=True)  # it is over
    assert "note: fold 0 of" in "".join(path.read_text() for path in fold.glob("training_log_*"))
    trainer = trainer_for("labelled", "run", NAME)
    trainer.load_checkpoint(str(fold / "checkpoint_final.pth"))
    trainer.step -= 1
    trainer.do_split()  # to validate an earlier checkpoint is no training
    with pytest.raises(UserError, match="has other cases than when this run began"):
        trainer.training_split()
    trainer.fold = "all"
    with pytest.raises(UserError, match="Restore the preprocessed cases"):
        trainer.training_split()


@without_validation
def test_convolutions_are_laid_out_for_bfloat16_on_a_cpu(with_data: Data) -> None:
    environment = with_data("labelled")
    for precision, last in (("bfloat16", True), ("stock", False)):
        environment.write_plans("labelled", "run", {"finetune": {**RUN, "precision": precision}})
        trainer = trainer_for("labelled", "run", NAME)
        trainer.initialize()
        convolutions = [m for m in trainer.network.modules() if isinstance(m, torch.nn.Conv3d)]
        kernels = [m.weight for m in convolutions if m.kernel_size[2] > 1 and m.in_channels > 1]
        assert {kernel.is_contiguous(memory_format=torch.channels_last_3d) for kernel in kernels} == {last}
