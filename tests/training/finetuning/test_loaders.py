"""Batches are functions of their numbers, whatever a clock says."""

import multiprocessing
from collections.abc import Callable
from itertools import count

import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnssl_ext.training.finetuning.loaders import never_by_time
from tests.conftest import Environment
from tests.support.runs import TRAINER, trainer_for

Data = Callable[[str], Environment]


def blurred(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], by_time: bool) -> torch.Tensor:
    """nnU-Net's blur where direct convolutions take ``seconds[0]`` and those by FFT ``seconds[1]``."""
    transform = GaussianBlurTransform((0.7, 0.7), False, False, 1.0, benchmark=True)
    pipeline = ComposeTransforms([RandomTransform(transform, apply_probability=1.0)])
    if not by_time:
        never_by_time(pipeline)
    now, calls = 0.0, count()

    def clock() -> float:
        nonlocal now
        call = next(calls) % (4 * transform.benchmark_num_runs)
        now += (call % 2) * seconds[call >= 2 * transform.benchmark_num_runs]
        return now

    monkeypatch.setattr(gaussian_blur, "time", clock)
    torch.manual_seed(0)
    return pipeline(image=torch.randn(1, 12, 12, 12))["image"]


@pytest.mark.parametrize("by_time", [True, False])
def test_blur_does_not_depend_on_the_machines_speed(monkeypatch: pytest.MonkeyPatch, by_time: bool) -> None:
    one, other = (blurred(monkeypatch, seconds, by_time) for seconds in ((1.0, 2.0), (2.0, 1.0)))
    torch.testing.assert_close(one, other)
    # nnU-Net's own differs in the last bits
    assert torch.equal(one, other) != by_time


def test_the_fine_tuner_times_nothing(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("labelled")
    environment.write_plans("labelled", "quick", {"finetune": {"steps": 12, "steps_per_epoch": 12}})
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = trainer_for("labelled", "quick", "nnsslTrainer_Finetune")
    trainer.initialize()
    blurs = []
    original = gaussian_blur.blur_dimension

    def blur(image: torch.Tensor, sigma: float, axis: int, force_use_fft: bool | None = None) -> torch.Tensor:
        blurs.append(force_use_fft)
        return original(image, sigma, axis, force_use_fft)

    monkeypatch.setattr(gaussian_blur, "blur_dimension", blur)
    training, _ = trainer.get_dataloaders()
    for _ in range(12):
        next(training)
    assert blurs
    assert set(blurs) == {None}


@pytest.mark.parametrize(("kind", "name"), [("labelled", "nnsslTrainer_Finetune"), ("plain", TRAINER)])
def test_a_validation_starts_no_process_that_imports_torch(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    """Where processes are not forked (Windows, macOS), each validation would start new ones."""
    with_data(kind).write_plans(kind, "quick", {})
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = trainer_for(kind, "quick", name)
    trainer.initialize()
    for method, workers in (("fork", 1), ("spawn", 0)):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        assert trainer.get_dataloaders()[1].workers == workers  # type: ignore[attr-defined]
