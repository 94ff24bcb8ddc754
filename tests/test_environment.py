import os
import platform
import subprocess
import sys
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("device", "variables", "kept"),
    [("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_TRIM_THRESHOLD_": "131072"}, False)],
)
def test_freed_memory_is_kept_on_the_cpu(device: str, variables: dict[str, str], kept: bool) -> None:
    """Page faults of filling three arrays of 12 MB at a time again and again."""
    program = f"""
import resource, torch
from nnssl_ext.environment import keep_freed_memory
keep_freed_memory({device!r})
def fill():
    for _ in range(10):
        arrays = [torch.zeros(3 << 20) for _ in range(3)]
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    faults = int(done.stdout)
    assert faults < 1000 if kept else faults > 10 * 9 * 256
