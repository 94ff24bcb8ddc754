"""Files of other projects in the layouts that failed before, into targets: each case asserts the right values."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.primus import PrimusV2
from torch import Tensor

from nnssl_ext.cli import main
from nnssl_ext.errors import UserError
from nnssl_ext.networks.architectures.pct_net import STRIDES, PCTNet
from nnssl_ext.networks.positions import resize_positions
from nnssl_ext.transfer.adaptations import input_channels
from nnssl_ext.transfer.names import canonical_weights, family_of
from nnssl_ext.transfer.read import read_source
from nnssl_ext.transfer.report import ADAPTED, COPIED, LEFT
from nnssl_ext.transfer.source import PretrainedWeights, SourceGeometry
from nnssl_ext.transfer.transfer import AUTO, INDEX, PHYSICAL, TargetNetwork, transfer
from tests.conftest import Environment
from tests.datasets import make_plans
from tests.support.layouts import SMALL, encoder_layout, published_layout, random_weights
from tests.transfer.files import as_numpy_1, nnssl_file, resnet18, spark_file, stock_file
from tests.transfer.helpers import MILLIMETRE, built, noise, planned, primus, source, target

Data = Callable[[str], Environment]
DATA = Path(__file__).parent / "data"


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def test_files_that_numpy_1_wrote_are_read() -> None:
    """Recorded with numpy 1.26.4: a stock checkpoint with nnU-Net's log, and PyMIC's dictionary."""
    stock = read_source(str(DATA / "stock_numpy1.pth"))
    assert stock.kind == "nnU-Net, nnUNetTrainer"
    assert set(stock.weights) == {
        f"encoder.stages.{stage}.0.convs.0.conv.{tensor}" for stage in (0, 1) for tensor in ("weight", "bias")
    }
    pymic = read_source(str(DATA / "pymic_numpy1.pt"))
    assert pymic.kind == "MIS-FM's PCT-Net"
    assert list(pymic.weights) == ["pyramid_ct.out_conv2.conv.seg_layers.weight"]


def test_numpy_1_in_a_whole_checkpoint_changes_nothing(tmp_path: Path) -> None:
    stock_file(tmp_path / "new.pth", make_plans("plain"), "plain")
    as_numpy_1(tmp_path / "new.pth", tmp_path / "old.pth")
    with zipfile.ZipFile(tmp_path / "old.pth") as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    assert b"numpy.core.multiarray" in pickled
    old, new = (read_source(str(tmp_path / name)) for name in ("old.pth", "new.pth"))
    assert old.geometry == new.geometry
    assert all(torch.equal(old.weights[name], tensor) for name, tensor in new.weights.items())


def test_of_aliases_that_differ_the_last_is_taken_as_torch_does(tmp_path: Path) -> None:
    """SparkMAE trains ``all_modules``; ``conv`` keeps what it had."""
    trained = spark_file(tmp_path / "checkpoint_final.pth")
    network = built(planned("residual"))
    network.load_state_dict(trained)
    given = read_source(str(tmp_path))
    as_torch = canonical_weights(network.state_dict())
    assert all(torch.equal(given.weights[name], tensor) for name, tensor in as_torch.items())
    assert any("tensors have several names with different values" in note for note in given.notes)
    to = target(planned("residual"))
    report = transfer(given, to)
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    assert torch.equal(to.tensors[name], trained[name.replace(".conv.weight", ".all_modules.0.weight")])
    assert "The last name was taken, as torch does" in str(report)


def primus_v2(channels: int = 1, shape: tuple[int, int, int] = (16, 16, 16)) -> PrimusV2:
    torch.manual_seed(0)
    return PrimusV2(channels, 72, (8, 8, 8), 3, 2, 6, shape, scale_attn_inner=True, init_values=0.1)


@pytest.mark.parametrize("shape", [(8, 16, 32), (8, 16, 16), (32, 32, 32)])
def test_primus_v2_positions_follow_its_tokens_of_8_voxels(shape: tuple[int, int, int]) -> None:
    """As many tokens on another grid (8x16x32), or another number: never copied in another order, never left."""
    network = noise(primus_v2())
    weights = canonical_weights(network.state_dict())
    given = PretrainedWeights(Path("v2.pth"), "test", weights, SourceGeometry(None, None, (16, 16, 16)))
    to = TargetNetwork(primus_v2(shape=shape), MILLIMETRE, shape)
    report = transfer(given, to)
    (row,) = [row for row in report.rows if row.name == "eva.pos_embed"]
    grid = tuple(edge // 8 for edge in shape)
    assert row.action == ADAPTED
    assert row.note == f"positions 2x2x2 -> {'x'.join(map(str, grid))}, interpolated"
    expected = resize_positions(weights["eva.pos_embed"], (2, 2, 2), grid)
    assert torch.equal(to.tensors["eva.pos_embed"], expected)


def test_primus_v2_both_branches_of_the_stem_take_more_channels() -> None:
    weights = canonical_weights(noise(primus_v2()).state_dict())
    given = PretrainedWeights(Path("v2.pth"), "test", weights, SourceGeometry(None, None, (16, 16, 16)))
    to = TargetNetwork(primus_v2(channels=3), MILLIMETRE, (16, 16, 16))
    report = transfer(given, to)
    adapted = {row.name for row in report.rows if "image channels 1 -> 3" in row.note}
    stem = "down_projection.stem.blocks.0"
    assert adapted == {f"{stem}.conv1.conv.weight", f"{stem}.skip.0.conv.weight"}
    for name in adapted:
        assert torch.equal(to.tensors[name], input_channels(weights[name], 3))


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("factor", [0.5, 0.68, 1.4, 1.5, 2.0])
def test_the_same_network_at_another_spacing_gets_all_of_its_weights(kind: str, factor: float) -> None:
    wide = {"features_per_stage": [4, 8, 16, 16], "stages": 4, "kernel_sizes": [[3] * 3] * 4}
    given = source(planned(kind, **wide))
    to = target(planned(kind, **wide), spacing=(factor,) * 3)
    report = transfer(given, to)
    assert report.encoder_share == 1.0
    assert all(row.action == COPIED for row in report.rows if ".seg_layers." not in row.name)
    by_resolution = target(planned(kind, **wide), spacing=(factor,) * 3)
    share = transfer(given, by_resolution, alignment=PHYSICAL, allow_partial=True).filled
    said = [line for line in str(report).splitlines() if "--align resolution" in line]
    assert bool(said) == (share != report.filled)
    assert not said or f"{share:,} parameters would come from the source instead of {report.filled:,}" in said[0]


def test_encoders_of_two_families_are_matched_by_resolution() -> None:
    plain, residual = (planned(kind, features_per_stage=[6, 6, 6]) for kind in ("plain", "residual"))
    given = source(plain)
    names = {AUTO: 2, PHYSICAL: 2, INDEX: 1}
    for way, stage in names.items():
        to = target(residual, spacing=(2.0, 2.0, 2.0))
        transfer(given, to, alignment=way)
        ours, theirs = "encoder.stages.1.blocks.0.conv1.conv.weight", f"encoder.stages.{stage}.0.convs.0.conv.weight"
        assert torch.equal(to.tensors[ours], given.weights[theirs]), way


def test_less_than_a_tenth_of_the_encoder_is_an_error_unless_allowed() -> None:
    given = source(planned(features_per_stage=[4, 8, 12]))
    other = planned(features_per_stage=[4, 10, 20])
    to = target(other)
    before = {name: tensor.detach().clone() for name, tensor in to.tensors.items()}
    with pytest.raises(UserError, match=r"only \d\.\d% of the encoder would come from source\.pth.*--allow-partial"):
        transfer(given, to)
    assert all(torch.equal(before[name], tensor) for name, tensor in to.tensors.items())
    assert 0 < transfer(given, to, allow_partial=True).encoder_share < 0.1


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("place", ["", "state_dict", "model", "network_weights", "checkpoint.state_dict"])
@pytest.mark.parametrize("family", ["plain", "residual", "primus", "pct_net", "vit", "resnet"])
def test_a_state_dict_of_every_family_is_found_wherever_it_is(
    tmp_path: Path, prefix: str, place: str, family: str
) -> None:
    weights, name, expected = FAMILIES[family]()
    content: Any = {prefix + key: tensor for key, tensor in weights.items()}
    for word in reversed(place.replace("checkpoint.", "model.").split(".") if place else []):
        content = {word: content, "epoch": 3}
    given = read_source(save(tmp_path / "file.pth", content))
    assert torch.equal(given.weights[name], weights[expected])


def _network(kind: str) -> dict[str, Tensor]:
    return dict(noise(primus() if kind == "primus" else built(planned(kind))).state_dict())


_BLOCK, _PRIMUS = "encoder.stages.1.blocks.0.conv1.conv.weight", "eva.blocks.1.attn.q_proj.weight"
_CONV, _QKV = "encoder.stages.1.0.convs.0.conv.weight", "blocks.1.attn.qkv.weight"
FAMILIES: dict[str, Callable[[], tuple[dict[str, Tensor], str, str]]] = {
    "plain": lambda: (_network("plain"), _CONV, _CONV),
    "residual": lambda: (_network("residual"), _BLOCK, _BLOCK),
    "primus": lambda: (_network("primus"), _PRIMUS, _PRIMUS),
    "pct_net": lambda: (
        random_weights(published_layout(1, 2, SMALL, (2, 2, 4), 2)),
        "pyramid_ct.out_conv2.conv.seg_layers.weight",
        "pyramid_ct.out_conv2.conv.2.weight",
    ),
    "vit": lambda: (random_weights(encoder_layout(1, 16, 4, 2)), f"backbone.{_QKV}", "blocks.0.1.attn.qkv.weight"),
    "resnet": lambda: (resnet18(2), "encoder.stages.2.blocks.0.skip.0.conv.weight", "layer2.0.downsample.0.weight"),
}


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_nnssls_primus_with_wrappers_before_its_names(tmp_path: Path, prefix: str) -> None:
    """The plan's key_to_encoder says ``encoder.eva``; every name may have a wrapper's word before it."""
    weights = nnssl_file(tmp_path / "a.pth", "primus")
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    moved = {f"{prefix}encoder.{name}": tensor for name, tensor in weights.items()}
    plan = {"key_to_encoder": "encoder.eva", "key_to_stem": "encoder.down_projection"}
    content["nnssl_adaptation_plan"].update(plan, key_to_lpe="encoder.eva.pos_embed")
    given = read_source(save(tmp_path / "b.pth", {**content, "network_weights": moved}))
    to = TargetNetwork(primus(), MILLIMETRE, (8, 8, 8))
    report = transfer(given, to)
    for name in ("eva.blocks.1.attn.q_proj.weight", "down_projection.proj.weight", "eva.pos_embed"):
        assert torch.equal(to.tensors[name], weights[name])
    assert report.encoder_share == 1.0
    assert f"from {prefix}encoder.eva.pos_embed" in str(report)


def test_the_table_names_the_sources_own_tensors(tmp_path: Path) -> None:
    given = read_source(save(tmp_path / "r.pth", {"state_dict": {f"backbone.{n}": t for n, t in resnet18(8).items()}}))
    report = transfer(given, target(planned("residual", features_per_stage=[8, 8, 16])), allow_partial=True)
    printed = str(report)
    assert "from backbone.layer2.0.conv1.weight" in printed
    assert "backbone.fc.weight" in report.unused
    assert not [name for name in report.unused if name.startswith("encoder.")]
    assert "the source has no stage of this number" in {row.note for row in report.rows}
    assert "compute something else" in printed


def test_a_resnet_50_has_no_layers_in_common_with_basic_blocks() -> None:
    bottlenecks = {f"layer{n}.0.conv3.weight": torch.randn(8, 4, 1, 1, 1) for n in range(1, 5)}
    weights = {**resnet18(4), **bottlenecks}
    given = PretrainedWeights(Path("r50.pth"), "ResNet3D", {})
    from nnssl_ext.transfer.resnet import renamed

    given = PretrainedWeights(Path("r50.pth"), "ResNet3D", {renamed(name): t for name, t in weights.items()})
    with pytest.raises(UserError, match="bottleneck blocks and other blocks have no layers in common"):
        transfer(given, target(planned("residual", features_per_stage=[4, 4, 8])))


def pct_net(mode: int, **options: Any) -> TargetNetwork:
    torch.manual_seed(1)
    network = PCTNet(
        input_channels=1,
        num_classes=5,
        strides=STRIDES[mode],
        features_per_stage=SMALL,
        heads=[2, 2, 4],
        window=2,
        **options,
    )
    return TargetNetwork(network, MILLIMETRE, (32, 32, 32))


@pytest.mark.parametrize("mode", [0, 1])
def test_resolution_modes_that_were_not_trained_are_left(tmp_path: Path, mode: int) -> None:
    """The file holds three modes, of which training touched the second: its norms have counted batches."""
    published = random_weights(published_layout(1, 2, SMALL, (2, 2, 4), 2))
    for name in published:
        if name.endswith("num_batches_tracked"):
            trained = name.startswith(("embeddings.1.", "pred_heads.1.", "pyramid_ct."))
            published[name] = torch.tensor(7 if trained else 0)
        elif name.endswith("relative_position_index"):
            published[name] = published[name].long() * 0
    given, to = read_source(save(tmp_path / "p.pt", {"model_state_dict": published})), pct_net(mode)
    report = transfer(given, to)
    rows = {row.name: row for row in report.rows}
    for place in (f"embeddings.{mode}.conv0.conv_conv.2.weight", f"pred_heads.{mode}.conv0.conv_conv.2.weight"):
        assert rows[place].action == (COPIED if mode == 1 else LEFT)
        assert rows[place].note == ("" if mode == 1 else "the pretraining did not train it")
    assert rows["pyramid_ct.convtrans_e2.conv.conv_conv.2.weight"].action == COPIED
    assert "Of the file's 3 resolution modes, 1 was trained." in str(report)


@pytest.mark.parametrize("hidden", [True, False])
def test_hidden_padding_is_remarked_for_published_weights(tmp_path: Path, hidden: bool) -> None:
    published = random_weights(published_layout(1, 2, SMALL, (2, 2, 4), 2))
    given = read_source(save(tmp_path / "p.pt", {"model_state_dict": published}))
    report = transfer(given, pct_net(1, mask_padding=hidden))
    assert ("mask_padding" in str(report)) == hidden


def test_positions_of_another_grid_name_the_setting_that_keeps_them(tmp_path: Path) -> None:
    """A stage-1 teacher of 3DINO has 6x6x6 positions; a plan's transformer has 7x7x7 unless it says otherwise."""
    from nnssl_ext.networks.architectures.vit import ViTUNETR

    layout = {**encoder_layout(1, 16, 4, 2), "pos_embed": (1, 217, 16)}
    encoder = random_weights(layout)
    file = save(tmp_path / "t.pth", {"teacher": {f"backbone.{name}": tensor for name, tensor in encoder.items()}})
    options: dict[str, Any] = {"embed_dim": 16, "depth": 4, "num_heads": 2, "decoder_features": 4}
    away, own = (
        TargetNetwork(ViTUNETR(input_channels=1, num_classes=3, position_grid=grid, **options), MILLIMETRE, (96,) * 3)
        for grid in ((7, 7, 7), (6, 6, 6))
    )
    assert "plan with architecture.arch_kwargs.position_grid=[6, 6, 6]" in str(transfer(read_source(file), away))
    report = transfer(read_source(file), own)
    assert "position_grid" not in str(report)
    assert torch.equal(own.tensors["backbone.pos_embed"], encoder["pos_embed"])


