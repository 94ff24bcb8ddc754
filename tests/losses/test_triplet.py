import pytest
import torch

from nnssl_ext.losses.triplet import plain_triplet, semi_hard_triplet, squared_distances


def test_distances() -> None:
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    torch.testing.assert_close(squared_distances(a, b), torch.cdist(a, b) ** 2, atol=1e-4, rtol=1e-4)


def on_a_line(*places: float) -> torch.Tensor:
    return torch.tensor(places)[:, None]


def test_the_nearest_negative_beyond_the_positive_is_taken() -> None:
    candidates = on_a_line(0.5, 2.0, 1.5, 3.0)
    allowed = torch.ones(1, 4, dtype=torch.bool)
    loss = semi_hard_triplet(on_a_line(0.0), on_a_line(1.0), candidates, allowed, 2.0)
    assert loss.item() == pytest.approx(1 - 1.5**2 + 2)
    allowed[0, 2] = False  # the same case as the anchor: no negative
    loss = semi_hard_triplet(on_a_line(0.0), on_a_line(1.0), candidates, allowed, 4.0)
    assert loss.item() == pytest.approx(1 - 2**2 + 4)


def test_where_all_are_nearer_the_farthest_is_taken() -> None:
    allowed = torch.ones(1, 2, dtype=torch.bool)
    loss = semi_hard_triplet(on_a_line(0.0), on_a_line(1.0), on_a_line(0.2, 0.5), allowed, 1.0)
    assert loss.item() == pytest.approx(1 - 0.25 + 1)


def test_with_one_negative_it_is_the_plain_triplet_loss() -> None:
    a, p, n = torch.randn(3, 1, 4).unbind(0)
    semi_hard = semi_hard_triplet(a, p, n, torch.ones(1, 1, dtype=torch.bool), 1.0)
    torch.testing.assert_close(semi_hard, plain_triplet(a, p, n, 1.0))


def test_distances_of_near_vectors_are_exact_under_autocast() -> None:
    base = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(0)), dim=0)
    near = torch.nn.functional.normalize(base + 1e-3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(1)))
    exact = squared_distances(base[None], near)
    with torch.autocast("cpu", torch.bfloat16):
        found = squared_distances(base[None], near)
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-6)
    assert exact.max() < 1e-2  # bfloat16 would round the products by as much
