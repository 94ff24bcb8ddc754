"""The code of docs/internals/new-method.md runs as it stands."""

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.methods.helpers import build

PAGE = Path(__file__).parents[1] / "docs" / "internals" / "new-method.md"


def blocks() -> dict[str, str]:
    """The page's Python files by name."""
    return dict(re.findall(r"\*\*`([^`]+)`\.?\*\*.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


def module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(code, name, "exec"), made.__dict__)
    return made


def test_the_method_of_the_page_passes_its_own_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = blocks()
    made = module("nnssl_ext.methods.denoising", files["nnssl_ext/methods/denoising.py"], monkeypatch)
    assert build(made.Denoising, made.DenoisingSettings()).optimizer().learning_rate == 1e-3
    tests = module("test_denoising", files["tests/methods/test_denoising.py"], monkeypatch)
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        getattr(tests, name)(folder)


def test_the_trainer_of_the_page_is_made_like_ours() -> None:
    code = blocks()["trainers/nnsslTrainer_Denoising.py"]
    ours = (PAGE.parents[2] / "trainers" / "nnsslTrainer_VolumeFusion.py").read_text()
    assert code.replace("Denoising", "VolumeFusion").replace('"denoising"', '"volume_fusion"').split() == ours.split()
