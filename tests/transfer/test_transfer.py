"""Sources into live networks: which tensor goes where, what the report says, on values."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnssl_ext.errors import UserError
from nnssl_ext.networks.weight_length import convolution_lengths
from nnssl_ext.transfer.adaptations import input_channels, kernel
from nnssl_ext.transfer.names import canonical_weights
from nnssl_ext.transfer.report import ADAPTED, COPIED, LEFT, Report
from nnssl_ext.transfer.source import PretrainedWeights, SourceGeometry
from nnssl_ext.transfer.transfer import AUTO, INDEX, PHYSICAL, TargetNetwork, transfer
from tests.support.networks import network
from tests.transfer.helpers import MILLIMETRE, changed, noise, planned, primus, source, target

ALIKE = [6, 6, 6]  # the same width at every stage: resolution alone decides


def filled(from_: PretrainedWeights, to: TargetNetwork, **options: object) -> tuple[Report, dict[str, Tensor]]:
    """Transfer, check the report against what really changed, and return the network's tensors."""
    before = {name: tensor.detach().clone() for name, tensor in to.tensors.items()}
    report = transfer(from_, to, **options)  # type: ignore[arg-type]
    after = canonical_weights(to.network.state_dict())  # fails if the names of a tensor disagree
    differences = changed(before, after)
    assert {row.name: row.filled for row in report.rows if row.parameters} == {
        row.name: differences[row.name] for row in report.rows if row.parameters
    }
    assert report.parameters == sum(p.numel() for p in to.network.parameters())
    assert report.filled == report.filled_by(COPIED) + report.filled_by(ADAPTED)
    assert all(row.note for row in report.rows if row.action in (LEFT, ADAPTED))
    return report, after


def notes(report: Report, part: str) -> set[str]:
    return {row.note for row in report.rows if part in row.name}


@pytest.mark.parametrize("kind", ["plain", "residual", "anisotropic", "ResidualUNet"])
def test_the_same_network_is_copied_but_for_its_heads(kind: str) -> None:
    plan = planned("residual" if kind == "ResidualUNet" else kind)
    if kind == "ResidualUNet":  # residual blocks in the decoder too
        plan["network_class_name"] = plan["network_class_name"].replace("ResidualEncoderUNet", kind)
    given = source(plan, outputs=3)
    report, after = filled(given, target(plan, outputs=5))
    for row in report.rows:
        if ".seg_layers." in row.name:
            assert (row.action, row.note) == (LEFT, "a segmentation head is not transferred")
        else:
            assert row.action == COPIED
            assert torch.equal(after[row.name], given.weights[row.name])


def test_layers_that_are_no_convolutions_are_copied_too() -> None:
    plan = planned("plain", nonlin="torch.nn.PReLU", nonlin_kwargs={})
    report, _ = filled(source(plan), target(plan))
    learned = [row for row in report.rows if row.name.endswith("nonlin.weight")]
    assert len(learned) > 4
    assert {row.action for row in learned} == {COPIED}


def test_both_readers_of_a_vision_transformers_image_take_more_channels() -> None:
    given_network = noise(network("vit"))
    given = PretrainedWeights(
        Path("vit.pth"), "test", canonical_weights(given_network.state_dict()), SourceGeometry(MILLIMETRE)
    )
    report, after = filled(given, TargetNetwork(network("vit", 3), MILLIMETRE, (32, 32, 32)))
    for name in ("backbone.patch_embed.proj.weight", "decoder.image.conv1.weight", "decoder.image.skip.weight"):
        (row,) = [row for row in report.rows if row.name == name]
        assert (row.action, row.note) == (ADAPTED, "image channels 1 -> 3, repeated and rescaled")
        torch.testing.assert_close(after[name].sum(1, keepdim=True), given.weights[name])


