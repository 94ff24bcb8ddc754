from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnssl_ext.networks.architectures.pct_net import STRIDES, PCTNet, published_name
from nnssl_ext.networks.architectures.window_attention import relative_positions
from tests.support.layouts import SMALL, Shape, published_layout

PUBLISHED = (24, 48, 128, 256, 512)


def waves(layout: dict[str, Shape], window: int) -> dict[str, Tensor]:
    """Values that need no random generator: about one for norms, of deviation 1 / sqrt(inputs) elsewhere."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(layout.items())):
        if name.endswith("index"):
            weights[name] = relative_positions(window)
        elif name.endswith("tracked"):
            weights[name] = torch.tensor(1)
        else:
            count = torch.arange(int(torch.tensor(shape).prod()), dtype=torch.float64)
            wave = torch.sin(number + 0.7 * count * count).float().view(shape)
            one = name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1)
            inputs = wave[0].numel() if len(shape) > 1 else 25
            weights[name] = 1 + 0.3 * wave if one else wave * (2 / inputs) ** 0.5
    return weights


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {published_name(name): tensor for name, tensor in weights.items()}


def small(mode: int, *, mask_padding: bool = False) -> PCTNet:
    return PCTNet(
        input_channels=1,
        num_classes=2,
        strides=STRIDES[mode],
        features_per_stage=SMALL,
        heads=[2, 2, 4],
        window=2,
        mask_padding=mask_padding,
    )


def test_a_file_with_the_published_layout_loads_strictly(tmp_path: Path) -> None:
    """MIS-FM's pretrained network: 1 channel, 4 + 1 fusion levels."""
    layout = published_layout(1, 5, PUBLISHED, (4, 8, 16), 6)
    weights = {
        name: torch.zeros(shape, dtype=torch.long if "index" in name else None) for name, shape in layout.items()
    }
    torch.save({"model_state_dict": weights}, tmp_path / "pctnet.pt")
    content = torch.load(tmp_path / "pctnet.pt", weights_only=True)["model_state_dict"]
    with torch.device("meta"):
        network = PCTNet(input_channels=1, num_classes=5, strides=STRIDES[1])
    network.load_state_dict(renamed(content), strict=True, assign=True)
    new = [name for name in network.state_dict() if name not in layout]
    assert len(new) == 2 * 8  # weight and bias of two heads per resolution mode and two of the pyramid
    assert all(".seg_layers." in name for name in new)


def test_parameters_as_published() -> None:
    """45.29 M in the paper: 24 to 512 channels, all resolution modes counted."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in PCTNet(input_channels=1, num_classes=classes).parameters()) for classes in (2, 5)
        ]
    assert counts == [45_287_730, 45_289_554]


#: Four values and the standard deviation of each output of the published network (openmedlab/MIS-FM at 1506d65,
#: Apache-2.0), with the weights of ``waves`` and an image of sin(0.37 n): PCTNet(dict(in_chns=1, class_num=2,
#: input_size=SIZE, feature_chns=SMALL, dropout=[0, 0, .2, .2, .2], resolution_mode=MODE, multiscale_pred=True,
#: num_heads=[2, 2, 4], window_sizes=[2, 2, 2])).eval().
RECORDED = {
    0: [
        [-0.022973, 0.205374, 0.0074, -0.335234, 0.272892],
        [0.576872, -0.05033, -0.107244, 0.763611, 1.521945],
        [0.607621, -1.071911, -0.137158, -0.190739, 1.552673],
        [1.611497, -0.082759, 0.33264, 7.131485, 4.625936],
    ],
    1: [
        [1.797064, 1.726825, -1.083019, -1.157834, 0.854558],
        [-0.292919, -0.499531, 0.263067, 0.487777, 0.463658],
        [2.435009, -0.881542, -1.183, -0.402993, 1.650118],
        [1.139221, -0.183334, 0.388002, 9.125598, 4.866071],
    ],
    2: [
        [0.167596, 0.128885, 0.032309, 0.087754, 0.559168],
        [-0.035262, 0.088079, -0.519155, -0.590774, 1.359018],
        [-0.899722, -2.731629, 0.29433, 1.000498, 2.140551],
        [0.643141, 1.656841, 0.103983, 9.26722, 5.909916],
    ],
}


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_outputs_as_published(mode: int) -> None:
    size = [(48, 48, 48), (24, 48, 48), (12, 48, 48)][mode]
    network = small(mode).eval()
    network.load_state_dict(renamed(waves(published_layout(1, 2, SMALL, (2, 2, 4), 2), 2)))
    count = torch.arange(size[0] * size[1] * size[2], dtype=torch.float64)
    with torch.no_grad():
        outputs = network(torch.sin(0.37 * count).float().view(1, 1, *size))
    for output, expected in zip(outputs, RECORDED[mode], strict=True):
        found = [*output.flatten()[:: output.numel() // 4][:4].tolist(), output.std().item()]
        assert found == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_any_legal_patch(mode: int, mask_padding: bool) -> None:
    network = small(mode, mask_padding=mask_padding)
    for size in [(16, 16, 32), (16, 48, 32), (32, 16, 80)]:
        outputs = network(torch.randn(2, 1, *size))
        assert tuple(outputs[0].shape) == (2, 2, *size)
        assert all(torch.isfinite(output).all() for output in outputs)


def test_files_fit_every_patch_and_every_mode() -> None:
    assert small(0).state_dict().keys() == small(2).state_dict().keys()
    small(2).load_state_dict(small(0).state_dict(), strict=True)


def test_what_fits_no_network_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected PCTNet strides \[\[1, 1, 1\], \[2, 2, 2\].* got \[\[1, 1, 1\]\]"):
        PCTNet(input_channels=1, num_classes=2, strides=[[1, 1, 1]])
    with pytest.raises(ValueError, match="multiples of its heads"):
        PCTNet(input_channels=1, num_classes=2, features_per_stage=[4, 4, 6, 8, 16])
