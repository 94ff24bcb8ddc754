"""Mutation fuzzing of the corpus's readers: a volume, a reason, or one lost item, never anything else.

Seeded; ``FUZZ_INPUTS`` sets the inputs. A reader gets a fifth of them, since each is a folder or a conversion.
"""

import os
import shutil
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnssl_ext.data.corpus.dicom import read_folder
from nnssl_ext.data.corpus.pool import Lost, WorkerPool
from nnssl_ext.data.corpus.readers import read_image
from nnssl_ext.data.corpus.volumes import Unusable, Volume
from tests.test_fuzz import INPUTS, mutated
from tests.volumes import volume, write_enhanced, write_image, write_series

#: Processes and random files: seconds each.
pytestmark = pytest.mark.integration

SHAPE = (5, 6, 7)
FILES = ("a.nii", "a.nii.gz", "a.mgz", "a.hdr", "a.mha", "a.mhd", "a.nrrd", "a.nhdr")


def read_mutated(task: tuple[str, int]) -> str:
    """Read a copy of a file or DICOM folder, one file of which is mutated."""
    source, seed = Path(task[0]), task[1]
    copy = source.parent / f"copy_{os.getpid()}"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    files = sorted(copy.iterdir())
    # mostly the beginning, where the header is
    file = files[0] if source.name != "series" else files[seed % len(files)]
    content = file.read_bytes()
    split = len(content) if seed % 3 == 0 else min(len(content), 600 if file.suffix == ".dcm" else 400)
    file.write_bytes(mutated(content[:split], seed) + content[split:])
    try:
        found = list(read_folder(str(copy))) if file.suffix == ".dcm" else read_image(str(files[0]))
        for one in found:
            if isinstance(one, Volume):
                one.check()
                one.digest()
        return "refused" if any(isinstance(one, Unusable) for one in found) else "read"
    except Unusable as verdict:
        return "refused" if "\n" not in str(verdict) else f"{task}: {verdict!r}"
    except MemoryError:
        raise
    except BaseException as error:
        return f"{task}: {error!r}"


def write(folder: Path, name: str) -> None:
    folder.mkdir()
    if name == "series":
        write_series(folder, volume(0, SHAPE))
    elif name == "enhanced":
        write_enhanced(folder / "a.dcm", volume(0, SHAPE), [2.0 * k for k in range(SHAPE[0])])
    elif name == "a.mgz":
        nibabel.save(nibabel.MGHImage(volume(0, SHAPE), np.eye(4)), folder / name)
    else:
        write_image(folder / name, volume(0, SHAPE))


@pytest.mark.parametrize("name", ["series", "enhanced", *FILES])
def test_a_mutated_image_costs_one_item(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, name)
    tasks = [(str(tmp_path / name), seed) for seed in range(INPUTS // 5)]
    results = list(WorkerPool(read_mutated, 1, lambda _: 60.0).run(tasks))
    counts = Counter("lost" if isinstance(result, Lost) else result for result in results)
    print(name, dict(counts))
    assert len(results) == INPUTS // 5
    assert set(counts) <= {"read", "refused", "lost"}
    assert counts["refused"] > INPUTS // 50
