"""Fixtures: an nnU-Net environment of its own for every test that asks for one."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.datasets import QUICK, dataset_name, make_dataset, make_labelled
from tests.images import make_images

REPOSITORY = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# hundreds of commands start below: without byte code each compiles the whole package again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# a shell that starts the tests in the background may ignore these, and children inherit that
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and threading.current_thread() is threading.main_thread():
        signal.signal(getattr(signal, _name), _handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that go through an nnU-Net environment, and start the longest first.

    ``make test-fast`` leaves the marked ones out. A long test that starts last keeps all other processes waiting.
    """
    for item in items:
        if "environment" in getattr(item, "fixturenames", ()):
            item.add_marker("integration")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Keep what imports have made out of garbage collection: each training collects once, a quarter of a second."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """``nnssl_ext train`` leaves its words for nnU-Net in ``sys.argv``."""
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(autouse=True)
def _no_progress_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an empty progress.png, since drawing takes half of a short run. The marker ``draws`` draws it."""
    if request.node.get_closest_marker("draws") is None:
        for logger in (
            "nnunetv2.training.logging.nnunet_logger.LocalLogger",
            "nnssl_ext.training.pretraining.log.PretrainingLog",
        ):
            monkeypatch.setattr(f"{logger}.plot_progress_png", lambda _, folder: Path(folder, "progress.png").touch())


@pytest.fixture
def training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the validation of whole cases, which takes most of a short fine-tuning."""
    name = "nnssl_ext.training.finetuning.trainer.nnsslTrainer_Finetune.perform_actual_validation"
    monkeypatch.setattr(name, lambda *_: None)


@dataclass
class Environment:
    """An nnU-Net environment in a temporary folder."""

    root: Path
    variables: dict[str, str]

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def results(self) -> Path:
        return self.root / "results"

    def dataset(self, kind: str) -> Path:
        return self.preprocessed / dataset_name(kind)

    def plans(self, kind: str, name: str = "nnUNetPlans") -> dict:
        return json.loads((self.dataset(kind) / f"{name}.json").read_text())

    def write_plans(self, kind: str, name: str, settings: dict, change: Callable[[dict], None] | None = None) -> None:
        images = self.root / "images"
        if not images.exists():
            make_images(images, classes=2, each=4)
        content = {**QUICK, "images": str(images), **settings}
        content["dino"] = {**QUICK["dino"], **settings.get("dino", {})}
        plans = {**self.plans(kind), "plans_name": name, "nnssl_ext": content}
        if change:
            change(plans)
        (self.dataset(kind) / f"{name}.json").write_text(json.dumps(plans))

    def fold(self, kind: str, plans: str, trainer: str, configuration: str = "3d_fullres", fold: str = "0") -> Path:
        return self.results / dataset_name(kind) / f"{trainer}__{plans}__{configuration}" / f"fold_{fold}"

    def run(
        self, *command: str, status: int = 0, variables: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a stock or own command of this Python's environment; it must end with ``status``."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        finished = subprocess.run(
            command,
            env={**os.environ, **self.variables, "PATH": path, **(variables or {})},
            text=True,
            timeout=600,
            capture_output=True,
            cwd=self.root,
        )
        assert finished.returncode == status, f"{command}\n{finished.stdout}\n{finished.stderr}"
        return finished


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Start ``tests/preload/server.py``. Yield the variables that let commands run in it."""
    folder, address = REPOSITORY / "tests" / "preload", tmp_path_factory.mktemp("server") / "socket"
    if len(str(address)) > 100:  # the system's limit
        yield {}
        return
    found = {
        "PYTHONPATH": str(folder),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    command = [sys.executable, str(folder / "server.py"), str(address)]
    with subprocess.Popen(
        command, env={**os.environ, **found}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout
        assert server.stdout.readline()
        yield {**found, "NNSSL_TEST_SERVER": str(address)}


@pytest.fixture
def quick_commands(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands start in a tenth of a second, as ``tests/preload`` says. ``real_commands`` is the marker without."""
    if request.node.get_closest_marker("real_commands") is None and sys.platform == "linux":
        for name, value in request.getfixturevalue("_server").items():
            monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def _written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("written")

    def written(kind: str) -> Path:
        folder = root / dataset_name(kind)
        if folder.exists():
            return folder
        return make_labelled(root) if kind == "labelled" else make_dataset(root, kind)

    return written


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_commands: None) -> Environment:
    """An empty environment; add data sets with ``with_data``."""
    variables = {
        "nnUNet_raw": str(tmp_path / "raw"),
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
        "nnUNet_extTrainer": str(REPOSITORY / "trainers"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": os.environ["nnUNet_def_n_proc"],
        # stock takes every core; two tests at once would spin against each other
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for folder in ("raw", "preprocessed", "results"):
        (tmp_path / folder).mkdir()
    return Environment(tmp_path, variables)


@pytest.fixture
def with_data(environment: Environment, _written: Callable[[str], Path]) -> Callable[[str], Environment]:
    """``with_data(kind)``: the environment with a fresh copy of a data set."""

    def add(kind: str) -> Environment:
        if not environment.dataset(kind).exists():
            shutil.copytree(_written(kind), environment.dataset(kind))
        return environment

    return add


@pytest.fixture
def two_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock's own class, with 2 of 12 blocks."""
    from nnunetv2.training.nnUNetTrainer.primus import primus_trainers

    build = primus_trainers.Primus

    def small(
        channels: int, width: int, patch: Any, outputs: int, _: int, heads: int, *rest: Any, **options: Any
    ) -> Any:
        return build(channels, width, patch, outputs, 2, heads, *rest, **options)

    monkeypatch.setattr(primus_trainers, "Primus", small)