STARTS = {
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
    "page.pth": (b"<!DOCTYPE html><html></html>", "it is a web page"),
    "packed.pth": (b"\x1f\x8b\x08\x00rest", "it is a gzip archive"),
    "keras.pth": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file"),
    "text.pth": (b"weights", "it needs more than tensors and plain values"),
}


@pytest.mark.parametrize("name", STARTS)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, name: str) -> None:
    content, message = STARTS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is refused: {message}") as error:
        read_source(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_an_archive_of_other_things_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("fold_0/checkpoint_final.pth", b"weights")
    with pytest.raises(UserError, match="it is a zip archive without a state dict"):
        read_source(str(tmp_path / "model.zip"))


def test_a_mistyped_path_is_no_question_for_hugging_face(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, *_, **__: asked.append(name))
    (tmp_path / "folder").mkdir()
    for text in ("folder/weights", "elsewhere/weights.bin", "results/fold_0", "results/fold_all", "a/b/c"):
        with pytest.raises(UserError, match="no Hugging Face repository"):
            read_source(text)
    assert asked == []


def test_the_page_of_a_branch_is_a_repository_and_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, file: str, revision: str | None, local_dir: Path) -> str:
        asked.append((name, revision))
        raise OSError("404 Client Error.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setenv("nnssl_pretrained_models", str(tmp_path))
    for text in ("https://huggingface.co/owner/model/tree/v1", "huggingface.co/owner/model/tree/main/"):
        with pytest.raises(UserError, match="could not be downloaded"):
            read_source(text)
    assert asked == [("owner/model", "v1"), ("owner/model", "main")]


def test_unlike_networks_are_answered_with_what_to_do() -> None:
    weights = canonical_weights(noise(primus()).state_dict())
    given = PretrainedWeights(Path("p.pth"), "test", weights)
    message = r"The source is a Primus, the target a U-Net. Give the trainer .* -tr nnUNet_Primus_M_Trainer\."
    with pytest.raises(UserError, match=message):
        transfer(given, target(planned()))


def test_families_are_told_apart_by_their_names() -> None:
    for family, make in FAMILIES.items():
        expected = {"plain": "U-Net", "residual": "U-Net", "primus": "Primus", "pct_net": "PCT-Net", "resnet": "ResNet"}
        assert family_of(make()[0]) == expected.get(family, "vision transformer")
    assert family_of(["0.weight", "encoder.layer.weight"]) == ""


def test_weights_of_version_0_1_load_for_transfer_and_export(
    with_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pretraining checkpoint that version 0.1 wrote, with that version's names of settings."""
    with_data("plain")
    recorded = DATA / "nnssl_ext_0_1.pth"
    content = torch.load(recorded, weights_only=True)
    assert content["nnssl_ext"]["versions"]["nnssl_ext"] == "0.1.0"
    given = read_source(str(recorded))
    assert given.kind == "nnssl_ext, VolumeFusion"
    file = tmp_path / "init.pth"
    words = ["-d", "811", "-c", "3d_fullres", "-o", str(file), "--overlap", "--allow-partial"]
    assert main(["transfer", str(recorded), *words]) == 0
    written = read_source(str(file)).weights["encoder.stages.0.0.convs.0.conv.weight"]
    assert torch.equal(written[:2], given.weights["encoder.stages.0.0.convs.0.conv.weight"])
    capsys.readouterr()
    assert main(["export", str(recorded), "-o", str(tmp_path / "model"), "--license", "cc-by-4.0"]) == 0
    plan = json.loads((tmp_path / "model" / "adaptation_plan.json").read_text())
    assert plan["architecture_plans"]["arch_class_name"] == "PlainConvUNet"
    assert re.search(r"^license: cc-by-4.0$", (tmp_path / "model" / "README.md").read_text(), re.M)
