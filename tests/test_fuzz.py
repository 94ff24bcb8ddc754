"""Mutation fuzzing of every reader of files from elsewhere: a plain answer or a UserError, never anything else.

Seeded; ``FUZZ_INPUTS`` sets the inputs a reader gets (``make fuzz`` takes thousands).
"""

import json
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from PIL import Image

from nnssl_ext import checkpoint
from nnssl_ext.data.images import ImageDataset, ImageFolder, ImageRequest
from nnssl_ext.data.index import CaseIndex, examine
from nnssl_ext.errors import UserError
from nnssl_ext.methods import SCHEMAS
from nnssl_ext.recipe import derive_plans, load_recipe, read_json
from nnssl_ext.settings import split_sections
from nnssl_ext.study.decathlon.tasks import unpack as unpack_task
from nnssl_ext.study.results import training_log
from nnssl_ext.transfer.read import read_source
from tests.conftest import REPOSITORY, Environment
from tests.datasets import make_plans

#: Processes and random files: seconds each.
pytestmark = pytest.mark.integration

INPUTS = int(os.environ.get("FUZZ_INPUTS", "150"))
Reader = Callable[[Path], object]


def mutated(content: bytes, seed: int) -> bytes:
    """One of: flipped bits, a changed byte, a cut, a doubled or removed stretch, a stretch of one byte."""
    generator = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        at = int(generator.integers(len(data))) if data else 0
        length = int(generator.integers(1, 64))
        kind = generator.integers(7)
        if kind == 0 and data:
            data[at] ^= 1 << int(generator.integers(8))
        elif kind == 1 and data:
            data[at] = int(generator.integers(256))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            del data[at : at + length]
        elif kind == 5:
            data[at : at + length] = bytes([int(generator.choice([0, 255, 127, 128]))]) * length
        else:
            data[at:at] = generator.bytes(length)
    return bytes(data)


def checkpoint_file(path: Path) -> Path:
    weights = {f"encoder.stages.{n}.0.convs.0.conv.weight": torch.randn(2, 2, 1, 1, 1) for n in range(3)}
    content = {
        "network_weights": weights,
        "logging": {"train_losses": [1.0, 0.5]},
        "citations": [{"name": "x", "apa_citations": ["y"]}],
        "nnssl_ext": {"format": checkpoint.FORMAT, "state": dict(weights), "trained": list(weights)},
    }
    checkpoint.save(content, path)
    return path


def foreign_file(path: Path) -> Path:
    """A stock checkpoint with an adaptation plan: no sha256 stands before the reader."""
    weights = {f"encoder.stages.{n}.0.convs.0.conv.weight": torch.randn(2, 2, 1, 1, 1) for n in range(3)}
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"configurations": {"a": {"patch_size": [8, 8, 8], "spacing": [1, 1, 1]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [8, 8, 8],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv"],
    }
    torch.save({"network_weights": weights, "nnssl_adaptation_plan": plan}, path, _use_new_zipfile_serialization=False)
    return path


def safetensors_file(path: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"encoder.stages.0.0.convs.0.conv.weight": torch.randn(2, 2, 1, 1, 1)}, path)
    return path


def recipe_file(path: Path) -> Path:
    recipe = {
        "description": "x",
        "nnssl_ext": {"epochs": 2, "volume_fusion": {"levels": 3, "boxes": [1, 2]}},
        "configuration": {"batch_size": 2, "patch_size": [16, 16, 16]},
        "architecture": {"features_base": 4, "features_max": 8},
    }
    path.write_text(json.dumps(recipe))
    return path


def use_recipe(path: Path) -> None:
    plans = derive_plans(make_plans("plain"), "other", [load_recipe(str(path))], ["3d_fullres"])
    split_sections(plans.get("nnssl_ext", {}), SCHEMAS, "plans other")


def tar_file(path: Path) -> Path:
    source = path.parent / "content"
    (source / "imagesTr").mkdir(parents=True)
    (source / "dataset.json").write_text("{}")
    with tarfile.open(path, "w") as archive:
        archive.add(source, "Task04_X")
    return path


