import numpy as np
import pytest
import torch

from nnssl_ext.views.random import VIEWS, BatchRandom, sample_generator, step_seed, to_device

CPU = torch.device("cpu")


def draws(indices: list[int]) -> list[torch.Tensor]:
    random = BatchRandom(3, VIEWS, indices, CPU)
    parts = [random.uniform(-1, 2, (4,)), random.integers(1, 5).float()[:, None]]
    noise = torch.stack([random.normal(i, (2, 3)) for i in range(len(indices))])
    return [*parts, noise.flatten(1)]


def test_a_sample_draws_the_same_in_any_batch() -> None:
    together = torch.cat(draws([7, 8, 9]), 1)
    alone = torch.cat([torch.cat(draws([index]), 1) for index in (7, 8, 9)])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])


def test_limits() -> None:
    random = BatchRandom(0, VIEWS, list(range(200)), CPU)
    integers = random.integers(2, 4)
    assert set(integers.tolist()) == {2, 3, 4}
    uniform = random.uniform(0.5, 0.75, (3,))
    assert 0.5 <= uniform.min() < 0.55
    assert 0.70 < uniform.max() < 0.75
    assert not random.chance(0.0, (9,)).any()
    assert random.chance(1.0, (9,)).all()


class Last:
    """A generator at the end of its range."""

    def random(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.full(shape, 1 - 2.0**-53)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 2.0), (0.5, 0.5), (-180.0, 180.0)])
def test_the_end_is_never_drawn(low: float, high: float) -> None:
    """In float32 the last numbers below 1 would be 1, and a place in a room of n voxels would be its n-th."""
    random = BatchRandom(0, VIEWS, [0], CPU)
    random._generators = [Last()]  # type: ignore[list-item]
    found = random.uniform(low, high, (2,))
    assert (found < high).all() or low == high
    assert torch.allclose(found, torch.tensor(high))


def test_streams_seeds_and_steps_differ() -> None:
    values = {float(sample_generator(*key).random()) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(values) == 4
    assert step_seed(0, 1) == step_seed(0, 1) != step_seed(0, 2)
    assert len({step_seed(0, 1, rank) for rank in range(4)}) == 4
    assert step_seed(0, 1, 0) == step_seed(0, 1)


def test_only_a_copy_to_cuda_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **options: options)
    assert to_device(torch.zeros(3), torch.device("mps")) == {"non_blocking": False}
