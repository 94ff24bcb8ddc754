import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nnssl_ext.environment import check_device, cores, program
from nnssl_ext.errors import UserError
from nnssl_ext.external_trainers import trainer_folders
from nnssl_ext.host_memory import HUGE_PAGES, KEPT_MEMORY, keep_memory
from nnssl_ext.methods import TRAINERS
from nnssl_ext.resources import resource_folder
from tests.conftest import Environment
from tests.support.runs import trainer_for

Data = Callable[[str], Environment]


@pytest.fixture
def three_threads() -> Iterator[None]:
    """As after stock nnUNetv2_train, which gives torch every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("trainer", [TRAINERS["volume_fusion"], "nnsslTrainer_Finetune"])
@pytest.mark.parametrize(("wanted", "threads"), [("2", 2), ("1,4", 1), ("", 3), ("none", 3), ("0", 3)])
def test_threads_of_our_trainers(
    with_data: Data, monkeypatch: pytest.MonkeyPatch, trainer: str, wanted: str, threads: int
) -> None:
    environment = with_data("plain")
    environment.write_plans("plain", "quick", {})
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    trainer_for("plain", "quick", trainer)
    assert torch.get_num_threads() == threads


def huge_pages() -> bool:
    """Whether the system gives them to who asks."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.is_file() and "[never]" not in setting.read_text()


@pytest.mark.skipif(not huge_pages(), reason="no huge pages here")
@pytest.mark.parametrize(("device", "value", "asked"), [("cpu", "", True), ("cuda", "", False), ("cpu", "0", False)])
def test_huge_pages_on_the_cpu(device: str, value: str, asked: bool) -> None:
    """Page faults of a new array of 64 MiB: 16,384 pages of 4 KiB, or some of 2 MiB and what was not to be had."""
    program = f"""
import resource, torch
from nnssl_ext.host_memory import keep_memory
keep_memory({device!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: text for name, text in os.environ.items() if name != HUGE_PAGES}
    environment |= {HUGE_PAGES: value} if value else {}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 8000) == asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other memory than glibc's")
@pytest.mark.parametrize(
    ("device", "set_before", "kept"),
    [("cpu", {}, True), ("cuda", {}, False), ("cpu", {"MALLOC_MMAP_THRESHOLD_": "1048576"}, False)],
)
def test_memory_is_kept_on_the_cpu(device: str, set_before: dict[str, str], kept: bool) -> None:
    """Page faults of an array of 64 MiB after one of 80 MiB, here and in a process that is started."""
    again = """
import resource, sys
b"x" * (80 * len(sys.argv) << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
b"x" * (64 * len(sys.argv) << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    program = f"""
import subprocess, sys
from nnssl_ext.host_memory import keep_memory
keep_memory({device!r})
exec({again!r})
print(subprocess.run([sys.executable, "-c", {again!r}], capture_output=True, text=True, check=True).stdout)
"""
    environment = {name: text for name, text in os.environ.items() if name not in (*KEPT_MEMORY, "GLIBC_TUNABLES")}
    environment |= {HUGE_PAGES: "0"} | set_before
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    here, there = map(int, done.stdout.split())
    assert (here < 1000) == (there < 1000) == kept


@pytest.mark.parametrize(("accepted", "kept"), [(2**31, 2**31 - 1), (32 << 20, 32 << 20), (0, None)])
def test_what_this_glibc_refuses_is_not_asked_of_others(
    monkeypatch: pytest.MonkeyPatch, accepted: int, kept: int | None
) -> None:
    """Before 2.35, glibc keeps at most 32 MiB; the limit for trimming alone would make it slower."""
    asked: list[tuple[int, int]] = []

    class Library:
        @staticmethod
        def mallopt(parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return int(parameter != -3 or value <= accepted)

    for name in (*KEPT_MEMORY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nnssl_ext.host_memory.sys.platform", "linux")
    monkeypatch.setattr("nnssl_ext.host_memory.ctypes.CDLL", lambda _: Library)
    keep_memory("cpu")
    values = {os.environ.get(name) for name in KEPT_MEMORY}
    assert values == {None if kept is None else str(kept)}
    assert ((-1, kept) in asked) == (kept is not None)
    for name in KEPT_MEMORY:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_cores_are_those_that_this_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cores() == len(before)


def test_our_trainers_are_named_once_and_after_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = str(resource_folder("trainers"))
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    assert trainer_folders() == ours
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path}{os.pathsep}")
    assert trainer_folders() == f"{tmp_path}{os.pathsep}{ours}"
    monkeypatch.setenv("nnUNet_extTrainer", trainer_folders())
    assert trainer_folders() == f"{tmp_path}{os.pathsep}{ours}"


def test_commands_are_found_in_an_environment_that_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert Path(program("nnUNetv2_train")).is_file()
    with pytest.raises(UserError, match="command nnUNetv3_train was not found beside .* Install nnunetv2 there"):
        program("nnUNetv3_train")


def test_mps_of_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.8.0"))
    with pytest.raises(UserError, match="MPS needs torch 2.10 .* this is 2.8.0. Use -device cpu"):
        check_device("mps", resamples=True)
    check_device("mps")  # fine-tuning resamples nothing on it
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.10.1"))
    check_device("mps", resamples=True)