def unpack(path: Path) -> None:
    (path.parent / "scratch").mkdir(exist_ok=True)
    unpack_task(path, "Task04_X", path.parent / "scratch")


READERS: dict[str, tuple[str, Callable[[Path], Path], Reader]] = {
    "checkpoint": ("c.pth", checkpoint_file, checkpoint.load),
    "log of a checkpoint": ("c.pth", checkpoint_file, training_log),
    "weights": ("c.pth", foreign_file, lambda path: read_source(str(path))),
    "safetensors": ("m.safetensors", safetensors_file, lambda path: read_source(str(path))),
    "recipe": ("r.json", recipe_file, use_recipe),
    "JSON": ("r.json", recipe_file, read_json),
    "archive": ("Task04_X.tar", tar_file, unpack),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_file_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, write, read = READERS[name]
    path = write(tmp_path / file)
    good = path.read_bytes()
    refused = 0
    for seed in range(INPUTS):
        path.write_bytes(mutated(good, seed))
        try:
            read(path)
        except UserError as error:
            refused += 1 if "\n" not in str(error) else -INPUTS
        except BaseException as error:
            raise AssertionError(f"{name}, seed {seed}: {error!r}") from error
    assert refused > INPUTS // 20


def test_mutated_cases_and_images_are_named(tmp_path: Path) -> None:
    """Readers that answer with a problem, not with an exception."""
    array = np.random.default_rng(0).standard_normal((1, 6, 6, 6)).astype(np.float32)
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "b.npz", data=array)
    good = {suffix: (tmp_path / f"{case}{suffix}").read_bytes() for case, suffix in (("a", ".npy"), ("b", ".npz"))}
    for name in ("x", "y"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray((array[0, :6, :6, number] * 50).astype(np.uint8)).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    images = ImageDataset(ImageFolder(tmp_path / "images"), ImageRequest((4, 4)), 0)
    picture = tmp_path / "images" / images.names[0]
    content = picture.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(INPUTS):
            for case, suffix in (("a", ".npy"), ("b", ".npz")):
                (tmp_path / f"{case}{suffix}").write_bytes(mutated(good[suffix], seed))
                examine(tmp_path, case)
            picture.write_bytes(mutated(content, seed))
            assert len(images[seed % 4].boxes) == 1


def test_a_mutated_index_is_made_anew(environment: Environment) -> None:
    folder = environment.root / "cases"
    folder.mkdir()
    for case in range(2):
        array = np.random.default_rng(case).standard_normal((1, 6, 6, 6)).astype(np.float32)
        np.save(folder / f"c{case}.npy", array)
    expected = CaseIndex.build(folder).fingerprint()
    (path,) = environment.root.glob("nnssl_ext_index_*")
    good = path.read_bytes()
    for seed in range(INPUTS):
        path.write_bytes(mutated(good, seed))
        assert set(CaseIndex.build(folder).fingerprint()) == set(expected)


BLOSC2 = """
import sys
from pathlib import Path
from nnssl_ext.data.index import examine
from tests.test_fuzz import mutated
folder, inputs = Path(sys.argv[1]), int(sys.argv[2])
good = (folder / "good").read_bytes()
for seed in range(int(sys.argv[3]), inputs):
    (folder / "seed").write_text(str(seed))
    (folder / "c.b2nd").write_bytes(mutated(good, seed))
    examine(folder, "c")
"""


def test_a_mutated_blosc2_case_is_named(tmp_path: Path) -> None:
    """In a process of its own: it is C code that reads them."""
    array = np.random.default_rng(0).standard_normal((1, 12, 12, 12)).astype(np.float32)
    blosc2.asarray(array, urlpath=str(tmp_path / "c.b2nd"), mode="w", blocks=(1, 6, 6, 6))
    (tmp_path / "good").write_bytes((tmp_path / "c.b2nd").read_bytes())
    crashes, start = [], 0
    while start < INPUTS:
        words = [sys.executable, "-c", BLOSC2, str(tmp_path), str(INPUTS), str(start)]
        ended = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
        if ended.returncode == 0:
            break
        crashes.append((int((tmp_path / "seed").read_text()), ended.returncode, ended.stderr[-300:]))
        start = crashes[-1][0] + 1
    assert crashes == []
