"""A run without enough memory ends with one line; what it wrote before stays."""

import re
from collections.abc import Callable

import pytest
import torch

from nnssl_ext import checkpoint
from nnssl_ext.training.memory import out_of_memory
from tests.conftest import Environment
from tests.support.runs import TRAINER, kill_at, pretrain, trainer_for

Data = Callable[[str], Environment]
ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError(),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "workspace": RuntimeError("GET was unable to find an engine to execute this computation"),
}


@pytest.mark.parametrize("where", ERRORS)
def test_one_line_and_intact_checkpoints(with_data: Data, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"epochs": 3})
    monkeypatch.setattr(out_of_memory, "_free_memory", lambda: 2**20)
    kill_at(4, monkeypatch, ERRORS[where])  # in the second epoch of three steps
    with pytest.raises(SystemExit) as stopped:
        pretrain(environment, "plain", "quick")
    line = str(stopped.value.code)
    assert line.startswith("nnssl_ext: error: out of memory (")
    assert "\n" not in line
    for part in (
        "after step 4",
        "a batch of 2 crops of 16x16x16 does not fit this machine",
        "needs an estimated 2.0 GiB on a GPU",
        "nnssl_ext.batch_size (now 2)",
        "nnssl_ext.crop_size",
        "nnssl_ext.activation_checkpointing=true",
    ):
        assert part in line, line
    fold = environment.fold("plain", "quick", TRAINER)
    assert checkpoint.load(fold / "checkpoint_latest.pth")["nnssl_ext"]["counters"]["step"] == 3


def test_the_batch_that_should_fit_is_named(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {"batch_size": 5000, "activation_checkpointing": True})
    monkeypatch.setattr(out_of_memory, "device_memory", lambda device: 4 * 2**30)
    trainer = trainer_for("plain", "quick")
    line = trainer.out_of_memory_advice()
    assert "this machine (4.0 GiB)" in line
    assert "(now 5000, an estimated " in line
    assert "activation_checkpointing" not in line


def test_where_the_memory_of_the_machine_is_unknown(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows does not tell it."""
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    monkeypatch.delattr(out_of_memory.os, "sysconf")
    assert "does not fit this machine, which needs" in trainer_for("plain", "quick").out_of_memory_advice()


def test_other_errors_stay_what_they_are(with_data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    kill_at(0, monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        pretrain(environment, "plain", "quick")
    kill_at(0, monkeypatch, ERRORS["workspace"])  # an old driver says so where memory is left
    with pytest.raises(RuntimeError, match="unable to find an engine"):
        pretrain(environment, "plain", "quick")


def test_smaller_crops_that_a_method_chose_are_kept(with_data: Data) -> None:
    """A batch alone would return to the plans' larger crops."""
    environment = with_data("plain")
    environment.write_plans(
        "plain", "quick", {}, lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[48, 48, 48])
    )
    line = trainer_for("plain", "quick", "nnsslTrainer_3DINO").out_of_memory_advice()
    assert re.search(r"Use nnssl_ext.crop_size=\[\d+,\d+,\d+\] with a smaller nnssl_ext.batch_size", line), line
