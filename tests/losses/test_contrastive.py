import math

import pytest
import torch
import torch.nn.functional as F

from nnssl_ext.losses.contrastive import hits, info_nce, paired_bce, similarities, within_sample
from nnssl_ext.losses.gather import gather_samples


def test_info_nce_is_cross_entropy_over_all_candidates_and_log_k_at_chance() -> None:
    torch.manual_seed(0)
    predictions, candidates, right = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2])
    loss = info_nce(predictions, candidates, right, 0.5)
    for row in range(3):
        cosines = torch.stack([F.cosine_similarity(predictions[row], c, dim=0) for c in candidates]) / 0.5
        assert loss[row].item() == pytest.approx((cosines.logsumexp(0) - cosines[right[row]]).item(), abs=1e-5)
    assert info_nce(predictions, torch.ones(5, 4), right, 0.5)[0].item() == pytest.approx(math.log(5))


def test_paired_bce_takes_one_wrong_candidate_never_the_right_one() -> None:
    predictions, right = torch.ones(50, 1), torch.full((50,), 2)
    candidates = torch.tensor([[-9.0], [-9.0], [9.0], [-9.0]])
    draws = torch.linspace(0, 0.999, 50)
    assert paired_bce(predictions, candidates, right, draws).max() < 1e-3
    wrong_way = paired_bce(predictions, -candidates, right, draws)
    assert wrong_way.min() > 8
    assert paired_bce(0 * predictions, candidates, right, draws)[0].item() == pytest.approx(math.log(2))
    two = paired_bce(torch.ones(1, 1), torch.tensor([[9.0], [-9.0]]), torch.tensor([0]), torch.tensor([0.7]))
    assert two.item() < 1e-3


def test_paired_bce_takes_every_candidate_but_excluded_ones_equally_often() -> None:
    candidates = torch.eye(6, requires_grad=True)
    excluded = torch.zeros(600, 6, dtype=torch.bool)
    excluded[:, [0, 3]] = True
    draws, right = torch.linspace(0, 1 - 2**-24, 600), torch.full((600,), 1)
    loss = paired_bce(torch.ones(600, 6), candidates, right, draws, excluded)
    (gradient,) = torch.autograd.grad(loss.sum(), candidates)
    often = gradient.sum(1) / gradient.sum(1)[2]
    assert often[[0, 3]].tolist() == [0, 0]
    assert often[[2, 4, 5]].tolist() == pytest.approx([1, 1, 1], abs=0.02)


def test_hits_share_what_is_equal() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    assert hits(scores, torch.tensor([1, 0, 2])).tolist() == pytest.approx([1, 1 / 3, 1 / 2])
    assert hits(scores, torch.tensor([0, 0, 0])).tolist() == pytest.approx([0, 1 / 3, 0])


def test_candidates_of_other_samples_can_be_left_out() -> None:
    scores = torch.tensor([[1.0, 0.0, 9.0, 9.0]])
    assert hits(within_sample(scores, torch.tensor([0]), torch.tensor([0, 0, 1, 1])), torch.tensor([0])) == 1


def test_in_one_process_samples_are_gathered_in_their_order() -> None:
    rows, place = gather_samples(torch.tensor([[5.0], [3.0], [4.0]]), 3)
    assert rows.flatten().tolist() == [5, 3, 4]
    assert place.tolist() == [0, 1, 2]


def test_cosines() -> None:
    assert similarities(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])).tolist() == [[1.0, 0.0]]


def test_cosines_are_exact_under_autocast() -> None:
    predictions = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    candidates = predictions + 0.01 * torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = similarities(predictions, candidates)
    torch.testing.assert_close(found, similarities(predictions, candidates), rtol=1e-5, atol=1e-6)
