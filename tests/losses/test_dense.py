from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from nnunetv2.training.loss.dice import SoftDiceLoss

from nnssl_ext.losses import dense, fused
from nnssl_ext.losses.dense import IGNORE, deep_supervision_weights, downsample_labels, hard_dice

Example = tuple[torch.Tensor, torch.Tensor]
Losses = Callable[[torch.Tensor, torch.Tensor], Example]


@pytest.fixture(params=[dense.dice_cross_entropy, fused.dice_cross_entropy], ids=["definition", "fused"])
def dice_cross_entropy(request: pytest.FixtureRequest) -> Losses:
    losses: Losses = request.param
    return losses


@pytest.fixture
def example() -> Example:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 5, 7), torch.randint(0, 4, (2, 6, 5, 7), dtype=torch.uint8)


def test_equals_torch_and_nnunet(example: Example, dice_cross_entropy: Losses) -> None:
    logits, target = example
    dice, entropy = dice_cross_entropy(logits, target)
    peer = SoftDiceLoss(apply_nonlin=lambda x: x.softmax(1), batch_dice=False, do_bg=True, smooth=1e-5)
    for sample in range(2):
        one = slice(sample, sample + 1)
        assert entropy[sample] == pytest.approx(F.cross_entropy(logits[one], target[one].long()).item(), rel=1e-5)
        assert dice[sample] - 1 == pytest.approx(peer(logits[one], target[one][:, None]).item(), rel=1e-4)


def by_autograd(logits: torch.Tensor, target: torch.Tensor) -> Example:
    """The same losses as they are usually written."""
    counted = (target != IGNORE).double()
    truth = F.one_hot(torch.where(target == IGNORE, 0, target).long(), logits.shape[1]).movedim(-1, 1).double()
    truth, space = truth * counted[:, None], (2, 3, 4)
    probability = logits.double().softmax(1) * counted[:, None]
    dice = (2 * (probability * truth).sum(space) + 1e-5) / (probability.sum(space) + truth.sum(space) + 1e-5)
    entropy = -(logits.double().log_softmax(1) * truth).sum((1, *space)) / counted.sum((1, 2, 3))
    return 1 - dice.mean(1), entropy


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
@pytest.mark.parametrize("classes", [2, 5])
def test_gradients_are_autograds(weights: tuple[float, float], classes: int, dice_cross_entropy: Losses) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(2, classes, 6, 5, 7)
    target = torch.randint(0, 4 if classes == 5 else 2, (2, 6, 5, 7), dtype=torch.uint8)  # one class is absent
    target[0, 1:3] = IGNORE
    gradients = []
    for losses in (dice_cross_entropy, by_autograd):
        leaf = logits.clone().requires_grad_()
        dice, entropy = losses(leaf, target)
        (torch.tensor([1.0, 2.0]) * (weights[0] * dice + weights[1] * entropy)).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_under_autocast_sums_are_not_in_bfloat16(example: Example, dice_cross_entropy: Losses) -> None:
    logits, target = example[0].bfloat16(), example[1]
    with torch.autocast("cpu", torch.bfloat16):
        dice, entropy = dice_cross_entropy(logits.requires_grad_(), target)
    expected = dice_cross_entropy(logits.detach().float(), target)
    assert dice.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close((dice, entropy), expected)
    (dice + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_ignored_voxels_count_for_nothing(example: Example, dice_cross_entropy: Losses) -> None:
    logits, target = example
    target[:, 2:] = IGNORE
    whole = dice_cross_entropy(logits, target)
    part = dice_cross_entropy(logits[:, :, :2], target[:, :2])
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a, b)


def test_all_ignored_gives_zero_and_no_gradient(example: Example, dice_cross_entropy: Losses) -> None:
    logits, target = example
    logits.requires_grad_()
    dice, entropy = dice_cross_entropy(logits, torch.full_like(target, IGNORE))
    (dice + entropy).sum().backward()
    assert dice.tolist() == entropy.tolist() == [0, 0]
    assert logits.grad is not None
    assert not logits.grad.any()


def test_values_are_per_sample(example: Example, dice_cross_entropy: Losses) -> None:
    logits, target = example
    both = dice_cross_entropy(logits, target)
    for sample in range(2):
        one = slice(sample, sample + 1)
        for a, b in zip(both, dice_cross_entropy(logits[one], target[one]), strict=True):
            torch.testing.assert_close(a[one], b)


def test_hard_dice_is_one_for_the_truth_and_zero_for_its_opposite() -> None:
    target = torch.tensor([[[[0, 1, 1, IGNORE]]]], dtype=torch.uint8)
    right = F.one_hot(torch.tensor([[[[0, 1, 1, 0]]]]), 2).permute(0, 4, 1, 2, 3).float()
    assert hard_dice(right, target).item() == 1
    assert hard_dice(right.flip(1), target).item() == 0


def test_hard_dice_leaves_out_a_sample_without_any_class() -> None:
    """Nothing counts, or all background is right. One wrong voxel counts."""
    target = torch.zeros(3, 1, 1, 4, dtype=torch.uint8)
    target[1] = IGNORE
    prediction = torch.zeros(3, 1, 1, 4, dtype=torch.int64)
    prediction[1:, ..., 0] = 1
    found = hard_dice(F.one_hot(prediction, 2).permute(0, 4, 1, 2, 3).float(), target)
    assert found.isnan().tolist() == [True, True, False]
    assert found[2] == 0


def test_labels_are_halved_without_new_values() -> None:
    target = torch.randint(0, 5, (1, 8, 8, 8), dtype=torch.uint8)
    target[0, :4] = IGNORE
    small = downsample_labels(target, (4, 4, 8))
    assert small.shape == (1, 4, 4, 8)
    assert (small[0, :2] == IGNORE).all()
    assert torch.equal(small[0, 2:], target[0, 5::2, 1::2])


def test_coarsest_output_has_no_weight() -> None:
    assert deep_supervision_weights(1) == [1]
    weights = deep_supervision_weights(4)
    assert weights[-1] == 0
    assert sum(weights) == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(2)
