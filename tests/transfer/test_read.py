"""Every kind of file is recognised, and none is trusted."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor

from nnssl_ext import checkpoint
from nnssl_ext.errors import UserError
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.source import PretrainedWeights
from tests.conftest import Environment
from tests.datasets import make_plans
from tests.support.runs import pretrain, trainer_for
from tests.transfer.files import hub_folder, nnssl_file, resnet18, stock_file
from tests.transfer.helpers import built, noise, planned

HALVING = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


def holds(source: PretrainedWeights, weights: dict[str, Tensor]) -> None:
    """Every tensor of the file is there once, with its values."""
    distinct = {tensor.data_ptr() for tensor in weights.values()}
    assert len(source.weights) == len(distinct)
    for name, tensor in source.weights.items():
        assert torch.equal(tensor, weights[name]), name


def test_our_checkpoint(with_data: Callable[[str], Environment]) -> None:
    environment = with_data("anisotropic")
    environment.write_plans("anisotropic", "quick", {})
    fold = pretrain(environment, "anisotropic", "quick")
    for place in (fold, fold / "checkpoint_final.pth"):
        source = read_source(str(place))
        assert source.kind == "nnssl_ext, VolumeFusion"
        holds(source, checkpoint.load(fold / "checkpoint_final.pth")["network_weights"])
        assert source.geometry.spacing == (5.0, 1.0, 1.0)
        assert source.geometry.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))
        # VolumeFusion trains the whole network, with heads of its own that are not in the file
        assert {name for name in source.untrained if "seg_layers" not in name} == set()
        assert source.citations


def test_a_real_supervised_checkpoint(with_data: Callable[[str], Environment], tmp_path: Path) -> None:
    with_data("plain")
    trainer = trainer_for("plain", "nnUNetPlans", "nnUNetTrainer")
    trainer.initialize()
    for key in trainer.logger.local_logger.my_fantastic_logging:
        trainer.logger.local_logger.my_fantastic_logging[key] = [checkpoint.np.float64(1.5)]
    trainer.save_checkpoint(str(tmp_path / "stock.pth"))
    source = read_source(str(tmp_path / "stock.pth"))
    assert source.kind == "nnU-Net, nnUNetTrainer"
    holds(source, trainer.network.state_dict())
    assert (source.geometry.spacing, source.geometry.strides) == ((1.0, 1.0, 1.0), HALVING)


def test_plans_that_cannot_be_read_leave_the_geometry_open(tmp_path: Path) -> None:
    stock_file(tmp_path / "old.pth", {"plans_per_stage": {}}, "plain")
    source = read_source(str(tmp_path / "old.pth"))
    assert source.geometry.spacing is None
    assert "could not be read" in source.notes[0]


@pytest.mark.parametrize("kind", ["residual", "plain", "primus"])
def test_nnssl(tmp_path: Path, kind: str) -> None:
    weights = nnssl_file(tmp_path / "checkpoint_final.pth", kind)
    source = read_source(str(tmp_path))
    holds(source, weights)
    assert source.citations[0]["type"] == "Data"
    if kind == "primus":
        assert source.geometry.patch_size == (8, 8, 8)
        assert source.geometry.spacing is None
    else:
        # no strides in the plan: they are the kernels by which the decoder goes up
        assert source.geometry.strides == HALVING
        assert source.geometry.spacing == (1.0, 1.0, 1.0)


def test_encoder_elsewhere_and_alone(tmp_path: Path) -> None:
    """key_to_encoder and key_to_stem say where they are; ResEncL's strides are known without a decoder."""
    weights = nnssl_file(tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    moved = {f"module.net.{n}": t for n, t in weights.items() if n.startswith("encoder.") and "all_modules" not in n}
    moved = {name.replace("encoder.", "enc."): tensor for name, tensor in moved.items()}
    content["network_weights"] = moved
    content["nnssl_adaptation_plan"].update(key_to_encoder="module.net.enc.stages", key_to_stem="module.net.enc.stem")
    torch.save(content, tmp_path / "b.pth")
    source = read_source(str(tmp_path / "b.pth"))
    assert torch.equal(source.weights["encoder.stem.convs.0.conv.weight"], weights["encoder.stem.convs.0.conv.weight"])
    assert source.geometry.strides == HALVING


def test_safetensors(tmp_path: Path) -> None:
    network = noise(built(planned("residual")))
    save_model(network, str(tmp_path / "model.safetensors"))
    holds(read_source(str(tmp_path)), dict(network.state_dict()))


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_resnet(tmp_path: Path, prefix: str) -> None:
    weights = resnet18(width=2)
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in weights.items()}}, tmp_path / "r.pth")
    source = read_source(str(tmp_path / "r.pth"))
    names = {
        "encoder.stem.convs.0.conv.weight": "conv1.weight",
        "encoder.stages.3.blocks.1.conv2.norm.running_var": "layer3.1.bn2.running_var",
        "encoder.stages.2.blocks.0.skip.0.conv.weight": "layer2.0.downsample.0.weight",
        "encoder.stages.2.blocks.0.skip.0.norm.bias": "layer2.0.downsample.1.bias",
    }
    for ours, theirs in names.items():
        assert torch.equal(source.weights[ours], weights[theirs])
    assert len(source.weights) == len(weights)


