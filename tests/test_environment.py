from collections.abc import Callable, Iterator

import pytest
import torch

from nnssl_ext.methods import METHODS
from tests.conftest import Environment
from tests.training.test_trainer import trainer_for

Data = Callable[[str], Environment]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """As after stock nnUNetv2_train, which gives torch every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("trainer", [METHODS["volume_fusion"].trainer, "nnsslTrainer_Finetune"])
@pytest.mark.parametrize(("wanted", "threads"), [("2", 2), ("1,4", 1), ("", 3), ("none", 3), ("0", 3)])
def test_threads_of_our_trainers(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, trainer: str, wanted: str, threads: int
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    trainer_for("plain", "quick", trainer)
    assert torch.get_num_threads() == threads