@pytest.mark.parametrize(("recorded", "note"), [((2, 3, 4), "positions 2x3x4 -> 4x3x4, interpolated"), ((), "shape")])
def test_positions_belong_to_the_recorded_grid_and_not_to_the_crop(recorded: tuple[int, ...], note: str) -> None:
    """Smaller crops may have been pretrained on."""
    weights = canonical_weights(noise(primus(shape=(8, 12, 16))).state_dict())
    given = PretrainedWeights(
        Path("primus.pth"), "test", weights, SourceGeometry(MILLIMETRE, None, (8, 8, 8)), position_grid=recorded
    )
    report, _ = filled(given, TargetNetwork(primus(shape=(16, 12, 16)), MILLIMETRE, (16, 12, 16)))
    (row,) = [row for row in report.rows if row.name.endswith("pos_embed")]
    assert row.note.startswith(note)


def test_heads_of_a_probe_read_the_encoder() -> None:
    plan = planned("plain", features_per_stage=ALIKE)
    whole = source(plan, outputs=2)
    kept = {name: tensor for name, tensor in whole.weights.items() if name.startswith("encoder.")}
    kept |= {
        f"decoder.seg_layers.{n}.{part}": torch.randn(2, *more)
        for n in range(3)
        for part, more in (("weight", (6, 1, 1, 1)), ("bias", ()))
    }
    given = replace(whole, weights=kept, outputs=("a", "b"))
    to = replace(target(plan, outputs=2), outputs=("a", "b"))
    report, _ = filled(given, to)
    assert {row.action for row in report.rows if ".seg_layers." in row.name} == {LEFT}


def test_heads_of_the_same_width_are_not_transferred_either() -> None:
    report, _ = filled(source(planned()), target(planned()))
    assert {row.action for row in report.rows if "seg_layers" in row.name} == {LEFT}


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_first_layer_answers_a_repeated_image_alike(kind: str) -> None:
    given, to = source(planned(kind)), target(planned(kind), channels=3)
    report, after = filled(given, to)
    (row,) = [row for row in report.rows if row.action == ADAPTED]
    assert row.note == "image channels 1 -> 3, repeated and rescaled"
    image = torch.randn(2, 1, 6, 6, 6)
    expected = F.conv3d(image, given.weights[row.name])
    torch.testing.assert_close(F.conv3d(image.expand(-1, 3, -1, -1, -1), after[row.name]), expected)


def test_anisotropic_and_back() -> None:
    there, back = planned("anisotropic"), planned("plain")
    given = source(back)
    to = target(there, spacing=(5.0, 1.0, 1.0))
    report, after = filled(given, to)
    name = "encoder.stages.0.0.convs.0.conv.weight"
    torch.testing.assert_close(after[name], given.weights[name].sum(2, keepdim=True))
    assert notes(report, "transpconvs.1.weight") == {"stride 2x2x2 -> 1x2x2"}
    # a stride changes no weight
    stage = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(after[stage], given.weights[stage])
    given = source(there, spacing=(5.0, 1.0, 1.0))
    _, after = filled(given, target(back))
    assert torch.equal(after[name], kernel(given.weights[name], (3, 3, 3)))


