"""The probe: the encoder stays, the head learns, and it goes through nnU-Net's own entry point."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint, run_training

from nnssl_ext import checkpoint
from nnssl_ext.cli import main
from nnssl_ext.settings import UNPROTECTED
from nnssl_ext.training.finetuning.probe import ProbeNetwork
from tests.conftest import Environment
from tests.datasets import OWN_NETWORKS, dataset_name, make_plans
from tests.support.networks import network
from tests.support.runs import trainer_for
from tests.support.transfers import transferred
from tests.transfer.files import stock_file

Data = Callable[[str], Environment]


@pytest.mark.parametrize("kind", ["plain", "residual", *OWN_NETWORKS])
def test_only_the_head_learns(kind: str) -> None:
    torch.manual_seed(0)
    whole = network(kind, 2, 3)
    probe = ProbeNetwork(whole, 3).train()
    image = torch.randn(1, 2, 16, 16, 16)
    output = probe(image)
    assert output.shape == (1, 3, 16, 16, 16)
    output.square().mean().backward()
    for name, parameter in probe.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == name.startswith("decoder."), name
    assert not any(module.training for module in probe.backbone_view.network.modules())
    # every tensor but the head is found in the whole network under the same name
    names = {k for k in probe.state_dict() if ".seg_layers." not in k}
    assert names
    assert names <= set(whole.state_dict())


def test_it_trains_from_a_pretrained_file(with_data: Data) -> None:
    environment = with_data("labelled")
    settings = {"steps": 2, "steps_per_epoch": 2, "validation_iterations": 1, "snapshots": [2]}
    environment.write_plans("labelled", "run", {"finetune": settings})
    arguments = (dataset_name("labelled"), "3d_fullres", 0)
    run_training(*arguments, "nnsslTrainer_Finetune", "run", device=torch.device("cpu"))
    source = environment.fold("labelled", "run", "nnsslTrainer_Finetune") / "checkpoint_final.pth"
    run_training(*arguments, "nnsslTrainer_Probe", "run", str(source), device=torch.device("cpu"))
    fold = environment.fold("labelled", "run", "nnsslTrainer_Probe")
    before, after = (checkpoint.load(path)["network_weights"] for path in (source, fold / "checkpoint_final.pth"))
    encoder = [k for k in after if k.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(after[k], before[k]) for k in encoder)
    assert (fold / "validation" / "summary.json").is_file()


def test_the_command_compares_files(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = with_data("labelled")
    monkeypatch.chdir(environment.root)
    weights = network("plain", 1, 3).state_dict()
    torch.save({"network_weights": weights}, "net.pth")
    words = ["probe", "mine=net.pth", "-d", "817", "-c", "3d_fullres", "-o", "probes", "-device", "cpu"]
    main([*words, "--labels", "2", "--runs", "1", "--steps", "2"])
    out = capsys.readouterr().out
    table = pd.read_csv("probes/results.csv")
    assert table.dice.notna().all()
    for arm, title in (("scratch", "untrained encoder"), ("mine", "mine")):
        mean = table[table.arm == arm].groupby("organ").dice.mean().mean()
        assert re.search(rf"{title} +{mean:.3f} ", out), (title, mean, out)
    logs = {path.parent.name: path.read_text() for path in Path("probes/logs").glob("*/*.txt")}
    assert ["Loading pretrained weights" in logs[arm] for arm in ("scratch", "mine")] == [False, True]


def test_it_starts_with_a_fresh_head(with_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds the heads of a decoder, for the fine-tuner."""
    environment = with_data("labelled")
    stock_file(tmp_path / "stock.pth", make_plans("plain"), "plain")
    content = torch.load(tmp_path / "stock.pth", weights_only=False)
    content["init_args"]["dataset_json"] = json.loads((environment.dataset("labelled") / "dataset.json").read_text())
    torch.save(content, tmp_path / "stock.pth")
    file = transferred(tmp_path / "stock.pth", "labelled", "-tr", "nnsslTrainer_Finetune")
    assert any(row["action"] != "left" for row in checkpoint.load(file)["nnssl_ext"]["transfer"]["rows"])
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    heads = []
    for weights in (str(file), None):
        trainer = trainer_for("labelled", "nnUNetPlans", "nnsslTrainer_Probe")
        maybe_load_checkpoint(trainer, False, False, weights)
        trainer.on_train_start()
        heads.append([layer.weight for layer in trainer.network.decoder.seg_layers])
    assert all(torch.equal(one, other) for one, other in zip(*heads, strict=True))


def test_a_fine_tunings_schedule_is_not_the_probes(with_data: Data) -> None:
    environment = with_data("labelled")
    finetune = {"head_only_steps": 0.2, "freeze_encoder_steps": 0.5, "encoder_lr_scale": 0.1, "layer_decay": 0.5}
    environment.write_plans("labelled", "sawtooth", {"finetune": finetune})
    settings = trainer_for("labelled", "sawtooth", "nnsslTrainer_Probe").settings
    assert {name: getattr(settings, name) for name in finetune} == UNPROTECTED
