"""What is given away can be taken by everyone it is meant for."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from safetensors.torch import load_model

from nnssl_ext import __version__, checkpoint
from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.methods import TRAINERS
from nnssl_ext.provenance import hardware
from nnssl_ext.transfer.read import read_source
from tests.conftest import Environment
from tests.support.runs import pretrain
from tests.support.transfers import stock_network, transferred

Data = Callable[[str], Environment]


def run_of(with_data: Data, kind: str = "residual") -> Path:
    environment = with_data(kind)
    environment.write_plans(kind, "quick", {"seed": 7})
    return pretrain(environment, kind, "quick")


def test_hugging_face_folder(with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, folder = run_of(with_data), tmp_path / "model"
    assert main(["export", str(run), "-o", str(folder), "--name", "My model", "--safetensors"]) == 0
    assert "fill in the license" in capsys.readouterr().out
    files = {"README.md", "adaptation_plan.json", "checkpoint_final.pth", "config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == files

    content = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    original = torch.load(run / "checkpoint_final.pth", weights_only=True)
    plan = json.loads((folder / "adaptation_plan.json").read_text())
    assert {**content["nnssl_adaptation_plan"], "citations": content["citations"]} == plan
    for name, tensor in original["network_weights"].items():
        assert torch.equal(content["network_weights"][name], tensor)
    # what only the run itself needs is not given away
    assert not {"optimizer_state", "init_args", "logging"} & set(content)
    assert not {"state", "identity"} & set(content["nnssl_ext"])

    # stock takes the checkpoint as it is, and our own reader takes the folder
    load_pretrained_weights(stock_network("residual"), str(folder / "checkpoint_final.pth"))
    assert read_source(str(folder)).kind == "nnssl_ext, VolumeFusion"
    assert transferred(folder, "residual").is_file()

    # safetensors: one name for each tensor, all of them back in a live network
    network = stock_network("residual")
    load_model(network, folder / "model.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, original["network_weights"][name]), name


def test_safetensors_know_what_was_trained_and_their_sum(with_data: Data, tmp_path: Path) -> None:
    environment, trainer = with_data("residual"), TRAINERS["rotation"]
    environment.write_plans("residual", "turned", {})
    run = pretrain(environment, "residual", "turned", trainer=trainer)
    main(["export", str(run), "-o", str(tmp_path / "model"), "--safetensors"])
    file = tmp_path / "model" / "model.safetensors"
    whole, alone = read_source(str(tmp_path / "model")), read_source(str(file))
    assert alone.kind == whole.kind == "nnssl_ext, Rotation"
    assert alone.untrained == whole.untrained
    assert any(name.startswith("decoder.") for name in alone.untrained)
    assert alone.position_grid == whole.position_grid
    assert alone.geometry.spacing == whole.geometry.spacing
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is damaged: its content does not match its sha256"):
        read_source(str(file))


def test_the_model_card_is_filled_from_the_run(with_data: Data, tmp_path: Path) -> None:
    run = run_of(with_data, "two_channel")
    main(["export", str(run), "-o", str(tmp_path / "model"), "--license", "cc-by-4.0"])
    card = (tmp_path / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert "FILL IN" not in card
    rows = dict(line.strip("| ").split(" | ", 1) for line in card.splitlines() if " | " in line.strip("| "))
    assert rows["Training cases"] == "4 (Dataset814_Twochannel, fold 0)"
    assert rows["Input channels"] == "2"
    assert rows["Spacing"] == "1 x 1 x 1 mm"
    assert rows["Crop"] == "16 x 16 x 16 voxels"
    assert rows["Normalization"] == "ZScoreNormalization, ZScoreNormalization"
    assert rows["Steps"] == "6 of 2 samples"
    assert rows["Seed"] == "7"
    assert rows["Hardware"] == hardware()
    assert f"nnssl_ext {__version__}" in rows["Versions"]
    parameters = sum(p.numel() for p in stock_network("two_channel").parameters())
    assert rows["Network"] == f"PlainConvUNet, {parameters:,} parameters"
    assert "    nnUNetv2_train 814 3d_fullres 0 -tr nnsslTrainer_VolumeFusion -p quick\n" in card
    main(["export", str(run), "-o", str(tmp_path / "open")])
    assert (tmp_path / "open" / "README.md").read_text().count("FILL IN") == 2


def test_stocks_own_zip(with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """nnUNetv2_export_model_to_zip packs a pretraining run, and installed elsewhere it is a source again."""
    run, environment = run_of(with_data), with_data("residual")
    words = ["-d", "812", "-c", "3d_fullres", "-f", "0", "-tr", "nnsslTrainer_VolumeFusion", "-p", "quick"]
    environment.run("nnUNetv2_export_model_to_zip", *words, "-o", str(tmp_path / "before.zip"), status=1)
    capsys.readouterr()
    with pytest.raises(UserError, match="--safetensors belong to a folder. Give -o FOLDER"):
        main(["export", str(run), "--zip", "--safetensors"])
    assert main(["export", str(run), "--zip"]) == 0
    command = capsys.readouterr().out.splitlines()[-1].split()
    assert command[:-1] == ["nnUNetv2_export_model_to_zip", *words, "-chk", "checkpoint_final.pth", "-o"]
    environment.run(*command)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    variables = {"nnUNet_results": str(elsewhere)}
    environment.run(
        "nnUNetv2_install_pretrained_model_from_zip", str(environment.root / command[-1]), variables=variables
    )
    installed = elsewhere / run.relative_to(environment.results)
    assert read_source(str(installed)).weights.keys() == read_source(str(run)).weights.keys()
    summary = json.loads((installed / "validation" / "summary.json").read_text())
    assert summary["pretraining"]["steps"] == 6


def test_refused(with_data: Data, tmp_path: Path) -> None:
    run = run_of(with_data)
    (tmp_path / "there").mkdir()
    again = transferred(run, "residual")
    cases = [
        ([str(run)], "nothing to do"),
        ([str(tmp_path / "absent"), "-o", "x"], "cannot read checkpoint"),
        ([str(run), "-o", str(tmp_path / "there")], "exists. Give another name"),
        ([str(run), "-o", str(tmp_path / "no" / "x")], "cannot write"),
        ([str(again), "-o", str(tmp_path / "x")], "was not written by a pretraining run"),
    ]
    for words, message in cases:
        with pytest.raises(UserError, match=message):
            main(["export", *words])
    (run / "progress.png").unlink()
    with pytest.raises(UserError, match=r"will miss .*progress\.png"):
        main(["export", str(run), "--zip"])
    assert not (run / "validation").exists()
    assert not (tmp_path / "x").exists()


def test_half_an_export_is_none(with_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(with_data)

    def full(*_: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr("nnssl_ext.transfer.export._save_safetensors", full)
    with pytest.raises(UserError, match="no space left"):
        main(["export", str(run), "-o", str(tmp_path / "model"), "--safetensors"])
    assert not [path for path in tmp_path.iterdir() if "model" in path.name]


def test_safetensors_are_written_without_importing_what_the_plans_name(
    with_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint from elsewhere may name any class. Building it would run foreign code."""
    content = checkpoint.load(run_of(with_data) / "checkpoint_final.pth")
    plans = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    plans["architecture"]["network_class_name"] = "foreign_network.Network"
    checkpoint.save(content, tmp_path / "foreign.pth")
    (tmp_path / "foreign_network.py").write_text("raise RuntimeError('foreign code was executed')")
    monkeypatch.syspath_prepend(str(tmp_path))

    main(["export", str(tmp_path / "foreign.pth"), "-o", str(tmp_path / "model"), "--safetensors"])

    written = read_source(str(tmp_path / "model" / "model.safetensors")).weights
    given = read_source(str(tmp_path / "foreign.pth")).weights
    assert set(written) == set(given)
    assert all(torch.equal(written[name], tensor) for name, tensor in given.items())


def test_safetensors_know_the_grid_of_positions(with_data: Data, tmp_path: Path) -> None:
    environment = with_data("vit")
    environment.write_plans("vit", "run", {"epochs": 1})
    run = pretrain(environment, "vit", "run", trainer=TRAINERS["masked_autoencoder"])
    main(["export", str(run), "-o", str(tmp_path / "model"), "--safetensors"])
    grid = read_source(str(tmp_path / "model" / "model.safetensors")).position_grid
    assert len(grid) == 3
    assert grid == read_source(str(run)).position_grid