def test_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = hub_folder(tmp_path / "hub")
    asked = []

    def download(name: str, file: str, revision: str | None, local_dir: Path) -> str:
        asked.append((name, file, revision))
        if name == "owner/absent":
            raise OSError("404 Client Error.\nmore lines")
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / file).write_bytes((tmp_path / "hub" / file).read_bytes())
        return str(local_dir / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.delenv("nnssl_pretrained_models", raising=False)
    with pytest.raises(UserError, match="export nnssl_pretrained_models="):
        read_source("owner/ResEncL-v1.5")
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path / "models"))
    for name in ("owner/ResEncL-v1.5", "https://huggingface.co/owner/ResEncL-v1.5/"):
        source = read_source(name)
        holds(source, weights)
        assert source.path == tmp_path / "models" / "owner_ResEncL-v1.5" / "checkpoint_final.pth"
        assert source.geometry.spacing == (1.0, 1.0, 1.0)
    read_source("owner/model@refs/pr/1")
    assert asked[-1] == ("owner/model", "checkpoint_final.pth", "refs/pr/1")
    with pytest.raises(UserError, match=r"of owner/absent could not be downloaded .*\(404 Client Error\.\)"):
        read_source("owner/absent")


class Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("executed",))


def test_pickles_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"network_weights": {"a": torch.zeros(1)}, "evil": Malicious()}, "evil.pth")
    Path("bare.pth").write_bytes(pickle.dumps(Malicious()))
    torch.save(
        {"network_weights": {"a": torch.zeros(1)}, "evil": Malicious()}, "old.pth", _use_new_zipfile_serialization=False
    )
    needed = {"evil.pth": r"'\w+\.mkdir', ", "old.pth": r"'\w+\.mkdir', ", "bare.pth": ""}
    for name, what in needed.items():
        with pytest.raises(UserError, match=rf"{name} is refused: it needs {what}more than tensors and plain values"):
            read_source(name)
    assert not Path("executed").exists()


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = noise(built(planned())).state_dict()
    files: dict[str, object] = {
        "other.pth": {"optimizer": {}, "epoch": 3},
        "list.pth": [torch.zeros(1)],
        "edited.pth": {"network_weights": {**good, "note": "edited by hand"}},
    }
    for name, content in files.items():
        torch.save(content, name)
    Path("cut.pth").write_bytes(Path("edited.pth").read_bytes()[:2000])
    Path("empty").mkdir()
    Path("large").mkdir()
    hub_folder(Path("large/hub"))
    Path("large/hub/adaptation_plan.json").write_text('{"a": "' + "x" * 5_000_000 + '"}')
    messages = {
        "other.pth": "got 'optimizer', 'epoch'. Save network.state_dict()",
        "list.pth": "holds a list, expected named tensors",
        "edited.pth": "of no known kind",
        "cut.pth": "damaged or no file of tensors",
        "empty": "holds neither checkpoint_final.pth nor model.safetensors",
        "absent.pth": "no file, no folder and no Hugging Face repository",
        "absent/dir/x.pth": "no file, no folder and no Hugging Face repository",
        "large/hub": "more than any settings: refused (at most 4,194,304)",
    }
    for name, message in messages.items():
        with pytest.raises(UserError) as error:
            read_source(name)
        assert message in str(error.value), name
        assert "\n" not in str(error.value)


def test_a_damaged_checkpoint_of_ours_is_noticed(tmp_path: Path) -> None:
    weights = noise(built(planned())).state_dict()
    content = {"network_weights": weights, "nnssl_ext": {"format": checkpoint.FORMAT}}
    checkpoint.save(content, tmp_path / "good.pth")
    assert read_source(str(tmp_path / "good.pth")).kind == "nnssl_ext, unknown origin"
    stored = torch.load(tmp_path / "good.pth", weights_only=True)
    stored["network_weights"]["decoder.stages.0.convs.0.conv.bias"].add_(1)
    torch.save(stored, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="its content does not match its sha256"):
        read_source(str(tmp_path / "bad.pth"))


def test_plans_with_odd_values_are_not_believed(tmp_path: Path) -> None:
    """A plan from elsewhere may say anything: what cannot be a spacing or a stride is not known."""
    odd_values: list[object] = [[1.0, -1.0, 1.0], "1,1,1", [None, None, None], {}]
    for odd in odd_values:
        plan_part = {"pretrain_plan": {"configurations": {"c": {"patch_size": "no", "spacing": odd}}}}
        nnssl_file(tmp_path / "odd.pth")
        content = torch.load(tmp_path / "odd.pth", weights_only=True)
        content["nnssl_adaptation_plan"].update(plan_part, recommended_downstream_patchsize=None)
        content["nnssl_adaptation_plan"]["architecture_plans"] = {"arch_kwargs": {"strides": [[0, 2, 2], 1, None]}}
        torch.save(content, tmp_path / "odd.pth")
        found = read_source(str(tmp_path / "odd.pth")).geometry
        assert (found.spacing, found.strides, found.patch_size) == (None, HALVING, None)


def test_stock_plans_of_a_test_are_read(tmp_path: Path) -> None:
    stock_file(tmp_path / "s.pth", make_plans("anisotropic"), "anisotropic")
    assert read_source(str(tmp_path / "s.pth")).geometry.strides == ((1, 1, 1), (1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize("edge", ["Infinity", "NaN", f"1{'0' * 400}"])
def test_a_plan_of_other_values_than_expected_leaves_the_geometry_open(tmp_path: Path, edge: str) -> None:
    hub_folder(tmp_path / "model")
    plan = json.loads((tmp_path / "model" / "adaptation_plan.json").read_text())
    plan["architecture_plans"], plan["recommended_downstream_patchsize"] = "ResEncL", []
    plan["pretrain_plan"]["configurations"]["onemmiso"] = {"patch_size": ["edge", 16, 16], "spacing": ["edge", 1, 1]}
    text = json.dumps(plan).replace('"edge"', edge)
    (tmp_path / "model" / "adaptation_plan.json").write_text(text)
    source = read_source(str(tmp_path / "model"))
    assert source.kind == "nnssl adaptation plan, unknown architecture"
    assert (source.geometry.patch_size, source.geometry.spacing) == (None, None)