@pytest.mark.parametrize(("theirs", "ours"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_other_depths(kind: str, theirs: int, ours: int) -> None:
    given, to = source(planned(kind, stages=theirs)), target(planned(kind, stages=ours))
    report, after = filled(given, to)
    for row in report.rows:
        stage = re.match(r"encoder\.stages\.(\d)", row.name)
        if stage:
            assert row.action == (COPIED if int(stage[1]) < theirs else LEFT)
            if row.action == COPIED:
                assert torch.equal(after[row.name], given.weights[row.name])
    # decoders count from the coarsest stage: the finest of both is the last
    last, first = f"decoder.stages.{ours - 2}.", f"decoder.stages.{theirs - 2}."
    name = "convs.0.conv.weight"
    assert torch.equal(after[last + name], given.weights[first + name])


def test_stages_go_where_their_resolution_is() -> None:
    """Target of twice the voxel size: what saw 2 mm goes on seeing 2 mm."""
    given, to = (
        source(planned(features_per_stage=ALIKE)),
        target(planned(features_per_stage=ALIKE), spacing=(2.0, 2.0, 2.0)),
    )
    report, after = filled(given, to, alignment=PHYSICAL)
    layer = "encoder.stages.{}.0.convs.0.conv.weight"
    assert torch.equal(after[layer.format(1)], given.weights[layer.format(2)])
    assert notes(report, "encoder.stages.2.0.convs.0.conv.weight") == {"no stage of the source has this resolution"}
    # the layer that reads the image does so whatever its resolution
    assert torch.equal(after[layer.format(0)], given.weights[layer.format(0)])
    assert torch.equal(after["decoder.transpconvs.1.weight"], given.weights["decoder.transpconvs.0.weight"])
    assert "0 (2x2x2) from 1 (2x2x2), 1 (4x4x4) from 2 (4x4x4), 2 (8x8x8) from none" in str(report)
    assert "--align index" in str(report)
    for way in (AUTO, INDEX):  # one family: by number
        coarser = target(planned(features_per_stage=ALIKE), spacing=(2.0, 2.0, 2.0))
        report, after = filled(given, coarser, alignment=way)
        assert torch.equal(after[layer.format(2)], given.weights[layer.format(2)])
        assert "--align index" not in str(report)
        assert "--align resolution" in str(report)


def test_strides_of_four_skip_stages() -> None:
    """The target's second stage is the source's third; no layer of the source goes up by four."""
    to = target(planned(features_per_stage=[6, 6], stages=2, strides=[[1, 1, 1], [4, 4, 4]]))
    given = source(planned(features_per_stage=ALIKE))
    report, after = filled(given, to, alignment=PHYSICAL)
    layer = "encoder.stages.{}.0.convs.0.conv.weight"
    assert torch.equal(after[layer.format(1)], given.weights[layer.format(2)])
    reason = "the source's decoder does not lead from the one resolution to the other"
    assert notes(report, "transpconvs.0.weight") == {reason}


def test_unknown_spacing_matches_by_number_and_says_so() -> None:
    given = source(planned())
    unknown = PretrainedWeights(given.path, given.kind, given.weights, SourceGeometry(None, given.geometry.strides))
    report, _ = filled(unknown, target(planned(), spacing=(3.0, 3.0, 3.0)))
    assert "matched by their number, since the source's spacing or strides are not known" in str(report)
    assert report.filled_by(COPIED) > 0.9 * report.parameters


def test_more_and_fewer_blocks() -> None:
    deep, shallow = planned("residual", n_blocks_per_stage=[2, 3, 4]), planned("residual")
    given = source(deep)
    report, _ = filled(given, target(shallow))
    assert {row.action for row in report.rows if row.name.startswith("encoder")} == {COPIED}
    assert any("blocks.3" in name for name in report.unused)
    report, _ = filled(source(shallow), target(deep))
    assert notes(report, "encoder.stages.2.blocks.3.conv1.conv.weight") == {"stage 2 of the source has no such layer"}


def test_plain_into_residual_and_back() -> None:
    plain, residual = planned("plain", n_conv_per_stage=[2, 2, 2]), planned("residual", n_blocks_per_stage=[1, 1, 1])
    given = source(plain)
    _, after = filled(given, target(residual))
    pairs = {
        "encoder.stem.convs.0": "encoder.stages.0.0.convs.0",
        "encoder.stages.0.blocks.0.conv1": "encoder.stages.0.0.convs.1",
        "encoder.stages.1.blocks.0.conv1": "encoder.stages.1.0.convs.0",
        "encoder.stages.1.blocks.0.conv2": "encoder.stages.1.0.convs.1",
    }
    for ours, theirs in pairs.items():
        for tensor in ("conv.weight", "conv.bias", "norm.weight", "norm.bias"):
            assert torch.equal(after[f"{ours}.{tensor}"], given.weights[f"{theirs}.{tensor}"])
    given = source(residual)
    _, after = filled(given, target(plain))
    for theirs, ours in pairs.items():
        assert torch.equal(after[f"{ours}.conv.weight"], given.weights[f"{theirs}.conv.weight"])


def test_widths_only_when_asked() -> None:
    narrow, wide = planned(), planned(features_per_stage=[4, 10, 16])
    given = source(narrow)
    report, _ = filled(given, target(wide), allow_partial=True)
    assert "width 8x4 there, 10x4 here" in notes(report, "encoder.stages.1.0.convs.0.conv.weight")
    # what belongs to a layer that was left is left with it
    assert notes(report, "encoder.stages.1.0.convs.0.norm.weight") == {"its convolution was left"}
    report, after = filled(given, target(wide), overlap=True)
    name = "encoder.stages.1.0.convs.0.conv.weight"
    assert torch.equal(after[name][:8, :4], given.weights[name])
    concatenated = "decoder.stages.0.convs.0.conv.weight"  # 8 + 8 channels over 10 + 10
    assert torch.equal(after[concatenated][:8, 10:18], given.weights[concatenated][:, 8:])
    assert torch.equal(
        after["decoder.stages.1.convs.0.conv.weight"], given.weights["decoder.stages.1.convs.0.conv.weight"]
    )


def test_a_decoder_without_skips_is_left() -> None:
    """NoSkipResEncL: its decoder's convolutions see the up-sampled map alone."""
    given = source(planned("residual"))
    for name in ("decoder.stages.0.convs.0.conv.weight", "decoder.stages.1.convs.0.conv.weight"):
        given.weights[name] = given.weights[name].chunk(2, 1)[0].clone()
    for overlap in (False, True):
        report, _ = filled(given, target(planned("residual")), overlap=overlap)
        assert notes(report, "decoder.stages.0.convs.0.conv.weight") == {"the source's decoder sees no skips"}
        assert {row.action for row in report.rows if "transpconvs" in row.name} == {COPIED}


def test_what_the_pretraining_did_not_train_is_left() -> None:
    given = source(planned())
    decoder = frozenset(name for name in given.weights if name.startswith("decoder."))
    encoder_only = PretrainedWeights(given.path, given.kind, given.weights, given.geometry, decoder)
    report, _ = filled(encoder_only, target(planned()))
    assert {row.action for row in report.rows if row.name.startswith("decoder.")} == {LEFT}
    assert notes(report, "transpconvs.0.weight") == {"the pretraining did not train it"}


def test_nothing_that_fits_is_an_error_and_changes_nothing() -> None:
    to = target(planned(features_per_stage=[5, 7, 9]))
    before = deepcopy(to.network.state_dict())
    with pytest.raises(UserError, match=r"nothing of source\.pth \(test\) fits the target network: '.*': .*width"):
        transfer(source(planned()), to)
    assert changed(before, to.network.state_dict()) == dict.fromkeys(before, 0)


def test_nothing_that_fits_by_resolution_names_the_other_way() -> None:
    """A plain stem of another width, and stages so far apart in millimetres that none corresponds."""
    plan, wider = planned(features_per_stage=[6, 8, 8]), planned(features_per_stage=[4, 8, 8])
    by_number = (8 * 8 * 27 + 3 * 8) + (8 * 16 * 27 + 3 * 8) + (8 * 8 * 8 + 8)  # bottleneck, decoder's first stage
    with pytest.raises(UserError, match=f"{by_number:,} parameters would come from the source instead of 0: .*--align"):
        transfer(source(plan), target(wider, spacing=(64.0, 64.0, 64.0)), alignment=PHYSICAL)


def test_values_that_are_not_finite_are_left() -> None:
    given = source(planned())
    given.weights["encoder.stages.1.0.convs.0.conv.weight"][0, 0, 0, 0, 0] = torch.nan
    report, _ = filled(given, target(planned()))
    assert notes(report, "encoder.stages.1.0.convs.0.conv.weight") == {"the source's values are not finite"}


def test_running_statistics_travel_with_their_convolution() -> None:
    batch_norm = planned(norm_op="torch.nn.modules.batchnorm.BatchNorm3d")
    given = source(batch_norm)
    _, after = filled(given, target(batch_norm))
    name = "encoder.stages.1.0.convs.0.norm.running_var"
    assert torch.equal(after[name], given.weights[name])
    # into an instance norm only what it has
    report, _ = filled(given, target(planned()))
    assert name in report.unused


def transformer(shape: tuple[int, int, int] = (8, 8, 8), **changes: int) -> PretrainedWeights:
    network = noise(primus(shape=shape, **changes))
    return PretrainedWeights(
        Path("primus.pth"), "test", canonical_weights(network.state_dict()), SourceGeometry(None, None, shape)
    )


def test_primus_of_other_classes_channels_and_crop() -> None:
    given = transformer(outputs=3)
    to = TargetNetwork(primus(channels=4, outputs=5, shape=(12, 8, 16)), MILLIMETRE, (12, 8, 16))
    report, after = filled(given, to)
    stem = "down_projection.proj.weight"
    assert torch.equal(after[stem], input_channels(given.weights[stem], 4))
    table = given.weights["eva.pos_embed"].reshape(1, 2, 2, 2, -1).movedim(-1, 1)
    expected = F.interpolate(table, size=(3, 2, 4), mode="trilinear").movedim(1, -1).reshape(1, 24, -1)
    torch.testing.assert_close(after["eva.pos_embed"], expected)
    block = "eva.blocks.1.attn.q_proj.weight"
    assert torch.equal(after[block], given.weights[block])
    assert {row.action for row in report.rows if row.name.startswith("up_projection.")} == {LEFT}
    assert {row.action for row in report.rows if row.name.startswith("eva.blocks.")} == {COPIED}
    assert to.network(torch.randn(1, 4, 12, 8, 16)).shape == (1, 5, 12, 8, 16)


def test_primus_of_another_patch_size() -> None:
    """Twice the patch on twice the crop: a volume that is twice as large becomes the same tokens."""
    given = transformer(patch=4)
    to = TargetNetwork(primus(patch=8, shape=(16, 16, 16)), MILLIMETRE, (16, 16, 16))
    report, after = filled(given, to)
    assert notes(report, "down_projection.proj.weight") == {"patch 4x4x4 -> 8x8x8, resampled"}
    assert torch.equal(after["eva.pos_embed"], given.weights["eva.pos_embed"])
    patch = torch.randn(1, 1, 4, 4, 4)
    large = F.interpolate(patch, size=(8, 8, 8), mode="trilinear", align_corners=False)
    name = "down_projection.proj.weight"
    torch.testing.assert_close(F.conv3d(large, after[name]), F.conv3d(patch, given.weights[name]), rtol=1e-4, atol=1e-4)


def test_primus_and_a_u_net_have_nothing_in_common() -> None:
    with pytest.raises(UserError, match=r"nothing of primus\.pth"):
        transfer(transformer(), target(planned()))


def test_other_networks_go_by_name() -> None:
    """A network of a user's own, of neither family: tensors of the same name and shape."""
    torch.manual_seed(0)
    to = TargetNetwork(
        nn.Sequential(nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3), nn.Conv3d(4, 2, 1)), MILLIMETRE, (16, 16, 16)
    )
    weights = {name: torch.randn(tensor.shape) for name, tensor in to.tensors.items() if not name.startswith("2.")}
    weights["1.weight"] = torch.randn(5, 4, 3, 3, 3)
    report, after = filled(PretrainedWeights(Path("own.pth"), "test", weights), to)
    assert torch.equal(after["0.weight"], weights["0.weight"])
    assert notes(report, "1.weight") == {"shape (5, 4, 3, 3, 3) there, (4, 4, 3, 3, 3) here"}
    assert notes(report, "2.weight") == {"the source has no tensor of this name"}


def test_initial_lengths_keep_the_function_and_are_reported() -> None:
    """A long pretraining made the weights three times as long: both files compute the same, one at initial lengths."""
    given = source(planned("residual"))
    for name, tensor in given.weights.items():
        if name.endswith("conv.weight"):
            tensor.mul_(3)
    kept, scaled = target(planned("residual")), target(planned("residual"))
    initial = convolution_lengths(scaled.network)
    assert transfer(given, kept).lengths == {}
    report = transfer(given, scaled, initial_lengths=True)
    assert convolution_lengths(scaled.network) == pytest.approx(initial, rel=1e-5)
    assert set(report.lengths) == set(initial)
    for name, factor in report.lengths.items():
        torch.testing.assert_close(scaled.tensors[name], factor * kept.tensors[name])
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(scaled.network(image), kept.network(image), rtol=3e-3, atol=3e-3)
    assert f"scaled to initial length: {len(initial)} convolutions" in str(report)
    assert report.as_dict()["lengths"] == report.lengths
