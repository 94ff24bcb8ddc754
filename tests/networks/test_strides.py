from nnssl_ext.networks.architectures.pct_net import PCTNet
from nnssl_ext.networks.architectures.vit import ViTUNETR
from nnssl_ext.networks.strides import halving_strides


def test_a_thick_axis_waits_until_the_others_have_caught_up() -> None:
    assert halving_strides((1, 1, 1), 2) == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]
    assert halving_strides((5, 1, 1), 4) == [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    assert halving_strides((1, 1, 3), 2) == [[1, 1, 1], [2, 2, 1], [2, 2, 2]]


def test_networks_choose_strides_for_a_spacing() -> None:
    assert [PCTNet.strides_for((thick, 1, 1))[1:3] for thick in (1.5, 3, 6)] == [
        [[2, 2, 2], [2, 2, 2]],
        [[1, 2, 2], [2, 2, 2]],
        [[1, 2, 2], [1, 2, 2]],
    ]
    assert ViTUNETR.strides_for((0.7, 0.7, 0.7)) == [[1, 1, 1], *[[2, 2, 2]] * 4]
